"""FaceSnap's mixer and ControlNet are trained by the command that trains Face Fusion, from features computed once."""

import json
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_face_snap import PATCH_WIDTH, ToyModel
from test_face_studio import toy_encoder
from test_finetuning import SELECTION, write_photos
from test_train_studio import prepared_place
from tiny_models import face, tiny_pipeline

from face_fusion_pipeline.avatars import sample_identity, sample_scene
from face_fusion_pipeline.avatars.world.caption import EXPRESSION_WORDS, caption
from face_fusion_pipeline.cli import _train_snap, main
from face_fusion_pipeline.conditioner_face_snap import mixed_tokens
from face_fusion_pipeline.face_attached import detach_module
from face_fusion_pipeline.face_embedders import WEIGHTS_NAME, AvatarEmbedder
from face_fusion_pipeline.face_errors import LandmarksError
from face_fusion_pipeline.face_files import read_tensors
from face_fusion_pipeline.face_landmarks import POINTS
from face_fusion_pipeline.face_pictures import load_image
from face_fusion_pipeline.face_snap import NETWORK, SNAP_WEIGHTS_NAME, SnapMetadata, new_mixer, new_network
from face_fusion_pipeline.publishing import repository
from face_fusion_pipeline.training import snap_cache
from face_fusion_pipeline.training.base_model import load_base
from face_fusion_pipeline.training.example_pictures import decoded
from face_fusion_pipeline.training.hidden_phrases import encode_without, without_phrases
from face_fusion_pipeline.training.latent_cache import cache_folders
from face_fusion_pipeline.training.loop import Part
from face_fusion_pipeline.training.pairs import Pairs, split_people
from face_fusion_pipeline.training.preparation import PrepareOptions, prepare, read_rows
from face_fusion_pipeline.training.snap import HIDDEN_GUIDANCE, HIDDEN_WEIGHT, SnapOptions, SnapTask
from face_fusion_pipeline.training.snap_cache import SnapFeatures, encode_snap_features, points_of
from face_fusion_pipeline.training.sources import DataError, open_source


class PlacedModel(ToyModel):
    """The toy's points in the box that it is given."""

    def fit(self, photo: Any, box: Any = None) -> Any:
        found = super().fit(photo, box)
        x0, y0, x1, y1 = box
        return replace(found, pose=replace(found.pose, x=(x0 + x1) / 2, y=(y0 + y1) / 2, scale=(y1 - y0) / 8))


