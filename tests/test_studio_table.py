"""FaceStudio on avatars: what the command draws and says, in too few steps to say much."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from face_fusion_pipeline import embedded_model
from face_fusion_pipeline.avatars.evaluation import studio_views
from face_fusion_pipeline.avatars.evaluation.evaluators import IMAGE_SIZE
from face_fusion_pipeline.avatars.evaluation.studio_pictures import METHODS, STRANGER
from face_fusion_pipeline.avatars.evaluation.trials import plan_trials, true_renders
from face_fusion_pipeline.avatars.face_model import load_avatar_face_model
from face_fusion_pipeline.cli import main


VIEWED = [*studio_views.WITH_VIEW, *studio_views.WITHOUT, studio_views.TRUTH, studio_views.ITSELF]


def test_the_command_draws_every_picture_once_and_says_how_far_heads_turn(tmp_path, capsys):
    words = ["avatars-evaluate", "studio", "--out", str(tmp_path), "--identities", "1", "--prompts", "1"]
    words += ["--steps", "1"]
    assert main(words) == 0
    result = json.loads((tmp_path / "studio.json").read_text())
    assert list(result["views"]) == VIEWED
    for found in result["views"].values():
        assert list(found["yaw"]) == ["-25", "0", "25"] and np.isfinite(list(found["yaw"].values())).all()
        assert found["yaw_error"] >= 0 and -1 <= found["likeness"]["avatar recogniser"]["mean"] <= 1
    assert result["views"][studio_views.TRUTH]["yaw_error"] < 8  # what the face model is worth
    assert set(METHODS) < set(result["methods"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["view"], row["method"]) for row in rows if "view" in row] == [
        (view, name) for view in studio_views.VIEWS for name in VIEWED
    ]
    text = (tmp_path / "studio.md").read_text()
    assert "| yaw error ↓ | yaw at -25° | yaw at 0° | yaw at 25° |" in text and text in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.png")} == {"sheet.png", "slider.png", "views.png"}
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert sum("view" in path.name for path in drawn) == 2 * len(studio_views.VIEWS)
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()} == drawn


@pytest.mark.parametrize("action", ["studio", "snap"])
def test_pictures_of_other_weights_are_not_taken_for_those_of_these(tmp_path, capsys, monkeypatch, action):
    from face_fusion_pipeline.cli import _evaluate_systems

    class Enough(Exception):
        """The settings are known."""

    seen = []

    def settings(args: Any, **more: Any) -> Any:
        seen.append(build(args, **more))
        raise Enough

    build = _evaluate_systems.settings_of
    monkeypatch.setattr(_evaluate_systems, "settings_of", settings)
    own, name = embedded_model() / f"face_{action}", f"face_{action}.safetensors"
    other = tmp_path / "other"
    other.mkdir()
    (other / name).write_bytes(b"trained for longer")
    for weights in (own, own, other):
        assert main(["avatars-evaluate", action, "--out", str(tmp_path), f"--{action}", str(weights)]) == 1
    first, again, last = (each.weights_hash for each in seen)
    assert first == again != last


def test_a_view_is_the_scene_of_the_prompt_with_a_turned_head_of_somebody_else():
    model = load_avatar_face_model(detector=studio_views.DETECTOR)
    for trial in plan_trials(3, 1, style="photo"):
        for yaw in studio_views.VIEWS:
            turned = studio_views.viewed(trial, yaw)
            (before,), (after,) = trial.scene.people, turned.scene.people
            assert (after.yaw, after.pitch, after.roll) == (yaw, 0, 0)
            assert (after.identity, after.expression, after.clothing) == (
                *(before.identity, before.expression),
                before.clothing,
            )
            assert turned.text == trial.text and turned.scene.background == trial.scene.background
            (view,) = true_renders([turned], person_shift=STRANGER)
            assert view.shape == (3, IMAGE_SIZE, IMAGE_SIZE)
            assert abs(studio_views.yaw_of(model, view) - yaw) < 8


def test_a_head_that_follows_has_no_error_and_one_that_does_not_has_the_views():
    rows = [
        {"method": name, "person": person, "view": view, "yaw": share * view, "similarity": {"r": share}}
        for name, share in (("follows", 1.0), ("stays", 0.0))
        for person in range(3)
        for view in studio_views.VIEWS
    ]
    found = SimpleNamespace(**studio_views.summarise_views(rows, ["r"], 0))
    assert found.follows["yaw_error"] == 0 and found.follows["yaw"] == {"-25": -25, "0": 0, "25": 25}
    assert found.stays["yaw_error"] == 25 and found.stays["likeness"]["r"]["mean"] == 0
