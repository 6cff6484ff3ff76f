"""Choosing a face detector: what is picked is said, what cannot work is refused, and insightface by a stand-in."""

import hashlib
import logging
import re
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from face_fusion_pipeline import face_detectors
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_detectors import InsightFaceDetector, find_yunet, load_detector
from face_fusion_pipeline.face_errors import FaceFusionError, ModelNotFoundError


@pytest.fixture
def no_yunet(monkeypatch):
    monkeypatch.delenv("FACE_FUSION_YUNET", raising=False)
    monkeypatch.setattr("face_fusion_pipeline.face_detectors.try_to_load_from_cache", lambda *_: None)
    face_detectors._fetch_yunet.cache_clear()


@pytest.mark.parametrize("wrong", ["mtcnn", None, 5, Image.new("RGB", (8, 8))])
def test_what_is_no_detector_is_refused(wrong):
    with pytest.raises(FaceFusionError, match="face detector"):
        load_detector(wrong)


def test_the_detector_picked_is_said(no_yunet, caplog):
    with caplog.at_level(logging.INFO, "face_fusion_pipeline"):
        load_detector("auto")
    (line,) = caplog.messages
    assert re.match(r"face detector: haar \(the YuNet model .* cannot be fetched \(HF_HUB_OFFLINE=1\): run `hf", line)


