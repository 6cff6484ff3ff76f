"""What earlier versions called otherwise: arguments, options and keys of files still work, with a line of warning."""

import json
from pathlib import Path
from typing import Any

import pytest

import face_fusion_pipeline
from face_fusion_pipeline import FaceDefaults, FaceFusionError
from face_fusion_pipeline.avatars.evaluation import evaluators
from face_fusion_pipeline.avatars.measures.choice import candidate
from face_fusion_pipeline.avatars.training import face_embedder
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.cli._arguments import EARLIER_ACTIONS, EARLIER_OPTIONS, todays_words
from face_fusion_pipeline.evaluation.generation import Settings, keep_settings
from face_fusion_pipeline.evaluation.picture_panel import load_panel
from face_fusion_pipeline.face_defaults import read_defaults
from face_fusion_pipeline.face_detectors import HaarDetector
from face_fusion_pipeline.face_errors import also_named, renamed
from face_fusion_pipeline.training.averaging import average_adapters
from face_fusion_pipeline.training.preparation import PrepareOptions, prepare
from face_fusion_pipeline.training.selection import SelectionOptions
from face_fusion_pipeline.training.task import FaceFusionTask


def warned(caplog: pytest.LogCaptureFixture, *names: str) -> bool:
    """Whether there was one line, with all of `names`; the lines are gone then."""
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return len(lines) == 1 and all(name in lines[0] for name in names)


def test_renamed_keeps_what_is_called_as_today_and_refuses_both(caplog: pytest.LogCaptureFixture) -> None:
    assert renamed({"new": 1, "other": 2}, {"old": "new"}, "x") == {"new": 1, "other": 2} and not caplog.records
    assert renamed({"old": 1, "other": 2}, {"old": "new"}, "x") == {"new": 1, "other": 2}
    assert warned(caplog, "x", "old", "new")
    with pytest.raises(FaceFusionError, match="old and new"):
        renamed({"old": 1, "new": 1}, {"old": "new"}, "x")


def test_an_argument_by_its_earlier_name(caplog: pytest.LogCaptureFixture) -> None:
    @also_named(old="new")
    def function(first: int, new: int = 0) -> tuple[int, int]:
        """Its docstring."""
        return first, new

    assert function(1, new=2) == function(1, 2) == (1, 2) and not caplog.records
    assert function(1, old=2) == (1, 2) and warned(caplog, "old", "new")  # type: ignore[call-arg]
    assert function.__doc__ == "Its docstring."


def test_defaults_of_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    today = FaceDefaults(guidance_scale=4.0, low_noise_guidance=2.0)
    assert FaceDefaults(guidance_scale=4.0, late_guidance=2.0) == today  # type: ignore[call-arg]
    assert warned(caplog, "late_guidance", "low_noise_guidance")
    (tmp_path / "face_fusion_defaults.json").write_text('{"guidance_scale": 4.0, "late_guidance": 2.0}')
    assert read_defaults(tmp_path) == today and warned(caplog, "face_fusion_defaults.json", "low_noise_guidance")
    assert today.late_guidance == 2.0 and warned(caplog, "low_noise_guidance")


def test_a_class(caplog: pytest.LogCaptureFixture) -> None:
    assert face_fusion_pipeline.LateGuidance is face_fusion_pipeline.GuidanceInterval
    assert warned(caplog, "LateGuidance", "GuidanceInterval")


def test_options_of_commands(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    for old, new in EARLIER_OPTIONS.items():
        assert todays_words(["command", old, "2", f"{old}=3"])[1:] == [new, "2", f"{new}=3"]
        caplog.clear()
    for (command, old), new in EARLIER_ACTIONS.items():
        assert todays_words([command, old, old]) == [command, new, old] and warned(caplog, old, new)
    words = ["generate", "--face", "x.png", "--prompt", "a cat", "--late-guidance", "1"]
    assert main(words) == 2
    assert "--low-noise-guidance must be a number above 1" in capsys.readouterr().err
    assert todays_words(["generate", "--prompt=--share"]) == ["generate", "--prompt=--share"]


def test_a_folder_of_pictures_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings("m", low_noise_guidance=2.0)
    keep_settings(tmp_path, settings)
    path = tmp_path / "settings.json"
    path.write_text(path.read_text().replace("low_noise_guidance", "late_guidance"))
    keep_settings(tmp_path, settings)
    assert warned(caplog, "settings.json") and json.loads(path.read_text())["low_noise_guidance"] == 2.0
    with pytest.raises(FaceFusionError, match="other settings"):
        keep_settings(tmp_path, Settings("m", low_noise_guidance=3.0))


def test_a_prepared_folder_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    selection = SelectionOptions(min_face_share=0.2)  # type: ignore[call-arg]
    assert selection == SelectionOptions(min_face_fraction=0.2) and warned(caplog, "min_face_fraction")
    options = PrepareOptions(selection, detector="haar")
    settings = options.settings()
    settings["min_face_share"] = settings.pop("min_face_fraction")
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(FaceFusionError, match="none of 0 photos"):
        prepare([], tmp_path, options, progress=False)
    assert warned(caplog, "min_face_fraction")


def test_a_mean_of_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FaceFusionError, match="fraction of the second must be from 0 to 1, got 2"):
        average_adapters(tmp_path, tmp_path, share=2, out=tmp_path)  # type: ignore[call-arg]
    assert warned(caplog, "share", "fraction")


def test_a_table(caplog: pytest.LogCaptureFixture) -> None:
    def table(key: str) -> dict[str, Any]:
        figures = {"drawing": {"eyes": {"mean": 0.9}}, "traits": {key: {"mean": 0.5}}, "similarity": {"r": {key: 0.3}}}
        return {"published": ["r"], "methods": {"none": figures, "adapter": figures}}

    assert candidate(table("closed"), "adapter", "t") == candidate(table("normalised"), "adapter", "t")
    assert {record.getMessage() for record in caplog.records} == {"t: closed is called normalised now"}


def test_folders_of_networks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "judges.safetensors").write_bytes((evaluators.SHIPPED / evaluators.WEIGHTS_NAME).read_bytes())
    (tmp_path / "judges.json").write_bytes((evaluators.SHIPPED / evaluators.LABELS_NAME).read_bytes())
    assert evaluators.load_evaluators(tmp_path).path == tmp_path / "judges.safetensors"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "judges.json is called evaluators.json now" in lines[1]
    caplog.clear()
    (tmp_path / "recogniser.safetensors").write_bytes(
        (face_embedder.SHIPPED / face_embedder.WEIGHTS_NAME).read_bytes()
    )
    face_embedder.load_training_embedder(tmp_path)
    assert warned(caplog, "recogniser.safetensors", "face_embedder.safetensors")


def test_arguments_of_what_looks_at_pictures(caplog: pytest.LogCaptureFixture) -> None:
    load_panel({}, HaarDetector(), judges=None)  # type: ignore[call-arg]
    assert warned(caplog, "judges", "evaluators")
    with pytest.raises(TypeError, match="base"):
        FaceFusionTask(recogniser=None, kept=None)  # type: ignore[call-arg]
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "recogniser is called embedder now",
        "kept is called feature_cache now",
    ]
