"""Faces unlike what a model knows take the training-free mode, where no mode is asked for."""

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import face, for_task, generate, tiny_pipeline, tiny_unet, with_adapter

from face_fusion_pipeline import SelfAttentionReference, StableDiffusionFaceFusionPipeline, embedded_model
from face_fusion_pipeline.avatars.evaluation.trials import portraits
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.conditioner_reference import ReferenceConditioner
from face_fusion_pipeline.face_attention import attention_layers
from face_fusion_pipeline.face_defaults import FaceDefaults, read_defaults
from face_fusion_pipeline.face_errors import FaceFusionError, IdentityMismatchError
from face_fusion_pipeline.face_familiarity import Familiarity, cell_statistics, familiarity_of, is_unfamiliar
from face_fusion_pipeline.publishing.repository import repository_files
from face_fusion_pipeline.reference_pass import capture_hidden_states
from face_fusion_pipeline.training import familiarity as fitting
from face_fusion_pipeline.unet_family import unet_fingerprint


NAME = "judge.safetensors"
FALLBACK = SelfAttentionReference(1.5, layers=("up_blocks",))
LEFT, RIGHT = (0, 0, 8, 16), (8, 0, 16, 16)


def judge_of(pipe: Any, bias: float = -1.0, **changes: Any) -> Familiarity:
    """One that finds everything familiar (bias above 0) or nothing."""
    weights = {name: torch.zeros(2, layer.to_q.in_features) for name, layer in layers_of(pipe).items()}
    judge = Familiarity(weights, bias, 150, 0, (0.5, 0.5), FALLBACK, unet_fingerprint(pipe.unet))
    return replace(judge, **changes)


def layers_of(pipe: Any) -> dict[str, Any]:
    return attention_layers(pipe.unet, "attn2")


def by_brightness(pipe: Any) -> Familiarity:
    """A judge that knows the dark picture of two."""
    dark, light = (capture(pipe, picture) for picture in (DARK, LIGHT))
    name = next(iter(dark))
    direction = (cell_statistics(dark[name], (0.5, 0.5)) - cell_statistics(light[name], (0.5, 0.5)))[0]
    middle = (cell_statistics(dark[name], (0.5, 0.5)) + cell_statistics(light[name], (0.5, 0.5)))[0] / 2
    return replace(judge_of(pipe), weights={name: direction}, bias=-float((direction * middle).sum()), timestep=0)


def capture(pipe: Any, picture: Image.Image) -> dict[str, torch.Tensor]:
    pixels = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        text = pipe.encode_prompt("", "cpu", 1, False)[0]
    return capture_hidden_states(pipe.unet, latents, 0, encoder_hidden_states=text)


DARK, LIGHT = (Image.new("RGB", (16, 16), (value,) * 3) for value in (20, 230))


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    """A model with weights that recommends both attentions."""
    pipe = with_adapter(tiny_pipeline())
    return recommending(pipe, tmp_path, judge_of(pipe))


def recommending(pipe: Any, folder: Path, judge: Familiarity) -> Any:
    judge.save(folder / NAME)
    pipe.__dict__.pop("_tools", None)  # a judge that was read before
    pipe.face_defaults = FaceDefaults(face_mode="both", face_familiarity=NAME, folder=folder)
    return pipe


# --- The judge ----------------------------------------------------------------------------------------------------


