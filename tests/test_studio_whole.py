"""FaceStudio's whole UNet against its LoRA: what learns, what teaches, and what the command trains, keeps and says."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_face_studio import toy_prior
from test_train_studio import prepared_place
from tiny_models import with_adapter

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline
from face_fusion_pipeline.avatars.ablations import studio_whole
from face_fusion_pipeline.avatars.ablations.studio_whole import LORA, UNET_NAME, WHOLE, StudioBudget, StudioTrainer
from face_fusion_pipeline.avatars.ablations.studio_whole_table import METHODS, differences
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.evaluation.generation import Settings
from face_fusion_pipeline.face_embedders import WEIGHTS_NAME
from face_fusion_pipeline.training.loop import Part


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A tiny base, prepared avatars, Face Fusion weights, and what lies beside FaceStudio's."""
    place: Path = tmp_path_factory.mktemp("whole")
    with_adapter(prepared_place(place, 24)).save_face_fusion_adapter(place / "teacher")
    (place / "base" / "face_studio" / "prior").mkdir(parents=True)  # a toy stands for it
    shutil.copy(place / WEIGHTS_NAME, place / "base" / "face_studio")
    return place


@pytest.fixture
def toys(monkeypatch: Any) -> None:
    load = StableDiffusionFaceFusionPipeline.load_face_studio

    def with_toy(pipe: Any, *args: Any, **kwargs: Any) -> None:
        load(pipe, *args, **{**kwargs, "prior": toy_prior})

    monkeypatch.setattr(StableDiffusionFaceFusionPipeline, "load_face_studio", with_toy)


def trainer_of(place: Path, out: Path, **more: Any) -> StudioTrainer:
    budget = StudioBudget(steps=2, batch_size=2)
    return StudioTrainer(str(place / "base"), place / "data", out, budget, str(place / "base" / "face_studio"), **more)


def a_batch(task: Any) -> dict[str, torch.Tensor]:
    rows = torch.arange(2)
    batch: dict[str, torch.Tensor] = task.part(Part(0, 0, 2, rows, rows), torch.Generator().manual_seed(0), 0.0)
    return batch


def test_the_whole_unet_learns_and_the_teacher_stays_what_it_was(place, tmp_path):
    trainer = trainer_of(place, tmp_path, teacher=place / "teacher")
    lora, whole = (trainer.task(variant, 0) for variant in (LORA, WHOLE))
    learning = {name for name, weight in whole.named_parameters() if weight.requires_grad}
    own = {f"unet.{name}" for name, _ in whole.base.unet.named_parameters() if not name.startswith("face_studio.")}
    assert learning == own | {"adapter.projection.weight", "adapter.projection.bias"}
    assert {name for name, weight in lora.named_parameters() if weight.requires_grad}.isdisjoint(own)
    assert torch.equal(lora.adapter.projection.weight, whole.adapter.projection.weight)
    assert lora.options == whole.options and lora.options.teacher_weight == 1

    batch = a_batch(lora)
    torch.testing.assert_close(a_batch(whole), batch, rtol=0, atol=0, equal_nan=True)  # NaN: nobody else is there
    noisy = lora.base.schedule.noised(batch["latents"], batch["noise"], batch["timesteps"])
    taught = lora.taught(batch, noisy, {})
    assert torch.allclose(whole.taught(batch, noisy, {}), taught, atol=1e-5)
    before = whole(batch)[0]
    with torch.no_grad():
        for weight in whole.base.unet.parameters():
            weight.add_(0.05)
    assert torch.allclose(whole.taught(batch, noisy, {}), taught, atol=1e-5)
    assert not torch.allclose(whole(batch)[0], before)


def run(place: Path, out: Path, *options: str) -> int:
    words = ["--model", str(place / "base"), "--data", str(place / "data"), "--out", str(out), "--steps", "1"]
    words += ["--train-batch-size", "2", "--identities", "2", "--teacher", str(place / "teacher")]
    length = [] if "--training-minutes" in options or "--training-steps" in options else ["--training-steps", "2"]
    return main(["avatars-evaluate", "studio-whole", *words, *length, *options])


