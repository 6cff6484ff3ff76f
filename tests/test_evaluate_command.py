"""`face-fusion evaluate`: figures by hand, what is seen in a picture, the whole command on a few avatars."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_models import tiny_components, tiny_tokenizer, tiny_unet
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, embedded_model, face_detectors
from face_fusion_pipeline.avatars import caption, render, sample_scene
from face_fusion_pipeline.cli import _evaluate_options, evaluate, main
from face_fusion_pipeline.evaluation.clip_score import QUALITY_PROMPTS, ClipScore
from face_fusion_pipeline.evaluation.comparison_tables import summarise
from face_fusion_pipeline.evaluation.copying import (
    HEAD,
    expression_difference,
    head_rotation,
    landmark_difference,
    pixel_agreement,
    pose_difference,
    yaw,
)
from face_fusion_pipeline.evaluation.distribution import cmmd
from face_fusion_pipeline.evaluation.faces import FaceFinder
from face_fusion_pipeline.evaluation.generation import METHODS, Settings, hash_weights, keep_settings, pipeline_of
from face_fusion_pipeline.evaluation.image_files import to_pil
from face_fusion_pipeline.evaluation.metrics import copy_paste_score, psnr
from face_fusion_pipeline.evaluation.observation import Observation, Observer, distribution
from face_fusion_pipeline.evaluation.people import Person, read_people
from face_fusion_pipeline.evaluation.picture_panel import load_panel
from face_fusion_pipeline.evaluation.picture_rows import KnownPerson, PicturePanel, match
from face_fusion_pipeline.evaluation.pictures import (
    ANOTHER_PHOTO,
    SOMEBODY_ELSE,
    list_pictures,
    photos_to_compare,
    plan_pictures,
    read_pictures,
    read_prompts,
)
from face_fusion_pipeline.evaluation.recognisers import DeepFaceRecogniser
from face_fusion_pipeline.face_adapter import create_adapter, save_adapter
from face_fusion_pipeline.face_detectors import Face, HaarDetector, YuNetDetector
from face_fusion_pipeline.face_errors import FaceFusionError, ModelNotFoundError
from face_fusion_pipeline.face_recognisers import OnnxRecogniser, face_template, insightface_recogniser
from face_fusion_pipeline.training.sources import Photo


# --- Figures -----------------------------------------------------------------------------------------------------


def _at(degrees: float) -> np.ndarray:
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def test_copy_paste_score_by_hand() -> None:
    reference, other = _at(0), _at(40)
    assert copy_paste_score(reference, reference, other) == pytest.approx(1)
    assert copy_paste_score(other, reference, other) == pytest.approx(-1)
    assert copy_paste_score(_at(10), reference, other) == pytest.approx((30 - 10) / 40)
    assert copy_paste_score(_at(70), reference, reference) == 0


def _turn(degrees: float) -> np.ndarray:
    """A head turned about its vertical axis, nose to the image's right."""
    a = np.radians(degrees)
    return np.array([[np.cos(a), 0, -np.sin(a)], [0, 1, 0], [np.sin(a), 0, np.cos(a)]])


@pytest.mark.parametrize("degrees", [-40, 0, 25])
def test_head_pose_of_projected_landmarks(degrees: float) -> None:
    points = (HEAD @ _turn(degrees).T)[:, :2] * 1.3 + np.array([200, 90])  # from far away
    assert yaw(head_rotation(points)) == pytest.approx(degrees, abs=1.5)
    assert pose_difference(head_rotation(points), _turn(0)) == pytest.approx(abs(degrees), abs=1.5)


def test_head_pose_of_avatars() -> None:
    turns = [-30.0, -10.0, 10.0, 30.0]
    people = range(1_100_000, 1_100_008)  # the size of a turn is right on average only: features differ in depth
    rendered = render([sample_scene(7, [who], style="photo", yaw=turn) for who in people for turn in turns])
    seen = np.array([yaw(head_rotation(points[0].numpy())) for points in rendered.landmarks5]).reshape(len(people), 4)
    assert all(abs(np.corrcoef(one, turns)[0, 1]) > 0.98 for one in seen)
    assert abs(seen[:, 3] - seen[:, 0]).mean() == pytest.approx(60, abs=20)


