"""What FaceSnap's parts give: variants differ in what they say, and are drawn as they were trained, once."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train_snap import PlacedModel, batch_of, place, task_of  # noqa: F401, a fixture

from face_fusion_pipeline.avatars.ablations import snap_parts
from face_fusion_pipeline.avatars.ablations.snap_parts import VARIANTS, PartsTask, Variant, five_points
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_landmarks import POINTS
from face_fusion_pipeline.generation.avatar_model import embedded_model


def test_five_points_are_those_of_the_72():
    points = torch.rand(2, POINTS, 3)
    found = five_points(points)
    assert found.shape == points.shape
    assert all(len(face.unique(dim=0)) == 5 for face in found)
    left = points[:, 36:44].mean(1)
    assert torch.allclose(found[:, 36], left) and torch.allclose(found[:, 43], left)
    for own in (30, 52, 58):
        assert torch.equal(found[:, own], points[:, own])
    assert torch.equal(found[:, 0], points[:, 30])
    assert five_points(torch.full((1, POINTS, 2), torch.nan)).isnan().all()


def parts_of(place, variant: Variant) -> PartsTask:  # noqa: F811
    task = task_of(place, face_dropout=0.0, points_dropout=0.0, text_dropout=0.0, both_dropout=0.0)
    parts = (task.base, task.adapter, task.network, task.pairs, task.features)
    return PartsTask(variant, *parts, options=task.options)


def predictions(task: PartsTask, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), task.fused(batch, task.identity_tokens(batch)):
        return task.predicted(batch, batch["latents"])


def test_a_variant_sees_what_it_says(place):  # noqa: F811
    seen = {}
    for name, variant in VARIANTS.items():
        task = parts_of(place, variant)
        seen[name] = batch_of(task)
        seen[name]["predicted"] = predictions(task, seen[name])
        assert task.subject["vector"] is variant.vector
        other = seen[name] | {"face": seen[name]["face"].flip(0) + 1}
        assert torch.equal(predictions(task, other), seen[name]["predicted"]) is variant.reads_text
    whole = seen["whole"]
    assert whole["face"].any() and whole["patches"].any()
    assert not seen["vector alone"]["patches"].any() and torch.equal(seen["vector alone"]["face"], whole["face"])
    assert not seen["patches alone"]["face"].any()
    assert torch.equal(seen["five points"]["points"], five_points(whole["points"]))
    assert not torch.equal(seen["text in place of tokens"]["predicted"], whole["predicted"])
    assert VARIANTS["identity loss"] == replace(Variant(), identity_loss=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    words = ["prepare", "avatars:12", "--model", str(embedded_model()), "--out", str(folder / "data")]
    assert main(words) == 0
    return folder / "data"


def test_the_command(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    words = ["avatars-evaluate", "snap-parts", "--data", str(data), "--out", str(out), "--identities", "2"]
    words += [
        "--prompts",
        "1",
        "--steps",
        "1",
        "--training-steps",
        "1",
        "--train-batch-size",
        "2",
        "--seeds",
        "0",
        "1",
    ]
    some = ["--variants", "whole", "text in place of tokens", "five points"]
    assert main([*words, *some]) == 0
    printed = capsys.readouterr().out
    assert "| text in place of tokens |" in printed and "1 steps of 2" in printed
    result = json.loads((out / "snap_parts.json").read_text())
    assert set(result["variants"]) == {
        "whole",
        "text in place of tokens",
        "five points",
        "true render",
        "somebody else",
    }
    whole, truth = result["variants"]["whole"], result["variants"]["true render"]
    assert len(whole["by_seed"]) == 2 and whole["spread"] >= 0
    assert truth["spread"] is None and truth["similarity"]["avatar recogniser"]["normalised"] == 1
    assert truth["driver"]["yaw"]["median"] < whole["driver"]["yaw"]["median"] + 45

    # What is trained and drawn stays; what is missing is made.
    monkeypatch.setattr(snap_parts, "train", None)
    shutil.rmtree(out / "whole" / "seed-1" / "pictures")
    assert main([*words, *some]) == 0
    again = json.loads((out / "snap_parts.json").read_text())
    assert again["variants"]["whole"]["by_seed"] == whole["by_seed"]

    capsys.readouterr()
    assert main([*words, *some, "--learning-rate", "1e-5"]) == 2
    assert "holds runs with another training" in capsys.readouterr().err
    other = tmp_path / "face_snap"
    shutil.copytree(embedded_model() / "face_snap", other)
    network = other / "ffrnet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(network).items()}, network)
    assert main([*words, *some, "--snap", str(other)]) == 2
    assert "holds runs with another sampling" in capsys.readouterr().err
    assert main([*words, "--variants", "a unicorn"]) == 2
    assert "no variant 'a unicorn': choose from 'whole'" in capsys.readouterr().err