class Colours(torch.nn.Module):
    """Who somebody is: the mean colour of the picture."""

    def forward(self, images: torch.Tensor, landmarks5: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A base with an image encoder, a face embedder, and rendered data for the base."""
    place: Path = tmp_path_factory.mktemp("snap")
    prepared_place(place)
    return place


@pytest.fixture
def train(place: Path, monkeypatch: Any) -> Any:
    module = types.ModuleType("colours")
    module.embedder = Colours
    monkeypatch.setitem(sys.modules, "colours", module)
    monkeypatch.setattr(_train_snap, "face_model", lambda args: PlacedModel())

    def run(out: Path, *options: str) -> int:
        words = ["--model", str(place / "base"), "--data", str(place / "data"), "--out", str(out)]
        words += ["--face-embedder", str(place / WEIGHTS_NAME), "--train-batch-size", "2", "--log-every", "1"]
        return main(["train", "--conditioner", "face-snap", *words, "--validation-people", "1", *options])

    return run


def weights(out: Path) -> dict[str, torch.Tensor]:
    mixer, _ = read_tensors(out / SNAP_WEIGHTS_NAME)
    network, _ = read_tensors(out / NETWORK / "diffusion_pytorch_model.safetensors")
    return {**mixer, **{f"{NETWORK}.{name}": tensor for name, tensor in network.items()}}


def test_weights_card_and_resume(train, tmp_path, capsys, monkeypatch):
    options = ("--snap-tokens", "3", "--snap-depth", "1", "--checkpointing-steps", "2", "--max-train-steps", "4")
    options += (
        "--validation-steps",
        "2",
        "--identity-embedder",
        "colours:embedder",
        "--learning-rate",
        "1e-3",
        "--snap-context",
        "append",
    )
    straight, again = tmp_path / "straight", tmp_path / "again"
    assert train(straight, *options) == 0
    assert "facial points of" in capsys.readouterr().out
    metadata = SnapMetadata.from_strings(read_tensors(straight / SNAP_WEIGHTS_NAME)[1])
    assert (metadata.tokens, metadata.depth, metadata.context) == (3, 1, "append")
    assert (metadata.image_width, metadata.face_width) == (PATCH_WIDTH, 256)
    record = json.loads((straight / "training.json").read_text())["face-snap"]
    assert (record["learned"]["identity_loss_weight"], record["learned"]["identity_loss_until"]) == (0.1, 1.0)
    assert "face_mode" not in record["learned"]
    card = (straight / "README.md").read_text()
    assert "Loss of people set aside, with the same noise: right_face" in card
    assert "# FaceSnap weights for base" in card and "FaceSnap's mixer and its ControlNet" in card
    assert str(tmp_path) not in card + json.dumps(record)
    tensors = weights(straight)
    assert tensors[f"{NETWORK}.controlnet_mid_block.weight"].abs().max() > 0  # it began with zeros

    # Features are there already, and a run that was stopped goes on to the same weights.
    monkeypatch.setattr(snap_cache, "picture_patches", None)
    assert train(again, *options) == 0
    (again / SNAP_WEIGHTS_NAME).unlink()
    for path in sorted((again / "checkpoint-4").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (again / "checkpoint-4").rmdir()
    assert train(again, *options) == 0
    resumed = weights(again)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors.items())

    files = repository.repository_files(straight, "me/snap")
    assert {"README.md", "pipeline.py", SNAP_WEIGHTS_NAME, f"{NETWORK}/config.json", "training.json"} <= files.keys()
    assert {"face_snap.py", "face_attached.py", "conditioner_tokens.py"} <= files.keys()


def test_a_trained_folder_draws(place, train, tmp_path):
    assert train(tmp_path / "out", "--max-train-steps", "1", "--snap-depth", "1") == 0
    pipe = tiny_pipeline()
    pipe.image_encoder = toy_encoder()
    pipe.load_face_snap(tmp_path / "out", face_embedder=str(place / WEIGHTS_NAME))
    dots = np.random.default_rng(0).uniform(1, 15, (POINTS, 2))
    assert pipe("a cat", face_image=face(), driver_image=dots, num_inference_steps=2).images[0].size == (16, 16)


def test_it_learns_of_photos(train, tmp_path):
    """Their points are those of the prepared pictures, in whose pixels their boxes are."""
    pipe = tiny_pipeline()
    pipe.register_modules(image_encoder=toy_encoder())
    pipe.save_pretrained(tmp_path / "base")
    photos = write_photos(tmp_path / "photos", ["ada", "bob", "ada", "bob", "cy", "cy"])
    prepare(open_source(photos), tmp_path / "data", PrepareOptions(SELECTION), progress=False)
    words = ("--model", str(tmp_path / "base"), "--data", str(tmp_path / "data"))
    assert train(tmp_path / "out", *words, "--max-train-steps", "1", "--snap-depth", "1") == 0
    (folder,) = (tmp_path / "data" / "snap").iterdir()
    rows = read_rows(tmp_path / "data")
    picture = load_image(tmp_path / "data" / rows[0]["file_name"])
    expected = points_of(PlacedModel(), picture, tuple(rows[0]["box"]))
    assert torch.allclose(SnapFeatures(folder, len(rows)).points([0])[0], expected)


# --- The task ----------------------------------------------------------------------------------------------------


def task_of(
    place: Path,
    context: str = "none",
    embedder: Any = None,
    base: Any = None,
    data: str = "data",
    phrases: Sequence[str] = (),
    **options: Any,
) -> SnapTask:
    base = base or load_base(place / "base")
    cache = cache_folders(place / data, base)
    torch.manual_seed(0)
    known_by, encoder = AvatarEmbedder().eval(), base.pipeline.image_encoder
    made = encode_snap_features(
        *(place / data, base, cache, encoder, known_by, PlacedModel()), model_name="toy", oval=0.9, progress=False
    )
    rows = read_rows(place / data)
    people, _ = split_people(rows, 0, 0)
    pairs = Pairs(place / data, cache, people)
    sizes = {"image_width": PATCH_WIDTH, "face_width": 256, "depth": 1, "tokens": 2}
    mixer = new_mixer(base.unet, **sizes, face_embedder="avatars", context=context)
    network = new_network(base.unet, 2)
    for name, parameter in network.named_parameters():
        if name.startswith("controlnet_") and "embedding" not in name:  # zeros let no gradient through
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(network.controlnet_cond_embedding.conv_out.weight, std=0.1)
    features = SnapFeatures(made, len(rows))
    hidden = encode_without(place / data, base, cache, phrases, progress=False) if phrases else None
    chosen = SnapOptions(**options)
    return SnapTask(base, mixer, network, pairs, features, options=chosen, embedder=embedder, hidden=hidden)


def batch_of(task: SnapTask, size: int = 4) -> dict[str, torch.Tensor]:
    rows = torch.arange(size)
    return task.part(Part(0, 0, size, rows, rows), torch.Generator().manual_seed(0), 0.0)


def test_gradients_reach_both_parts_and_nothing_else(place):
    check_gradients(task_of(place, face_dropout=0.0, points_dropout=0.0))


def test_sdxl_goes_through_the_same_task(place):
    pipe = tiny_pipeline(family="xl")
    pipe.unet.register_to_config(sample_size=16)
    pipe.register_modules(image_encoder=toy_encoder())
    pipe.save_pretrained(place / "xl")
    assert main(["prepare", "avatars:12", "--model", str(place / "xl"), "--out", str(place / "xl data")]) == 0
    base = load_base(place / "xl")
    for context in ("none", "append"):
        task = task_of(place, context, base=base, data="xl data", face_dropout=0.0, points_dropout=0.0)
        check_gradients(task)
        detach_module(base.unet, "face_snap")


def check_gradients(task: SnapTask) -> None:
    loss, _ = task(batch_of(task))
    loss.backward()
    learning = {name: parameter for name, parameter in task.named_parameters() if parameter.grad is not None}
    reached = {name for name, parameter in learning.items() if parameter.grad.any()}
    assert {name.split(".")[0] for name in learning} == {"adapter", "network"}
    assert {"adapter.queries", "adapter.who.0.weight", "adapter.patches.0.weight"} <= reached
    assert "network.controlnet_cond_embedding.conv_in.weight" in reached
    frozen = [parameter for name, parameter in task.unet.named_parameters() if not name.startswith("face_snap.")]
    assert not any(parameter.requires_grad for parameter in frozen)
    assert "adapter.nobody" not in reached  # everybody was there


def test_training_sees_a_reference_as_the_pipeline_does(place):
    task = task_of(place)
    crop = decoded(task.base, task.pairs.shards.references([(0, 0)]).float())[0]
    pipe = task.base.pipeline
    torch.manual_seed(0)
    pipe._token_parts = {"face_snap": {"face_embedder": AvatarEmbedder().eval()}}
    identity = pipe.encode_face(crop, face_mode="face-snap")
    assert torch.allclose(identity.embeddings, task.features.faces([0]), atol=1e-5)
    assert torch.allclose(identity.features, task.features.patches([0]), atol=1e-2)  # stored in half precision
    rows = (torch.tensor([0]), [(0, 0)])
    batch = task.examples(task.pairs, *rows) | {"has_face": torch.ones(1, dtype=torch.bool)}
    assert torch.allclose(mixed_tokens(pipe, identity), task.identity_tokens(batch)["text"], atol=1e-2)


def test_a_reference_is_another_photo_than_the_target(place):
    task = task_of(place)
    for target, references in task.pairs.references.items():
        assert target not in {example for example, _ in references}


def test_the_loss_depends_on_who_it_is_and_where_the_points_are(place):
    task = task_of(place, face_dropout=0.0, points_dropout=0.0).eval()
    batch = batch_of(task)
    with torch.no_grad():
        right = task(batch)[0]
        assert torch.equal(task(batch)[0], right)
        assert not torch.equal(task({**batch, "face": batch["face"].flip(0)})[0], right)
        assert not torch.equal(task({**batch, "patches": batch["patches"].flip(0)})[0], right)
        assert not torch.equal(task({**batch, "points": batch["points"] + 3})[0], right)
        nobody = {**batch, "has_face": torch.zeros(4, dtype=torch.bool)}
        alone = task(nobody)[0]
        assert torch.equal(task({**nobody, "face": batch["face"].flip(0)})[0], alone)


def test_tokens_that_are_appended_are_not_seen_where_nobody_is(place):
    task = task_of(place, "append", face_dropout=0.0).eval()
    batch = batch_of(task)
    for parameter in task.network.parameters():
        torch.nn.init.zeros_(parameter)
    noisy, conditions = batch["latents"], {key: batch[key] for key in task.empty}
    with torch.no_grad():
        plain = task.unet(noisy, batch["timesteps"], **task.base.unet_arguments(conditions, 32)).sample
        for present in (True, False):
            seen = {**batch, "has_face": torch.full((4,), present)}
            with task.fused(seen, task.identity_tokens(seen)):
                found = task.predicted(seen, noisy)
            assert torch.allclose(found, plain, atol=1e-5) is not present


def test_the_identity_loss_is_weighed_by_the_share_of_the_picture(place):
    task = task_of(place, embedder=Colours(), identity_loss_weight=0.1, face_dropout=0.0)
    timesteps, present = torch.tensor([0, 500, 999]), torch.tensor([True, True, True])
    alphas = task.base.schedule.alphas
    assert torch.equal(task.identity_weights(timesteps, present), alphas[timesteps].sqrt())
    assert not task.identity_weights(timesteps, ~present).any()
    batch = batch_of(task)
    assert len(batch["recognised"]) == 4  # at all noise levels
    loss, extra = task(batch)
    without = task_of(place, face_dropout=0.0).train()(batch)[0]
    assert torch.allclose(loss, without + 0.1 * extra["identity_loss"], atol=1e-5)


def test_dropped_points_are_not_drawn(place):
    drawn = batch_of(task_of(place, points_dropout=0.0))["points"]
    assert drawn.isfinite().all()
    assert batch_of(task_of(place, points_dropout=1.0))["points"].isnan().all()


def test_a_face_that_cannot_be_fitted_has_no_points(place):
    class Blind(ToyModel):
        def fit(self, photo: Any, box: Any = None) -> Any:
            raise LandmarksError("a profile")

    assert points_of(Blind(), face(), (1, 1, 9, 9)).isnan().all()
    assert points_of(PlacedModel(), face(), (1, 1, 9, 9)).shape == (POINTS, 2)
    base = load_base(place / "base")
    looks = (place / "data", base, cache_folders(place / "data", base), base.pipeline.image_encoder)
    made = encode_snap_features(*looks, AvatarEmbedder().eval(), Blind(), model_name="blind", oval=0.0, progress=False)
    with pytest.raises(DataError, match="could fit no face"):
        SnapFeatures(made, len(read_rows(place / "data")))


# --- Hidden phrases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a person in a suit, smiling, at the beach", "a person in a suit, at the beach"),
        ("a person in a suit, in a garden, with a smile", "a person in a suit, in a garden"),
        ("Smiling, a person in a suit", "a person in a suit"),
        ("a smiling person", "a person"),
        ("a person laughing out loud, watercolor", "a person, watercolor"),
        ("a smilingly kept secret", "a smilingly kept secret"),
    ],
)
def test_phrases_are_taken_out_of_captions(text, left):
    assert without_phrases(text, ["laughing", "laughing out loud", "smiling", "with a smile"]) == left


def test_what_is_hidden_is_learned_from_the_weights_at_the_start_which_read_it(place):
    options = {"face_dropout": 0.0, "text_dropout": 0.0, "both_dropout": 0.0, "points_dropout": 0.0}
    before = batch_of(task_of(place, **options))
    phrases = ["a", "photo", "picture"]  # a tiny tokenizer reads the first words alone
    task = task_of(place, phrases=phrases, hidden_fraction=0.5, **options).train()
    batch = batch_of(task)
    unread = batch["unread"].tolist()
    assert len(unread) == 2
    assert task.hidden is not None
    left = task.hidden.take([task.pairs.targets[row] for row in range(4)])["text"].float()
    for row in range(4):
        assert torch.equal(batch["text"][row], (left if row in unread else before["text"])[row])
    assert not torch.equal(batch["text"], before["text"])

    noisy = task.base.schedule.noised(batch["latents"], batch["noise"], batch["timesteps"])
    with torch.no_grad(), task.fused(before, task.identity_tokens(before)):
        whole, part = task.predicted(before, noisy), task.predicted(batch, noisy)
        taught = part + HIDDEN_GUIDANCE * (whole - part)
        for parameter in (*task.adapter.parameters(), *task.network.parameters()):  # what is learned does not teach
            parameter.add_(1.0)
        target = task.target(batch, noisy, {})
    plain = task.base.schedule.target(batch["latents"], batch["noise"], batch["timesteps"])
    for row in range(4):
        assert torch.allclose(target[row], (taught if row in unread else plain)[row], atol=1e-5)

    halves = []  # of two processes, or two parts of a batch
    for half in (torch.arange(2), torch.arange(2, 4)):
        part = task.part(Part(0, 0, 4, half, half), torch.Generator(), 0.0)
        halves += [int(half[0]) + row for row in part["unread"].tolist()]
    assert sorted(halves) == sorted(unread)
    nobody = batch | {"unread": torch.zeros(0, dtype=torch.long)}
    assert torch.equal(task.target(nobody, noisy, {}), plain)

    weights, others = task.loss_weights(batch), task.loss_weights(before)
    for row in range(4):  # such errors are small
        assert torch.isclose(weights[row], others[row] * (HIDDEN_WEIGHT if row in unread else 1))
    assert not any(parameter.requires_grad for parameter in task.readers.parameters())
    task.eval()
    assert torch.equal(task.target(batch, noisy, {}), plain)
    assert torch.equal(task.loss_weights(batch), others)


def test_the_phrases_of_avatars():
    phrases = _train_snap.hidden_phrases("avatars")
    assert {"smiling", "with a smile", "in tears, crying"} <= set(phrases)
    scene = sample_scene(3, [sample_identity(1)])
    text = caption(scene, plain=True)
    own = max((words for words in EXPRESSION_WORDS[scene.people[0].expression] if f", {words}" in text), key=len)
    assert without_phrases(text, phrases) == text.replace(f", {own}", "")


def test_training_with_hidden_phrases(train, place, tmp_path, capsys):
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("smiling\nlaughing\nin\n\n")
    assert train(tmp_path / "first", "--max-train-steps", "1", "--snap-depth", "1") == 0
    hide = ("--max-train-steps", "2", "--hidden-phrases", str(phrases))
    assert train(tmp_path / "out", *hide) == 2
    assert "weights that know poses" in capsys.readouterr().err
    hide += ("--init-adapter", str(tmp_path / "first"))
    assert train(tmp_path / "out", *hide) == 0
    taught = ("--teacher", str(tmp_path / "first"))
    assert train(tmp_path / "again", *hide, *taught) == 0  # the weights at the start, too
    learned, again = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert all(torch.allclose(learned[name], tensor, atol=1e-3) for name, tensor in again.items())
    assert train(tmp_path / "third", "--max-train-steps", "1", *taught) == 2
    assert "what --hidden-phrases hides" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "training.json").read_text())["face-snap"]
    assert record["learned"]["hidden_fraction"] == 0.5
    phrases.write_text("in\n")
    assert train(tmp_path / "out", *hide, "--max-train-steps", "3") == 2  # others than those of the checkpoint
    refused = capsys.readouterr().err
    assert "checkpoint" in refused and "hidden" in refused
    words = ["train", "--model", str(place / "base"), "--data", str(place / "data"), "--out", str(tmp_path / "none")]
    assert main([*words, "--hidden-phrases", str(phrases)]) == 2
    assert "not of face-fusion's" in capsys.readouterr().err
    assert main([*words, "--teacher", "weights"]) == 2
    assert "FaceStudio's and FaceSnap's" in capsys.readouterr().err
    phrases.write_text("a unicorn\n")
    assert train(tmp_path / "other", *hide) == 2
    assert "no caption" in capsys.readouterr().err
    phrases.write_text("\n")
    assert train(tmp_path / "other", *hide) == 2
    assert "has no phrases" in capsys.readouterr().err
    phrases.unlink()
    assert train(tmp_path / "other", *hide) == 2
    assert "cannot read the phrases" in capsys.readouterr().err


def test_it_goes_on_from_other_weights(train, place, tmp_path, capsys):
    options = ("--max-train-steps", "1", "--learning-rate", "1e-12", "--adam-weight-decay", "0")
    assert train(tmp_path / "first", "--max-train-steps", "2", "--snap-depth", "1", "--snap-tokens", "3") == 0
    assert train(tmp_path / "second", *options, "--init-adapter", str(tmp_path / "first")) == 0
    first, second = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], tensor, atol=1e-6) for name, tensor in second.items())
    file = str(tmp_path / "first" / SNAP_WEIGHTS_NAME)
    assert train(tmp_path / "third", *options, "--init-adapter", file, "--snap-oval", "0.5") == 2
    assert "has oval 0.9, not 0.5" in capsys.readouterr().err
    assert train(tmp_path / "third", *options, "--init-adapter", str(place / "base")) == 2
    assert SNAP_WEIGHTS_NAME in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--face-embedder", ""], "needs a --face-embedder"),
        (["--keep-references"], "not of face-snap's"),
        (["--validation-prompt", "a cat"], "not of face-snap's"),
        (["--face-mode", "both"], "--face-mode is of Face Fusion's training, not of face-snap's"),
        (["--identity-loss-weight", "1"], "go together"),
        (["--snap-depth", "0"], "--snap-depth must be"),
    ],
)
def test_bad_options(train, tmp_path, capsys, options, words):
    assert train(tmp_path / "out", "--max-train-steps", "1", *options) == 2
    assert words in capsys.readouterr().err


def test_a_face_model_is_asked_for(place, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FACE_FUSION_FACE_MODEL", raising=False)
    words = ["--model", str(place / "base"), "--data", str(place / "data"), "--out", str(tmp_path)]
    words += ["--face-embedder", str(place / WEIGHTS_NAME), "--max-train-steps", "1"]
    assert main(["train", "--conditioner", "face-snap", *words]) == 2
    assert "need a face model" in capsys.readouterr().err
    assert main(["train", "--conditioner", "face-snap", *words, "--face-model", "nowhere"]) == 2
    assert "no face model nowhere" in capsys.readouterr().err