def test_landmarks_differ_in_shape_and_not_in_place() -> None:
    points = HEAD[:, :2]
    turned = points @ np.array([[0.8, 0.6], [-0.6, 0.8]]) * 2 + 7
    assert landmark_difference(turned, points) == pytest.approx(0, abs=1e-9)
    wider = points * np.array([1.2, 1])
    assert landmark_difference(wider, points) > 0.03


def test_expressions_differ() -> None:
    assert distribution(np.log([1.0, 3.0])) == pytest.approx([0.25, 0.75])
    assert distribution(np.array([0.25, 0.75])) == pytest.approx([0.25, 0.75])
    assert expression_difference(np.array([1.0, 0]), np.array([0.25, 0.75])) == pytest.approx(0.75)


def test_psnr_of_unrelated_pictures_is_near_ten_and_wraps_around_in_integers() -> None:
    """The published PSNR column (28 dB and 0.4 SSIM) is what 8-bit subtraction makes of unrelated pictures."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 3, 112, 112), dtype=np.uint8)
    wrapped = 10 * np.log10(255**2 / np.mean((a - b) ** 2))  # uint8 differences, uint8 squares
    assert 27 < wrapped < 29
    crops = [torch.from_numpy(picture).float() / 255 for picture in (a, b)]
    found = pixel_agreement(*crops)
    assert 7 < found["psnr"] < 9 and found["psnr"] == pytest.approx(psnr(a / 255, b / 255), abs=1e-4)
    assert abs(found["ssim"]) < 0.1
    shifted = pixel_agreement(crops[0], (crops[0] + 0.1))
    assert shifted["psnr"] == pytest.approx(20, abs=1e-3) and 0.8 < shifted["ssim"] < 1


def test_intervals_are_over_people() -> None:
    rows = [{"method": "m", "group": g, "distance[r]": v} for g, v in (("a", 0.0), ("a", 0.0), ("b", 1.0), ("b", 1.0))]
    figures = summarise(rows)["m"]["distance[r]"]
    assert (figures["mean"], figures["low"], figures["high"], figures["count"]) == (0.5, 0.0, 1.0, 4)


def test_cmmd_by_hand_and_of_equal_distributions() -> None:
    kernel = np.exp(-2 / (2 * 10**2))  # of orthogonal unit vectors
    x, y = np.eye(3)[[0, 0, 0]], np.eye(3)[[1, 1]]
    estimate = cmmd(x, np.array(["a", "a", "b"]), y, draws=50)
    assert estimate.mean == pytest.approx(1000 * (2 - 2 * kernel)) and estimate.low == pytest.approx(estimate.high)
    rng = np.random.default_rng(0)
    same, groups = rng.normal(size=(60, 4)), np.repeat(np.arange(20), 3)
    near, far = (cmmd(same, groups, rng.normal(size=(60, 4)) + shift, draws=200) for shift in (0, 2))
    assert near.low < 0.1 * far.low and near.low - 1 < near.mean < near.high + 1 and far.low < far.mean < far.high
    assert np.isnan(cmmd(x, np.array(["a"] * 3), y).mean)


# --- Several people ----------------------------------------------------------------------------------------------


def _seen(degrees: float, x: float = 0.0, height: float = 20.0) -> Observation:
    points = HEAD[:, :2]
    return Observation(Face((x, 0, x + 15, height), 1, points), {"r": _at(degrees)}, None, torch.rand(3, 112, 112))


def test_faces_are_assigned_by_likeness() -> None:
    ada, bob = KnownPerson(_seen(0), {}), KnownPerson(_seen(90), {})
    # Both are most like the first face; together it costs least to give it to Bob, who is unlike the second one.
    near, far = _seen(50), _seen(20)
    assert match([ada, bob], [near, far]) == [far, near]
    assert match([ada, bob], [near]) == [None, near]
    assert match([ada], []) == [None]
    small, large = Observation(Face((0, 0, 9, 9), 1)), Observation(Face((0, 0, 50, 50), 1))
    assert match([KnownPerson(small, {})], [small, large]) == [large]


def test_a_locator_adds_the_landmarks_that_a_detector_lacks() -> None:
    class Locator:
        def landmarks(self, image: Image.Image, boxes: list[Any]) -> list[np.ndarray]:
            return [np.full((5, 2), box[0]) for box in boxes]

    class Detector:
        name, sizes = "boxes", (64,)

        def detect(self, image: Image.Image) -> list[Face]:
            return [Face((4, 8, 20, 28), 1.0), Face((30, 8, 50, 30), 0.9)]

    picture = Image.new("RGB", (64, 64))
    alone, located = (FaceFinder(Detector(), locator).find(picture) for locator in (None, Locator()))
    assert [face.landmarks5 for face in alone] == [None, None]
    assert [face.box for face in located] == [face.box for face in alone]
    assert [np.unique(face.landmarks5).tolist() for face in located] == [[face.box[0]] for face in alone]


def test_neighbours_are_compared() -> None:
    panel = PicturePanel({}, Observer(FaceFinder(None)))  # type: ignore[arg-type]
    row = panel.compare(_seen(0), _seen(0), [], [_seen(60), _seen(90)])
    assert row["similarity_own[r]"] == pytest.approx(1) and row["distance[r]"] == pytest.approx(0)
    assert row["similarity_neighbour[r]"] == pytest.approx((0.5 + 0) / 2)
    assert "copy_paste[r]" not in row


# --- People, prompts, pictures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photos of each of three avatars, one folder for each of them."""
    folder = tmp_path_factory.mktemp("people")
    for number, name in enumerate(("ada", "bob", "carl")):
        scenes = [sample_scene(50 + i, [1_100_000 + number], style="photo", yaw=8.0 * i) for i in range(2)]
        (folder / name).mkdir()
        for i, image in enumerate(render(scenes).images):
            to_pil(image).save(folder / name / f"{i}.png")
    return folder