def test_logits_are_those_of_means_and_deviations_in_the_ellipse() -> None:
    torch.manual_seed(0)
    states = {"a": torch.randn(2, 16, 3), "b": torch.randn(2, 4, 5)}
    weights = {"a": torch.randn(2, 3), "b": torch.randn(2, 5)}
    judge = Familiarity(weights, 0.5, 0, 0, (0.5, 0.5), FALLBACK, "")
    inner = states["a"].double()[:, [5, 6, 9, 10]].numpy()  # the middle of 4 x 4; of 2 x 2 all
    expected = 0.5 + (inner.mean(1) * weights["a"][0].numpy() + inner.std(1) * weights["a"][1].numpy()).sum(1)
    other = states["b"].double().numpy()
    expected += (other.mean(1) * weights["b"][0].numpy() + other.std(1) * weights["b"][1].numpy()).sum(1)
    np.testing.assert_allclose(judge.logits(states).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(judge.logits({name: s.half() for name, s in states.items()}), expected, rtol=1e-2)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    judge = by_brightness(pipe)
    judge.save(tmp_path / NAME)
    again = Familiarity.load(tmp_path / NAME)
    assert all(torch.equal(again.weights[name], weights) for name, weights in judge.weights.items())
    assert (again.bias, again.noise, again.half_axes) == (judge.bias, (0, 0), (0.5, 0.5))
    assert again.fallback == FALLBACK
    assert again.fits(pipe.unet) and not again.fits(tiny_unet(seed=1))
    assert not replace(again, weights={"nowhere": torch.zeros(2, 3)}).fits(pipe.unet)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": {}}, "damaged"),
        ({"weights": {"a": torch.zeros(3, 2)}}, "mean and a deviation"),
        ({"weights": {"a": torch.full((2, 2), torch.nan)}}, "NaN"),
        ({"bias": "much"}, "bias"),
        ({"half_axes": (0.5,)}, "damaged"),
        ({"timestep": "soon"}, "damaged"),
        ({"base_fingerprint": "a b"}, "numbers"),
    ],
)
def test_a_damaged_file_is_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    judge = judge_of(tiny_pipeline())
    bias = changes.pop("bias", None)
    replace(judge, **changes).save(tmp_path / NAME)
    if bias:
        raw = (tmp_path / NAME).read_bytes().replace(b'"-1.0"', f'"{bias}"'.encode())
        (tmp_path / NAME).write_bytes(raw)
    with pytest.raises(FaceFusionError, match=f"(?s){NAME}.*{words}|{words}"):
        Familiarity.load(tmp_path / NAME)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    tiny_pipeline().encode_face(face()).save(tmp_path / NAME)
    with pytest.raises(FaceFusionError, match="face-fusion-identity.*expected 'face-fusion-familiarity'"):
        Familiarity.load(tmp_path / NAME)


# --- Encoding and calls -------------------------------------------------------------------------------------------


def test_the_unfamiliar_takes_the_training_free_mode_and_one_line_says_so(pipe: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        identity = pipe.encode_face(face())
    assert identity.mode == "training-free" and identity.self_attention == FALLBACK and is_unfamiliar(identity)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "unlike the pictures" in line and "no likeness" in line and "face_mode (--mode)" in line
    said = pipe.encode_face(face(), face_mode="training-free", self_attention=FALLBACK)
    assert torch.equal(generate(pipe, face_image=face()), generate(pipe, face_image=said))
    assert torch.equal(generate(pipe, face_image=identity), generate(pipe, face_image=said))


def test_a_mode_that_is_asked_for_wins(pipe: Any, caplog: Any) -> None:
    for mode in ("both", "adapter", "training-free"):
        identity = pipe.encode_face(face(), face_mode=mode)
        assert identity.mode == mode and identity.familiarity is None
    assert pipe.encode_face(face(), face_mode="training-free").self_attention == SelfAttentionReference()
    pipe.face_defaults, recommended = None, pipe.face_defaults
    plain = generate(pipe, face_image=face(), face_mode="both")
    pipe.face_defaults = recommended
    assert torch.equal(generate(pipe, face_image=face(), face_mode="both", face_mirrored=False), plain)
    assert not caplog.records


def test_what_is_said_of_the_self_attention_is_kept(pipe: Any) -> None:
    own = SelfAttentionReference(3.0, 20)
    assert pipe.encode_face(face(), self_attention=own).self_attention == own
    weaker = pipe.encode_face(face(), face_mode="training-free", self_attention=FALLBACK.with_scale(0.5))
    expected = generate(pipe, face_image=weaker)
    assert torch.equal(generate(pipe, face_image=face(), face_self_scale=0.5), expected)


def test_the_familiar_changes_nothing_and_costs_nothing(pipe: Any, tmp_path: Path, caplog: Any) -> None:
    passes: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda *args: passes.append(1))
    recommending(pipe, tmp_path, judge_of(pipe, bias=1.0))
    identity, looks = pipe.encode_face(face()), len(passes)
    assert identity.mode == "both" and identity.familiarity == 1.0 and not is_unfamiliar(identity)
    pipe.face_defaults = FaceDefaults(face_mode="both")
    plain = pipe.encode_face(face())
    assert len(passes) == 2 * looks == 4  # clean for the weights, noised for the model's own
    assert plain.familiarity is None
    assert all(torch.equal(key, identity.keys[name]) for name, key in plain.keys.items())
    assert not caplog.records


