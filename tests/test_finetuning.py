"""`face-fusion train`: pairs and losses; and neither processes nor a kill nor a full disk change what is learned."""

import copy
import functools
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from face_fusion_pipeline import create_adapter, embedded_model
from face_fusion_pipeline.avatars.training import rendered
from face_fusion_pipeline.avatars.training.rendered import detected, paired, prepare_rendered
from face_fusion_pipeline.avatars.world.dataset import plan
from face_fusion_pipeline.avatars.world.render import render
from face_fusion_pipeline.cli import build_parser, main
from face_fusion_pipeline.face_adapter import save_adapter
from face_fusion_pipeline.face_files import read_tensors, save_tensors
from face_fusion_pipeline.face_images import crop_face
from face_fusion_pipeline.face_layout import box_masks, pool, visible_people
from face_fusion_pipeline.face_self_attention import SelfAttentionReference
from face_fusion_pipeline.face_studio import STUDIO_WEIGHTS_NAME, detach, lora_state, new_studio, save_studio
from face_fusion_pipeline.reference_pass import face_tensors
from face_fusion_pipeline.training import latent_cache, loop, objective
from face_fusion_pipeline.training import task as task_module
from face_fusion_pipeline.training.base_model import base_of, load_base
from face_fusion_pipeline.training.fused_unet import face_fused_unet
from face_fusion_pipeline.training.kernels import plain_attention, plain_attention_on_cpu
from face_fusion_pipeline.training.latent_cache import Shards, cache_folders, encode, is_encoded, shard_path
from face_fusion_pipeline.training.loop import Part, TrainingError, data_order
from face_fusion_pipeline.training.pairs import Pairs, split_people
from face_fusion_pipeline.training.preparation import PrepareOptions, prepare, read_rows
from face_fusion_pipeline.training.samples import Samples
from face_fusion_pipeline.training.selection import SelectionOptions
from face_fusion_pipeline.training.sources import DataError, open_source
from face_fusion_pipeline.training.task import FaceFusionOptions, FaceFusionTask


SIDE = 16
CLOSE = {"rtol": 1e-3, "atol": 1e-6}  # of float16
SELECTION = SelectionOptions(resolution=SIDE, reference_resolution=SIDE, min_side=SIDE, min_face=4, min_sharpness=0)


def write_photos(folder: Path, people: list[str | None]) -> Path:
    """A picture of noise for everybody named, with the face in its middle."""
    lines = []
    for index, identity in enumerate(people):
        pixels = np.random.default_rng(index).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        row = {"file_name": f"{index}.png", "text": f"photo {'ab'[index % 2]}", "box": [6, 6, 18, 18]}
        lines.append(json.dumps({**row, "identity": identity}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(model: Path) -> Any:
    return load_base(model)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, base: Any) -> Path:
    """Three people with two photos each and four with one, prepared and encoded."""
    root = tmp_path_factory.mktemp("data")
    photos = write_photos(root / "photos", ["ada", "bob", "ada", "cy", "bob", "cy", "dan", None, None, "eve"])
    prepare(open_source(photos), root / "data", PrepareOptions(SELECTION), progress=False)
    encode(root / "data", base, progress=False)
    return root / "data"


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def pairs_of(data: Path, base: Any, validation: int = 2) -> tuple[Pairs, Pairs]:
    cache = cache_folders(data, base, 4)
    return tuple(Pairs(data, cache, people) for people in split_people(read_rows(data), validation, seed=0))  # type: ignore[return-value]


def task_of(data: Path, base: Any, embedder: Any = None, **options: Any) -> FaceFusionTask:
    adapter = create_adapter(base.unet, metadata={"resolution": SIDE})
    return FaceFusionTask(base, adapter, *pairs_of(data, base), FaceFusionOptions(**options), embedder)


def part_of(task: FaceFusionTask, rows: list[int], batch_size: int = 4, step: int = 3) -> dict[str, torch.Tensor]:
    indices = data_order(0, step, batch_size, task.size)
    part = Part(0, step, batch_size, torch.tensor(rows), indices[rows])
    return task.part(part, torch.Generator(), 0.0)


def gradients(task: FaceFusionTask, batch: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    task.adapter.zero_grad()
    loss, _ = task(batch)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in task.adapter.parameters()]


# --- What is minimised -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", objective.PREDICTIONS)
def test_the_target_leads_back_to_the_picture(prediction: str) -> None:
    schedule = objective.NoiseSchedule(torch.linspace(0.999, 0.01, 50), prediction)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 20, 49])
    noisy = schedule.noised(latents, noise, timesteps)
    found = schedule.one_step(noisy, schedule.target(latents, noise, timesteps), timesteps)
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-4)


def test_min_snr_weights_are_those_of_diffusers() -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler, timesteps = DDPMScheduler(), torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, timesteps)
    least = snr.clamp(max=5.0)
    for prediction, expected in (("epsilon", least / snr), ("v_prediction", least / (snr + 1))):
        schedule = objective.NoiseSchedule(scheduler.alphas_cumprod, prediction)
        torch.testing.assert_close(schedule.weight(timesteps, 5.0), expected)
        assert schedule.weight(timesteps, None).eq(1).all()
    noisy = objective.NoiseSchedule(scheduler.alphas_cumprod, "v_prediction").weight(timesteps, 5.0, keep_noisy=True)
    assert noisy[snr < 5].allclose(torch.ones(())) and noisy[0] < 0.1
    end = objective.NoiseSchedule(torch.tensor([0.5, 0.0]), "epsilon").weight(torch.tensor([1]), 5.0)
    assert float(end) == 1  # zero terminal SNR


def test_a_face_touches_the_cells_of_its_box() -> None:
    mask = objective.face_mask(torch.tensor([[4.0, 8.0, 9.0, 16.0], [-5.0, -5.0, 1.0, 1.0]]), side=32, size=8)
    assert mask.shape == (2, 1, 8, 8)
    assert mask[0, 0].nonzero().tolist() == [[row, column] for row in (2, 3) for column in (1, 2)]
    assert mask[1, 0].nonzero().tolist() == [[0, 0]]
    error = objective.weighted_error(torch.ones(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), mask, 5.0)
    torch.testing.assert_close(error, torch.ones(2))


def test_jittered_landmarks_are_turned_zoomed_and_moved() -> None:
    points = torch.tensor([[[0.0, 0.0], [20.0, 0.0], [10.0, 8.0], [2.0, 20.0], [18.0, 20.0]]]).repeat(3, 1, 1)
    draws = torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.5], [0.5, 1.0, 1.0, 0.5]])
    same, turned, moved = objective.jittered(points, draws, 1.0)
    torch.testing.assert_close(same, points[0])
    edge, expected = turned[1] - turned[0], torch.tensor([20 * np.cos(np.pi / 15), 20 * np.sin(np.pi / 15)])
    torch.testing.assert_close(edge, expected.float())
    assert (moved[1] - moved[0]).norm() == pytest.approx(25)
    extent = (points[0] - points[0].mean(0)).abs().max()
    torch.testing.assert_close(moved.mean(0) - points[0].mean(0), torch.tensor([0.1 * extent, 0.0]))
    torch.testing.assert_close(objective.jittered(points, draws, 0.0), points)


