"""Publishing a trained model: the parts without logs, a card with the records, and nothing half done."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from face_fusion_pipeline.avatars.training import publish
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_errors import FaceFusionError, ModelNotFoundError


RECORD = {
    "steps": 1234,
    "options": {"batch_size": 8, "seed": 5},
    "trained_parameters": 99_000,
    "seconds": 90,
    "threads": 2,
    "machine": "a machine",
    "date": "2026-01-02T03:04:05",
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def trained(tmp_path):
    model = tmp_path / "model"
    for part in publish.PARTS:
        (model / part).mkdir(parents=True)
        (model / part / "config.json").write_text(json.dumps({"_name_or_path": "elsewhere", "size": 1}))
    save_file({"w": torch.zeros(10)}, model / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({"w": torch.zeros(10)}, model / "face_fusion_adapter.safetensors")
    (model / "model_index.json").write_text("{}")
    continued = {**RECORD, "steps": 77, "continues": RECORD}
    (model / "training.json").write_text(json.dumps({"unet": continued, "adapter": RECORD}))
    (model / "logs").mkdir()
    return model


def test_copies_parts_and_writes_the_card(trained, tmp_path):
    table = tmp_path / "table.md"
    table.write_text("| measured |\n")
    out = tmp_path / "out"
    size = publish.publish(trained, out, [table], "A note.")
    assert size == sum(path.stat().st_size for path in trained.rglob("*.safetensors"))
    assert not (out / "logs").exists()
    assert json.loads((out / "unet" / "config.json").read_text()) == {"size": 1}
    card = (out / "README.md").read_text()
    assert card.index("| UNet | 99,000 | 1,234 × 8") < card.index("| UNet | 99,000 | 77 × 8"), "earlier runs first"
    for words in ("1,234 × 8", "99,000", "1.5 min", "a machine", "2026-01-02", "| measured |", "A note."):
        assert words in card
    assert card.startswith("---\nlicense: apache-2.0\n")


def test_the_card_counts_the_threads_of_all_processes():
    record = RECORD | {"machine": "a CPU, 2 cores", "threads": 1}
    assert "1.5 min, 1 thread |" in publish._row("UNet", record)
    assert "1.5 min, 2 threads |" in publish._row("UNet", record | {"processes": 2})
    assert "1.5 min |" in publish._row("UNet", record | {"machine": "a GPU"})


def test_the_adapter_may_come_from_another_folder(trained, tmp_path):
    weights, out = tmp_path / "weights", tmp_path / "out"
    weights.mkdir()
    (trained / "face_fusion_adapter.safetensors").unlink()
    save_file({"w": torch.ones(3)}, weights / "face_fusion_adapter.safetensors")
    (weights / "training.json").write_text(json.dumps({"face-fusion": {**RECORD, "steps": 4321}}))
    publish.publish(trained, out, [], adapter=weights)
    assert torch.equal(load_file(out / "face_fusion_adapter.safetensors")["w"], torch.ones(3))
    assert json.loads((out / "training.json").read_text())["adapter"]["steps"] == 4321
    assert "| Face Fusion adapter | 99,000 | 4,321 × 8" in (out / "README.md").read_text()


def test_missing_part_or_too_large_leaves_everything_as_it_was(trained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    (trained / "model_index.json").rename(trained / "elsewhere.json")
    assert main(["avatars-publish", "--model", str(trained), "--out", str(out)]) == 2
    assert "model_index.json" in capsys.readouterr().err
    (trained / "elsewhere.json").rename(trained / "model_index.json")
    monkeypatch.setattr(publish, "SIZE_LIMIT", 10)
    assert main(["avatars-publish", "--model", str(trained), "--out", str(out)]) == 2
    assert "MB" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("absent", ["unet", "tokenizer", publish.ADAPTER_WEIGHTS_NAME, "training.json", "table.md"])
def test_whatever_is_missing_is_named_before_anything_is_written(absent, trained, tmp_path):
    table = trained / "table.md"
    table.write_text("| measured |\n")
    (trained / absent).rename(tmp_path / "elsewhere")
    with pytest.raises(ModelNotFoundError, match=f"{absent} missing"):
        publish.publish(trained, tmp_path / "out", [table])
    assert not (tmp_path / "out").exists()


def test_the_limit_of_the_weights_is_allowed_and_a_byte_more_is_not(trained, tmp_path, monkeypatch):
    size = sum(path.stat().st_size for path in trained.rglob("*.safetensors"))
    monkeypatch.setattr(publish, "SIZE_LIMIT", size - 1)
    with pytest.raises(FaceFusionError, match="more than"):
        publish.publish(trained, tmp_path / "out", [])
    monkeypatch.setattr(publish, "SIZE_LIMIT", size)
    assert publish.publish(trained, tmp_path / "out", []) == size


def test_publishing_again_leaves_nothing_of_the_parts_before(trained, tmp_path):
    old = trained / "unet" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file({"w": torch.zeros(3)}, old)
    publish.publish(trained, tmp_path / "out", [])
    old.unlink()
    publish.publish(trained, tmp_path / "out", [])
    published = {path.name for path in (tmp_path / "out" / "unet").iterdir()}
    assert published == {path.name for path in (trained / "unet").iterdir()}


def test_the_folder_that_is_published_from_is_no_place_for_the_result(trained, tmp_path):
    before = {path: path.read_bytes() for path in trained.rglob("*.*")}
    with pytest.raises(FaceFusionError, match="take another folder"):
        publish.publish(trained, trained / "unet" / "..", [])
    assert {path: path.read_bytes() for path in trained.rglob("*.*")} == before


def test_the_card_counts_every_run_and_orders_the_parts():
    hours = {
        name: {**RECORD, "seconds": 3600 * n} for n, name in enumerate(("adapter", "unet", "clip-text", "vae"), 1)
    }
    hours["unet"]["continues"] = {**RECORD, "seconds": 3600 * 5, "continues": {**RECORD, "seconds": 3600 * 6}}
    text = publish.card(hours, [], 12_300_000, "A note.")
    assert "Cost: 21.0 hours" in text and "12.3 MB" in text and "torch 2.13.0. A note." in text
    parts = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if "1,234 × 8" in line]
    assert parts == ["autoencoder", "CLIP (text alone)", "UNet", "UNet", "UNet", "Face Fusion adapter"]


def test_the_card_names_what_lies_beside_the_model():
    text = publish.card({"unet": RECORD}, [], 1, "", ["controlnet", "face_snap"])
    assert "`controlnet/` holds a depth ControlNet for it" in text and "`face_snap/` holds those of FaceSnap" in text
    assert "FaceStudio" not in text
    assert "ControlNet" not in publish.card({"unet": RECORD}, [], 1, "")


@pytest.mark.parametrize("name", publish.BESIDE)
def test_what_lies_beside_the_model_goes_along_within_a_limit_of_its_own(trained, tmp_path, monkeypatch, name):
    file = Path(name, "below", "weights.safetensors")
    (trained / file).parent.mkdir(parents=True)
    (trained / name / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1000)}, trained / file)
    monkeypatch.setitem(publish.BESIDE, name, (3000, "something"))
    with pytest.raises(FaceFusionError, match=f"{name} are 0.0 MB, more than"):
        publish.publish(trained, tmp_path / "out", [])
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(publish.BESIDE, name, (10_000, "something"))
    size = publish.publish(trained, tmp_path / "out", [])
    assert (tmp_path / "out" / file).is_file()
    assert size < 4000, "it is not counted with the model"
    assert f"`{name}/` holds something." in (tmp_path / "out" / "README.md").read_text()
    (trained / name).rename(tmp_path / "elsewhere")
    publish.publish(trained, tmp_path / "out", [])
    assert not (tmp_path / "out" / name).exists()