def test_without_weights_the_strength_is_that_of_the_unfamiliar(tmp_path: Path) -> None:
    pipe = recommending(tiny_pipeline(), tmp_path, judge_of(tiny_pipeline()))
    assert pipe.encode_face(face()).self_attention == FALLBACK


def test_references_are_judged_together(tmp_path: Path) -> None:
    pipe = with_adapter(tiny_pipeline())
    recommending(pipe, tmp_path, by_brightness(pipe))
    one = [pipe.encode_face(picture).familiarity for picture in (DARK, LIGHT)]
    assert one[0] > 0 > one[1]
    both = pipe.encode_face([DARK, LIGHT, LIGHT])
    assert both.familiarity == pytest.approx((one[0] + 2 * one[1]) / 3, abs=1e-4) and is_unfamiliar(both)
    assert not is_unfamiliar(pipe.encode_face([DARK, DARK, LIGHT]))


def test_people_of_one_call_are_seen_in_one_mode(tmp_path: Path) -> None:
    pipe = with_adapter(tiny_pipeline())
    recommending(pipe, tmp_path, by_brightness(pipe))
    people = pipe.encode_people([DARK, LIGHT])
    assert [person.mode for person in people] == ["training-free"] * 2
    assert [is_unfamiliar(person) for person in people] == [False, True]
    places = {"face_boxes": [LEFT, RIGHT]}
    drawn = generate(pipe, face_image=[[DARK], [LIGHT]], **places)
    assert torch.equal(drawn, generate(pipe, face_image=people, **places))
    known = pipe.encode_face(DARK)
    assert known.mode == "both"
    beside = pipe.encode_people([known, LIGHT])  # pictures take the mode of the identity beside them
    assert [person.mode for person in beside] == ["both"] * 2
    saved = pipe.encode_face(DARK, face_mode="adapter")
    assert [person.mode for person in pipe.encode_people([saved, LIGHT])] == ["adapter"] * 2
    with pytest.raises(IdentityMismatchError, match="'adapter', not 'both'"):
        pipe.encode_people([saved, LIGHT], face_mode="both")


def test_a_judge_of_another_unet_is_not_asked(pipe: Any, tmp_path: Path) -> None:
    recommending(pipe, tmp_path, judge_of(tiny_pipeline(seed=1)))
    assert familiarity_of(pipe) is None and pipe.encode_face(face()).mode == "both"
    pipe.face_defaults = replace(pipe.face_defaults, folder=tmp_path / "elsewhere")  # the file is not there
    assert familiarity_of(pipe) is None and pipe.encode_face(face()).mode == "both"


def test_an_identity_file_is_what_it_was(pipe: Any, tmp_path: Path) -> None:
    pipe.encode_face(face()).save(tmp_path / "ada.safetensors")
    again = type(pipe.encode_face(face())).load(tmp_path / "ada.safetensors")
    assert again.mode == "training-free" and again.self_attention == FALLBACK and again.familiarity is None
    assert torch.equal(generate(pipe, face_image=again), generate(pipe, face_image=face()))