def test_both_are_trained_once_and_compared(place, toys, tmp_path, capsys, monkeypatch):
    trained: list[str] = []
    train = studio_whole.train

    def noted(task: Any, *args: Any) -> Any:
        trained.append(task.name)
        if trained == ["face-studio", "face-studio-whole"]:
            raise KeyboardInterrupt  # stopped before the second has begun
        return train(task, *args)

    monkeypatch.setattr(studio_whole, "train", noted)
    assert run(place, tmp_path, "--seeds", "0") == 130
    assert run(place, tmp_path, "--seeds", "0") == 0
    assert trained == ["face-studio", "face-studio-whole", "face-studio-whole"]
    result = json.loads((tmp_path / "studio_whole.json").read_text())
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed-*/pictures/images/*.png")}
    assert len(drawn) == 2 * 2 * len(METHODS)
    lora, whole = result["trainings"]
    assert (lora["variant"], whole["variant"]) == (LORA, WHOLE)
    assert lora["steps"] == whole["steps"] == 2 and lora["trained_parameters"] < whole["trained_parameters"]
    assert (lora["learning_rate"], whole["learning_rate"]) == (1e-3, 1e-4)
    assert lora["held_out"] > 0 and whole["held_out"] > 0
    names = [f"{variant}: {method}" for method in METHODS for variant in (LORA, WHOLE)]
    assert list(result["methods"]) == [*names, "true render", "somebody else"]
    assert list(result["differences"]) == list(METHODS)
    text = (tmp_path / "studio_whole.md").read_text()
    assert text in capsys.readouterr().out and "The whole UNet less the LoRA" in text and result["machine"] in text

    assert run(place, tmp_path, "--seeds", "0", "1") == 0  # another seed: only its trainings are made
    assert trained[3:] == ["face-studio", "face-studio-whole"]
    assert all(path.stat().st_mtime_ns == at for path, at in drawn.items())
    by_seed = json.loads((tmp_path / "studio_whole.json").read_text())["differences"][METHODS[0]]["likeness"]
    assert list(by_seed["by_seed"]) == ["0", "1"] and by_seed["count"] == 4

    capsys.readouterr()
    assert run(place, tmp_path, "--seeds", "0", "--whole-learning-rate", "1e-5") == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "holds runs with another budget" in line and "choose another --out" in line


def test_pictures_are_drawn_with_the_weights_that_learned(place, toys, tmp_path):
    trainer = trainer_of(place, tmp_path)
    folder, record = trainer.trained(WHOLE, 0)
    assert record["options"]["teacher_weight"] == 0  # nobody teaches
    pipe, own = trainer.pipeline(folder, Settings.of(trainer.model), "cpu")
    state = pipe.unet.state_dict()
    kept = load_file(folder / UNET_NAME)
    assert all(torch.equal(state[name], weight) for name, weight in kept.items())
    assert state.keys() - kept.keys() == {"face_studio.projection.weight", "face_studio.projection.bias"}
    base = StableDiffusionFaceFusionPipeline.from_pretrained(trainer.model).unet.state_dict()
    assert not any(torch.equal(base[name], weight) for name, weight in kept.items() if name.endswith("to_k.weight"))
    assert own.weights_hash != Settings.of(trainer.model).weights_hash


def test_a_difference_is_of_the_same_picture_and_its_seeds_are_told():
    class Panel:
        class evaluators:  # noqa: N801
            name = "r"

    seen = {"expression": "a", "clothing": "b", "background": "c", "people": "1"}
    rows = [
        {
            "method": f"{variant}: {METHODS[0]}",
            "person": person,
            "training": seed,
            "similarity": {"r": 0.1 * person + gain * (seed + 1)},
            "wanted": seen,
            "said": seen if variant == LORA else seen | {"clothing": "x"},
            "eyes": variant == WHOLE,
        }
        for seed in (0, 1)
        for variant, gain in ((LORA, 0.0), (WHOLE, 0.2))
        for person in range(3)
    ]
    found = differences(rows, METHODS[0], Panel, 0)  # type: ignore[arg-type]
    assert found["likeness"]["mean"] == pytest.approx(0.3)
    assert found["likeness"]["by_seed"] == pytest.approx({"0": 0.2, "1": 0.4})
    assert found["obedience"]["mean"] == -0.25 and found["eyes"]["mean"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--training-steps", "1", "--training-minutes", "1"], "not allowed with"),
        (["--seeds", "1", "1"], "--seeds must be different numbers, got [1, 1]"),
        (["--data", "nowhere"], "nowhere"),
        (["--teacher", "nowhere"], "nowhere"),
        (["--studio", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_named_before_anything_is_trained(place, tmp_path, capsys, options, said):
    assert run(place, tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("out/*/seed-*"))


def test_a_training_has_a_length(place, tmp_path, capsys):
    words = ["--data", str(place / "data"), "--out", str(tmp_path)]
    assert main(["avatars-evaluate", "studio-whole", *words]) == 2
    assert "--training-steps --training-minutes is required" in capsys.readouterr().err


def test_equal_minutes_are_given_to_both():
    budget = StudioBudget(minutes=3.0, precision="bf16")
    lora, whole = (budget.loop(variant, 1) for variant in (LORA, WHOLE))
    assert lora.minutes == whole.minutes == 3 and lora.steps is None and lora.seed == whole.seed == 1
    assert lora.precision == "bf16" and (lora.lr, whole.lr) == (1e-3, 1e-4)