def test_unknown_prediction_and_recogniser_are_refused() -> None:
    with pytest.raises(TrainingError, match="'flow'"):
        objective.NoiseSchedule(torch.ones(3), "flow")
    with pytest.raises(TrainingError, match="MODULE:FUNCTION"):
        objective.load_face_embedder("nobody")
    found = objective.load_face_embedder("avatars")(torch.rand(2, 3, 128, 128), torch.rand(2, 5, 2) * 128)
    assert found.shape == (2, 256)


# --- Data --------------------------------------------------------------------------------------------------------


def test_references_are_other_photos_of_the_person_or_altered_crops(data: Path, base: Any) -> None:
    cache = encode(data, base, progress=False)
    pairs = Pairs(data, cache, split_people(read_rows(data), 0, seed=0)[0])
    assert pairs.references[0] == [(2, 0)] and pairs.references[4] == [(1, 0)]
    assert pairs.references[6] == [(6, 1), (6, 2), (6, 3), (6, 4)] and pairs.references[7][0] == (7, 1)
    chosen = pairs.choose(torch.tensor([6, 6, 0]), torch.tensor([0.0, 0.99, 0.99]))
    assert chosen == [(6, 1), (6, 4), (2, 0)]
    latents = pairs.reference_latents([(6, 0), (6, 1)])
    assert not torch.allclose(latents[0], latents[1])


def test_what_may_not_be_a_reference_is_a_target_only(tmp_path: Path, base: Any) -> None:
    photos = write_photos(tmp_path / "photos", ["ada", "ada", "ada", "bob", "bob"])
    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    for number in (1, 4):
        rows[number]["as_reference"] = False
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = prepare(open_source(photos), tmp_path / "data", PrepareOptions(SELECTION), progress=False)
    assert (report["paired_with_another_photo"], report["paired_with_itself"]) == (4, 1)
    kept = read_rows(tmp_path / "data")
    pairs = Pairs(tmp_path / "data", encode(tmp_path / "data", base, progress=False), split_people(kept, 0, seed=0)[0])
    found = {number: pairs.references[number] for number in range(5)}
    assert found[0] == [(2, 0)] and found[1] == [(0, 0), (2, 0)] and found[2] == [(0, 0)] and found[4] == [(3, 0)]
    assert {owner for owner, _ in found[3]} == {3}, (
        "bob's other photo may not stand for him: altered crops of this one"
    )


def overlap(a: list[float], b: list[float]) -> bool:
    return max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])