def test_people_have_a_reference_and_other_photos(folder: Path) -> None:
    people = read_people(folder, limit=2)
    assert [person.name for person in people] == ["ada", "bob"]
    assert people[0].reference.name == "ada/0.png" and [p.name for p in people[0].others] == ["ada/1.png"]


def test_a_photo_that_is_no_reference_comes_after_those_that_are(folder: Path, tmp_path: Path) -> None:
    names = [("ada/0.png", False), ("ada/1.png", True)]
    lines = [
        json.dumps({"file_name": name, "identity": "ada", "text": "", "as_reference": allowed})
        for name, allowed in names
    ]
    shutil.copytree(folder, tmp_path / "people")
    (tmp_path / "people" / "metadata.jsonl").write_text("\n".join(lines))
    (ada,) = read_people(tmp_path / "people")
    assert ada.reference.name == "ada/1.png" and [photo.name for photo in ada.others] == ["ada/0.png"]


def test_planned_pictures_are_stable_and_paired(folder: Path, tmp_path: Path) -> None:
    people = read_people(folder)
    few = plan_pictures(people[:1], ["a", "b"], ["none", "adapter"], tmp_path)
    more = plan_pictures(people, ["c", "a", "b"], ["none", "adapter"], tmp_path)
    assert set(few) < set(more) and len({picture.path for picture in more}) == len(more) == 18
    seeds = {(p.people, p.prompt): set() for p in more}
    for picture in more:
        seeds[picture.people, picture.prompt].add(picture.seed)
    assert all(len(mine) == 1 for mine in seeds.values()) and len(set.union(*seeds.values())) == 9
    pairs = plan_pictures(people, ["a"], ["adapter"], tmp_path, together=2)
    assert [picture.people for picture in pairs] == [("ada", "bob")]  # nobody is left to stand beside Carl
    with pytest.raises(FaceFusionError, match="too few for --people 4"):
        plan_pictures(people, ["a"], ["adapter"], tmp_path, together=4)


