"""Face embedders: which network knows a person, by name, file or callable."""

import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from face_fusion_pipeline.avatars.evaluation.evaluators import load_evaluators
from face_fusion_pipeline.avatars.training.data import portraits, render_avatars
from face_fusion_pipeline.avatars.training.face_embedder import SHIPPED, load_training_embedder
from face_fusion_pipeline.evaluation.metrics import verification_auc
from face_fusion_pipeline.face_embedders import (
    WEIGHTS_NAME,
    CheckedEmbedder,
    FaceEmbedder,
    load_face_embedder,
)
from face_fusion_pipeline.face_errors import AdapterMismatchError, FaceFusionError, ModelNotFoundError
from face_fusion_pipeline.face_images import crop_face


def crops(size: int = 128, count: int = 2) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def assert_embeddings(found: torch.Tensor, count: int, width: int) -> None:
    assert found.shape == (count, width) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(count))


def test_the_avatars_own_is_a_folder_or_a_file_and_its_name_is_its_content(tmp_path: Path) -> None:
    own = load_face_embedder(SHIPPED)
    assert isinstance(own, FaceEmbedder) and own.width == 256
    assert own.name.startswith("face_embedder-") and load_face_embedder(SHIPPED / WEIGHTS_NAME).name == own.name
    found = own(crops())
    assert_embeddings(found, 2, 256)
    torch.testing.assert_close(own(crops()[1:]), found[1:], rtol=1e-4, atol=1e-5)
    assert own([]).shape == (0, 256)
    assert_embeddings(own([crops(64)[0].convert("L"), crops(200)[0]]), 2, 256)
    changed = {name: weight.half() + 1e-3 for name, weight in load_training_embedder().state_dict().items()}
    save_file(changed, tmp_path / WEIGHTS_NAME, {"format": "face-fusion-training-recogniser"})
    assert load_face_embedder(tmp_path).name != own.name


def test_the_avatars_own_tells_people_apart_by_crops_and_is_no_evaluator(tmp_path: Path) -> None:
    images = render_avatars(tmp_path, "test", 60, "cpu")
    members = portraits(images)
    rows = [row for found in members.values() for row in found]
    names = np.array([name for name, found in members.items() for _ in found])
    faces = [
        crop_face(Image.fromarray(images.pixels[row].permute(1, 2, 0).numpy()), images.records[row]["boxes"][0])
        for row in rows
    ]
    assert verification_auc(load_face_embedder(SHIPPED)(faces).numpy(), names) > 0.95
    own, other = load_training_embedder(), load_evaluators().recogniser
    assert {type(part) for part in own.modules()} & {torch.nn.GroupNorm} and not {
        type(part) for part in other.modules()
    } & {torch.nn.GroupNorm}
    assert not own.state_dict().keys() & other.state_dict().keys()


