"""Evaluation: figures against hand-computed values, alignment, evaluators on fresh renders, a small table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_components, tiny_controlnet, tiny_unet

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline
from face_fusion_pipeline.avatars import BACKGROUNDS, CLOTHINGS, EXPRESSIONS, STYLES, render
from face_fusion_pipeline.avatars.evaluation import depth_table, people_table
from face_fusion_pipeline.avatars.evaluation.avatar_table import CEILING, FLOOR, as_markdown, compare, summarise
from face_fusion_pipeline.avatars.evaluation.depth_table import POSED, STRANGER, compare_depth, control_depth
from face_fusion_pipeline.avatars.evaluation.evaluator_training import train_evaluators
from face_fusion_pipeline.avatars.evaluation.evaluators import SHIPPED, WEIGHTS_NAME, Evaluators, load_evaluators
from face_fusion_pipeline.avatars.evaluation.framing import FACE_HEIGHT, portrait_crops
from face_fusion_pipeline.avatars.evaluation.model_quality import measure_model, quality_trials, reconstruction_psnr
from face_fusion_pipeline.avatars.evaluation.morph_table import compare_morphs
from face_fusion_pipeline.avatars.evaluation.recognition import kept, measure_recognition
from face_fusion_pipeline.avatars.evaluation.renders import coarse, depth_cells
from face_fusion_pipeline.avatars.evaluation.savings_table import (
    EVERYTHING,
    REFERENCES,
    SAVINGS,
    compare_savings,
    inner_scales,
)
from face_fusion_pipeline.avatars.evaluation.scoring import Panel
from face_fusion_pipeline.avatars.evaluation.trial_pictures import image_path
from face_fusion_pipeline.avatars.evaluation.trials import (
    FIRST_TEST_IDENTITY,
    detected_face,
    plan_trials,
    portraits,
    reference_face,
    true_renders,
)
from face_fusion_pipeline.avatars.training.rendered import scenes
from face_fusion_pipeline.avatars.world.caption import caption
from face_fusion_pipeline.avatars.world.dataset import write
from face_fusion_pipeline.cli import _evaluate_options, avatars_evaluate
from face_fusion_pipeline.evaluation.generation import METHODS, Settings
from face_fusion_pipeline.evaluation.image_files import from_pil, read_image, to_pil, write_image
from face_fusion_pipeline.evaluation.metrics import (
    auc,
    bootstrap_mean,
    box_iou,
    cosine_similarity,
    normalised_similarity,
    psnr,
    verification_auc,
)
from face_fusion_pipeline.evaluation.recognisers import load_recognisers
from face_fusion_pipeline.face_errors import FaceFusionError, ModelNotFoundError, NoFaceError
from face_fusion_pipeline.face_images import Face
from face_fusion_pipeline.face_recognisers import OnnxRecogniser, align_faces, face_template, similarity_transform
from face_fusion_pipeline.generation import photos
from face_fusion_pipeline.training.errors import TrainingError


LABELS = {
    "expression": sorted(EXPRESSIONS),
    "clothing": sorted(CLOTHINGS),
    "background": sorted(BACKGROUNDS),
    "style": sorted(STYLES),
    "people": ["1", "2", "3"],
}


@pytest.fixture(scope="module")
def untrained() -> Evaluators:
    torch.manual_seed(0)
    evaluators = Evaluators.new(LABELS)
    evaluators.networks.eval()
    return evaluators


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionFaceFusionPipeline:
    """Random weights, images of 64 pixels: the evaluators see them enlarged."""
    pipe = StableDiffusionFaceFusionPipeline(**{**tiny_components(), "unet": tiny_unet(sample_size=32)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- Figures -----------------------------------------------------------------------------------------------------


def test_cosine_similarity() -> None:
    assert cosine_similarity(np.array([3, 4]), np.array([4, 3])) == pytest.approx(24 / 25)
    assert cosine_similarity(np.zeros(2), np.ones(2)) == 0
    assert cosine_similarity(np.eye(2), np.array([0, -2])).tolist() == [0, -1]


def test_auc_counts_won_pairs_and_half_of_the_ties() -> None:
    # 3 beats 1 and 2; 2 beats 1 and ties with 2: 3.5 of 4 pairs
    assert auc(np.array([3, 2]), np.array([1, 2])) == pytest.approx(3.5 / 4)
    assert auc(np.array([0.0]), np.array([1.0, 2.0])) == 0
    with pytest.raises(ValueError, match="0 positive"):
        auc(np.array([]), np.array([1.0]))


def test_verification_auc_uses_all_pairs() -> None:
    embeddings = np.array([[1, 0], [2, 0.1], [0, 1], [0.1, 3]])
    assert verification_auc(embeddings, np.array([7, 7, 8, 8])) == 1
    assert verification_auc(embeddings, np.array([7, 8, 7, 8])) < 0.5


def test_bootstrap_draws_identities_not_images() -> None:
    same_in_group = bootstrap_mean(np.array([0.0] * 50 + [1.0] * 50), np.repeat([0, 1], 50))
    assert (same_in_group.mean, same_in_group.low, same_in_group.high) == (0.5, 0.0, 1.0)
    single_images = bootstrap_mean(np.array([0.0] * 50 + [1.0] * 50), np.arange(100))
    assert 0.35 < single_images.low < 0.45 and 0.55 < single_images.high < 0.65
    assert bootstrap_mean(np.array([1.0, np.nan]), np.array([0, 1])).count == 1


def test_an_interval_holds_its_mean_and_one_person_gives_none() -> None:
    for count in range(2, 30):  # sums of equal numbers differ by rounding
        equal = bootstrap_mean(np.full(3 * count, 0.1), np.repeat(np.arange(count), 3))
        assert equal.low <= equal.mean <= equal.high
    alone = bootstrap_mean(np.random.default_rng(0).random(20), np.zeros(20))
    assert alone.count == 20 and np.isnan(alone.low) and np.isnan(alone.high) and "[" not in str(alone)


def test_normalised_similarity() -> None:
    assert normalised_similarity(0.5, 0.2, 0.8) == pytest.approx(0.5)
    assert np.isnan(normalised_similarity(0.5, 0.2, 0.2))


def test_psnr_is_computed_in_float() -> None:
    assert psnr(np.full((4, 4), 0.5), np.full((4, 4), 0.6)) == pytest.approx(20.0)
    assert psnr(np.ones(3), np.ones(3)) == np.inf
    # uint8 arithmetic wraps around: 0 - 255 would count as an error of 1
    assert psnr(np.zeros(4, np.uint8), np.full(4, 255, np.uint8), peak=255) == pytest.approx(0.0)


def test_box_iou() -> None:
    assert box_iou(np.array([0, 0, 2, 2]), np.array([1, 0, 3, 2])) == pytest.approx(1 / 3)
    assert box_iou(np.array([0, 0, 1, 1]), np.array([2, 2, 3, 3])) == 0


# --- Alignment ---------------------------------------------------------------------------------------------------


def test_similarity_transform_is_exact_for_similar_points() -> None:
    angle = torch.tensor(0.3, dtype=torch.float64)
    turn = 1.7 * torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    shift = torch.tensor([5.0, -3.0], dtype=torch.float64)
    points = face_template(112).double()
    matrix = similarity_transform(points, points @ turn.T + shift)
    torch.testing.assert_close(matrix, torch.cat([turn, shift[:, None]], 1))


def test_aligned_crop_is_that_of_opencv() -> None:
    torch.manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.rand(2, 3, 130, 130), 3, 1)
    landmarks = face_template(112) * 0.6 + torch.tensor([20.0, 25.0]) + torch.randn(2, 5, 2)
    crops = align_faces(images, landmarks, 112)
    for image, points, crop in zip(images, landmarks, crops, strict=True):
        matrix = similarity_transform(points.double(), face_template(112).double()).numpy()
        pixels = image.permute(1, 2, 0).numpy()
        expected = cv2.warpAffine(pixels, matrix, (112, 112), borderMode=cv2.BORDER_REPLICATE)
        # OpenCV rounds positions to 1/32 pixel
        assert np.abs(crop.permute(1, 2, 0).numpy() - expected).max() < 0.03


# --- Trials ------------------------------------------------------------------------------------------------------


def test_trials_ask_unseen_captions_of_test_people() -> None:
    trials = plan_trials(2, 3, style="photo")
    assert [trial.person for trial in trials] == [FIRST_TEST_IDENTITY] * 3 + [FIRST_TEST_IDENTITY + 1] * 3
    assert [trial.text for trial in plan_trials(2, 3, style="photo")] == [trial.text for trial in trials]
    seen = {trials[0].text}
    assert plan_trials(1, 1, style="photo", exclude=seen)[0].text not in seen
    assert all(trial.wanted["clothing"] in trial.text for trial in trials)
    assert len({trial.seed for trial in trials}) == 6
    several = [{p.identity.seed for p in trial.scene.people} for trial in plan_trials(3, 1, people=2, style="photo")]
    assert len(set.union(*several)) == 6  # nobody twice
    assert plan_trials(1, 1, people=2, style="photo")[0].wanted.keys() == {"background", "style", "people"}
    sketch = plan_trials(1, 1, style="line art", clothing="red shirt", background="plain blue")[0]
    assert sketch.wanted.keys() == {"expression", "style", "people"}  # colours cannot be seen


def test_somebody_else_stands_in_the_same_scene() -> None:
    trials = plan_trials(1, 1, style="photo", background="plain red")
    truth, stranger = true_renders(trials), true_renders(trials, person_shift=1)
    assert truth.shape == (1, 3, 128, 128)
    assert (truth[..., :4, :4] - stranger[..., :4, :4]).abs().max() < 0.02 < (truth - stranger).abs().max()
    person = portraits(trials[0].person)
    assert person.face.size == (128, 128) and (person.reference - person.other).abs().max() > 0.1


# --- Evaluators ------------------------------------------------------------------------------------------------------


def test_evaluators_survive_saving(untrained: Evaluators, tmp_path: Path) -> None:
    untrained.save(tmp_path)
    loaded = load_evaluators(tmp_path)
    assert loaded.labels == untrained.labels
    for name, value in untrained.networks.state_dict().items():
        torch.testing.assert_close(loaded.networks.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    assert (tmp_path / WEIGHTS_NAME).stat().st_size < 4_000_000
    with pytest.raises(ModelNotFoundError, match="train-evaluators"):
        load_evaluators(tmp_path / "nowhere")


def test_locator_reads_its_peak(untrained: Evaluators, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(1, 5, 32, 32)
    logits[:, :, 10, 20] = 50
    logits[:, 0, 10, 21] = 50  # equally high: half a cell further
    logits[:, :, 30, 2] = 49  # a second face, too far to pull on the first
    monkeypatch.setattr(untrained.locator, "planes", lambda images: logits)
    landmarks = untrained.locate(torch.zeros(1, 3, 128, 128))
    assert landmarks[0, 1].tolist() == pytest.approx([81.5, 41.5], abs=1e-3)
    assert landmarks[0, 0].tolist() == pytest.approx([83.5, 41.5], abs=1e-3)


def test_evaluators_learn(tmp_path: Path) -> None:
    """A few steps on two plain backgrounds: the training loop must bring the scene evaluator well above chance."""
    for split, first in (("train", 0), ("validation", 1_000_000)):
        records = []
        for i in range(24):
            torch.manual_seed(i)
            image = torch.rand(3, 1, 1) * 0.4 * torch.ones(3, 128, 128) + (0.5 if i % 2 else 0.0)
            write_image(tmp_path / split / f"{i}.png", image)
            near = np.full((128, 128), 60000 if i % 2 else 5000, np.uint16)
            near[:, :4] = 0 if i % 2 else 65535  # a light picture is near nearly everywhere, a dark one far
            Image.fromarray(near).save(tmp_path / split / f"depth{i}.png")
            words = {"expression": "sad", "clothing": "suit", "style": "photo", "background": ["dark", "light"][i % 2]}
            points = (face_template(60) + 30).tolist()
            record = {"file_name": f"{i}.png", "text": "", "identities": [first + i // 2], "people": 1}
            record |= {"depth_file_name": f"depth{i}.png"}
            records.append({**record, **words, "landmarks5": [points], "boxes": [[30, 30, 90, 90]]})
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    result = train_evaluators(tmp_path, tmp_path / "evaluators", steps=16)
    assert result["accuracy"]["background"] > 0.8
    assert result["images"] == 24 and result["landmark_error_pixels"] >= 0
    first = load_evaluators(tmp_path / "evaluators").scene.heads["background"].weight
    again = train_evaluators(tmp_path, tmp_path / "again", steps=2, start=tmp_path / "evaluators")
    runs = [report["evaluators"]["scene"]["started_from_evaluators"] for report in (again, result)]
    assert runs == [True, False]
    second = load_evaluators(tmp_path / "again").scene.heads["background"].weight
    assert 0 < (second - first).abs().max() < 0.1  # went on from there
    nearer = train_evaluators(tmp_path, tmp_path / "evaluators", steps=40, only=["depth"])
    assert nearer["depth_error"] < 0.3  # one half for whoever says the same of all pictures
    assert torch.equal(load_evaluators(tmp_path / "evaluators").scene.heads["background"].weight, first)
    assert [nearer["evaluators"][name]["steps"] for name in ("scene", "depth")] == [16, 40]

    for split in ("train", "validation"):  # the same without depth maps
        metadata = tmp_path / split / "metadata.jsonl"
        metadata.write_text(metadata.read_text().replace("depth_file_name", "nothing"))
    flat = train_evaluators(tmp_path, tmp_path / "evaluators", steps=2, only=["scene"])
    assert flat["depth_error"] is None and flat["accuracy"]["background"] >= 0
    with pytest.raises(TrainingError, match="--depth"):
        train_evaluators(tmp_path, tmp_path / "none", steps=2)
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(not (SHIPPED / WEIGHTS_NAME).is_file(), reason="no trained evaluators in the package")
def test_shipped_evaluators_see_what_renders_show() -> None:
    evaluators = load_evaluators()
    trials = plan_trials(60, 2, seed=5)
    images = true_renders(trials)
    said = evaluators.describe(images)
    for trait in ("expression", "clothing", "background", "people"):
        asked = [(i, trial.wanted[trait]) for i, trial in enumerate(trials) if trait in trial.wanted]
        right = np.mean([said[trait][i] == word for i, word in asked])
        assert right >= 0.95, f"{trait}: {right:.3f}"
    depth = depth_cells(torch.stack([from_pil(control_depth(trial.scene))[:1] for trial in trials]))
    assert (evaluators.nearness(images) - depth).abs().mean() <= 0.05
    embeddings = evaluators.embed(images, evaluators.locate(images))
    assert verification_auc(embeddings, np.array([trial.person for trial in trials])) >= 0.95


# --- Recognisers in ONNX files -----------------------------------------------------------------------------------


def test_recognisers_of_photographs_tell_avatars_apart(test_data: Path) -> None:
    models = test_data / "models"
    recognisers = load_recognisers([f"first={models / 'mobileface_v2.onnx'}:raw"], models)
    assert [r.name for r in recognisers] == ["first", "mobileface_v2", "mobilefacenet_foamliu"]
    result = measure_recognition(recognisers[1:], None, identities=12, portraits=3)
    assert result["images"] == 36
    assert min(result["auc"].values()) > 0.85
    assert 0 < max(result["coarse"].values()) < 0.7, "they go by what is fine"


def test_what_is_left_of_likeness_without_what_is_fine() -> None:
    generator = np.random.default_rng(0)
    people, who = np.repeat(np.arange(20), 3), generator.normal(size=(20, 64))
    alone = 0.3 * generator.normal(size=(60, 64))  # what only the picture itself has
    sharp = np.repeat(who, 3, 0) + alone
    assert kept(sharp, 5 * sharp, people) == pytest.approx(1), "lengths do not count"
    assert abs(kept(sharp, alone, people)) < 0.05, "a picture is not compared with itself"
    strangers = np.repeat(generator.normal(size=(20, 64)), 3, 0)
    assert abs(kept(sharp, strangers, people)) < 0.1
    assert 0.5 < kept(sharp, np.repeat(who, 3, 0) + strangers, people) < 0.9
    images = torch.rand(2, 3, 16, 16)
    assert coarse(images, 4).shape == images.shape
    torch.testing.assert_close(coarse(images, 4).mean(), images.mean(), atol=0.02, rtol=0)
    assert coarse(images, 4).std() < 0.6 * images.std()


def test_bad_recogniser_arguments(tmp_path: Path) -> None:
    with pytest.raises(FaceFusionError, match="NAME=FILE"):
        load_recognisers(["file.onnx"])
    with pytest.raises(ModelNotFoundError, match="missing.onnx"):
        OnnxRecogniser(tmp_path / "missing.onnx")
    with pytest.raises(ModelNotFoundError, match="no folder"):
        load_recognisers([], tmp_path / "nowhere")


# --- Tables ------------------------------------------------------------------------------------------------------


def _row(method: str, person: int, similarity: float, said: str, found: bool | None = True) -> dict:
    wanted = {"expression": "sad", "clothing": "suit", "background": "city", "people": "1"}
    seen = {**wanted, "expression": said}
    return {"method": method, "person": person, "similarity": {"r": similarity}, "wanted": wanted, "said": seen,
            "face_found": found}  # fmt: skip


def test_summary_by_hand() -> None:
    rows = [_row("adapter", 1, 0.6, "sad"), _row("adapter", 2, 0.8, "angry", found=False)]
    rows += [_row(FLOOR, p, 0.3, "sad", None) for p in (1, 2)] + [_row(CEILING, p, 0.9, "sad") for p in (1, 2)]
    summary = summarise(rows, ["adapter", CEILING, FLOOR], ["r"])
    mine = summary["adapter"]
    assert mine["similarity"]["r"]["mean"] == pytest.approx(0.7)
    assert mine["similarity"]["r"]["normalised"] == pytest.approx(0.4 / 0.6)
    assert mine["accuracy"]["expression"] == 0.5 and mine["accuracy"]["mean"] == pytest.approx(0.875)
    assert mine["no_face"] == 0.5 and summary[FLOOR]["no_face"] is None


def test_guidance_interval_is_part_of_the_settings_and_of_what_a_table_says(
    pipe: StableDiffusionFaceFusionPipeline, untrained: Evaluators, tmp_path: Path
) -> None:
    settings = Settings(model="tiny", steps=4)
    trials, panel = plan_trials(1, 1, style="photo"), Panel(untrained)
    made = []
    for name, late in (("same", None), ("as-before", settings.guidance_scale), ("late", 2.0)):
        result = compare(pipe, trials, ["none"], panel, replace(settings, low_noise_guidance=late), tmp_path / name)
        made.append(image_path(tmp_path / name, trials[0], "none").read_bytes())
    assert made[0] == made[1] != made[2]
    assert "4 steps, guidance 4.0 (2.0 in the low-noise half), face" in as_markdown(result, panel.names)
    with pytest.raises(FaceFusionError, match="other settings"):
        compare(pipe, trials, ["none"], panel, settings, tmp_path / "late")
    old = json.loads((tmp_path / "same" / "settings.json").read_text())
    del old["low_noise_guidance"]  # a folder of an earlier version goes on
    (tmp_path / "same" / "settings.json").write_text(json.dumps(old))
    compare(pipe, trials, ["none"], panel, settings, tmp_path / "same")


def test_table_end_to_end_resumes(
    pipe: StableDiffusionFaceFusionPipeline, untrained: Evaluators, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.set_face_fusion_adapter(_adapter(pipe))
    settings = Settings(model="tiny", steps=1, batch=2)
    trials = plan_trials(2, 2, style="photo")
    panel = Panel(untrained)
    methods = [*METHODS, "adapter-mirrored", "both"]
    result = compare(pipe, trials, methods, panel, settings, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 7 and {row["method"] for row in rows} == {*methods, CEILING, FLOOR}
    assert result["methods"][CEILING]["similarity"]["avatar recogniser"]["normalised"] == 1
    assert "| adapter |" in (tmp_path / "table.md").read_text() == as_markdown(result, panel.names)
    assert (tmp_path / "sheet.png").is_file()
    faces = [read_image(image_path(tmp_path, trials[0], method)).numpy().tobytes() for method in methods]
    assert len(set(faces)) == 5  # the face changes the image, the modes differ, and so does a second reference

    lost = [image_path(tmp_path, trial, "adapter") for trial in trials[2:]]  # one batch
    before = [path.read_bytes() for path in lost]
    for path in lost:
        path.unlink()
    calls: list = []
    monkeypatch.setattr(type(pipe), "encode_face", _counted(type(pipe).encode_face, calls))
    assert compare(pipe, trials, methods, panel, settings, tmp_path) == result
    assert len(calls) == 1 and [path.read_bytes() for path in lost] == before

    with pytest.raises(FaceFusionError, match="other settings"):
        compare(pipe, trials, ["none"], panel, Settings(model="tiny", steps=2), tmp_path)


def test_references_are_cut_out_by_a_detector_as_of_photos(
    pipe: StableDiffusionFaceFusionPipeline, untrained: Evaluators, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.set_face_fusion_adapter(_adapter(pipe))
    trials = plan_trials(2, 1, style="photo")
    first, second = (trial.person for trial in trials)

    def found(image: Image.Image, detector: str, *args: Any) -> tuple[Image.Image, Face]:
        if (np.asarray(image) == np.asarray(to_pil(portraits(second).reference))).all():
            raise NoFaceError("no face")
        return image, Face({"yunet": (30.0, 20.0, 95.0, 110.0)}[detector], 0.9)

    monkeypatch.setattr(photos, "load_detector", lambda name: name)
    monkeypatch.setattr(photos, "find_upright", found)
    detected_face.cache_clear()
    crop = reference_face(first, cut_out="yunet")
    assert crop.size == (128, 128) and np.abs(np.asarray(crop, float) - np.asarray(portraits(first).face)).mean() > 1
    assert reference_face(second, cut_out="yunet") == reference_face(second) == portraits(second).face
    results = {}
    for cut_out in ("true", "yunet"):
        out = tmp_path / cut_out
        settings = Settings(model="tiny", steps=1, cut_out=cut_out)  # type: ignore[arg-type]
        results[cut_out] = compare(pipe, trials, ["adapter"], Panel(untrained), settings, out)
        results[cut_out]["image"] = image_path(out, trials[0], "adapter").read_bytes()
    assert results["true"]["image"] != results["yunet"]["image"]
    text = (tmp_path / "yunet" / "table.md").read_text()
    assert "cut out by yunet, 1 faces" in text and "cut out" not in (tmp_path / "true" / "table.md").read_text()
    detected_face.cache_clear()


def test_people_table_end_to_end(
    pipe: StableDiffusionFaceFusionPipeline, untrained: Evaluators, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.set_face_fusion_adapter(_adapter(pipe))
    settings = Settings(model="tiny", steps=3)  # a second pass takes a part of them
    trials = plan_trials(2, 1, people=2, style="photo")
    names = ("no faces", "no masks", "nearest, none", "faces drawn again")
    methods = [method for method in people_table.METHODS if method.name in names]
    monkeypatch.setattr(people_table, "true_boxes", lambda trial: [[8, 16, 24, 40], [40, 16, 56, 40]])
    result = people_table.compare_people(pipe, trials, untrained, settings, tmp_path, methods)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 6
    assert "| nearest, none |" in (tmp_path / "people.md").read_text() == people_table.as_markdown(result)
    pictures = {image_path(tmp_path, trials[0], people_table.slug(m.name)).read_bytes() for m in methods}
    assert len(pictures) == 4 and (tmp_path / "sheet.png").is_file()
    assert result["methods"][FLOOR]["leakage"] is not None
    for method in methods:
        paths = [image_path(tmp_path, trial, people_table.slug(method.name)) for trial in trials]
        shown = untrained.describe(torch.stack([read_image(path, 128) for path in paths]))["people"]
        assert [row["doubled"] for row in rows if row["method"] == method.name and row["place"] == 0] == [
            int(people) > 2 for people in shown
        ]
    # The floor: a stranger's face (the next but one) against everybody in the table but that stranger.
    first = trials[0].person
    crops = portrait_crops(true_renders(trials, person_shift=2)[0], [[8, 16, 24, 40], [40, 16, 56, 40]])
    others = torch.stack([portraits(person).other for person in (first, first + 1)])  # first + 2 is the stranger
    found, known = (untrained.embed(images, untrained.locate(images)) for images in (crops, others))
    floor = next(row for row in rows if row["method"] == FLOOR)
    assert floor["own"] == pytest.approx((known @ found[0]).mean(), abs=1e-5)


def test_depth_table_end_to_end(
    pipe: StableDiffusionFaceFusionPipeline, untrained: Evaluators, tmp_path: Path
) -> None:
    pipe.set_face_fusion_adapter(_adapter(pipe))
    pipe.register_modules(controlnet=tiny_controlnet(pipe.unet))
    trials = plan_trials(3, 1, style="photo")
    settings = Settings(model="tiny", controlnet="tiny", steps=2)  # of which half is one
    result = compare_depth(pipe, trials, untrained, settings, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 10 and "| face, depth |" in (tmp_path / "depth.md").read_text()
    assert len({path.read_bytes() for path in (tmp_path / "images").glob(f"{trials[0].key}_*")}) == 8
    # The landmark error is a mean of distances over that of the eyes, in the scene with the next person in it.
    truth = render([depth_table.posing_scene(trials[0])])
    found = untrained.locate(truth.images)[0]
    by_hand = np.linalg.norm(found - truth.landmarks5[0][0], axis=1).mean()
    by_hand /= np.linalg.norm(truth.landmarks5[0][0][0] - truth.landmarks5[0][0][1])
    posed = next(row for row in rows if row["method"] == POSED and row["trial"] == trials[0].key)
    assert posed["landmark_error"] == pytest.approx(by_hand, rel=1e-4)
    own_map = depth_cells(from_pil(control_depth(trials[0].scene))[None, :1])
    own = next(method for method in depth_table.METHODS if method.poser == depth_table.ONESELF)
    seen = untrained.nearness(read_image(image_path(tmp_path, trials[0], depth_table.slug(own)), 128)[None])
    row = next(row for row in rows if row["method"] == own.name and row["trial"] == trials[0].key)
    assert row["depth_error"] == pytest.approx(float((seen - own_map).abs().mean()), rel=1e-4)
    assert result["methods"][STRANGER]["similarity"]["count"] == 3


def test_morph_table_end_to_end(
    pipe: StableDiffusionFaceFusionPipeline, untrained: Evaluators, tmp_path: Path
) -> None:
    adapter = _adapter(pipe)
    for weight in adapter.parameters():
        weight.data.mul_(20)  # so that a face changes more than the rounding of a PNG
    pipe.set_face_fusion_adapter(adapter)
    trials = plan_trials(2, 1, style="photo")
    result = compare_morphs(pipe, trials, untrained, Settings(model="tiny", steps=1), tmp_path, (0.0, 0.5, 1.0))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["person"], row["second"]) for row in rows[::3]] == [
        (trials[0].person, trials[1].person),
        (trials[1].person, trials[0].person),
    ]
    assert len({path.read_bytes() for path in (tmp_path / "images").glob(f"{trials[0].key}_*")}) == 3
    mean = np.mean([row["to_second"] for row in rows if row["fraction"] == 0.5])
    assert result["fractions"]["0.5"]["to_second"]["mean"] == pytest.approx(mean)
    # The ends are the people alone: no trace of the other reference, whoever it is.
    alone = pipe(
        trials[0].text,
        face_image=portraits(trials[0].person).face,
        num_inference_steps=1,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(trials[0].seed),
        output_type="pt",
    ).images[0]
    end, far = (read_image(image_path(tmp_path, trials[0], name)) for name in ("share000", "share100"))
    assert 2 * (end - alone).abs().mean() < (far - alone).abs().mean()
    torch.testing.assert_close(end, alone, rtol=0, atol=0.01)
    with pytest.raises(FaceFusionError, match="two identities"):
        compare_morphs(pipe, trials[:1], untrained, Settings(model="tiny", steps=1), tmp_path / "one")


def test_savings_table_end_to_end(
    pipe: StableDiffusionFaceFusionPipeline, untrained: Evaluators, tmp_path: Path
) -> None:
    adapter = _adapter(pipe)
    for weight in adapter.parameters():
        weight.data.mul_(20)
    pipe.set_face_fusion_adapter(adapter)
    trials = plan_trials(2, 1, style="photo")
    result = compare_savings(pipe, trials, untrained, Settings(model="tiny", steps=5), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["saving"] for row in rows[: len(SAVINGS)]] == [saving.name for saving in SAVINGS]
    # Every option reaches the picture, each in its own way.
    assert len({path.read_bytes() for path in (tmp_path / "images").glob(f"{trials[0].key}_*")}) == len(SAVINGS)
    half = [row for row in rows if row["saving"] == "reference of half the side"]
    whole = [row for row in rows if row["saving"] == EVERYTHING.name]
    by_hand = np.mean([a["similarity"] - b["similarity"] for a, b in zip(half, whole, strict=True)])
    assert result["savings"]["reference of half the side"]["difference"]["mean"] == pytest.approx(by_hand)
    assert result["savings"][EVERYTHING.name]["difference"]["mean"] == 0
    assert pipe._face_layer_scales == 1.0
    # Of a face outside the finest layers, only the others see something.
    inner = inner_scales(pipe.unet)
    assert inner and not any(name.startswith(("down_blocks.0", "up_blocks.1")) for name in inner)


def test_what_the_self_attention_sees_of_a_reference_needs_no_weights(
    pipe: StableDiffusionFaceFusionPipeline, untrained: Evaluators, tmp_path: Path
) -> None:
    trials = plan_trials(1, 1, style="photo")
    result = compare_savings(pipe, trials, untrained, Settings(model="tiny", steps=5), tmp_path, REFERENCES)
    assert list(result["savings"]) == [reference.name for reference in REFERENCES]
    assert result["savings"]["as it is"]["difference"]["mean"] == 0
    pictures = {path.read_bytes() for path in (tmp_path / "images").glob(f"{trials[0].key}_*")}
    assert len(pictures) == len(REFERENCES)


def test_control_depth_is_near_where_the_person_is() -> None:
    near = np.asarray(control_depth(plan_trials(1, 1, style="photo")[0].scene))
    assert near.shape == (128, 128, 3) and near.min() == 0 and near.max() == 255
    assert near[64, 64, 0] > 200 > 60 > near[4, 4, 0]  # a head in the middle, the background in the corner


def test_leakage_by_hand() -> None:
    methods = {name: {"own": {"mean": own}, "neighbour": {"mean": other}}
               for name, own, other in (("mine", 0.8, 0.2), ("mixed", 0.5, 0.5), (FLOOR, 0.1, 0.1))}  # fmt: skip
    people_table.add_leakage(methods)
    assert methods["mine"]["leakage"] == pytest.approx(1 / 7)
    assert methods["mixed"]["leakage"] == pytest.approx(1)
    assert np.isnan(methods[FLOOR]["leakage"])


def test_more_people_than_asked_for_are_counted() -> None:
    assert people_table.presence(2, 2, most=3) == {"all_present": True, "doubled": False}
    assert people_table.presence(3, 2, most=3) == {"all_present": False, "doubled": True}
    assert people_table.presence(1, 2, most=3) == {"all_present": False, "doubled": False}
    assert people_table.presence(3, 3, most=3)["doubled"] is None  # a fourth would not be seen
    row = {"person": 1, "own": 0.5, "neighbour": 0.1}
    figures = people_table.summarise([row | people_table.presence(shown, 2, 3) for shown in (1, 2, 2, 3)], seed=0)
    assert (figures["all_present"], figures["doubled"]) == (0.5, 0.25)
    unknown = people_table.summarise([row | people_table.presence(3, 3, 3)], seed=0)
    assert np.isnan(unknown["doubled"])
    result = {"methods": {"some": figures | {"leakage": 0.0}, "unknown": unknown | {"leakage": 0.0}}, "most": 3}
    result |= {"settings": {"steps": 1, "guidance_scale": 1, "face_scale": 1, "seed": 0}, "images_per_method": 1}
    table = people_table.as_markdown({**result, "people": 2, "machine": "", "date": ""}).splitlines()
    assert [line.split(" | ")[-2:] for line in table[2:4]] == [["50.0 %", "25.0 % |"], ["100.0 %", "– |"]]


def test_people_are_cut_out_as_portraits() -> None:
    image = torch.zeros(3, 128, 128)
    image[0, 40:60, 20:34] = 1
    (crop,) = portrait_crops(image, [(20, 40, 34, 60)])
    rows, columns = (crop[0] > 0.5).nonzero().T
    assert rows.max() - rows.min() + 1 == pytest.approx(FACE_HEIGHT, abs=3)
    assert (rows.float().mean(), columns.float().mean()) == pytest.approx((63.5, 63.5), abs=2)


def _adapter(pipe: StableDiffusionFaceFusionPipeline):
    from face_fusion_pipeline.face_adapter import create_adapter

    return create_adapter(pipe.unet, "xavier", metadata={"resolution": 64})


def _counted(function, calls: list):
    def wrapped(*args, **kwargs):
        calls.append(kwargs)
        return function(*args, **kwargs)

    return wrapped


def test_model_report_end_to_end(
    pipe: StableDiffusionFaceFusionPipeline, untrained: Evaluators, tmp_path: Path
) -> None:
    trials = quality_trials(5)
    assert [trial.wanted["people"] for trial in trials] == ["1", "1", "1", "2", "3"]
    result = measure_model(pipe, trials, Panel(untrained), Settings(model="tiny", steps=1), tmp_path)
    assert result["prompts"] == 5 and 0 < result["psnr"] < 40
    assert json.loads((tmp_path / "model.json").read_text()) == result
    assert "| people right ↑ |" in (tmp_path / "model.md").read_text()


def test_reconstruction_of_a_perfect_vae_is_infinite(pipe: StableDiffusionFaceFusionPipeline) -> None:
    class Copy(torch.nn.Linear):
        dtype = torch.float32
        config = type("Config", (), {"scaling_factor": 0.5, "shift_factor": 0.25})

        def encode(self, pixels):
            return type("Encoded", (), {"latents": pixels})

        def decode(self, latents):
            return type("Decoded", (), {"sample": latents})

    assert reconstruction_psnr(Copy(1, 1), torch.rand(2, 3, 8, 8)) > 100


# --- Command -----------------------------------------------------------------------------------------------------


def _run(*words: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    avatars_evaluate.add_arguments(parser)
    return avatars_evaluate.run(parser.parse_args(list(words)))


def test_table_command(
    pipe: StableDiffusionFaceFusionPipeline,
    untrained: Evaluators,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    untrained.save(tmp_path / "evaluators")
    pipe.unload_face_fusion_adapter()
    pipe.save_pretrained(tmp_path / "model")
    words = ["table", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--evaluators"]
    words += [str(tmp_path / "evaluators"), "--identities", "1", "--prompts", "1", "--steps", "1", "--json"]
    assert _run(*words) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["methods"]) == ["none", "training-free", CEILING, FLOOR]
    with pytest.raises(FaceFusionError, match="no adapter"):
        _run(*words, "--methods", "adapter")
    with pytest.raises(FaceFusionError, match="metadata.jsonl"):
        _run(*words, "--training-data", str(tmp_path))
    write(tmp_path / "data" / "train", "train", 12, size=32, progress=False)
    seen = _evaluate_options.training_captions(str(tmp_path / "data"))
    together = {caption(scene) for scene in scenes(range(12))}
    assert seen | together == _evaluate_options.training_captions("avatars:12") and len(seen) > 8


def test_recognition_command(test_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = str(test_data / "models")
    assert _run("recognition", "--recognisers", models, "--identities", "4", "--portraits", "2") == 0
    assert "mobileface_v2: AUC" in capsys.readouterr().out
