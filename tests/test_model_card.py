"""The card of trained weights names the base that they belong to, and no path of the machine they were trained on."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny_models import tiny_pipeline

from face_fusion_pipeline import create_adapter, save_adapter
from face_fusion_pipeline.face_adapter import ADAPTER_WEIGHTS_NAME
from face_fusion_pipeline.generation.provenance import public_name
from face_fusion_pipeline.publishing import repository
from face_fusion_pipeline.training.model_card import write_card
from face_fusion_pipeline.training.task import FaceFusionOptions


RUN = {
    "options": {"batch_size": 4, "lr": 1e-4},
    "trained_parameters": 1234,
    "steps": 2,
    "samples": 8,
    "seconds": 60,
    "processes": 1,
    "machine": "a machine",
    "date": "2026-01-02T03:04:05",
    "versions": {"torch": "2.13.0"},
}
REPORT = {
    "kept": 9,
    "read": 10,
    "people": 3,
    "skipped": {"no face": 1},
    "paired_with_another_photo": 6,
    "paired_with_itself": 3,
    "settings": {"resolution": 16},
}


@pytest.fixture
def pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> Any:
    """A function from the base, as it was given to `face-fusion train`, to the card that goes to the Hub."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "data" / "metadata.jsonl").write_text("{}\n")
    base = tiny_pipeline(family=family)
    adapter = create_adapter(base.unet, metadata={"resolution": 16})
    (tmp_path / "weights").mkdir()
    save_adapter(adapter, tmp_path / "weights" / ADAPTER_WEIGHTS_NAME)
    monkeypatch.chdir(tmp_path)

    def card(model: str) -> ModelCard:
        task: Any = SimpleNamespace(name="face-fusion", settings=asdict(FaceFusionOptions()), adapter=adapter)
        task.base = SimpleNamespace(pipeline=base)
        weights, command = tmp_path / "weights", ["face-fusion", "train", "--model", model]
        write_card(weights, model, tmp_path / "data", task, RUN, command)
        assert str(tmp_path) not in (weights / "training.json").read_text()
        files = repository.repository_files(weights, "me/ada")
        return ModelCard(files["README.md"].decode())  # type: ignore[union-attr]

    return card


@pytest.fixture
def family() -> str:
    """Of the base, where a test says no other."""
    return "sd"


def bases(card: ModelCard) -> list[str]:
    """What its snippet and its command load as the base."""
    return re.findall(r'from_pretrained\("([^"]+)"|--model (\S+) --adapter me/ada', card.text)


def test_a_base_of_the_hub_is_named(pushed: Any) -> None:
    card = pushed("someone/sd-1.5")
    assert card.data.base_model == "someone/sd-1.5"
    assert bases(card) == [("someone/sd-1.5", ""), ("", "someone/sd-1.5")]
    assert "was a folder" not in card.text


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_the_repository_draws_with_the_family_of_the_base(pushed: Any, tmp_path: Path, family: str) -> None:
    card = pushed("someone/model")
    files = repository.repository_files(tmp_path / "weights")
    kind = "StableDiffusionXL" if family == "xl" else "StableDiffusion"
    assert f"class {kind}FaceFusionPipeline(" in files["pipeline.py"].read_text()  # type: ignore[union-attr]
    assert ("pipeline_xl_img2img.py" in files) == ("stable-diffusion-xl" in card.data.tags) == (family == "xl")
    assert "pipeline_xl.py" not in files and "pipeline_controlnet.py" in files


def test_a_copy_in_the_cache_of_the_hub_is_named_by_its_id(pushed: Any, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some-one--sd--1.5" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    card = pushed(str(snapshot))
    assert card.data.base_model == "some-one/sd--1.5" and "0123abcd" not in card.text
    assert bases(card) == [("some-one/sd--1.5", ""), ("", "some-one/sd--1.5")]


@pytest.mark.parametrize("given", ["{}/models/mine", "models/mine", "./models/mine"])
def test_a_folder_is_no_base_of_the_hub(pushed: Any, tmp_path: Path, given: str) -> None:
    """`models/mine` looks like an id, but the folder is what was loaded."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    card = pushed(given.format(tmp_path))
    assert card.data.base_model is None and "models/mine" not in card.content
    assert bases(card) == [("mine", ""), ("", "mine")]
    assert '# "mine" was a folder' in card.text


def test_the_base_is_named_as_it_was_given(pushed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link keeps its own name, and the folder where one stands has one."""
    (tmp_path / "3f2a").mkdir()
    (tmp_path / "sd15").symlink_to(tmp_path / "3f2a", target_is_directory=True)
    assert bases(pushed("sd15")) == [("sd15", ""), ("", "sd15")]
    assert [public_name(word) for word in ("sd15/", "./sd15", str(tmp_path / "sd15"))] == ["sd15"] * 3
    monkeypatch.chdir(tmp_path / "3f2a")
    assert public_name(".") == "3f2a" and public_name("a portrait") == "a portrait"
    assert public_name("word " * 2000) == "word " * 2000 and public_name("a\0b") == "a\0b"


def test_the_card_shows_the_last_picture_here_and_not_on_the_hub(pushed: Any, tmp_path: Path) -> None:
    logs = tmp_path / "weights" / "logs" / "face-fusion"
    logs.mkdir(parents=True)
    for step in (5, 10):
        (logs / f"sample_{step:07d}.png").touch()
    card = pushed("someone/sd-1.5")
    here = (tmp_path / "weights" / "README.md").read_text()
    assert "<Gallery />\n\n<!-- of the training" in here and "](logs/face-fusion/sample_0000010.png)" in here
    assert "sample_" not in card.content and "of the training, on this machine" not in card.content
    assert "<Gallery />\n\n## Use" in card.content
