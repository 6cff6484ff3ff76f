"""The kit that trains the avatar model from scenes drawn on the device."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

from face_fusion_pipeline.avatars.kit.plans import plan_windows
from face_fusion_pipeline.avatars.kit.presets import KIT_PRESETS
from face_fusion_pipeline.avatars.kit.scene_tensors import detected, draw_scenes, emphasis, face_crops
from face_fusion_pipeline.avatars.kit.stages import STAGES, Times, load_parts, made_up, run, warm_up
from face_fusion_pipeline.avatars.kit.tasks import ScenePairs
from face_fusion_pipeline.avatars.training.data import AvatarImages
from face_fusion_pipeline.avatars.training.tokenizer import train_tokenizer
from face_fusion_pipeline.avatars.training.vae import create_vae
from face_fusion_pipeline.avatars.world.caption import caption, full_caption
from face_fusion_pipeline.avatars.world.dataset import plan, scene_records
from face_fusion_pipeline.avatars.world.render import render
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_images import CROP_ENLARGE, crop_face
from face_fusion_pipeline.training.loop import TrainingError


TINY = KIT_PRESETS["tiny"]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A folder with an untrained VAE and a tokenizer: what the kit begins with."""
    folder = tmp_path_factory.mktemp("kit") / "start"
    create_vae(8, 8, (0, 0, 0, 1), latent_channels=4).save_pretrained(folder / "vae")
    scenes = [plan("train", index, 5) for index in range(50)]
    words = [text for scene in scenes for text in (caption(scene), full_caption(scene))]
    train_tokenizer(words, 700).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def trained(start) -> Path:
    out = start.parent / "trained"
    words = ["avatars-kit", "--model", str(start), "--out", str(out), "--preset", "tiny", "--scenes", "60"]
    assert main([*words, "--base-seconds", "1", "--faces-seconds", "1", "--depth-seconds", "1"]) == 0
    return out


def test_a_run_leaves_an_ordinary_model_with_weights_and_records(trained):
    pipe = StableDiffusionPipeline.from_pretrained(trained, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a person in a red shirt", num_inference_steps=1, output_type="np").images[0]
    assert image.shape == (64, 64, 3) and np.isfinite(image).all()
    assert pipe.text_encoder.config.max_position_embeddings == 77
    with safe_open(trained / "face_fusion_adapter.safetensors", "pt") as file:
        assert json.loads(file.metadata()["resolution"]) == 64
    records = json.loads((trained / "training.json").read_text())
    assert set(records) == {"unet", "face-fusion", "controlnet"}
    assert all(record["steps"] > 0 and record["training_images"] > 0 for record in records.values())
    rates = [json.loads(line)["what"] for line in (trained / "rates.jsonl").read_text().splitlines()]
    assert rates == ["scenes", *STAGES]
    for stage in ("unet", "face-fusion", "controlnet"):
        assert list((trained / "logs" / stage).glob("sample_*.png"))


def test_a_later_run_goes_on_from_the_weights_and_keeps_the_record(trained, tmp_path):
    before = (trained / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    run(trained, tmp_path, TINY, Times(draw=0, base=0.5, faces=0, depth=0), scenes=40, workers=1, warm=False)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != before
    record = json.loads((tmp_path / "training.json").read_text())["unet"]
    assert record["continues"] == json.loads((trained / "training.json").read_text())["unet"]
    assert not (tmp_path / "controlnet").exists()


def test_a_killed_run_goes_on_from_its_checkpoint(start, tmp_path, monkeypatch):
    from face_fusion_pipeline.avatars.kit.tasks import BaseTask

    often = replace(TINY, loops={**TINY.loops, "base": replace(TINY.loops["base"], checkpoint_minutes=0.0)})
    forward = BaseTask.forward

    def steps_until_killed(number):
        """The steps in the metrics after a run that is killed when it computes its `number`-th loss."""
        losses = []

        def killed(self, batch):
            losses.append(None)
            if len(losses) == number:
                raise KeyboardInterrupt
            return forward(self, batch)

        monkeypatch.setattr(BaseTask, "forward", killed)
        with pytest.raises(KeyboardInterrupt):  # long before the time is up, on any machine
            run(start, tmp_path, often, Times(draw=0, base=600, faces=0, depth=0), scenes=40, workers=1, warm=False)
        metrics = tmp_path / "logs" / "unet" / "metrics.jsonl"
        return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]

    lines, after = steps_until_killed(4), steps_until_killed(2)
    assert (tmp_path / "logs" / "unet" / "checkpoint.safetensors").is_file()
    assert lines == [1, 2, 3] and after[:4] == [1, 2, 3, 4]


def test_what_is_missing_is_named(tmp_path, capsys):
    with pytest.raises(TrainingError, match="vae does not exist"):
        load_parts(tmp_path, TINY)
    words = ["avatars-kit", "--model", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(words) == 2 and "nothing to train" in capsys.readouterr().err
    assert main([*words, "--base-seconds", "-1"]) == 2
    assert "--base-seconds must be a number from 0" in capsys.readouterr().err


def test_planned_windows_are_the_same_from_processes(start):
    alone, many = (plan_windows(start / "tokenizer", "validation", workers) for workers in (1, 2))
    for _ in range(2):
        first, second = next(alone), next(many)
        assert [scene.seed for scene in first.scenes] == [scene.seed for scene in second.scenes]
        assert torch.equal(first.tokens, second.tokens) and first.tokens.shape[1:] == (2, 77)
    many.close()


def test_drawn_scenes_hold_what_the_renderer_says(start):
    planned = next(plan_windows(start / "tokenizer", "train"))
    window = planned._replace(scenes=planned.scenes[:12], tokens=planned.tokens[:12])
    data = draw_scenes([window], lambda images: images[:, :2, ::8, ::8], 64, torch.device("cpu"), 12, at_once=5)
    rendered = render(window.scenes, 64)
    records = scene_records(window.scenes, rendered)
    assert len(data) == 12
    torch.testing.assert_close(data.latents.float(), (rendered.images * 2 - 1)[:, :2, ::8, ::8], atol=1e-3, rtol=0)
    for row, scene in enumerate(window.scenes):
        people = len(scene.people)
        assert torch.equal(data.boxes[row, :people], rendered.boxes[row]) and data.boxes[row, people:].isnan().all()
        assert data.identities[row].tolist() == [p.identity.seed for p in scene.people] + [-1] * (3 - people)
        assert data.target[row] < people
    exact = [{**record, "landmarks68": rendered.landmarks68[i].tolist(), "boxes": rendered.boxes[i].tolist()}
             for i, record in enumerate(records)]  # fmt: skip
    images = AvatarImages(torch.empty(12, 3, 64, 64, dtype=torch.uint8), exact, Path(), "")
    assert torch.equal(data.emphasis, images.face_emphasis(8, 8))


def test_crops_are_those_of_a_photo():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    picture = coarse.resize((64, 64), Image.Resampling.BICUBIC)
    boxes = torch.tensor([[20.0, 16.0, 44.0, 46.0], [2.0, 30.0, 22.0, 52.0]])  # the second reaches over the border
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float().div(127.5).sub(1)
    found = face_crops(pixels.expand(2, -1, -1, -1), boxes, CROP_ENLARGE)
    for crop, box in zip(found, boxes.tolist(), strict=True):
        true = np.asarray(crop_face(picture, tuple(box), CROP_ENLARGE, 64), dtype=float)
        mine = crop.add(1).mul(127.5).permute(1, 2, 0).numpy()
        assert np.abs(mine - true).mean() < 4


def test_detected_boxes_stay_near():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 50.0]]).expand(3, -1)
    draws = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.5, 0.5], [0.5, 1.0, 0.0]])
    exact, larger, aside = detected(boxes, draws)
    torch.testing.assert_close(exact, boxes[0])
    torch.testing.assert_close((larger[2:] - larger[:2]), 1.2 * (boxes[0, 2:] - boxes[0, :2]))
    torch.testing.assert_close(aside - boxes[0], torch.tensor([2.5, -2.5, 2.5, -2.5]))