def test_rendered_avatars_are_prepared_without_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(embedded_model())
    assert main(["prepare", "avatars:40", "--model", model, "--out", str(tmp_path / "data")]) == 0
    assert "40 scenes" in capsys.readouterr().out
    own = load_base(model)
    rows, cache = read_rows(tmp_path / "data"), cache_folders(tmp_path / "data", own)
    assert is_encoded(tmp_path / "data", own) and not (tmp_path / "data" / "images").exists()
    pairs = Pairs(tmp_path / "data", cache, split_people(rows, 0, seed=0)[0])
    assert len(rows) > 20 and all(own not in {index for index, _ in found} for own, found in pairs.references.items())
    assert all(rows[index]["as_reference"] for found in pairs.references.values() for index, _ in found)
    together = [row for row in rows if row["others"]]
    shown = {row["identity"] for row in rows if row["as_reference"]}
    assert 8 <= len(together) <= 12 and all(row["identity"] in shown for row in together), "3 of 10 scenes"
    assert {len(row["others"]) for row in together} == {1, 2} and not any(row["as_reference"] for row in together)
    assert all(not overlap(row["box"], other) for row in together for other in row["others"])
    assert len({row["box"][0] > other[0] for row in together for other in row["others"]}) == 2, "anybody of them"
    assert not rows[5]["others"]
    index = int(rows[5]["source"].removeprefix("avatars:"))
    scene = plan("train", index, 5)
    drawn = render([scene], 128)
    assert rows[5]["identity"] == scene.people[0].identity.seed and rows[5]["text"]
    pixels = (drawn.images * 255).round() / 127.5 - 1
    torch.testing.assert_close(pairs.shards.latents([5]).float(), own.latents(pixels), rtol=0, atol=0.02)
    image = Image.fromarray((drawn.images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    boxes = np.array([(row["box"], detected(row)) for row in rows])
    heights = boxes[:, :, 3] - boxes[:, :, 1]
    ratio = heights[:, 1] / heights[:, 0]
    assert 1 / 1.2 < ratio.min() < 0.95 and 1.05 < ratio.max() < 1.2, "as detectors draw them"
    middle = boxes.reshape(-1, 2, 2, 2).mean(2)
    assert 0.02 < (np.abs(middle[:, 0] - middle[:, 1]) / heights[:, :1]).max() < 1 / 12 + 1e-6
    crop = np.asarray(crop_face(image, detected(rows[5]), resolution=128)).copy()
    face = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(pairs.shards.references([(5, 0)]).float(), own.latents(face), rtol=0, atol=0.02)


def test_workers_prepare_the_same_avatars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendered, "WINDOW", 20)
    monkeypatch.setattr(latent_cache, "SHARD", 16)
    monkeypatch.setattr(rendered, "SHARD", 16)
    load = functools.partial(load_base, str(embedded_model()))
    reports = [
        prepare_rendered(50, tmp_path / name, load(), progress=False, workers=workers, load=load)
        for name, workers in (("alone", 1), ("shared", 2))
    ]
    assert reports[0] == reports[1] and reports[0]["kept"] > 32
    first, second = tmp_path / "alone", tmp_path / "shared"
    files = sorted(path.relative_to(first) for path in first.rglob("*.*"))
    assert [file.suffix for file in files].count(".safetensors") == 2 * 4
    for file in files:
        if file.suffix == ".safetensors":
            assert metadata_of(first / file) == metadata_of(second / file)
            for name, tensor in load_file(first / file).items():
                torch.testing.assert_close(load_file(second / file)[name], tensor, rtol=0, atol=0.01)
        else:
            assert (first / file).read_bytes() == (second / file).read_bytes()


def test_scenes_of_nobody_with_another_portrait_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(embedded_model())
    with pytest.raises(DataError, match="render more scenes"):
        prepare_rendered(1, tmp_path / "one", base, progress=False)
    monkeypatch.setattr(rendered, "WINDOW", 5)
    report = prepare_rendered(6, tmp_path / "six", base, progress=False)  # the last one alone in its window
    assert report["kept"] < 6 == report["read"]
    cache = cache_folders(tmp_path / "six", base)
    latents = Shards(cache, report["kept"]).latents(range(report["kept"]))
    assert latents.dtype == torch.float16 and latents.isfinite().all()
    assert prepare_rendered(6, tmp_path / "one", base, progress=False) == report, "what was refused is not in the way"


def test_of_a_person_with_a_single_photo_nothing_is_prepared() -> None:
    people = [("ada", True), ("ada", False), ("bob", True), ("cy", True), ("cy", True)]
    rows = [{"identity": name, "as_reference": photo, "own_reference": False, "others": []} for name, photo in people]
    rows.insert(0, rows[0] | {"as_reference": False, "others": [[0, 0, 1, 1]]})
    found = paired([(row, torch.tensor(number)) for number, row in enumerate(rows)])
    assert [int(pixels) for _, pixels in found] == [2, 0, 4, 5]  # ada's photo would be its own reference


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["avatars:many", "--model", "MODEL"], "number of scenes"),
        (["avatars:40"], "give --model"),
        (["avatars:40", "--model", "MODEL", "--limit", "3"], "--limit chooses among photos"),
        (["avatars:40", "--model", "MODEL", "--min-face", "9"], "--min-face chooses among photos"),
    ],
)
def test_rendered_avatars_refuse_what_is_for_photos(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(embedded_model()) if word == "MODEL" else word for word in words]
    assert main(["prepare", *words, "--out", str(tmp_path / "data")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "data").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("")
    with pytest.raises(DataError, match="not empty"):
        prepare_rendered(10, tmp_path / "data", load_base(embedded_model()))


def test_validation_shares_nobody_with_training(data: Path) -> None:
    rows = read_rows(data)
    people, aside = split_people(rows, 3, seed=1)
    assert len(aside) == 3 and sorted(i for members in people + aside for i in members) == list(range(10))
    names = [{rows[i]["identity"] for members in part for i in members} - {None} for part in (people, aside)]
    assert not names[0] & names[1]
    assert split_people(rows, 3, seed=1)[1] == aside != split_people(rows, 3, seed=2)[1]
    with pytest.raises(ValueError, match="none of 7"):
        split_people(rows, 7, seed=0)


@pytest.mark.parametrize(("people", "aside"), [(1, 0), (3, 0), (4, 2), (39, 2), (60, 3), (2000, 32)])
def test_how_many_are_set_aside_by_default(people: int, aside: int) -> None:
    rows: list[Any] = [{"identity": str(i // 2)} for i in range(2 * people)]
    assert [len(part) for part in split_people(rows, None, seed=0)] == [people - aside, aside]


def test_a_run_by_time_has_a_bar_over_time() -> None:
    options = loop.LoopOptions(batch_size=1, lr=1.0, minutes=2)
    bar = loop.progress_bar(options, "face-fusion", 7, 30.0, silent=False)
    assert (bar.total, bar.n) == (120, 30)
    bar.update(60)
    assert "75%" in str(bar) and "left" in str(bar)
    bar.close()
    assert loop.progress_bar(options, "face-fusion", 7, 999.0, silent=False).n == 120  # a run that had ended
    by_steps = loop.progress_bar(replace(options, steps=50), "face-fusion", 7, 30.0, silent=False)
    assert (by_steps.total, by_steps.n) == (50, 7)
    assert loop.progress_bar(options, "face-fusion", 0, 0.0, silent=True).disable


def test_latents_are_those_of_the_pictures(data: Path, base: Any) -> None:
    rows, shards = read_rows(data), Shards(cache_folders(data, base, 4), 10)
    for index in (0, 7):
        pixels = np.asarray(Image.open(data / rows[index]["file_name"]))
        expected = base.latents(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
        torch.testing.assert_close(shards.latents([index])[0].float(), expected, atol=2e-3, rtol=2e-3)
        text = base.conditions([rows[index]["text"]])["text"][0]
        torch.testing.assert_close(shards.conditions([index])["text"][0].float(), text, atol=2e-3, rtol=2e-3)
    assert shards.reference_count(0) == 1 and shards.reference_count(6) == 5


def test_examples_are_equal_read_from_memory_or_from_files(
    data: Path, base: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = Shards(cache_folders(data, base), 10)
    monkeypatch.setattr(latent_cache, "SHARD", 3)  # several shards
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("latents", "conditions"))
    cache = encode(tmp_path / "data", base, progress=False)
    mapped, read = Shards(cache, 10, in_memory=0), Shards(cache, 10)
    examples, chosen = [9, 0, 4, 4], [(7, 3), (0, 0), (9, 4)]
    for own, other in ((mapped, read), (whole, read)):
        for found, expected in (
            (own.latents(examples), other.latents(examples)),
            (own.references(chosen), other.references(chosen)),
            (own.conditions(examples)["text"], other.conditions(examples)["text"]),
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=0 if own is mapped else 2e-3)


def test_a_broken_shard_is_made_again_and_another_base_has_its_own(data: Path, base: Any) -> None:
    cache = encode(data, base, progress=False)
    for folder in (cache.latents, cache.conditions):
        path = shard_path(folder, 0)
        whole, tensors = path.read_bytes(), load_file(path)
        path.unlink()  # the mapped tensors keep the old file
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="cannot be read"):
            Shards(cache, 10)
        encode(data, base, progress=False)
        again = load_file(path)
        assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)
    other = base_of(tiny_models.tiny_pipeline(seed=1))
    assert is_encoded(data, base) and not is_encoded(data, other) and not is_encoded(data, base, augmentations=3)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_another_part_of_the_base_leaves_what_it_does_not_encode(
    part: str, data: Path, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_models.tiny_pipeline()
    pipe.register_modules(**{part: tiny_models.tiny_components(seed=2)[part]})
    other = base_of(pipe)
    assert not is_encoded(data, other)

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(other, "conditions" if part == "vae" else "latents", refuse)
    first, second = cache_folders(data, base), encode(data, other, progress=False)
    assert is_encoded(data, other)
    old, new = Shards(first, 10), Shards(second, 10)
    assert torch.equal(old.latents([3]), new.latents([3])) == (part != "vae")
    assert torch.equal(old.references([(6, 2)]), new.references([(6, 2)])) == (part != "vae")
    assert torch.equal(old.conditions([3])["text"], new.conditions([3])["text"]) == (part == "vae")


def test_all_text_encoders_and_the_family_decide_where_captions_lie(data: Path, base: Any) -> None:
    def place(encoders: list[Any], is_xl: bool = False) -> Path:
        like: Any = SimpleNamespace(vae=base.vae, text_encoders=encoders, is_xl=is_xl)
        return cache_folders(data, like).conditions

    first, second, third = (tiny_models.tiny_components(seed)["text_encoder"] for seed in (0, 1, 2))
    pairs = ([first], [first, second], [first, third], [second, first])
    assert len({place(pair) for pair in pairs} | {place([first], is_xl=True)}) == 5
    assert place([first]) == cache_folders(data, base, augmentations=3).conditions


# --- Task --------------------------------------------------------------------------------------------------------


def test_only_the_adapter_learns_and_a_dropped_face_is_no_face(data: Path, base: Any) -> None:
    task = task_of(data, base).train()
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert trained == {f"adapter.{name}" for name, _ in task.adapter.named_parameters()}
    assert task.adapter.training and not task.unet.training
    batch = part_of(task, [0, 1, 2, 3])
    loss, found = gradients(task, batch)
    assert all(gradient.abs().sum() > 0 for gradient in found)
    batch["has_face"][:] = False
    dropped, found = gradients(task, batch)
    assert all(not gradient.any() for gradient in found) and dropped != pytest.approx(loss, rel=1e-6)
    schedule = base.schedule
    noisy = schedule.noised(batch["latents"], batch["noise"], batch["timesteps"])
    plain = base.unet(noisy, batch["timesteps"], batch["text"]).sample
    assert dropped == pytest.approx((plain - batch["noise"]).square().mean().item(), rel=1e-5)


def test_dropout_shares_exclude_each_other(data: Path, base: Any) -> None:
    task = task_of(data, base, text_dropout=0.2, both_dropout=0.1, face_dropout=0.3)
    parts = [part_of(task, list(range(50)), 50, step) for step in range(10)]
    no_face = torch.cat([~part["has_face"] for part in parts])
    no_text = torch.cat([(part["text"] == task.empty["text"]).flatten(1).all(1) for part in parts])
    fractions = [float(found.float().mean()) for found in (no_text & ~no_face, no_text & no_face, ~no_text & no_face)]
    assert fractions == pytest.approx([0.2, 0.1, 0.3], abs=0.06)


def test_the_gradient_of_a_batch_is_the_mean_of_its_parts(data: Path, base: Any) -> None:
    task = task_of(data, base, snr_gamma=5.0, face_loss_weight=3.0)
    whole = gradients(task, part_of(task, [0, 1, 2, 3]))[1]
    parts = [gradients(task, part_of(task, rows))[1] for rows in ([0, 2], [1, 3])]
    for expected, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close((first + second) / 2, expected, rtol=1e-3, atol=1e-7)


def test_large_pictures_are_attended_to_by_fused_kernels(
    data: Path, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fused(side: int) -> bool:
        with plain_attention_on_cpu(torch.empty(1, 4, side, side)):
            return torch.backends.cuda.flash_sdp_enabled()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [fused(side) for side in (16, 32, 64)] == [False, False, True] and torch.backends.cuda.flash_sdp_enabled()
    found = []
    for side in (16, 64):  # what is computed again is computed alike
        monkeypatch.setattr(task_module, "plain_attention_on_cpu", lambda _, s=side: plain_attention(s == 16))
        saving = task_of(data, base, gradient_checkpointing=True)
        try:
            found.append(gradients(saving, part_of(saving, [0, 1, 2, 3]))[1])
        finally:
            base.unet.disable_gradient_checkpointing()
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-6)


def test_recomputation_and_kept_references_change_nothing(data: Path, base: Any) -> None:
    plain = task_of(data, base)
    loss, expected = gradients(plain, part_of(plain, [0, 1]))
    kept = task_of(data, base, keep_references=True)
    assert gradients(kept, part_of(kept, [0, 1]))[0] == pytest.approx(loss, rel=1e-3)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    saving = task_of(data, base, gradient_checkpointing=True)
    hook = base.unet.up_blocks[-1].resnets[0].register_forward_pre_hook(count)
    try:
        again, found = gradients(saving, part_of(saving, [0, 1]))
    finally:
        hook.remove()
        base.unet.disable_gradient_checkpointing()
    assert runs == 3  # reference pass, forward pass, and once more for the gradients
    assert again == pytest.approx(loss, rel=1e-6)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_identity_loss_pulls_the_prediction_to_the_person(data: Path, base: Any) -> None:
    class Colours(torch.nn.Module):
        def forward(self, images: torch.Tensor, landmarks5: torch.Tensor) -> torch.Tensor:
            assert landmarks5.shape == (len(images), 5, 2) and images.shape[1:] == (3, SIDE, SIDE)
            return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) - 0.5

    task = task_of(data, base, Colours(), identity_loss_weight=1.0, identity_loss_until=0.5)
    batch = part_of(task, [0, 1, 2, 3])
    assert sorted(batch["recognised"].tolist()) == (batch["timesteps"] < 500).nonzero()[:, 0].tolist()
    fewer = task_of(data, base, Colours(), identity_loss_weight=1.0, identity_loss_until=0.4)
    parts = [part_of(fewer, [0, 1, 2, 3], step=step) for step in range(20)]
    assert {int((part["timesteps"] < 400).sum()) for part in parts} == {1, 2}
    assert {len(part["recognised"]) for part in parts} == {2}, "another number each time, and kernels are sought anew"
    batch["has_face"][:] = True
    batch["timesteps"], batch["recognised"] = torch.tensor([10, 100, 600, 900]), torch.tensor([0, 1, 2, 3])
    loss, extra = task(batch)
    assert 0 < extra["identity_loss"].item() < 1
    assert not task.eval()(batch)[1], "validation losses are those of the noise alone"
    task.train()
    extra["identity_loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.adapter.parameters())
    batch["has_face"][:2] = False
    assert task(batch)[1]["identity_loss"].item() == 0, "the others are too noisy"
    batch["has_face"][:] = True
    clearer = task_of(
        data, base, Colours(), identity_loss_weight=1.0, identity_loss_from=0.05, identity_loss_until=0.5
    )
    batch["timesteps"] = torch.tensor([10, 49, 50, 900])
    loss = clearer(batch)[1]["identity_loss"]
    batch["has_face"][2] = False
    assert loss.item() > 0 == clearer(batch)[1]["identity_loss"].item(), "who is shown is settled in the first two"
    batch["has_face"][:] = True
    places: list[torch.Tensor] = []
    colours = task.embedder
    turning = task_of(data, base, lambda images, points: places.append(points) or colours(images, points))  # type: ignore[misc]
    turning.options = FaceFusionOptions(identity_loss_weight=1.0, identity_loss_until=0.5, identity_loss_jitter=1.0)
    turning.identity_loss(batch, batch["latents"], batch["latents"])
    assert torch.equal(*places) and not torch.allclose(places[0], batch["landmarks5"], atol=0.1), "both look alike"
    batch["timesteps"][:] = 0  # nearly no noise: the prediction is the picture
    assert task(batch)[1]["identity_loss"].item() < extra["identity_loss"].item()


def test_a_face_among_others_is_seen_in_its_place_as_in_a_call() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(40, 3, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 6 + 14 * torch.rand(40, 3, 2, generator=generator)], -1)
    boxes[30:, 2] = torch.nan
    boxes[35:, 1] = torch.nan
    inside = 0
    for size in (16, 8, 4):
        places = objective.face_places(boxes[:, 0], boxes[:, 1:], 64, size)
        for place, people in zip(places, boxes, strict=True):
            there = [box.tolist() for box in people if not box.isnan().any()]
            expected = visible_people(pool(box_masks(there, 64, 64), size, size))[0]
            assert torch.equal(place, expected if len(there) > 1 else torch.ones(size * size, dtype=torch.bool))
            inside += int(place.sum())
    assert inside > 1000


def test_a_picture_of_several_people_shows_the_face_to_its_place_only(
    data: Path, base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(data, base)
    batch = part_of(task, [0, 1, 2, 3])
    assert batch["others"].shape == (4, 0, 4) and task.places(batch) is None
    batch["has_face"][:] = True
    alone = task(batch)[0]
    batch["others"] = torch.full((4, 1, 4), torch.nan)
    torch.testing.assert_close(task(batch)[0], alone)
    batch["boxes"], batch["others"][:, 0] = torch.tensor([[1.0, 1, 5, 7]] * 4), torch.tensor([9.0, 1, 14, 7])
    places = task.places(batch)
    assert places is not None and 0 < places[(SIDE // 2) ** 2].sum() < places[(SIDE // 2) ** 2].numel()
    assert not torch.allclose(task(batch)[0], alone)
    monkeypatch.setattr(task_module, "face_places", lambda boxes, others, side, size: torch.zeros(4, size**2) > 0)
    nowhere = task(batch)[0]
    batch["has_face"][:] = False
    torch.testing.assert_close(task(batch)[0], nowhere)


def test_compiled_training_learns_the_same_from_whichever_face(data: Path, base: Any) -> None:
    task = task_of(data, base)
    batches = [part_of(task, [0, 1, 2, 3], step=step) for step in range(3)]
    plain = [gradients(task, batch) for batch in batches]
    torch.compiler.reset()
    task.compile(backend="aot_eager", fullgraph=True)
    assert task.unet._compiled_call_impl is not None
    try:
        found = [gradients(task, batches[0])]
        torch._dynamo.config.error_on_recompile = True
        found += [gradients(task, batch) for batch in batches[1:]]
        assert task.sample(data / "nothing.png"), "other batch sizes run as they are"
    finally:
        torch._dynamo.config.error_on_recompile = False
        task.unet._compiled_call_impl = None
    for (loss, expected), (compiled_loss, compiled) in zip(plain, found, strict=True):
        assert compiled_loss == pytest.approx(loss, rel=1e-5)
        for a, b in zip(expected, compiled, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_an_average_lies_between_two_trainings_and_says_so(base: Any, tmp_path: Path) -> None:
    first, second = (create_adapter(base.unet, init, metadata={"resolution": SIDE}) for init in ("attn1", "xavier"))
    for name, adapter, steps in (("a", first.half(), 7), ("b", second.half(), 9)):
        save_adapter(adapter, tmp_path / name / "face_fusion_adapter.safetensors")
        record = {"face-fusion": {"task": "face-fusion", "steps": steps, "date": "2026-01-01"}}
        (tmp_path / name / "training.json").write_text(json.dumps(record))
    a, b = (load_file(tmp_path / name / "face_fusion_adapter.safetensors") for name in "ab")
    for fraction in (0.0, 0.25, 1.0):
        out = tmp_path / f"{fraction}"
        assert (
            main(["average", str(tmp_path / "a"), str(tmp_path / "b"), "--fraction", str(fraction), "--out", str(out)])
            == 0
        )
        for key, mean in load_file(out / "face_fusion_adapter.safetensors").items():
            assert mean.dtype == torch.float16
            torch.testing.assert_close(
                mean.double(), (1 - fraction) * a[key].double() + fraction * b[key].double(), **CLOSE
            )
    assert metadata_of(tmp_path / "0.25" / "face_fusion_adapter.safetensors")["resolution"] == str(SIDE)
    record = json.loads((tmp_path / "0.25" / "training.json").read_text())["face-fusion"]
    assert record["steps"] == 9 and record["averaged"]["fraction"] == 0.25 and record["averaged"]["with"]["steps"] == 7
    again = [str(tmp_path / name) for name in ("1.0", "0.25")]
    assert main(["average", *again, "--fraction", "0.5", "--out", str(tmp_path / "again")]) == 0
    twice = json.loads((tmp_path / "again" / "training.json").read_text())["face-fusion"]["averaged"]
    assert (
        twice["fraction"] == 0.5
        and twice["before"] == record["averaged"]
        and twice["with"]["averaged"]["fraction"] == 1.0
    )


def test_an_average_of_face_studio_takes_layers_that_only_the_second_has(base: Any, tmp_path: Path) -> None:
    known = {"image_width": 4, "face_width": 3, "face_embedder": "toy", "tokens": 2, "rank": 2}
    new_studio(base.unet, **known)
    for tensor in lora_state(base.unet).values():
        torch.nn.init.normal_(tensor)
    save_studio(base.unet, tmp_path / "b" / STUDIO_WEIGHTS_NAME)
    detach(base.unet)
    b, strings = read_tensors(tmp_path / "b" / STUDIO_WEIGHTS_NAME)
    a = {name: tensor + 1 for name, tensor in b.items() if ".to_q." not in name}
    save_tensors(tmp_path / "a" / STUDIO_WEIGHTS_NAME, a, strings)
    assert main(["average", *(str(tmp_path / name) for name in "ab"), "--out", str(tmp_path / "mean")]) == 0
    mean, said = read_tensors(tmp_path / "mean" / STUDIO_WEIGHTS_NAME)
    assert said == strings and mean.keys() == b.keys()
    for name, tensor in mean.items():
        expected = b[name] + 0.5 if name in a else b[name] / 2 if ".lora_B." in name else b[name]
        torch.testing.assert_close(tensor, expected, msg=name)

    adapter = create_adapter(base.unet, metadata={"resolution": SIDE})
    save_adapter(adapter, tmp_path / "c" / "face_fusion_adapter.safetensors")
    assert main(["average", *(str(tmp_path / name) for name in "bc"), "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_averaged_is_refused_and_nothing_is_lost(
    base: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, side in (("a", SIDE), ("b", 2 * SIDE)):
        adapter = create_adapter(base.unet, metadata={"resolution": side})
        save_adapter(adapter, tmp_path / name / "face_fusion_adapter.safetensors")
    before = (tmp_path / "a" / "face_fusion_adapter.safetensors").read_bytes()
    for words, message in (
        (["a", "b", "--out", "c"], "different bases or kinds of reference"),
        (["a", "a", "--fraction", "1.5", "--out", "c"], "from 0 to 1, got 1.5"),
        (["b", "a", "--out", "a"], "take another folder"),
        (["a", "nowhere", "--out", "c"], "nowhere"),
    ):
        places = [word if word.startswith("--") or word == "1.5" else str(tmp_path / word) for word in words]
        assert main(["average", *places]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert (tmp_path / "a" / "face_fusion_adapter.safetensors").read_bytes() == before


def test_v_prediction_comes_from_the_scheduler() -> None:
    pipe = tiny_models.tiny_pipeline()
    assert base_of(pipe).schedule.prediction == "epsilon"
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    assert base_of(pipe).schedule.prediction == "v_prediction"


def test_sdxl_goes_through_the_same_task(data: Path) -> None:
    xl = base_of(tiny_models.tiny_pipeline(family="xl"), "tiny xl")
    assert xl.is_xl and xl.conditions(["a", "b"])["pooled"].shape == (2, tiny_models.TEXT_WIDTH)
    encode(data, xl, progress=False)
    batch = part_of(task := task_of(data, xl), [0, 1])
    assert {"text", "pooled", "reference"} <= batch.keys()
    _, found = gradients(task, batch)
    assert all(gradient.abs().sum() > 0 for gradient in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("timestep", [0, 20])
def test_training_sees_a_reference_as_the_pipeline_does(
    data: Path, family: str, dtype: torch.dtype, timestep: int
) -> None:
    """Bit for bit: the same latents, the same words (none), in XL the same sizes, and so the same keys and values."""
    base = base_of(tiny_models.tiny_pipeline(family=family))
    encode(data, base, progress=False)
    pairs = pairs_of(data, base)[0]
    base.cast(dtype)
    noised = {"reference_mode": "noised" if timestep else "clean", "reference_timestep": timestep}
    adapter = create_adapter(base.unet, metadata={"resolution": 2 * SIDE, **noised}).to(dtype)
    task = FaceFusionTask(base, adapter, pairs)
    (pixels,) = face_tensors(tiny_models.face(), 2 * SIDE)
    with torch.no_grad():
        projected = adapter(task.reference_states(base.latents(pixels)))
    base.pipeline.set_face_fusion_adapter(adapter)
    identity = base.pipeline.encode_face(tiny_models.face())
    assert identity.keys.keys() == projected.keys() and len(projected) == (5 if family == "xl" else 4)
    for name, (key, value) in projected.items():
        assert torch.equal(identity.keys[name], key) and torch.equal(identity.values[name], value)


def test_training_for_both_attentions_sees_what_the_pipeline_sees(data: Path, family: str) -> None:
    """Keys at both attentions bit for bit; without its face an example is predicted as without any."""
    base = base_of(tiny_models.tiny_pipeline(family=family))
    encode(data, base, progress=False)
    own = SelfAttentionReference(timestep=30)
    adapter = create_adapter(base.unet, metadata={"resolution": 2 * SIDE})
    task = FaceFusionTask(base, adapter, pairs_of(data, base)[0], self_attention=own)
    assert task.subject["face_mode"] == "both" and task.subject["self_timestep"] == "30"
    (pixels,) = face_tensors(tiny_models.face(), 2 * SIDE)
    states = task.reference_states(base.latents(pixels))
    hers = {name: h[:, None] for name, h in states.items() if name.endswith("attn1")}
    keys = task.self_attention_keys(hers, torch.tensor([True]), None)
    base.pipeline.set_face_fusion_adapter(adapter)
    identity = base.pipeline.encode_face(tiny_models.face(), face_mode="both", self_attention=own)
    assert identity.keys.keys() == states.keys() and keys
    for name, seen in keys.items():
        assert torch.equal(identity.keys[name], seen.key) and torch.equal(identity.values[name], seen.value)
        assert seen.scale == own.scale

    batch = part_of(task, [0, 1])
    batch["has_face"] = torch.tensor([True, False])
    noisy = base.schedule.noised(batch["latents"], batch["noise"], batch["timesteps"])
    with torch.no_grad():
        plain = task.predicted(batch, noisy)
        with task.fused(batch, task.identity_tokens(batch)):
            both = task.predicted(batch, noisy)
        cross = FaceFusionTask(base, adapter, pairs_of(data, base)[0])
        with cross.fused(batch, cross.identity_tokens(batch)):
            alone = cross.predicted(batch, noisy)
    assert torch.allclose(both[1], plain[1], atol=1e-5)
    assert (both[0] - plain[0]).abs().max() > 1e-3 and (both[0] - alone[0]).abs().max() > 1e-4
    _, found = gradients(task, batch)
    assert all(gradient.abs().sum() > 0 for gradient in found)


# --- Processes, kills and full disks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(Path(__file__).with_name("training_runs.py")), str(model), str(data), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), out


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "training_state.safetensors")


def test_processes_and_parts_give_the_gradients_of_one_large_batch(runs: Any) -> None:
    found, out = runs
    expected = state(out / "one", 1)
    names = [name for name in expected if name.startswith("optimizer/exp_avg/")]
    assert names and all(expected[name].abs().sum() > 0 for name in names)
    for run in ("two", "parts"):
        assert found[run][0] == 0, found[run][1]
        averages = state(out / run, 1)
        for name in names:  # a tenth of the gradient after one step
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(averages[name], expected[name], rtol=1e-3, atol=1e-4 * scale)
    assert json.loads((out / "two" / "training.json").read_text())["face-fusion"]["processes"] == 2


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(runs: Any) -> None:
    found, out = runs
    assert found["straight"][0] == 0 and found["killed"][0] == -9 and found["resumed"][0] == 0
    expected, resumed = state(out / "straight", 6), state(out / "killed", 6)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    straight, killed = (load_file(out / run / "face_fusion_adapter.safetensors") for run in ("straight", "killed"))
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    lines = (out / "killed" / "logs/face-fusion/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "lr" in line] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_loses_no_checkpoint(runs: Any) -> None:
    found, out = runs
    status, errors = found["full"]
    assert status == 2 and "earlier checkpoints are complete" in errors
    assert found["freed"][0] == 0
    expected, freed = state(out / "straight", 6), state(out / "full", 6)
    assert all(torch.equal(expected[name], freed[name]) for name in expected)
    assert not list((out / "full").rglob("*.partial")) and not list((out / "full").rglob("*.tmp"))


def test_the_prediction_of_a_teacher_is_the_target(data: Path, base: Any) -> None:
    """Of the student's own reference, in training; people set aside are measured by the noise."""
    teacher = create_adapter(base.unet, "xavier", metadata={"resolution": SIDE})

    def task_with(student: Any) -> FaceFusionTask:
        return FaceFusionTask(base, student, *pairs_of(data, base), teacher=teacher)

    same = copy.deepcopy(teacher).requires_grad_(True)
    task = task_with(same)
    assert task(part_of(task, [0, 1, 2, 3]))[0].item() == 0, "who knows as much has nothing to learn"

    task = task_with(create_adapter(base.unet, metadata={"resolution": SIDE}))
    batch = part_of(task, [0, 1, 2, 3])
    batch["has_face"] = torch.tensor([True, True, True, False])
    noisy = base.schedule.noised(batch["latents"], batch["noise"], batch["timesteps"])
    predicted = []
    for adapter in (task.adapter, teacher):
        with torch.no_grad(), face_fused_unet(base.unet, adapter, task.identity_tokens(batch), batch["has_face"]):
            predicted.append(base.unet(noisy, batch["timesteps"], batch["text"]).sample)
    errors = (predicted[0] - predicted[1]).square().mean((1, 2, 3))
    assert errors[3] == 0 < errors[0]
    loss, found = gradients(task, batch)
    assert loss == pytest.approx(errors.mean().item(), rel=1e-4) and all(gradient.any() for gradient in found)
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert trained == {f"adapter.{name}" for name, _ in task.adapter.named_parameters()}
    noise = (predicted[0] - batch["noise"]).square().mean()
    assert task.eval()(batch)[0].item() == pytest.approx(noise.item(), rel=1e-4)


def test_a_student_comes_to_predict_what_its_teacher_does(data: Path, base: Any, tmp_path: Path) -> None:
    teacher, student = (create_adapter(base.unet, kind, metadata={"resolution": SIDE}) for kind in ("xavier", "attn1"))
    task = FaceFusionTask(base, student, pairs_of(data, base, 0)[0], teacher=teacher)
    batch = part_of(task, [0, 1, 2, 3])
    before = task(batch)[0].item()
    known = copy.deepcopy(teacher.state_dict())
    loop.train(task, loop.LoopOptions(batch_size=4, lr=1e-2, steps=40, warmup=0, schedule="constant"), tmp_path)
    assert task.train()(batch)[0].item() < before / 2
    assert all(torch.equal(known[name], weight) for name, weight in teacher.state_dict().items())
    resumed = FaceFusionTask(base, student, pairs_of(data, base, 0)[0], teacher=copy.deepcopy(student))
    with pytest.raises(TrainingError, match="teacher"):
        loop.train(resumed, loop.LoopOptions(batch_size=4, lr=1e-2, steps=41), tmp_path)


# --- Command -----------------------------------------------------------------------------------------------------


said: list[str] = []  # on stdout, by the runs of `train`


@pytest.fixture
def train(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str, **options: Any) -> tuple[int, str]:
        given: dict[str, Any] = {"model": model, "data": data, "out": tmp_path / "out", "max-train-steps": 2}
        given |= {key.replace("_", "-"): value for key, value in options.items()}
        status = main(["train", *(f"--{key}={value}" for key, value in given.items()), *words])
        captured = capsys.readouterr()
        said.append(captured.out)
        return status, captured.err

    return run


def test_weights_card_and_pictures(train: Any, tmp_path: Path, family: str) -> None:
    pipe = tiny_models.tiny_pipeline(family=family)
    pipe.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "validation_people": 2}
    options["model"] = tmp_path / "model"
    words = ["--validation-prompt", "a cat", "--validation-inference-steps", "2", "--validation-steps", "1"]
    status, errors = train(*words, "--use-ema", **options)
    out = tmp_path / "out"
    assert status == 0, errors
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (out / "checkpoint-2" / "face_fusion_adapter.safetensors").is_file()
    pipe.load_face_fusion_adapter(out)
    with Image.open(out / "logs/face-fusion/sample_0000002.png") as sample:
        assert "generated by AI" in sample.info["description"]
    last = json.loads((out / "logs/face-fusion/metrics.jsonl").read_text().splitlines()[-1])
    assert {"validation_loss_right_face", "validation_loss_wrong_face", "validation_loss_no_face"} <= last.keys()
    card = (out / "README.md").read_text()
    assert "](logs/face-fusion/sample_0000002.png)" in card
    assert "2 sheets of pictures drawn meanwhile: " in said[-1] and "the last is sample_0000002.png" in said[-1]
    assert "--max-train-steps 2" in card and "10 of 10, of 7 people" in card and str(tmp_path) not in card
    assert "right face " in card and "wrong face " in card
    record = json.loads((out / "training.json").read_text())["face-fusion"]
    assert record["pipeline"] == type(pipe).__name__
    assert record["steps"] == 2 and record["learned"]["text_dropout"] == 0.05 and len(record["data"]["sha256"]) == 64
    status, errors = train("--resume-from-checkpoint", "none", **options)
    assert status == 2 and "checkpoint-2 of an earlier run" in errors


def test_weights_for_both_attentions(train: Any, tmp_path: Path) -> None:
    words = ["--face-mode", "both", "--validation-prompt", "a cat", "--validation-inference-steps", "1"]
    status, errors = train(*words, validation_people=1)
    assert status == 0, errors
    record = json.loads((tmp_path / "out" / "training.json").read_text())["face-fusion"]
    assert record["learned"]["face_mode"] == "both" and record["learned"]["self_layers"] == "up_blocks"
    assert "--face-mode both" in (tmp_path / "out" / "README.md").read_text()
    assert train(*words, validation_people=1)[0] == 0, "it goes on where it was"


def test_pictures_of_a_training_are_drawn_in_the_mode_that_it_is_for() -> None:
    asked: list[Any] = []

    def pipe(prompt: str, **options: Any) -> Any:
        asked.append(options["face_mode"])
        return SimpleNamespace(images=[tiny_models.face()])

    Samples([tiny_models.face()], ["a cat"], mode="both")._pictures(pipe, [tiny_models.face()])
    assert asked == ["both"]


def test_photos_are_prepared_on_the_way(train: Any, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", ["ada", "ada", "bob"])
    selected = ["--min-side", "16", "--min-face", "4", "--workers", "1", "--min-sharpness", "0"]
    in_half = ["--mixed-precision", "bf16", "--gradient-checkpointing", "--init", "xavier"]
    status, errors = train(*selected, *in_half, data=photos, num_train_epochs=1)
    assert status == 0, errors
    assert "no pictures were drawn meanwhile: --validation-prompt TEXT" in said[-1]
    assert json.loads((tmp_path / "out/prepared/report.json").read_text())["paired_with_another_photo"] == 2


def test_a_checkpoint_of_another_training_is_refused(train: Any, tmp_path: Path) -> None:
    assert train(validation_people=0)[0] == 0
    before = (tmp_path / "out" / "face_fusion_adapter.safetensors").read_bytes()
    for words, named in (
        (["--token-count-bias"], "token_count_bias False, not True"),
        (["--text-dropout", "0.2"], "text_dropout 0.05, not 0.2"),
        (["--init", "zero_v"], "initial_weights"),
        (["--validation-people", "2"], "training_images"),
        (["--face-mode", "both"], "face_mode adapter, not both"),
    ):
        status, errors = train(*words, **({} if "people" in words[0] else {"validation_people": 0}))
        assert status == 2 and named in errors and "checkpoint-2" in errors
    assert (tmp_path / "out" / "face_fusion_adapter.safetensors").read_bytes() == before
    assert train(validation_people=0)[0] == 0


def test_options_for_photos_are_refused_where_the_data_are_prepared(
    train: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = json.loads((data / "report.json").read_text())["settings"]["resolution"]
    status, errors = train("--resolution", "256")
    assert status == 2 and f"prepared with --resolution {side}, not 256" in errors
    status, errors = train("--limit", "3")
    assert status == 2 and "--limit chooses photos" in errors
    photos = write_photos(tmp_path / "photos", ["ada", "ada"])
    monkeypatch.setattr("face_fusion_pipeline.training.loop.process_group", lambda: SimpleNamespace(
        num_processes=2, is_main_process=True, device=torch.device("cpu")))  # fmt: skip
    status, errors = train("--augmentations", "8", "--min-sharpness", "0", data=photos)
    assert status == 2 and "--min-sharpness 0.0 --augmentations 8`, in one process" in errors


def test_strategies_that_split_the_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.Accelerator, "distributed_type", loop.DistributedType.FSDP)
    with pytest.raises(TrainingError, match="FSDP splits the weights"):
        loop.create_accelerator(loop.LoopOptions(batch_size=1, lr=1.0, steps=1), tmp_path)


def test_the_record_names_a_checkpoint_without_its_place(train: Any, tmp_path: Path) -> None:
    assert train()[0] == 0
    assert train("--resume-from-checkpoint", "checkpoint-2")[0] == 0
    text = (tmp_path / "out" / "training.json").read_text() + (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text and json.loads(
        (tmp_path / "out" / "training.json").read_text()
    )["face-fusion"]["options"]["resume"] == "checkpoint-2"  # fmt: skip


def test_weights_can_be_trained_on(train: Any, tmp_path: Path) -> None:
    assert train(validation_people=0)[0] == 0
    first = tmp_path / "out" / "face_fusion_adapter.safetensors"
    a, metadata = load_file(first), metadata_of(first)
    save_file(a, first, {**metadata, "base_fingerprint": "0 1 2"})  # as if of a fine-tune of the same base
    former = json.loads((first.parent / "training.json").read_text())["face-fusion"]
    (first.parent / "training.json").write_text(json.dumps({"adapter": former}))  # its name in a published model
    second = {"init_adapter": first.parent, "out": tmp_path / "second", "learning_rate": 1e-9}
    assert train(**second)[0] == 0
    b = load_file(tmp_path / "second" / first.name)
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    assert metadata_of(tmp_path / "second" / first.name) == metadata
    record = json.loads((tmp_path / "second" / "training.json").read_text())["face-fusion"]
    assert record["continues"] == former
    status, errors = train("--token-count-bias", **{**second, "init_adapter": first})
    assert status == 2 and "token_count_bias" in errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "/nowhere"], "there is no folder /nowhere"),
        (["--data", "/nowhere"], "/nowhere is no folder of photos"),
        (["--learning-rate", "0"], "--learning-rate must be a number above 0"),
        (["--text-dropout", "0.9", "--face-dropout", "0.2"], "more than 1"),
        (["--resolution", "100"], "multiple of 8"),
        (["--identity-loss-weight", "0.1"], "go together"),
        (
            ["--identity-loss-weight", "0.1", "--identity-embedder", "avatars", "--identity-loss-from", "0.3"],
            "nothing",
        ),
        (["--resume-from-checkpoint", "checkpoint-7"], "no such folder"),
        (["--use-8bit-adam"], "bitsandbytes"),
        (["--report-to", "comet_ml"], "comet_ml"),
        (["--validation-image", "a.png"], "--validation-prompt"),
        (["--validation-people", "99"], "none of 7"),
        (["--push-to-hub"], "on the Hub"),
        (["--max-train-steps", "0"], "--max-train-steps must be a whole number from 1"),
        (["--reference-timestep", "1000"], "--reference-timestep must be a whole number from 0 to 999"),
        (["--adam-beta2", "1"], "below 1"),
    ],
)
def test_bad_input_is_one_line(train: Any, words: list[str], message: str) -> None:
    status, errors = train(*words)
    line = errors.strip().splitlines()[-1]
    assert status == 2 and line.startswith("face-fusion: error:") and message in line


def test_trackers_and_the_hub_get_the_results(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    from face_fusion_pipeline.publishing import hub

    logged: list[Any] = []
    sent: dict[str, Any] = {}

    class Notes(tracking.GeneralTracker):
        name, requires_logging_directory = "notes", False
        tracker = None

        def __init__(self, run_name: str, **kwargs: Any) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            logged.append(values)

        def log(self, values: dict[str, Any], step: int | None, **kwargs: Any) -> None:
            logged.append(values)

        def log_images(self, values: dict[str, Any], step: int | None, **kwargs: Any) -> None:
            logged.append({name: picture.shape for name, picture in values.items()})

    class Hub:
        def create_repo(self, name: str, **options: Any) -> Any:
            return type("Url", (), {"repo_id": f"me/{name}"})

        def create_commit(self, repository: str, operations: list[Any], **options: Any) -> Any:
            sent.update(repository=repository, files={operation.path_in_repo for operation in operations})
            return type("Commit", (), {"commit_url": "https://address"})

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notes", Notes)
    monkeypatch.setattr(hub, "HfApi", Hub)
    options = {"report_to": "notes", "log_every": 1, "validation_people": 2, "validation_inference_steps": 2}
    status, errors = train("--push-to-hub", "--validation-prompt", "a cat", **options)
    assert status == 0, errors
    assert logged[0]["batch_size"] == 4 and any("loss" in values for values in logged)
    assert any("samples" in values for values in logged)
    assert sent["repository"] == "me/out" and {"face_fusion_adapter.safetensors", "pipeline.py"} <= sent["files"]
    assert not [name for name in sent["files"] if "sample" in name or "checkpoint" in name]


def test_the_script_takes_the_names_of_diffusers() -> None:
    path = Path(__file__).parents[1] / "examples" / "train_face_fusion.py"
    spec = importlib.util.spec_from_file_location("train_face_fusion", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.dashed("--train_data_dir=my_photos") == "--train-data-dir=my_photos"
    text = """--pretrained_model_name_or_path a/b --train_data_dir c_d --output_dir e --resolution 512 --seed 1
    --train_batch_size 1 --gradient_accumulation_steps 2 --max_train_steps 3 --learning_rate 1e-4 --use_8bit_adam
    --lr_scheduler cosine --lr_warmup_steps 4 --mixed_precision fp16 --checkpointing_steps 5 --snr_gamma 5 --use_ema
    --resume_from_checkpoint latest --push_to_hub --validation_prompt x y --validation_image i --validation_steps 6
    --report_to wandb --gradient_checkpointing --max_train_samples 7 --checkpoints_total_limit 8"""
    args = build_parser().parse_args(["train", *map(script.dashed, text.split())])
    assert (args.model, args.data, args.limit, args.train_batch_size) == ("a/b", "c_d", 7, 1)
    assert args.validation_prompt == ["x", "y"] and args.use_8bit_adam


def test_the_commands_of_the_page_on_training_parse() -> None:
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text().replace("\\\n", " ")
    commands = [line for line in page.splitlines() if line.startswith("face-fusion ")]
    assert len(commands) == 2
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True)[1:])