def test_pictures_are_read_as_they_are_listed(folder: Path, tmp_path: Path) -> None:
    people = read_people(folder)
    planned = plan_pictures(people, ["a"], ["none"], tmp_path)
    list_pictures(planned, tmp_path)
    for picture in planned:
        picture.path.write_bytes(b"")
    assert read_pictures(tmp_path, people) == planned
    with pytest.raises(FaceFusionError, match="line 3: identity 'carl' is not among"):
        read_pictures(tmp_path, people[:2])
    planned[1].path.unlink()
    with pytest.raises(FaceFusionError, match="line 2: there is no file"):
        read_pictures(tmp_path, people)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"identity": "ada"}', "line 1: 'file_name' is missing"),
        ('{"file_name": "x.png"}', "line 1: 'identity' is missing"),
        ("{", "line 1"),
        ("[1]", "line 1"),
        ("", "lists no picture"),
    ],
)
def test_a_bad_list_names_its_line(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(FaceFusionError, match=message):
        read_pictures(tmp_path, read_people(folder))


def test_prompts_are_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \na cat\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog"]
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(FaceFusionError, match="empty"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(FaceFusionError, match="nowhere.txt"):
        read_prompts(tmp_path / "nowhere.txt")


# --- Recognisers that are not installed --------------------------------------------------------------------------


def test_deepface_is_given_aligned_bgr_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Model:
        input_shape = (160, 160)

        def forward(self, pixels: np.ndarray) -> list[float]:
            given.append(pixels)
            return [float(pixels[..., channel].mean()) for channel in range(3)]

    deepface = types.SimpleNamespace(build_model=lambda name: Model())
    monkeypatch.setitem(sys.modules, "deepface", types.SimpleNamespace(DeepFace=deepface))
    red = torch.zeros(2, 3, 128, 128)
    red[:, 0] = 1
    points = torch.tensor(HEAD[:, :2], dtype=torch.float32).expand(2, 5, 2) + 64
    vectors = DeepFaceRecogniser("Facenet512").embed(red, points)
    assert vectors == pytest.approx(np.array([[0, 0, 1.0]] * 2), abs=1e-5)
    assert [pixels.shape for pixels in given] == [(1, 160, 160, 3)] * 2


def test_arcface_is_the_recogniser_of_an_insightface_pack(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = test_data / "models" / "mobileface_v2.onnx"

    def analysis(pack: str, allowed_modules: list[str]) -> types.SimpleNamespace:
        assert pack == "buffalo_l" and "recognition" in allowed_modules
        return types.SimpleNamespace(models={"recognition": types.SimpleNamespace(model_file=str(file))})

    monkeypatch.setitem(sys.modules, "insightface.app", types.SimpleNamespace(FaceAnalysis=analysis))
    arcface, same = insightface_recogniser(), OnnxRecogniser(file, preprocessing="arcface")
    images, points = torch.rand(1, 3, 128, 128), torch.tensor(HEAD[:, :2], dtype=torch.float32)[None] + 64
    assert arcface.name == "ArcFace" and np.array_equal(arcface.embed(images, points), same.embed(images, points))


def test_what_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("deepface", "insightface.app"):
        monkeypatch.setitem(sys.modules, name, None)
    people = {person.name: person for person in read_people(folder)}
    panel, left_out = load_panel(people, HaarDetector(), recognisers=["insightface", "deepface:VGG-Face"])
    assert "[insightface]" in left_out["ArcFace"] and "[deepface]" in left_out["VGG-Face"]
    assert "FACE_FUSION_YUNET" in left_out["face recognition, pose, expression, PSNR and SSIM"]
    assert panel.observer.recognisers == [] and "--expression" in left_out["expression"]
    with pytest.raises(ModelNotFoundError, match="nowhere.onnx"):
        load_panel(people, HaarDetector(), recognisers=["mine=nowhere.onnx"])
    with pytest.raises(FaceFusionError, match="NAME=FILE"):
        load_panel(people, HaarDetector(), recognisers=["arcface"])


# --- What looks at pictures --------------------------------------------------------------------------------------


def test_clip_of_the_avatars_prefers_the_right_caption() -> None:
    scenes = [sample_scene(seed, [1_100_000 + seed], style="photo") for seed in range(6)]
    clip, pictures = ClipScore(embedded_model()), [to_pil(image) for image in render(scenes).images]
    scores = [[clip.score(picture, caption(scene))["clip_score"] for scene in scenes] for picture in pictures]
    right = np.diag(scores)
    assert right.mean() > (np.sum(scores) - right.sum()) / 30 + 5
    alone = clip.score(pictures[0], "")
    assert "clip_score" not in alone and "quality" not in alone
    assert np.linalg.norm(alone["clip_embedding"]) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        ClipScore("nowhere")


def test_another_clip_also_judges_quality(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, **ids, "max_position_embeddings": 12}
    vision = {**size, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (model, tokenizer, processor):
        part.save_pretrained(tmp_path)
    clip, picture = ClipScore(tmp_path), Image.new("RGB", (48, 32), "red")
    found = clip.score(picture, "a dog")
    tokens = tokenizer(
        ["a dog", *QUALITY_PROMPTS], padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    cosines = (logits.text_embeds @ logits.image_embeds[0]).tolist()
    assert found["clip_score"] == pytest.approx(max(0, 100 * cosines[0]), abs=1e-3)
    good, bad = np.exp(100 * np.array(cosines[1:]) - 100 * max(cosines[1:]))
    assert found["quality"] == pytest.approx(good / (good + bad), abs=1e-4)
    assert clip.score(picture, "a dog, " * 50)["clip_score"] >= 0  # longer than the CLIP reads
    assert clip.score(picture, "")["quality"] == pytest.approx(found["quality"], abs=1e-4)


def test_recognisers_tell_photographs_apart(test_data: Path) -> None:
    """Eight people, two photographs each: the other photo is nearer than anybody else, and it is no copy."""
    models = test_data / "models"
    photos = sorted((test_data / "photos" / "london").glob("*.jpg"))[:8]
    assert len(photos) == 8
    people = {person.name: person for person in _pairs(photos)}
    yunet = YuNetDetector(models / "face_detection_yunet_2023mar.onnx")
    panel, left_out = load_panel(people, yunet, folder=models)
    assert not any("landmarks" in why for why in left_out.values())
    rows = [row for picture in photos_to_compare(list(people.values())) for row in panel.rows(picture)]
    near, far = ([row for row in rows if row["method"] == method] for method in (ANOTHER_PHOTO, SOMEBODY_ELSE))
    assert len(near) == len(far) == 4
    for name in ("mobileface_v2", "mobilefacenet_foamliu"):
        assert max(row[f"distance[{name}]"] for row in near) < min(row[f"distance[{name}]"] for row in far)
        assert all(row[f"similarity_other[{name}]"] < 0.6 for row in far)
    assert all(8 < row["psnr"] < 25 and row["pose_difference"] < 25 for row in near)


def _pairs(photos: list[Path]) -> list[Person]:
    """Two photos in a row are one person's."""
    both = zip(photos[::2], photos[1::2], strict=True)
    return [Person(str(i), (Photo(a.name, a), Photo(b.name, b))) for i, (a, b) in enumerate(both)]


# --- The command -------------------------------------------------------------------------------------------------


class CentralFaces:
    """Finds one face, or two, wherever one looks: pictures of a tiny model show none."""

    name, sizes = "central", (64,)

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def detect(self, image: Image.Image) -> list[Face]:
        side = min(image.size) / 2 / self.count
        places = [((i + 0.5) * image.width / self.count - side / 2, image.height / 4) for i in range(self.count)]
        points = face_template(112).numpy() * side / 111
        return [Face((x, y, x + side, y + side), 0.9, points + np.array([x, y])) for x, y in places]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for pictures of 64 pixels, and an adapter beside them."""
    folder = tmp_path_factory.mktemp("model")
    pipe = StableDiffusionFaceFusionPipeline(**{**tiny_components(), "unet": tiny_unet(sample_size=32)})
    pipe.save_pretrained(folder)
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, "xavier", metadata={"resolution": 64}))
    pipe.save_face_fusion_adapter(folder)
    return folder


@pytest.fixture
def words(folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command for two prompts and all people; a face is found in the middle of every picture."""
    monkeypatch.setattr(face_detectors, "load_detector", lambda *_: CentralFaces())
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    words = ["evaluate", "--identities", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--evaluators"]
    return [*words, "--out", str(tmp_path / "out"), "--model", str(model), "--steps", "1"]


def _rows(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "rows.parquet").to_pylist()


def test_from_photos_to_tables(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows, out = _rows(tmp_path / "out"), tmp_path / "out"
    counts = {"none": 6, "training-free": 6, "adapter": 6, ANOTHER_PHOTO: 3, SOMEBODY_ELSE: 3}
    assert result["pictures"] == counts and len(rows) == 24
    assert {row["identity"] for row in rows} == {"ada", "bob", "carl"}
    assert {row["reference"] for row in rows} == {"ada/0.png", "bob/0.png", "carl/0.png"}
    mine = [row["distance[avatar recogniser]"] for row in rows if row["method"] == "adapter"]
    figures = result["methods"]["adapter"]["distance[avatar recogniser]"]
    assert figures["mean"] == pytest.approx(np.mean(mine)) and figures["low"] <= figures["mean"] <= figures["high"]
    assert result["methods"][ANOTHER_PHOTO].keys().isdisjoint(["copy_paste[avatar recogniser]"])
    expected = {"psnr", "ssim", "pose_difference", "landmark_difference", "expression_difference", "face_found"}
    assert expected | {f"{m}[avatar recogniser]" for m in ("copy_paste", "similarity_other")} < set(result["columns"])
    assert {"ArcFace", "Facenet512", "VGG-Face", "CLIP score, quality (CLIP-IQA), CMMD"} == set(result["left_out"])
    table = (out / "table.md").read_text()
    assert "| adapter |" in table and "**VGG-Face**: --recogniser deepface:VGG-Face" in table
    assert {"distance.png", "likeness_or_copying_avatar_recogniser.png"} < {p.name for p in (out / "plots").iterdir()}
    pictures = {(row["identity"], row["prompt"], row["method"]): row["file"] for row in rows if row["prompt"]}
    of_ada = [Image.open(out / "images" / pictures["ada", "a cat", method]) for method in METHODS]
    assert len({image.tobytes() for image in of_ada}) == 3 and "generated by AI" in of_ada[0].text["description"]

    # what was made can be scored again, as pictures of anybody else's
    again = ["evaluate", "--identities", words[2], "--images", str(out / "images"), "--evaluators"]
    assert main([*again, "--out", str(tmp_path / "again"), "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["methods"] == result["methods"] and second["settings"] is None


def test_a_stopped_run_goes_on(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*words, "--methods", "adapter"]) == 0
    expected, out = _rows(tmp_path / "out"), tmp_path / "stopped"
    words[words.index("--out") + 1] = str(out)
    calls: list[str] = []
    score = PicturePanel.rows

    def stop_at_the_third(panel: PicturePanel, picture: Any) -> list[dict[str, Any]]:
        calls.append(picture.key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(panel, picture)

    monkeypatch.setattr(PicturePanel, "rows", stop_at_the_third)
    assert main([*words, "--methods", "adapter"]) == 130
    assert not (out / "table.md").exists() and len(list((out / "rows").iterdir())) == 2
    (made := sorted((out / "images").glob("*.png")))[-1].unlink()
    times = {path: path.stat().st_mtime_ns for path in made[:-1]}
    assert main([*words, "--methods", "adapter"]) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times and made[-1].is_file()
    assert len(calls) == 3 + 10 and _rows(out) == expected  # 6 pictures and 6 photos, 2 of them scored before

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is missing, so nothing needs a model")

    monkeypatch.setattr("face_fusion_pipeline.evaluation.generation.pipeline_of", refuse)
    assert main([*words, "--methods", "adapter", "--batch-size", "1"]) == 0
    assert len(calls) == 13
    made[0].write_bytes(made[1].read_bytes())  # another picture at its place is scored again
    assert main([*words, "--methods", "adapter"]) == 0
    assert len(calls) == 14


def test_other_settings_need_another_folder(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--methods", "none", "--max-identities", "1"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    for other in (["--steps", "2"], ["--low-noise-guidance", "2"]):
        assert main([*words, "--methods", "none", "--max-identities", "1", *other]) == 2
        assert "made with other settings" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_part_of_a_model_that_draws_is_known(tmp_path: Path, part: str) -> None:
    folder = tmp_path / "model" / part
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"first")
    before = hash_weights(str(tmp_path / "model"))
    (folder / "model.safetensors").write_bytes(b"second")
    assert before != hash_weights(str(tmp_path / "model"))


def test_an_adapter_that_was_trained_on_is_another_one(tmp_path: Path) -> None:
    file, out = tmp_path / evaluate.ADAPTER_FILE, tmp_path / "out"
    file.write_bytes(b"first")
    settings = Settings.of("m", str(tmp_path))
    assert settings.weights_hash == hash_weights("m", str(file)) and hash_weights("owner/m", "owner/name") is None
    keep_settings(out, settings)
    keep_settings(out, replace(settings, batch=1))
    file.write_bytes(b"second")
    with pytest.raises(FaceFusionError, match="other settings"):
        keep_settings(out, Settings.of("m", str(tmp_path)))


def test_a_model_that_was_trained_on_is_another_one(tmp_path: Path) -> None:
    """Also for the commands that measure avatars, whose figures are published."""
    unet, out = tmp_path / "model" / "unet", tmp_path / "out"
    unet.mkdir(parents=True)
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(b"first")
    arguments = argparse.Namespace(
        **{"model": str(tmp_path / "model"), "steps": 1, "guidance_scale": 1.0, "low_noise_guidance": None},
        **{"seed": 0, "batch": 1, "adapter": None},
    )
    keep_settings(out, _evaluate_options.settings_of(arguments))
    keep_settings(out, _evaluate_options.settings_of(arguments))
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(b"second")
    with pytest.raises(FaceFusionError, match="other settings"):
        keep_settings(out, _evaluate_options.settings_of(arguments))


@pytest.mark.parametrize(
    ("guidance", "late", "expected"),
    [(None, None, (4.0, 2.0)), (4.0, None, (4.0, None)), (4.0, 3.0, (4.0, 3.0)), (None, 3.0, (4.0, 3.0))],
)
def test_guidance_that_is_asked_for_is_that_of_all_steps(
    guidance: float | None, late: float | None, expected: tuple[float, float | None], tmp_path: Path
) -> None:
    arguments = argparse.Namespace(
        model=str(tmp_path), steps=1, guidance_scale=guidance, low_noise_guidance=late, seed=0, batch=1
    )
    settings = _evaluate_options.settings_of(arguments)
    assert (settings.guidance_scale, settings.low_noise_guidance) == expected
    arguments.guidance_scale, arguments.low_noise_guidance = 1.0, 2.0
    with pytest.raises(FaceFusionError, match="--guidance-scale above 1, got 1"):
        _evaluate_options.settings_of(arguments)


def test_the_pipeline_has_the_adapter_of_the_settings_and_no_other(tmp_path: Path) -> None:
    unet = tiny_unet()
    StableDiffusionFaceFusionPipeline(**{**tiny_components(), "unet": unet}).save_pretrained(tmp_path)
    save_adapter(create_adapter(unet), tmp_path / evaluate.ADAPTER_FILE)
    pipe = pipeline_of(Settings(model=str(tmp_path)))
    assert pipe._face_adapter is None and pipe._progress_bar_config["disable"]
    assert pipeline_of(Settings(model=str(tmp_path), adapter=str(tmp_path)))._face_adapter is not None


def test_several_people_in_a_picture(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face_detectors, "load_detector", lambda *_: _OneInPlainPictures())
    for name, colour in (("ada", "red"), ("bob", "blue"), ("carl", "green")):
        (tmp_path / "people" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), colour).save(tmp_path / "people" / name / "0.png")
    words[2] = str(tmp_path / "people")
    assert main([*words, "--people", "2", "--methods", "none", "adapter"]) == 0
    rows = _rows(tmp_path / "out")
    assert [(row["identity"], row["place"]) for row in rows] == [("ada", 0), ("bob", 1)] * 4
    assert {row["group"] for row in rows} == {"ada + bob"} and all(row["all_present"] == 1 for row in rows)
    assert all(row["similarity_neighbour[avatar recogniser]"] < 1 for row in rows)
    assert "## Several people" in (tmp_path / "out" / "table.md").read_text()


class _OneInPlainPictures(CentralFaces):
    """One face in the photos of this test, which are of one colour, two in pictures of the tiny model."""

    def detect(self, image: Image.Image) -> list[Face]:
        self.count = 1 if all(low == high for low, high in image.getextrema()) else 2
        return super().detect(image)


def test_a_reference_without_a_face_is_left_out_and_named(
    folder: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = tmp_path / "people"
    for name in ("ada", "zoe"):
        (people / name).mkdir(parents=True)
        image = Image.open(folder / "ada" / "0.png") if name == "ada" else Image.new("RGB", (64, 64), "white")
        image.save(people / name / "0.png")

    class NotInWhite(CentralFaces):
        def detect(self, image: Image.Image) -> list[Face]:
            return [] if image.convert("L").getextrema() == (255, 255) else super().detect(image)

    monkeypatch.setattr(face_detectors, "load_detector", lambda *_: NotInWhite())
    words[2] = str(people)
    assert main([*words, "--methods", "adapter"]) == 0
    rows = _rows(tmp_path / "out")
    assert {row["identity"] for row in rows if row["method"] == "adapter"} == {"ada"}
    table = (tmp_path / "out" / "table.md").read_text()
    assert "* zoe/0.png: no face found" in table
    assert "**Sim(GT), copy-paste**: nobody in --identities has a second photo" in table

    broken = next((tmp_path / "out" / "images").glob("ada*.png"))
    broken.write_bytes(b"no picture")
    assert main([*words, "--methods", "adapter"]) == 0
    assert len(_rows(tmp_path / "out")) == len(rows) - 1
    assert f"* {broken.name}: " in (tmp_path / "out" / "table.md").read_text()


def test_what_a_safety_checker_blacked_out_counts_in_no_figure(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: Any, image: torch.Tensor, *_: Any) -> tuple[torch.Tensor, list[bool]]:
        return torch.cat([torch.full_like(image[:1], -1), image[1:]]), [True] + [False] * (len(image) - 1)

    monkeypatch.setattr(StableDiffusionFaceFusionPipeline, "run_safety_checker", check)
    assert main([*words, "--methods", "none", "--max-identities", "1"]) == 0
    hidden = [p for p in (tmp_path / "out" / "images").glob("*.png") if "blacked_out" in Image.open(p).info]
    assert hidden and all(Image.open(path).convert("L").getextrema() == (0, 0) for path in hidden)
    rows = [row for row in _rows(tmp_path / "out") if row["method"] == "none"]
    assert rows and not {row["file"] for row in rows} & {path.name for path in hidden}
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"* {path.name}: the model's safety checker blacked it out" in table for path in hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--steps", "0"], "--steps must be a whole number from 1 to 1000, got 0"),
        (["--guidance", "-1"], "--guidance must be a number from 0 to 100, got -1"),
        (["--low-noise-guidance", "1"], "--low-noise-guidance must be a number above 1, at most 100, got 1"),
        (["--seed", "-1"], "--seed must be a whole number from 0"),
        (["--scale", "-1"], "--scale"),
        (["--people", "4"], "too few for --people 4"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--identities", "./nowhere"], "nowhere"),
        (["--model", "nowhere"], "there is no folder nowhere"),
        (["--images", "nowhere"], "has no metadata.jsonl"),
        (["--recogniser", "mine=nowhere.onnx"], "no recogniser file nowhere.onnx"),
        (["--device", "nothing"], "--device nothing"),
        (["--device", "meta"], "--device meta"),
    ],
)
def test_bad_arguments(words: list[str], capsys: pytest.CaptureFixture[str], change: list[str], message: str) -> None:
    assert main([*words, *change]) == 2
    captured = capsys.readouterr().err
    assert message in captured and captured.count("\n") == 1


def test_nothing_to_evaluate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--identities", str(folder), "--out", str(tmp_path)]) == 2
    assert "--prompts FILE" in capsys.readouterr().err


def test_two_processes_share_the_pictures(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--methods", "none", "--max-identities", "2", "--device", "cpu"]
    script = tmp_path / "evaluate.py"  # the command, with the detector of these tests: searching noise takes a minute
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_evaluate_command import CentralFaces, face_detectors, main\n"
        "face_detectors.load_detector = lambda *_: CentralFaces()\nsys.exit(main(sys.argv[1:]))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    seen = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}  # bars are read below
    done = subprocess.run([*launch, str(script), *words], capture_output=True, text=True, timeout=500, env=seen)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = _rows(tmp_path / "out")
    assert len(rows) == len({(row["method"], row["identity"], row["prompt"]) for row in rows}) == 4 + 2 + 2
    made = re.findall(r"images: 100%.*?\| (\d+/\d+)", done.stderr)
    assert set(made) == {"2/2"} and done.stdout.count("# Evaluation of") == 1  # each of them makes one half