# --- The model's folder -------------------------------------------------------------------------------------------


def test_the_file_goes_where_the_model_goes(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / NAME).unlink()
    again = StableDiffusionFaceFusionPipeline.from_pretrained(tmp_path / "model")
    assert again.face_defaults == pipe.face_defaults and familiarity_of(again) is not None
    assert again.encode_face(face()).self_attention == FALLBACK
    assert familiarity_of(StableDiffusionFaceFusionPipeline.from_pipe(again)) is not None


def test_of_a_model_on_the_hub_it_is_fetched_of_the_same_commit(pipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    snapshot, asked = tmp_path / "models--ada--avatars" / "snapshots" / "0123abcd", []
    pipe.save_pretrained(snapshot)
    (snapshot / NAME).rename(tmp_path / "there.safetensors")

    def download(repo_id: str, filename: str, **place: Any) -> str:
        asked.append((repo_id, filename, place["revision"]))
        shutil.copy(tmp_path / "there.safetensors", snapshot / filename)
        return str(snapshot / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(StableDiffusionFaceFusionPipeline, "download", lambda *args, **options: str(snapshot))
    again = StableDiffusionFaceFusionPipeline.from_pretrained("ada/avatars")
    assert asked == [("ada/avatars", NAME, "0123abcd")] and familiarity_of(again) is not None


def test_a_newer_judge_takes_the_place_of_an_older_one(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    recommending(pipe, tmp_path, judge_of(pipe, bias=3.0)).save_pretrained(tmp_path / "model")
    assert Familiarity.load(tmp_path / "model" / NAME).bias == 3.0
    read_defaults(tmp_path / "model").save(tmp_path / "model")  # type: ignore[union-attr]  onto itself
    assert Familiarity.load(tmp_path / "model" / NAME).bias == 3.0


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_other_pipelines_and_families_do_alike(task: str, tmp_path: Path) -> None:
    pipe = with_adapter(tiny_pipeline(family="xl"))
    recommending(pipe, tmp_path, judge_of(pipe))
    other = for_task(pipe, task)
    picture = Image.new("RGB", (16, 16))
    arguments = {"image": picture, "strength": 1.0} | ({"mask_image": picture} if task == "Inpaint" else {})
    said = other.encode_face(face(), face_mode="training-free", self_attention=FALLBACK)
    assert torch.equal(generate(other, face_image=face(), **arguments), generate(other, face_image=said, **arguments))


def test_a_repository_has_the_judge(pipe: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    pipe.save_pretrained(folder)
    pipe.save_face_fusion_adapter(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert repository_files(folder)[NAME] == folder / NAME


def test_the_command_line_says_it_in_one_line(pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.save_pretrained(tmp_path / "model")
    pipe.save_face_fusion_adapter(tmp_path / "model")
    face(size=32).save(tmp_path / "ada.png")
    words = ["generate", "--face", str(tmp_path / "ada.png"), "--no-detect", "--prompt", "a cat", "--steps", "1"]
    words += ["--model", str(tmp_path / "model"), "--num-images", "1", "--no-sheet", "--json"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    made = json.loads(printed.out)
    assert (made["face_mode"], made["face_self_scale"]) == ("training-free", 1.5)
    (line,) = [line for line in printed.err.splitlines() if "unlike" in line]
    assert line.startswith("face-fusion: this face is unlike the pictures that the model was trained with")
    assert main([*words, "--mode", "both", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["face_mode"] == "both" and "unlike" not in printed.err


@pytest.mark.parametrize("name", ["../judge.safetensors", "judge.bin", "", 3, "a/b.safetensors", "/judge.safetensors"])
def test_a_name_is_that_of_a_file_beside(name: Any, tmp_path: Path) -> None:
    (tmp_path / "face_fusion_defaults.json").write_text(json.dumps({"face_familiarity": name}))
    with pytest.raises(FaceFusionError, match=r"face_familiarity must be the name of a \.safetensors file"):
        read_defaults(tmp_path)


# --- Fitting ------------------------------------------------------------------------------------------------------


def tinted(red: bool, count: int = 20) -> list[fitting.FaceIn]:
    """Faces of noise in one of two colours."""
    rng = np.random.default_rng(int(red))
    channels = [1.0, 0.2, 0.2] if red else [0.2, 0.2, 1.0]
    pictures = rng.integers(60, 256, (count, 32, 32, 3)) * channels
    return [(Image.fromarray(pixels.astype(np.uint8)), (8.0, 8.0, 24.0, 24.0)) for pixels in pictures]


def test_two_kinds_are_told_apart_and_the_same_seed_gives_the_same_judge() -> None:
    pipe, how = tiny_pipeline(), fitting.Judged(timestep=0, repeats=2)
    judge, figures = fitting.fit_familiarity(pipe, tinted(True), tinted(False), FALLBACK, how)
    assert figures["pictures"] == {"familiar": 32, "unfamiliar": 32}
    assert figures["held out"] == {"familiar": 8, "unfamiliar": 8}
    assert figures["right"]["familiar"] >= 0.75 and figures["right"]["unfamiliar"] >= 0.75
    assert judge.fits(pipe.unet) and judge.fallback == FALLBACK
    found = [fitting.judged_unfamiliar(pipe, judge, tinted(red)) for red in (True, False)]
    assert sum(found[0]) <= 5 and sum(found[1]) >= 14
    again, _ = fitting.fit_familiarity(pipe, tinted(True), tinted(False), FALLBACK, how)
    assert again.bias == judge.bias and all(torch.equal(again.weights[n], w) for n, w in judge.weights.items())
    with pytest.raises(FaceFusionError, match="4 unfamiliar pictures are too few"):
        fitting.fit_familiarity(pipe, tinted(True), tinted(False, 4), FALLBACK, how)
    with pytest.raises(FaceFusionError, match="no pictures"):
        fitting.fit_familiarity(pipe, tinted(True), [], FALLBACK, how)


def test_a_regression_is_the_minimum_of_its_loss() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(30, 3, dtype=torch.float64) + shift for shift in (0.5, -0.5)]
    rows[0][:, 2] *= 50  # a scale of its own counts as any other
    weights, bias = fitting.logistic(*rows, l2=0.05)
    both = torch.cat(rows)
    mean, deviation = both.mean(0), both.std(0)

    def loss(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        known, other = ((part - mean) / deviation @ w + b for part in rows)
        halves = torch.nn.functional.softplus(-known).mean() + torch.nn.functional.softplus(other).mean()
        return halves / 2 + 0.05 * w.square().sum()

    w = (weights * deviation).requires_grad_()
    b = torch.tensor(bias + float(weights @ mean), dtype=torch.float64, requires_grad=True)
    for gradient in torch.autograd.grad(loss(w, b), (w, b)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


def test_pictures_vary_by_the_seed_alone() -> None:
    import random

    one, same, other = (fitting.as_users_bring_it(tinted(True)[0], random.Random(seed)) for seed in (1, 1, 2))
    assert one.mode == "RGB" and one.width == one.height
    assert np.array_equal(np.asarray(one), np.asarray(same))
    assert one.size != other.size or not np.array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, and pictures of two kinds in which the whole picture is the face."""
    from face_fusion_pipeline.face_detectors import Face
    from face_fusion_pipeline.generation import photos

    tiny_pipeline().save_pretrained(tmp_path / "model")
    for red in (True, False):
        folder = tmp_path / ("red" if red else "blue") / "more"
        folder.mkdir(parents=True)
        for number, (picture, _) in enumerate(tinted(red, 12)):
            picture.save(folder / f"{number}.png")
    (tmp_path / "red" / "notes.txt").write_text("none")

    def found(source: Any, detector: Any = None, **options: Any) -> Any:
        picture = Image.open(source).convert("RGB")
        return photos.FacePhoto(picture, Face((8.0, 8.0, 24.0, 24.0), 0.9))

    monkeypatch.setattr("face_fusion_pipeline.generation.photos.locate_face", found)
    return tmp_path


def familiarity(folders: Path, *words: str) -> int:
    given = ["--familiar", str(folders / "red"), "--unfamiliar", str(folders / "blue"), "--timestep", "0"]
    return main(["familiarity", "--model", str(folders / "model"), *given, "--self-scale", "2", *words])


def test_the_command_writes_the_judge_and_names_it(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FaceDefaults(guidance_scale=3.0).save(folders / "model")
    assert familiarity(folders, "--try", str(folders / "red"), str(folders / "blue"), "--limit", "10", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["pictures"] == {"familiar": 16, "unfamiliar": 16} and set(figures["tried"]) == {"red", "blue"}
    assert figures["tried"]["blue"]["of"] == 10
    defaults = read_defaults(folders / "model")
    assert defaults == FaceDefaults(guidance_scale=3.0, face_familiarity="face_familiarity.safetensors")
    assert defaults and defaults.familiarity_file
    judge = Familiarity.load(defaults.familiarity_file)
    assert judge.fallback.scale == 2.0 and judge.timestep == 0


def test_the_command_names_what_is_not_there(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert familiarity(folders, "--try", str(folders / "green")) == 2
    assert f"there is no folder {folders / 'green'}" in capsys.readouterr().err
    assert main(["familiarity", "--model", "nowhere", "--familiar", "a", "--unfamiliar", "b"]) == 2
    assert "--model nowhere is no folder" in capsys.readouterr().err
    assert familiarity(folders, "--limit", "3") == 2
    assert "familiar pictures are too few" in capsys.readouterr().err
    assert not (folders / "model" / "face_fusion_defaults.json").exists()


def test_all_ways_of_both_conditioners_take_a_judge() -> None:
    """The noise of a judge that no kind of attention reads is looked at once more, and no keys are of it."""
    pipe = with_adapter(tiny_pipeline())
    judge = judge_of(pipe, timestep=77)
    for mode, cross, own in (("adapter", True, False), ("training-free", False, True)):
        conditioner = ReferenceConditioner(mode, cross=cross, own=own)
        options = fitting_options(judge)
        judged, plain = (conditioner.encode(pipe, face(), each) for each in (options, fitting_options(None)))
        assert judged.familiarity == -1.0 and plain.familiarity is None
        assert judged.keys.keys() == plain.keys.keys()
        assert all(torch.equal(judged.keys[name], key) for name, key in plain.keys.items())


def fitting_options(judge: Familiarity | None) -> Any:
    from face_fusion_pipeline.conditioner import IdentityOptions

    return IdentityOptions(familiarity=judge)


# --- The model that comes with the package -----------------------------------------------------------------------


def test_the_avatar_model_knows_avatars_and_no_photographs() -> None:
    """Its judge is of its UNet; of two photographs (where test data are) and two avatars it knows the latter."""
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    judge = familiarity_of(pipe)
    assert judge is not None and judge.fallback.scale == 1.5 and judge.noise == (150, 0)
    avatars = [portraits(seed).face for seed in (1_100_000, 1_100_001)]
    found = [pipe.encode_face(picture).familiarity for picture in avatars]
    assert min(found) > 0, found
    folder = Path(os.environ.get("FACE_FUSION_TEST_DATA", "nowhere")) / "photos" / "london"
    if not folder.is_dir():
        pytest.skip("no photographs: FACE_FUSION_TEST_DATA names no folder with photos/london")
    for path in sorted(folder.glob("*.jpg"))[:2]:
        with Image.open(path) as photo:
            width, height = photo.size  # faces fill the middle of this set
            crop = photo.convert("RGB").crop((width // 8, height // 8, width * 7 // 8, height * 7 // 8))
        identity = pipe.encode_face(crop)
        assert is_unfamiliar(identity) and identity.self_attention == judge.fallback
