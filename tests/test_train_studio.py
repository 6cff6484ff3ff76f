"""FaceStudio is trained by the command that trains Face Fusion, from embeddings that are computed once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_face_studio import IMAGE_WIDTH, toy_encoder
from tiny_models import tiny_pipeline, with_adapter

from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_embedders import WEIGHTS_NAME, AvatarEmbedder
from face_fusion_pipeline.face_files import read_tensors, save_tensors
from face_fusion_pipeline.face_studio import STUDIO_WEIGHTS_NAME, StudioMetadata, new_studio
from face_fusion_pipeline.publishing import repository
from face_fusion_pipeline.training import studio_cache
from face_fusion_pipeline.training.base_model import load_base
from face_fusion_pipeline.training.latent_cache import cache_folders
from face_fusion_pipeline.training.loop import Part
from face_fusion_pipeline.training.pairs import Pairs, split_people
from face_fusion_pipeline.training.preparation import read_rows
from face_fusion_pipeline.training.studio import StudioOptions, StudioTask


def prepared_place(place: Path, pictures: int = 12) -> Any:
    """The pipeline of `place/base`, with an image encoder; beside it a face embedder, and rendered data."""
    pipe = tiny_pipeline()
    pipe.unet.register_to_config(sample_size=16)  # pictures of 32 pixels: smaller ones are not rendered
    pipe.register_modules(image_encoder=toy_encoder())
    pipe.save_pretrained(place / "base")
    torch.manual_seed(0)
    embedder = AvatarEmbedder()
    save_tensors(place / WEIGHTS_NAME, embedder.state_dict(), embedder.metadata)
    out = ["--model", str(place / "base"), "--out", str(place / "data")]
    assert main(["prepare", f"avatars:{pictures}", *out]) == 0
    return pipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """As [`prepared_place`], and Face Fusion weights for the base."""
    place: Path = tmp_path_factory.mktemp("studio")
    with_adapter(prepared_place(place)).save_face_fusion_adapter(place / "teacher")
    return place


def train(place: Path, out: Path, *options: str) -> int:
    words = ["--model", str(place / "base"), "--data", str(place / "data"), "--out", str(out)]
    words += ["--face-embedder", str(place / WEIGHTS_NAME), "--train-batch-size", "2", "--log-every", "1"]
    return main(["train", "--conditioner", "face-studio", *words, "--validation-people", "1", *options])


def weights(out: Path) -> tuple[dict[str, torch.Tensor], StudioMetadata]:
    tensors, strings = read_tensors(out / STUDIO_WEIGHTS_NAME)
    return tensors, StudioMetadata.from_strings(strings)


def test_weights_card_and_resume(place, tmp_path, capsys, monkeypatch):
    options = ("--fit-captions", "--studio-tokens", "3", "--studio-rank", "2", "--checkpointing-steps", "2")
    teacher = ("--teacher", str(place / "teacher"))
    straight, again = tmp_path / "straight", tmp_path / "again"
    assert train(place, straight, *options, *teacher, "--max-train-steps", "4") == 0
    assert "the tokens begin with" in capsys.readouterr().out
    tensors, metadata = weights(straight)
    assert (metadata.tokens, metadata.rank, metadata.image_width, metadata.face_width) == (3, 2, IMAGE_WIDTH, 256)
    assert metadata.face_embedder.startswith("face_embedder-")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if ".lora_B." in name)
    record = json.loads((straight / "training.json").read_text())["face-studio"]
    assert record["learned"]["teacher_weight"] == 0.7
    assert "face_mode" not in record["learned"]
    card = (straight / "README.md").read_text()
    assert "# FaceStudio weights for base" in card
    assert str(tmp_path) not in card + json.dumps(record)

    # Embeddings are there already, and a run that was stopped goes on to the same weights.
    monkeypatch.setattr(studio_cache, "picture_embeddings", None)
    assert train(place, again, *options, *teacher, "--max-train-steps", "4", "--checkpoints-total-limit", "2") == 0
    (again / STUDIO_WEIGHTS_NAME).unlink()
    for path in (again / "checkpoint-4").iterdir():
        path.unlink()
    (again / "checkpoint-4").rmdir()
    assert train(place, again, *options, *teacher, "--max-train-steps", "4", "--checkpoints-total-limit", "2") == 0
    resumed, _ = weights(again)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors.items())

    files = repository.repository_files(straight, "me/studio")
    assert {"README.md", "pipeline.py", STUDIO_WEIGHTS_NAME, "training.json"} <= files.keys()


def test_a_trained_file_draws(place, tmp_path):
    assert train(place, tmp_path / "out", "--max-train-steps", "1", "--studio-rank", "2") == 0
    pipe = tiny_pipeline()
    pipe.image_encoder = toy_encoder()
    pipe.load_face_studio(tmp_path / "out", face_embedder=str(place / WEIGHTS_NAME))
    from tiny_models import face

    picture = pipe("a cat", face_image=face(), style_image=face(1), style_scale=1, num_inference_steps=2).images[0]
    assert picture.size == (16, 16)


def test_it_goes_on_from_other_weights(place, tmp_path, capsys):
    first, again = tmp_path / "first", ("--init-adapter", str(tmp_path / "first"))
    assert train(place, first, "--max-train-steps", "2", "--studio-rank", "2", "--studio-tokens", "3") == 0
    still = ("--max-train-steps", "1", "--learning-rate", "1e-12", "--adam-weight-decay", "0")
    assert train(place, tmp_path / "second", *still, *again) == 0
    (tensors, metadata), (going_on, _) = weights(first), weights(tmp_path / "second")
    assert metadata.tokens == 3 and tensors.keys() == going_on.keys()
    assert all(torch.allclose(going_on[name], tensor, atol=1e-6) for name, tensor in tensors.items())
    assert train(place, tmp_path / "third", *still, *again, "--picture-mask", "0.5") == 2
    assert "has picture_mask 1.5, not 0.5" in capsys.readouterr().err


def test_embeddings_of_rendered_data_are_of_their_pictures(place):
    base = load_base(place / "base")
    cache = cache_folders(place / "data", base)
    seen: list[int] = []

    class Counting(AvatarEmbedder):
        name = "counting"

        def __call__(self, faces: Any) -> torch.Tensor:
            seen.append(len(faces))
            return torch.full((len(faces), 4), 0.5)  # of length 1

    made = studio_cache.encode_embeddings(
        place / "data", base, cache, base.pipeline.image_encoder, Counting(), mask=1.5, progress=False
    )
    rows = len((place / "data" / "metadata.jsonl").read_text().splitlines())
    found = studio_cache.Embeddings(made, rows)
    assert found.whole([0, 1]).shape == (2, IMAGE_WIDTH)
    assert not torch.allclose(found.whole([0]), found.covered([0]))
    assert torch.allclose(found.faces([0, 1]), torch.full((2, 4), 0.5))
    assert sum(seen) == rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--face-embedder", ""], "needs a --face-embedder"),
        (["--keep-references"], "of Face Fusion's training"),
        (["--face-mode", "both"], "--face-mode is of Face Fusion's training, not of face-studio's"),
        (["--face-embedder", "nowhere.safetensors"], "no face embedder"),
        (["--teacher", "nowhere"], "no such file"),
    ],
)
def test_bad_options(place, tmp_path, capsys, options, words):
    assert train(place, tmp_path / "out", "--max-train-steps", "1", *options) == 2
    assert words in capsys.readouterr().err


def test_an_embedder_learns_from_crops_as_detectors_cut_them(place, tmp_path, monkeypatch, capsys):
    from face_fusion_pipeline.avatars.training import crop_embedder
    from face_fusion_pipeline.face_embedders import load_avatar_embedder

    crops = torch.randint(0, 256, (12, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(crop_embedder, "face_crops", lambda *_: (crops, [number // 2 for number in range(12)]))
    words = ["--data", str(place / "data"), "--out", str(tmp_path), "--batch-size", "2", "--steps", "1"]
    assert main(["avatars-train", "crop-embedder", *words]) == 0, capsys.readouterr().err
    assert load_avatar_embedder(tmp_path / WEIGHTS_NAME).width == 256
    record = json.loads((tmp_path / "training.json").read_text())["crop-embedder"]
    assert record["training_images"] == 3  # three of six people are set aside
    assert main(["avatars-train", "crop-embedder", "--data", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "is not prepared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"whole_pictures": 1.0, "style_dropout": 0.0}, "whole"),
        ({"whole_pictures": 0.0, "style_dropout": 0.0}, "covered"),
        ({"whole_pictures": 1.0, "style_dropout": 1.0}, None),
    ],
)
def test_a_batch_shows_what_the_options_say(place, options, seen):
    base = load_base(place / "base")
    cache = cache_folders(place / "data", base)
    torch.manual_seed(0)
    embedder = AvatarEmbedder().eval()
    encoder = base.pipeline.image_encoder
    made = studio_cache.encode_embeddings(place / "data", base, cache, encoder, embedder, mask=1.5, progress=False)
    people, _ = split_people(read_rows(place / "data"), 0, 0)
    pairs = Pairs(place / "data", cache, people)
    embeddings = studio_cache.Embeddings(made, len(pairs.rows))
    sizes = {"image_width": IMAGE_WIDTH, "face_width": 256, "face_embedder": "avatars", "tokens": 2, "rank": 2}
    studio = new_studio(base.unet, **sizes)
    task = StudioTask(
        base, studio, pairs, embeddings, options=StudioOptions(face_dropout=0.0, appended=1.0, **options)
    )
    rows = torch.arange(4)
    batch = task.part(Part(0, 0, 4, rows, rows), torch.Generator().manual_seed(0), 0.0)
    indices = [pairs.targets[row] for row in rows]
    expected = torch.zeros(4, IMAGE_WIDTH) if seen is None else getattr(embeddings, seen)(indices)
    assert torch.equal(batch["picture"], expected)
    assert bool(batch["appended"]) and bool(batch["has_face"].all())
    assert torch.allclose(batch["face"].norm(dim=1), torch.ones(4), atol=1e-3)
