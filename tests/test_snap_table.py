"""FaceSnap on avatars: what the command draws and says, with weights that have learned nothing."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, embedded_model
from face_fusion_pipeline.avatars import render, sample_scene
from face_fusion_pipeline.avatars.evaluation import snap_table
from face_fusion_pipeline.avatars.evaluation.detector import AvatarDetector
from face_fusion_pipeline.avatars.evaluation.trials import FIRST_TEST_IDENTITY, plan_trials
from face_fusion_pipeline.avatars.face_model import SHAPE, WEIGHTS_NAME, AvatarFaceModel, FaceEstimator, save_estimator
from face_fusion_pipeline.avatars.world import sheet
from face_fusion_pipeline.avatars.world.caption import EXPRESSION_WORDS, caption
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.evaluation.image_files import to_pil
from face_fusion_pipeline.face_attached import save_attached
from face_fusion_pipeline.face_embedders import load_face_embedder
from face_fusion_pipeline.face_snap import FaceMixer, new_mixer, new_network, save_network
from face_fusion_pipeline.training.hidden_phrases import without_phrases


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Untrained weights for the embedded model, in a model's folder: the face embedder lies beside FaceStudio's."""
    folder = tmp_path_factory.mktemp("model") / "face_snap"
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    embedder = load_face_embedder(embedded_model() / "face_studio")
    shutil.copytree(embedded_model() / "face_studio", folder.parent / "face_studio")
    encoder = pipe.image_encoder.config.hidden_size
    new_mixer(pipe.unet, image_width=encoder, face_width=embedder.width, face_embedder=embedder.name, tokens=2)
    folder.mkdir()
    save_attached(pipe.unet, FaceMixer, folder / "face_snap.safetensors")
    save_network(new_network(pipe.unet), folder)
    torch.manual_seed(0)
    save_estimator(FaceEstimator(), folder / WEIGHTS_NAME, {"world": 1})
    return folder