def test_emphasis_of_nobody_is_nothing():
    assert not emphasis(torch.full((1, 3, 4), torch.nan), torch.full((1, 3, 68, 2), torch.nan), 8, 8).any()


def test_pairs_show_another_photo_of_the_same_person(start):
    parts = load_parts(start, TINY)
    planned = next(plan_windows(start / "tokenizer", "train"))
    window = planned._replace(scenes=planned.scenes[:60], tokens=planned.tokens[:60])
    data = draw_scenes([window], parts.latents, 64, torch.device("cpu"), 60)
    pairs = ScenePairs(data, parts.text_encoder, "key")
    rows = torch.arange(len(pairs))
    chosen = pairs.choose(rows, torch.linspace(0, 0.999, len(rows)))
    indices = pairs.index(rows)
    for index, (reference, _) in zip(indices.tolist(), chosen, strict=True):
        person = data.identities[index, data.target[index]]
        assert reference != index and data.photo[reference]
        assert data.identities[reference].tolist() == [person, -1, -1]
    batch = pairs.batch(rows)
    alone = (data.identities[indices] >= 0).sum(1) == 1
    assert batch["others"][alone].isnan().all() and not batch["boxes"].isnan().any()
    assert (~batch["others"].isnan()).any((1, 2))[~alone].all()


def test_made_up_scenes_are_laid_out_as_drawn_ones(start):
    """Another layout in memory would be compiled anew, which takes a minute on a GPU."""
    parts = load_parts(start, TINY)
    parts.vae.to(memory_format=torch.channels_last)
    planned = next(plan_windows(start / "tokenizer", "train"))
    window = planned._replace(scenes=planned.scenes[:6], tokens=planned.tokens[:6])
    drawn = draw_scenes([window], parts.latents, TINY.size, torch.device("cpu"), 6)
    made = made_up(parts, TINY, 6, torch.device("cpu"))
    for field in fields(drawn):
        one, other = getattr(drawn, field.name), getattr(made, field.name)
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride()), field.name


def test_a_warmed_run_waits_for_what_is_compiled(start, tmp_path):
    times = Times(draw=0, base=0.3, faces=0, depth=0)
    run(start, tmp_path, TINY, times, scenes=40, workers=1, warm=True)
    assert (tmp_path / "unet").is_dir()


def test_warming_up_trains_nothing_that_stays(start, capsys):
    before = sorted(path for path in start.parent.iterdir())
    warm_up(start, TINY, ["base", "faces", "depth"])
    assert sorted(path for path in start.parent.iterdir()) == before
    frozen = load_parts(start, TINY)
    scenes = made_up(frozen, TINY, 8, torch.device("cpu"))
    assert len(ScenePairs(scenes, frozen.text_encoder, "")) == 8