def test_nothing_is_fetched_offline(no_yunet, monkeypatch):
    for name in ("get_session", "hf_hub_download"):
        monkeypatch.setattr(face_detectors, name, lambda *_, **__: pytest.fail("asked the network"))
    assert load_detector("auto").name == "haar"
    assert find_yunet() is None
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE=1.*FACE_FUSION_YUNET.*'haar'") as caught:
        load_detector("yunet")
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(no_yunet, tmp_path, monkeypatch):
    """A network with one file, which is not YuNet; `asked` counts how often it is asked for what."""
    asked = Counter()
    (tmp_path / "fetched.onnx").write_bytes(b"no YuNet")

    def head(url, timeout):
        assert timeout <= 5
        asked["head"] += 1

    def download(repo, file):
        asked[repo, file] += 1
        return str(tmp_path / "fetched.onnx")

    monkeypatch.setattr(face_detectors.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(face_detectors, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(face_detectors, "hf_hub_download", download)
    yield asked
    face_detectors._fetch_yunet.cache_clear()


def test_yunet_is_fetched_at_first_use_and_known_by_its_hash(hub, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "face_fusion_pipeline")
    with pytest.raises(ModelNotFoundError, match="fetched.onnx is not the YuNet model that is known by its hash"):
        load_detector("yunet")
    assert load_detector("auto").name == "haar" and "fetched.onnx is not" in caplog.text
    assert hub == {"head": 1, ("opencv/face_detection_yunet", "face_detection_yunet_2023mar.onnx"): 1}
    content = (tmp_path / "fetched.onnx").read_bytes()
    monkeypatch.setattr(face_detectors, "YUNET_SHA256", hashlib.sha256(content).hexdigest())
    assert find_yunet(download=True) == tmp_path / "fetched.onnx"
    monkeypatch.setattr(face_detectors, "try_to_load_from_cache", lambda *_: str(tmp_path / "cached.onnx"))
    (tmp_path / "cached.onnx").write_bytes(b"another")
    with pytest.raises(ModelNotFoundError, match="cached.onnx is not"):
        find_yunet()


def test_the_file_with_that_hash_is_yunet(test_data):
    file = test_data / "models" / face_detectors.YUNET_FILE
    assert hashlib.sha256(file.read_bytes()).hexdigest() == face_detectors.YUNET_SHA256


def test_a_network_that_is_not_there_is_noticed_once(hub, monkeypatch):
    def head(url, timeout):
        hub["head"] += 1
        raise OSError("no route")

    monkeypatch.setattr(face_detectors, "get_session", lambda: SimpleNamespace(head=head))
    assert [load_detector("auto").name for _ in range(3)] == ["haar"] * 3
    assert hub == {"head": 1}
    with pytest.raises(ModelNotFoundError, match="cannot be fetched \\(OSError\\)"):
        load_detector("yunet")


def test_a_file_that_is_named_is_what_is_taken(hub, tmp_path, monkeypatch, caplog):
    """By whatever name it is called: one that is missing or broken is a mistake, not a reason for another detector."""
    for name, content in (("absent.onnx", None), ("broken.onnx", b"no model")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        for detector in ("auto", "yunet"):
            with pytest.raises(ModelNotFoundError, match=name):
                load_detector(detector, tmp_path / name)
            monkeypatch.setenv("FACE_FUSION_YUNET", str(tmp_path / name))
            with pytest.raises(ModelNotFoundError, match=name):
                load_detector(detector)
            monkeypatch.delenv("FACE_FUSION_YUNET")
    assert not hub


def test_the_detector_that_was_named_by_a_file_is_said(test_data, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "face_fusion_pipeline")
    file = test_data / "models" / face_detectors.YUNET_FILE
    monkeypatch.setenv("FACE_FUSION_YUNET", str(file))
    assert load_detector().name == "yunet"
    assert caplog.messages == [f"face detector: yunet ({file})"]


def test_the_command_shows_which_detector_it_picked(no_yunet, tmp_path, caplog, capsys):
    """The command shows lines of level INFO, so this one needs no option."""
    package = logging.getLogger("face_fusion_pipeline")
    before = package.level
    try:
        status = main(["generate", "--face", str(tmp_path / "none.png"), "--prompt", "x", "--out", str(tmp_path)])
    finally:
        package.setLevel(before)
    assert status == 2
    assert "none.png" in capsys.readouterr().err
    assert "face detector: haar" in caplog.text


# --- insightface ---------------------------------------------------------------------------------------------------


class FaceAnalysis:
    """insightface's class of this name: asked for a pack or folder, it answers with one face for each picture."""

    made: list[tuple] = []
    pictures: list[np.ndarray] = []

    def __init__(self, name, allowed_modules):
        self.made.append((name, allowed_modules))

    def prepare(self, ctx_id, det_size):
        assert ctx_id == -1  # on the CPU

    def get(self, image):
        self.pictures.append(image)
        points = np.arange(10, dtype=np.float32).reshape(5, 2)
        faces = [(np.array([1, 2, 5, 8], dtype=np.float32), points), (np.array([9, 2, 12, 8]), None)]
        return [SimpleNamespace(bbox=box, kps=kps, det_score=np.float32(0.75)) for box, kps in faces]


@pytest.fixture
def insightface(monkeypatch):
    monkeypatch.setattr(FaceAnalysis, "made", [])
    monkeypatch.setattr(FaceAnalysis, "pictures", [])
    monkeypatch.setitem(sys.modules, "insightface", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "insightface.app", SimpleNamespace(FaceAnalysis=FaceAnalysis))


def test_insightface_sees_bgr_and_answers_in_faces(insightface):
    faces = InsightFaceDetector().detect(Image.new("RGB", (16, 12), (250, 100, 3)))
    (picture,) = FaceAnalysis.pictures
    assert picture.shape == (12, 16, 3)
    assert picture[0, 0].tolist() == [3, 100, 250]
    assert picture.flags.c_contiguous  # OpenCV takes no view with a negative stride
    assert [(face.box, face.score) for face in faces] == [((1, 2, 5, 8), 0.75), ((9, 2, 12, 8), 0.75)]
    assert faces[0].landmarks5.tolist() == np.arange(10).reshape(5, 2).tolist()
    assert faces[1].landmarks5 is None


def test_insightface_models_are_a_pack_or_a_folder(insightface, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for model in (None, "antelopev2", "models", tmp_path / "models"):
        load_detector("insightface", model)
    folder = str(tmp_path / "models")
    assert [name for name, _ in FaceAnalysis.made] == ["buffalo_l", "antelopev2", folder, folder]
    assert all(modules == ["detection"] for _, modules in FaceAnalysis.made)


def test_the_licence_of_insightface_is_said_when_it_is_chosen(insightface, caplog):
    caplog.set_level(logging.WARNING, "face_fusion_pipeline")  # whatever a command before has set
    load_detector("haar")
    assert not caplog.records
    load_detector("insightface")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "non-commercial research only" in caplog.text


def test_errors_of_insightface_name_the_way_out(insightface, monkeypatch):
    def broken(*_, **__):
        raise AssertionError  # what it raises where no model could be downloaded

    monkeypatch.setattr(FaceAnalysis, "prepare", broken)
    with pytest.raises(ModelNotFoundError, match="AssertionError.*detector 'auto'"):
        load_detector("insightface")
    monkeypatch.setitem(sys.modules, "insightface.app", None)  # not installed
    with pytest.raises(ModelNotFoundError, match="pip install 'face-fusion-pipeline\\[insightface\\]'"):
        load_detector("insightface")