@pytest.mark.parametrize("mode", ["both", "face-snap"])
def test_generate_shows_faces_snaps_controlnet_the_photo_and_the_points(weights, tmp_path, monkeypatch, mode):
    seen = []
    call = StableDiffusionFaceFusionPipeline.__call__

    def noted(self, prompt, **arguments):
        seen.append(arguments)
        return call(self, prompt, **arguments)

    monkeypatch.setattr(StableDiffusionFaceFusionPipeline, "__call__", noted)
    sheet.portrait(FIRST_TEST_IDENTITY + 4).save(tmp_path / "ada.png")
    words = ["generate", "--face", str(tmp_path / "ada.png"), "--prompt", "a person", "--out", str(tmp_path / "out")]
    words += ["--yaw", "20", "--expression", "smiling", "--mode", mode, "--control-scale", "0.8", "--mirror"]
    words += ["--face-snap", str(weights), "--face-model", str(weights / WEIGHTS_NAME), "--steps", "1"]
    assert main([*words, "--num-images", "1"]) == 0
    fused, plain = seen
    assert fused["driver_image"].shape == (1, 72, 2) and fused["controlnet_conditioning_scale"] == 0.8
    assert np.array_equal(plain["driver_image"], fused["driver_image"]) and "face_image" not in plain
    if mode == "face-snap":
        assert fused["face_image"].mode == "face-snap" and fused["face_image"].n_refs == 2
    else:  # an identity of Face Fusion would show FaceSnap's ControlNet nobody
        ((photo, mirrored),) = fused["face_image"]
        assert np.array_equal(np.asarray(mirrored), np.asarray(photo)[:, ::-1])
        assert (fused["face_mode"], fused["face_mirrored"]) == ("both", False)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("named", "expected"),
    [([], ("OWNER/NAME", "face_snap")), (["--face-snap", "OTHER/SNAP"], ("OTHER/SNAP", None))],
)
def test_a_model_on_the_hub_may_hold_weights_that_see_a_pose(tmp_path, named, expected):
    from face_fusion_pipeline.cli import _driver_options, build_parser

    words = ["generate", "--face", "ada.png", "--prompt", "a person", "--out", str(tmp_path), "--yaw", "20"]
    args = build_parser().parse_args([*words, "--model", "OWNER/NAME", *named])
    _driver_options.check_driver(args)
    loaded = []
    pipe = SimpleNamespace(load_face_snap=lambda weights, subfolder: loaded.append((weights, subfolder)))
    _driver_options.load_snap(pipe, args)
    assert loaded == [expected] and args.controlnet is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mode", "face-snap"], "--mode face-snap needs a --driver or a pose"),
        (["--face-snap", "weights"], "--face-snap goes with --driver or a pose"),
        (["--yaw", "2", "--controlnet", "net", "--face-snap", "weights"], "takes the place of FaceSnap's"),
        (["--yaw", "2", "--mode", "face-snap", "--refine-faces"], "leave one out"),
    ],
)
def test_options_that_do_not_go_together_are_named(tmp_path, capsys, more, message):
    sheet.portrait(FIRST_TEST_IDENTITY + 4).save(tmp_path / "ada.png")
    words = ["generate", "--face", str(tmp_path / "ada.png"), "--prompt", "a person", "--out", str(tmp_path / "out")]
    assert main([*words, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_command_draws_every_method_once_and_says_how_far_the_driver_is_followed(weights, tmp_path, capsys):
    words = ["avatars-evaluate", "snap", "--snap", str(weights), "--face-model", str(weights), "--out", str(tmp_path)]
    words += ["--identities", "1", "--prompts", "1", "--steps", "2"]
    assert main(words) == 0
    names = [*snap_table.METHODS, "true render", "somebody else"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == names
    assert all(np.isfinite([row[name] for name in snap_table.FIGURES]).all() for row in rows)
    result = json.loads((tmp_path / "snap.json").read_text())
    assert set(result["driver"]) == set(names) and (tmp_path / "sheet.png").is_file()
    truth = result["driver"]["true render"]
    assert truth["expression"]["mean"] == 1 and truth["landmarks"]["mean"] < 0.1  # what an evaluator sees is there
    assert "from the own shape" in (tmp_path / "snap.md").read_text()
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert len(drawn) == len(snap_table.METHODS) and main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()} == drawn


def test_what_is_asked_is_the_person_in_the_drivers_pose_and_the_prompt_names_no_expression(weights):
    model = snap_table.EstimatedAvatarFaceModel(FaceEstimator(), 1)
    for trial in plan_trials(6, 2, style="photo"):
        driven = snap_table.driven_trial(trial, model, 0)
        (wanted,), (driver,), (own,) = driven.trial.scene.people, driven.driver.people, trial.scene.people
        assert (wanted.identity, wanted.clothing) == (own.identity, own.clothing)
        assert driver.identity.seed == own.identity.seed + snap_table.STRANGER
        assert (wanted.yaw, wanted.pitch, wanted.roll, wanted.expression) == (
            *(driver.yaw, driver.pitch, driver.roll),
            driver.expression,
        )
        assert driven.named.scene == driven.trial.scene and own.clothing in driven.named.text
        assert without_phrases(driven.named.text, EXPRESSION_WORDS[driver.expression]) == driven.trial.text
        assert own.clothing in driven.trial.text and len(driven.trial.text) < len(caption(trial.scene, plain=True))


@pytest.mark.parametrize("expression", ["neutral", "smiling", "laughing", "sad", "crying", "angry", "surprised"])
def test_no_word_of_an_expression_is_left(expression):
    for seed in range(40):
        scene = sample_scene(seed, [FIRST_TEST_IDENTITY], expression=expression)
        text = without_phrases(caption(scene, plain=True), EXPRESSION_WORDS[expression])
        for word in ("expression", "face", "smil", "laugh", "sad", "cry", "tears", "angry", "surprised"):
            assert word not in text
        assert scene.people[0].clothing in text and "  " not in text and ", ," not in text


def test_the_detector_of_portraits_is_near_the_renderers_boxes():
    apart = []
    for number in range(20):
        scene = sample_scene(number, [FIRST_TEST_IDENTITY + number], style="photo")
        drawn = render([scene])
        (face,) = AvatarDetector().detect(to_pil(drawn.images[0]))
        true = drawn.boxes[0][0].numpy()
        height = true[3] - true[1]
        apart.append(np.abs(np.array(face.box)[[1, 3]] - true[[1, 3]]).mean() / height)
        assert face.landmarks5.shape == (5, 2)
    assert np.median(apart) < 0.1


def test_shapes_are_compared_without_the_size_of_a_head():
    model = AvatarFaceModel(1)
    (first, second) = (np.full(len(SHAPE), 0.5) for _ in range(2))
    first[-3:] = second[-3:] = (1, 0, 0)
    second[SHAPE.index("size")] = 1
    assert snap_table.apart(model, first, second) > 0.01
    small, large = map(snap_table.of_average_size, (first, second))
    assert snap_table.apart(model, small, large) == 0 and second[SHAPE.index("size")] == 1