def test_an_onnx_file_is_called_by_name_and_digest(test_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = test_data / "models" / "mobileface_v2.onnx"
    embedder = load_face_embedder(file)
    assert embedder.width == 256 and embedder.name.startswith("mobileface_v2-") and len(embedder.name) == 22
    assert_embeddings(embedder(crops()), 2, 256)
    shutil.copyfile(file, tmp_path / "other.onnx")
    assert load_face_embedder(tmp_path / "other.onnx").name == f"other-{embedder.name[-8:]}"
    with pytest.raises(FaceFusionError, match="not N x 3 x 112 x 112"):
        load_face_embedder(test_data / "models" / "face_detection_yunet_2023mar.onnx")


def test_landmarks_of_a_detector_align_the_face(test_data: Path) -> None:
    """One London face, cut exactly and cut a tenth of its side off: with a detector both are one person."""
    pytest.importorskip("onnxruntime")
    from face_fusion_pipeline.face_detectors import YuNetDetector
    from face_fusion_pipeline.face_images import detect_faces

    yunet = YuNetDetector(test_data / "models" / "face_detection_yunet_2023mar.onnx")
    photo = Image.open(sorted((test_data / "photos" / "london").glob("*.jpg"))[0]).convert("RGB")
    x0, y0, x1, y1 = detect_faces(photo, yunet)[0].box
    aside = (y1 - y0) * 0.15
    faces = [crop_face(photo, box, resolution=256) for box in ((x0, y0, x1, y1), (x0 + aside, y0, x1 + aside, y1))]
    file = test_data / "models" / "mobilefacenet_foamliu.onnx"
    apart = load_face_embedder(file)(faces)
    aligned = load_face_embedder(file, detector=yunet)(faces)
    assert float(aligned[0] @ aligned[1]) > 0.9 > float(apart[0] @ apart[1])


def test_insightface_is_its_file_and_its_licence_is_said_once(
    test_data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("onnxruntime")
    file = test_data / "models" / "mobileface_v2.onnx"
    asked = []

    def analysis(pack: str, allowed_modules: list[str]) -> types.SimpleNamespace:
        asked.append(pack)
        return types.SimpleNamespace(models={"recognition": types.SimpleNamespace(model_file=str(file))})

    monkeypatch.setitem(sys.modules, "insightface.app", types.SimpleNamespace(FaceAnalysis=analysis))
    caplog.set_level("WARNING", "face_fusion_pipeline")
    assert load_face_embedder("insightface").name == load_face_embedder(file).name
    assert [record.message for record in caplog.records if "non-commercial" in record.message] != []
    assert len(caplog.records) == 1
    load_face_embedder("insightface:antelopev2")
    assert asked == ["buffalo_l", "antelopev2"]
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(ModelNotFoundError, match=r"pip install 'face-fusion-pipeline\[insightface\]'"):
        load_face_embedder("insightface")


def test_a_callable_is_an_embedder_and_what_it_gives_is_checked() -> None:
    def mine(faces: list[Image.Image]) -> np.ndarray:
        assert {face.mode for face in faces} == {"RGB"}
        return np.full((len(faces), 3), 2.0)

    mine.name, mine.width = "mine", 3  # type: ignore[attr-defined]
    embedder = load_face_embedder(mine)  # type: ignore[arg-type]
    assert (embedder.name, embedder.width) == ("mine", 3)
    assert_embeddings(embedder([crops()[0].convert("L")]), 1, 3)
    mine.width = 4  # type: ignore[attr-defined]
    with pytest.raises(FaceFusionError, match=r"mine gives \(2, 3\) for 2 faces, not \(2, 4\)"):
        load_face_embedder(mine)(crops())  # type: ignore[arg-type]
    with pytest.raises(FaceFusionError, match="NaN"):
        CheckedEmbedder("broken", 2, lambda faces: torch.full((len(faces), 2), torch.nan))(crops())
    for name, width in (("", 3), ("mine", 0), ("mine", "3"), (None, 3)):
        with pytest.raises(FaceFusionError, match="a name and a width"):
            CheckedEmbedder(name, width, mine)


def test_what_is_no_embedder_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: object, error: type[FaceFusionError], words: str) -> None:
        with pytest.raises(error, match=words) as caught:
            load_face_embedder(source)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused(tmp_path, ModelNotFoundError, f"{WEIGHTS_NAME}: give a folder")
    refused(tmp_path / "none.onnx", ModelNotFoundError, "none.onnx")
    refused(lambda faces: faces, FaceFusionError, "`name` and `width`")
    for name, content in (("weights.bin", b"x"), ("weights.safetensors", b"x"), ("weights.onnx", b"x")):
        (tmp_path / name).write_bytes(content)
    refused(tmp_path / "weights.bin", FaceFusionError, "no face embedder")
    refused(tmp_path / "weights.safetensors", AdapterMismatchError, "not a readable safetensors file")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors", {"format": "else"})
    refused(tmp_path / "other.safetensors", AdapterMismatchError, "format 'else'")
    save_file({"a": torch.zeros(1)}, tmp_path / "few.safetensors", {"format": "face-fusion-face-embedder"})
    refused(tmp_path / "few.safetensors", AdapterMismatchError, "other weights")
    if "onnxruntime" in sys.modules or pytest.importorskip("onnxruntime"):
        refused(tmp_path / "weights.onnx", FaceFusionError, "no network that onnxruntime can read")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(tmp_path / "weights.onnx", FaceFusionError, "pip install onnxruntime")
