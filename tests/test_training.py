"""Training: the loop resumes bit for bit, and every stage writes parts that diffusers and transformers load."""

import argparse
import copy
import dataclasses
import functools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from face_fusion_pipeline.avatars.training.data import load_avatars, render_avatars
from face_fusion_pipeline.avatars.world.dataset import write
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_errors import ModelNotFoundError
from face_fusion_pipeline.training import loop
from face_fusion_pipeline.training.latent_cache import cached
from face_fusion_pipeline.training.loop import LoopOptions, Task, TrainingError, data_order, learning_rate, train


SIZE = 32
OPTIONS = LoopOptions(batch_size=4, lr=1e-2, steps=6, warmup=2, log_every=1)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """An ImageFolder of random images, two of each identity."""
    root = tmp_path_factory.mktemp("avatars")
    for split, count in (("train", 12), ("validation", 8)):
        draw = random.Random(split)
        (root / split / "images").mkdir(parents=True)
        (root / split / "depth").mkdir()
        lines = []
        for index in range(count):
            name = f"images/{index}.png"
            Image.frombytes("RGB", (SIZE, SIZE), draw.randbytes(SIZE * SIZE * 3)).save(root / split / name)
            depth = np.frombuffer(draw.randbytes(SIZE * SIZE * 2), np.uint16).reshape(SIZE, SIZE)
            Image.fromarray(depth).save(root / split / f"depth/{index}.png")
            record = {
                "file_name": name,
                "depth_file_name": f"depth/{index}.png",
                "text": f"a {draw.choice(['red', 'blue'])} shirt",
                "identities": [index // 2],
            }
            points = [[12.0, 20.0] if k >= 48 else [20.0, 12.0] for k in range(68)]  # the mouth, all else
            lines.append(json.dumps({**record, "boxes": [[8, 8, 23, 23]], "landmarks68": [points]}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines))
    return root


class Regression(Task):
    """Learns the mean of noisy numbers; enough to exercise everything in the loop."""

    name, size = "regression", 10

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        with torch.no_grad():
            self.layer.weight.fill_(0.5)
            self.layer.bias.zero_()
        self.dies_at = None
        self.seen = 0

    def batch(self, indices, generator, progress):
        return {"x": torch.randn(len(indices), 3, generator=generator) + indices[:, None].float()}

    def forward(self, batch):
        self.seen += 1
        if self.seen == self.dies_at:
            raise KeyboardInterrupt
        loss = (self.layer(batch["x"]) - 1).square().mean()
        return loss, {"twice": 2 * loss}

    def export(self, folder):
        self.exported = {name: p.detach().clone() for name, p in self.named_parameters()}


def checkpoint_of(folder):
    with safe_open(folder / "logs/regression/checkpoint.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a safetensors file is no dict


def test_the_record_keeps_the_options_of_the_task_too(tmp_path):
    task = Regression()
    task.settings = {"face_weight": 5.0}
    assert train(task, OPTIONS, tmp_path)["options"].items() >= {"face_weight": 5.0, "lr": OPTIONS.lr}.items()


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "no")])
def test_bf16_is_taken_only_where_the_device_computes_in_it(native, expected, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "_computes_in_bf16", lambda: native)
    options = dataclasses.replace(OPTIONS, precision="auto")
    assert train(Regression(), options, tmp_path)["options"]["precision"] == expected
    assert not caplog.records
    assert loop.usable_precision("bf16") == "bf16"  # as asked, but not in silence
    assert bool(caplog.records) is not native


def test_compiled_training_equals_plain_and_exports_the_task_itself(tmp_path):
    plain, compiled = Regression(), Regression()
    compile = functools.partial(nn.Module.compile, compiled, backend="aot_eager")
    compiled.compile = lambda: compile()  # no compiler is needed to see what is compiled and that it is
    train(plain, OPTIONS, tmp_path / "plain")
    train(compiled, dataclasses.replace(OPTIONS, compile=True), tmp_path / "compiled")
    assert compiled._compiled_call_impl is not None and plain._compiled_call_impl is None
    assert compiled.exported.keys() == plain.exported.keys() == {"layer.weight", "layer.bias"}
    for name, value in plain.exported.items():
        torch.testing.assert_close(compiled.exported[name], value)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    train(Regression(), OPTIONS, straight)

    options = dataclasses.replace(OPTIONS, checkpoint_minutes=0)  # a checkpoint after every step
    dying = Regression()
    dying.dies_at = 4
    with pytest.raises(KeyboardInterrupt):
        train(dying, options, killed)
    resumed = Regression()
    record = train(resumed, options, killed)

    assert resumed.seen == 3 and record["steps"] == 6 and record["samples"] == 24
    expected, found = checkpoint_of(straight), checkpoint_of(killed)
    assert expected.keys() == found.keys()
    assert any(key.startswith("optimizer/exp_avg_sq/") for key in found)
    for key in expected:
        assert torch.equal(expected[key], found[key]), key
    steps = [json.loads(line)["step"] for line in (killed / "logs/regression/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_export_is_the_average_and_the_weights_stay(tmp_path):
    task = Regression()
    train(task, OPTIONS, tmp_path)
    saved = checkpoint_of(tmp_path)
    assert torch.equal(task.exported["layer.weight"], saved["ema/layer.weight"])
    assert torch.equal(task.layer.weight, saved["model/layer.weight"])
    assert not torch.equal(saved["ema/layer.weight"], saved["model/layer.weight"])


def test_a_finished_run_given_again_trains_no_further(tmp_path):
    train(Regression(), OPTIONS, tmp_path)
    again = Regression()
    train(again, OPTIONS, tmp_path)
    assert again.seen == 0


def test_a_continued_run_keeps_the_record_of_the_first(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(Regression(), OPTIONS, first)
    again = dataclasses.replace(OPTIONS, steps=3)
    record = train(Regression(), again, second, source=first)
    assert record["steps"] == 3 and record["continues"]["steps"] == OPTIONS.steps
    assert json.loads((second / "training.json").read_text())["regression"]["continues"]["steps"] == OPTIONS.steps
    assert "continues" not in train(Regression(), again, second, source=second), "the same finished run, given again"


def test_wrong_resume_and_bad_loss_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="--steps or --minutes"):
        train(Regression(), dataclasses.replace(OPTIONS, steps=None), tmp_path)
    with pytest.raises(TrainingError, match="no checkpoint"):
        train(Regression(), OPTIONS, tmp_path, export_only=True)
    train(Regression(), OPTIONS, tmp_path)
    with pytest.raises(TrainingError, match="batch_size 4, not 5"):
        train(Regression(), dataclasses.replace(OPTIONS, batch_size=5), tmp_path)
    exploding = Regression()
    exploding.layer.bias.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="smaller --lr"):
        train(exploding, dataclasses.replace(OPTIONS, resume="never"), tmp_path)


def test_what_is_not_finite_replaces_no_checkpoint(tmp_path):
    """Also between two lines of the log, and in a run that ends by time."""
    good = dataclasses.replace(OPTIONS, steps=2)
    train(Regression(), good, tmp_path)
    checkpoint = tmp_path / "logs" / "regression" / "checkpoint.safetensors"

    class Breaks(Regression):
        def forward(self, batch):
            loss, extra = super().forward(batch)
            return loss * (float("nan") if self.seen > 1 else 1.0), extra

    for options in ({"checkpoint_minutes": 60.0}, {"checkpoint_minutes": 0.0}):
        before = checkpoint.read_bytes()
        with pytest.raises(TrainingError, match="not finite"):
            train(Breaks(), dataclasses.replace(OPTIONS, log_every=20, **options), tmp_path)
        assert checkpoint.read_bytes() == before or options["checkpoint_minutes"] == 0.0
    with safe_open(checkpoint, "pt") as file:
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118


def test_a_checkpoint_of_other_data_or_another_start_is_refused(tmp_path):
    class OfData(Regression):
        settings = {"power": 1.0}
        key = "first"

        @property
        def subject(self):
            return {**self.settings, "data": self.key}

    train(OfData(), OPTIONS, tmp_path)
    train(OfData(), OPTIONS, tmp_path)  # finished, given again
    other = OfData()
    other.key = "second"
    with pytest.raises(TrainingError, match="data first, not second"):
        train(other, OPTIONS, tmp_path)
    other = OfData()
    other.settings = {"power": 2.0}
    with pytest.raises(TrainingError, match="power"):
        train(other, OPTIONS, tmp_path)
    other = OfData()
    torch.nn.init.constant_(other.layer.weight, 0.25)
    with pytest.raises(TrainingError, match="initial_weights"):
        train(other, OPTIONS, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["controlnet", "--face-loss-weight", "5"], "--face-loss-weight is for the stage unet, not controlnet"),
        (["unet", "--decoder-only"], "--decoder-only is for the stage vae"),
        (["unet", "--render", "10", "--images", "5"], "leave --images out"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, message, tmp_path, capsys):
    assert main(["avatars-train", *words, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_data_order_visits_every_image_once_an_epoch():
    order = torch.cat([data_order(seed=3, step=step, batch_size=4, size=10) for step in range(5)])
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert torch.equal(data_order(3, 2, 4, 10), order[8:12])
    assert not torch.equal(data_order(4, 2, 4, 10), order[8:12])


def test_learning_rate_rises_and_decays_to_zero():
    rates = [learning_rate(OPTIONS, step, step / 6) for step in range(7)]
    assert rates[0] == pytest.approx(0.5 * OPTIONS.lr) and rates[6] == pytest.approx(0)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert learning_rate(dataclasses.replace(OPTIONS, schedule="linear"), 9, 0.75) == pytest.approx(0.25 * OPTIONS.lr)


def test_pixels_are_cached_until_the_metadata_change(dataset, tmp_path):
    first = load_avatars(dataset, "train")
    assert first.pixels.shape == (12, 3, SIZE, SIZE) and (dataset / "train/pixels.safetensors").is_file()
    assert torch.equal(load_avatars(dataset, "train").pixels, first.pixels)
    assert len(load_avatars(dataset, "train", 5)) == 5
    assert torch.equal(load_avatars(dataset, "train").pixels, first.pixels)
    assert first.face_emphasis(4, 8)[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 2, 0], [0, 2, 1, 0], [0, 0, 0, 0]]
    first.records[0] = {"boxes": [[-9, -9, -1, 40]], "landmarks68": []}  # to the left of the picture
    assert not first.face_emphasis(4, 8)[0].any()
    with pytest.raises(TrainingError, match="avatars-dataset"):
        load_avatars(tmp_path, "train")


def test_a_cache_that_was_cut_off_is_made_again(tmp_path):
    path = tmp_path / "numbers.safetensors"
    made = []

    def make():
        made.append(None)
        return torch.arange(5.0)

    assert cached(path, "key", make).tolist() == cached(path, "key", make).tolist() and len(made) == 1
    path.write_bytes(path.read_bytes()[:-8])
    assert cached(path, "key", make).tolist() == [0, 1, 2, 3, 4] and len(made) == 2
    assert cached(path, "another", make).tolist() == cached(path, "another", make).tolist() and len(made) == 3


def test_rendered_data_equal_a_dataset_on_disk(tmp_path):
    from face_fusion_pipeline.avatars.training.controlnet import load_depth

    write(tmp_path / "disk" / "test", "test", 10, size=32, depth=True, progress=False)
    disk = load_avatars(tmp_path / "disk", "test")
    memory = render_avatars(tmp_path / "memory", "test", 10, "cpu", size=32, depth=True)
    assert torch.equal(disk.pixels, memory.pixels)
    assert disk.captions == memory.captions and torch.equal(disk.first_boxes, memory.first_boxes)
    difference = load_depth(memory).int() - load_depth(disk).int()
    assert load_depth(memory).amax((1, 2, 3)).eq(255).all() and difference.abs().max() <= 1, "16 bits were rounded"


def test_tokenizer_takes_any_text_and_survives_saving(tmp_path):
    from face_fusion_pipeline.avatars.training.tokenizer import load_tokenizer, train_tokenizer

    tokenizer = train_tokenizer(["a smiling woman in a red shirt", "a smiling man in a crown"] * 3)
    assert len(tokenizer) <= 2000
    ids = tokenizer("a smiling man").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id and len(ids) == 5
    strange = tokenizer("Zürich 你好 🙂").input_ids
    assert tokenizer.unk_token_id not in strange[1:-1]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path).model_max_length == 77
    assert load_tokenizer(tmp_path)("Zürich 你好 🙂").input_ids == strange


@pytest.fixture(scope="module")
def model(dataset, tmp_path_factory):
    """A model folder with all parts, each trained for two steps through the command's own code."""
    from face_fusion_pipeline.avatars.training import presets
    from face_fusion_pipeline.cli import avatars_train

    tiny = {
        "vae": {"encoder_width": 4, "decoder_width": 4, "blocks": (0, 0, 0, 1)},
        "clip": {"text_width": 32, "text_layers": 1, "vision_width": 32, "vision_layers": 1, "projection": 16},
        "unet": {"widths": (32, 32, 64), "attention": (True, True, True), "head_size": 16},
        "controlnet": {},
    }
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        for stage, network in tiny.items():
            patch.setitem(presets.PRESETS[stage], "cpu", presets.Preset(network, presets.PRESETS[stage]["cpu"].loop))
            parser = argparse.ArgumentParser()
            avatars_train.add_arguments(parser)
            fixed = [
                "--data",
                str(dataset),
                "--out",
                str(folder),
                "--steps",
                "2",
                "--batch-size",
                "4",
                "--threads",
                "1",
            ]
            assert avatars_train.run(parser.parse_args([stage, *fixed])) == 0
    return folder


def test_exported_folder_is_an_ordinary_stable_diffusion(model):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype, pipe.image_encoder.dtype} == {torch.float32}
    assert pipe.scheduler.config.prediction_type == "v_prediction" and not pipe.scheduler.config.clip_sample
    with safe_open(model / "unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor("conv_in.weight").dtype == torch.float16
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red shirt", num_inference_steps=2).images[0].size == (SIZE, SIZE)


def test_scaled_latents_have_unit_size(model, dataset):
    from face_fusion_pipeline.avatars.training.unet import load_frozen

    frozen = load_frozen(model)
    latents = frozen.latents(load_avatars(dataset, "train").images(torch.arange(12)))
    assert float(latents.square().mean().sqrt()) == pytest.approx(1, rel=0.02)


def test_latents_that_shrink_with_the_picture_have_no_extra_loss(dataset):
    """The decoder and encoder of this double copy pixels, so halved latents decode to the halved picture."""
    from types import SimpleNamespace

    from face_fusion_pipeline.avatars.training.vae import VaeTask, create_vae

    data = load_avatars(dataset, "train")
    vae = create_vae(4, 4, (0, 0, 0, 1))
    task = VaeTask(vae, data, data, latent_noise=0.0)
    images = data.images(torch.arange(4))
    batch = {"images": images, "noise": torch.zeros(())}
    assert task(batch)[1]["smaller"] > 0
    task.equivariance = 0.0
    assert "smaller" not in task(batch)[1]
    task.equivariance = 0.5
    del task._modules["vae"]
    task.vae = SimpleNamespace(encoder=lambda x: x, decoder=lambda x: x)
    assert task(batch)[1]["smaller"] == 0


def test_text_encoder_and_score_tower_agree(model):
    from face_fusion_pipeline.avatars.training.clip import tokenize
    from face_fusion_pipeline.avatars.training.unet import load_frozen
    from face_fusion_pipeline.evaluation.clip_score import load_clip

    frozen, clip = load_frozen(model), load_clip(model)
    tokens = tokenize(frozen.tokenizer, ["a red shirt"])
    expected = frozen.text_encoder(tokens)[0]
    torch.testing.assert_close(clip.text_model(tokens)[0], expected)
    # The image tower of the clip that was put together again is the exported one.
    pixels = torch.rand(1, 3, SIZE, SIZE)
    vision = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    torch.testing.assert_close(vision, frozen.image_encoder(pixels).image_embeds)


def test_every_stage_is_recorded(model):
    records = json.loads((model / "training.json").read_text())
    assert records.keys() == {"vae", "clip", "unet", "controlnet"} and records["unet"]["samples"] == 8


def test_the_face_embedder_of_trainings_learns_who_is_who_and_is_not_the_evaluator(tmp_path):
    from face_fusion_pipeline.avatars.evaluation.evaluators import load_evaluators
    from face_fusion_pipeline.avatars.training.face_embedder import (
        FaceEmbedderTask,
        TrainingEmbedder,
        load_training_embedder,
    )

    dataset = tmp_path / "data"
    for split in ("train", "validation"):
        write(dataset / split, split, 10, size=SIZE, progress=False)
    words = ["--data", str(dataset), "--out", str(tmp_path), "--batch-size", "2", "--threads", "1", "--lr", "1e-3"]
    assert (
        main(["avatars-train", "face-embedder", *words, "--steps", "20", "--warmup", "2", "--ema-decay", "0.5"]) == 0
    )
    first, last = (
        json.loads(line) for line in (tmp_path / "logs/face-embedder/metrics.jsonl").read_text().splitlines()
    )
    assert first["loss"] > 0 and 0 <= last["validation_auc_head"] <= 1
    trained, fresh, images = load_training_embedder(tmp_path), TrainingEmbedder(), load_avatars(dataset, "train")
    task = FaceEmbedderTask(copy.deepcopy(trained), images, images)
    batch = task.batch(torch.arange(task.size), torch.Generator().manual_seed(0), 0.0)
    found = batch["head"].shape[0] // 2
    assert found == task.size > 1 and batch["landmarks5"].shape == (2 * found, 5, 2)
    assert task(batch)[0] < FaceEmbedderTask(fresh, images, images)(batch)[0]
    assert {task.pair([7, 8, 9], draw / 6) for draw in range(6)} == {
        (a, b) for a in (7, 8, 9) for b in (7, 8, 9) if a != b
    }
    with pytest.raises(ModelNotFoundError, match="avatars-train face-embedder"):
        load_training_embedder(tmp_path / "nowhere")
    assert type(load_training_embedder()) is not type(load_evaluators().recogniser), "what trains does not evaluate"


def test_the_shipped_face_embedder_of_trainings_tells_unseen_people_apart(tmp_path):
    from face_fusion_pipeline.avatars.training.face_embedder import FaceEmbedderTask, load_training_embedder

    unseen = render_avatars(tmp_path, "test", 100, "cpu")
    task = FaceEmbedderTask(load_training_embedder(), unseen, unseen)
    with torch.no_grad():
        measured = task.eval().sample(tmp_path / "nothing.png")
        # A cosine of the whole is the mean of those of its towers, each of which counts the same.
        points = torch.tensor([[[48.0, 60], [80, 60], [64, 72], [52, 86], [76, 86]]]).repeat(2, 1, 1)
        whole = task.embedder(unseen.pixels[:2] / 255, points)
        towers = [task.embedder.see(name, unseen.pixels[:2] / 255, points) for name in task.embedder.towers]
    assert measured["validation_auc_head"] > 0.98 and measured["validation_auc_features"] > 0.98
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(*whole, dim=0), torch.stack([a @ b for a, b in towers]).mean())


def test_controlnet_is_exported_small_and_followed(model, dataset):
    from diffusers import ControlNetModel

    from face_fusion_pipeline import StableDiffusionFaceFusionPipeline
    from face_fusion_pipeline.avatars.training.controlnet import create_controlnet, load_depth
    from face_fusion_pipeline.avatars.training.unet import load_unet

    controlnet = ControlNetModel.from_pretrained(model / "controlnet")
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(model, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    depth = load_depth(load_avatars(dataset, "train"))
    assert depth.shape == (12, 1, SIZE, SIZE) and depth.amin() == 0 and depth.amax() == 255
    picture = Image.fromarray(depth[0, 0].numpy())
    assert pipe("a red shirt", control_image=picture, num_inference_steps=2).images[0].size == (SIZE, SIZE)
    unet = load_unet(model)
    fresh = create_controlnet(unet).state_dict()
    assert torch.equal(fresh["conv_in.weight"], unet.conv_in.weight)
    assert not any(
        weight.any() for name, weight in fresh.items() if name.startswith(("controlnet_down", "controlnet_mid"))
    )
    trained = controlnet.state_dict()
    assert any(
        weight.any() for name, weight in trained.items() if name.startswith(("controlnet_down", "controlnet_mid"))
    )
    losses = [json.loads(line) for line in (model / "logs/controlnet/metrics.jsonl").read_text().splitlines()][-1]
    assert {"validation_loss_right_depth", "validation_loss_wrong_depth"} <= losses.keys()


def test_a_controlnet_follows_another_unet(model, tmp_path):
    """What its training added to the copy of its UNet stays, also below another text encoder."""
    from diffusers import ControlNetModel

    from face_fusion_pipeline.avatars.training.controlnet import load_controlnet_for
    from face_fusion_pipeline.avatars.training.text_change import text_map
    from face_fusion_pipeline.avatars.training.unet import load_frozen, load_unet

    captions, generator = ["a red shirt", "a blue shirt", "a hat", ""], torch.Generator().manual_seed(0)
    former, base, frozen = load_unet(model), load_unet(model), load_frozen(model)
    before = frozen.text_states(captions).flatten(0, 1)
    with torch.no_grad():
        for weight in [*base.parameters(), *frozen.text_encoder.parameters()]:
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    solution, _ = text_map(before, frozen.text_states(captions).flatten(0, 1))
    source = ControlNetModel.from_pretrained(model / "controlnet").state_dict()
    moved = load_controlnet_for(frozen, base, model, captions).state_dict()
    was, now, shared = former.state_dict(), base.state_dict(), 0
    for name, weight in moved.items():
        expected = source[name]
        if name in now:
            added = source[name] - was[name]
            reads_text = "attn2.to_k" in name or "attn2.to_v" in name
            expected = now[name] + (added @ solution.T.float() if reads_text else added)
            shared += 1
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)
    assert 20 < shared < len(moved)
    with pytest.raises(TrainingError, match="does not exist"):
        load_controlnet_for(frozen, base, tmp_path, captions)


def test_depth_maps_have_to_be_in_the_dataset(dataset):
    from face_fusion_pipeline.avatars.training.controlnet import load_depth

    data = load_avatars(dataset, "train", 2)
    for record in data.records:
        del record["depth_file_name"]
    with pytest.raises(TrainingError, match="avatars-dataset --depth"):
        load_depth(data)


def test_two_processes_share_the_batch(dataset, model, tmp_path):
    """The command starts its own processes; both take part, one writes."""
    command = [sys.executable, "-m", "face_fusion_pipeline", "avatars-train", "vae", "--data", str(dataset)]
    options = ["--out", str(tmp_path), "--continue-from", str(model), "--steps", "3", "--batch-size", "4"]
    subprocess.run([*command, *options, "--processes", "2"], check=True, capture_output=True, timeout=200)
    record = json.loads((tmp_path / "training.json").read_text())["vae"]
    assert (record["processes"], record["steps"], record["samples"]) == (2, 3, 12)
    lines = (tmp_path / "logs/vae/metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if "validation_psnr" in line]) == 1


def test_word_loss_is_the_cross_entropy_of_cosines_without_padding(model, dataset):
    from face_fusion_pipeline.avatars.training.clip import ClipTask, tokenize
    from face_fusion_pipeline.avatars.training.tokenizer import load_tokenizer
    from face_fusion_pipeline.evaluation.clip_score import load_clip

    clip, tokenizer, data = load_clip(model), load_tokenizer(model), load_avatars(dataset, "train")
    task = ClipTask(clip, tokenizer, data, data)
    tokens = tokenize(tokenizer, ["a red shirt", "blue"])
    width = clip.config.text_config.hidden_size
    states = torch.randn(*tokens.shape, width, generator=torch.Generator().manual_seed(0))
    words = clip.text_model.get_input_embeddings().weight.detach().double().numpy()
    losses = []
    for row, state in zip(tokens.tolist(), states.double().numpy(), strict=True):
        for token, vector in zip(row, state, strict=True):
            if token != tokenizer.pad_token_id:
                cosines = words @ vector / (np.linalg.norm(words, axis=1) * np.linalg.norm(vector))
                losses.append(np.log(np.exp(cosines / 0.1).sum()) - cosines[token] / 0.1)
    assert 5 <= len(losses) < tokens.numel()  # "blue" and three words, some with start and end; the rest is padding
    assert float(task.word_loss(states, tokens).detach()) == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_unet_is_fitted_to_another_number_of_latent_channels(model):
    import types

    from face_fusion_pipeline.avatars.training.unet import load_frozen, load_unet, load_unet_for

    frozen = load_frozen(model)
    frozen.vae = types.SimpleNamespace(config=types.SimpleNamespace(latent_channels=6))
    fitted, source = load_unet_for(frozen, model, ["a red shirt"]), load_unet(model)
    assert fitted.conv_in.in_channels == fitted.conv_out.out_channels == 6
    assert torch.equal(fitted.mid_block.resnets[0].conv1.weight, source.mid_block.resnets[0].conv1.weight)


def test_a_unet_keeps_reading_text_after_a_change_of_its_encoder(model):
    """States that are a linear map of the former ones: the refitted UNet answers as before.

    In double precision, where the map is exact: a UNet after two steps of training enlarges the rounding of single
    precision, by how much depends on the processor.
    """
    from face_fusion_pipeline.avatars.training.text_change import change_text, text_map
    from face_fusion_pipeline.avatars.training.unet import load_frozen, load_unet, load_unet_for

    captions = ["a red shirt", "a blue shirt", "a red blue shirt", ""]
    frozen, generator = load_frozen(model), torch.Generator().manual_seed(0)
    states = frozen.text_states(captions).double()
    width = states.shape[-1]
    mixing = torch.eye(width) + torch.randn(width, width, generator=generator) / (4 * width**0.5)
    mixed = states @ mixing.double()
    solution, explained = text_map(states.flatten(0, 1), mixed.flatten(0, 1))
    torch.testing.assert_close(mixed @ solution, states, rtol=0, atol=1e-9)
    assert explained == pytest.approx(1.0, abs=1e-8)
    unet, fitted = load_unet(model).double(), load_unet(model).double()
    change_text(fitted, solution)
    noisy = torch.randn(4, unet.config.in_channels, 4, 4, generator=generator).double()
    with torch.no_grad():
        before, after = unet(noisy, 500, states).sample, fitted(noisy, 500, mixed).sample
        unfitted = unet(noisy, 500, mixed).sample
    assert (after - before).abs().max() < 1e-6 * (unfitted - before).abs().max()
    _, lost = text_map(states.flatten(0, 1), torch.randn(states.flatten(0, 1).shape, generator=generator))
    assert lost < 0.9

    norm = frozen.text_encoder.get_submodule("final_layer_norm")
    norm.weight.data, norm.bias.data = norm.weight * 2, norm.bias * 2  # another encoder: all states are doubled
    doubled = load_unet_for(frozen, model, captions).double()
    with torch.no_grad():
        after, unfitted = doubled(noisy, 500, 2 * states).sample, unet(noisy, 500, 2 * states).sample
    assert (after - before).abs().max() < 0.01 * (unfitted - before).abs().max()


def test_timesteps_are_stratified_and_may_lean_to_noise():
    from face_fusion_pipeline.avatars.training.unet import DiffusionLoss

    shape, generator = torch.Size((1000, 1, 1, 1)), torch.Generator().manual_seed(0)
    even = DiffusionLoss(1.0).draw(shape, generator)["timesteps"]
    assert sorted(even.tolist()) == list(range(1000))  # one from each of as many ranges
    noisy = DiffusionLoss(1.0, timestep_power=0.5).draw(shape, generator)["timesteps"]
    assert noisy.float().mean() == pytest.approx(1000 * 2 / 3, rel=0.01)
    assert noisy.min() >= 0 and noisy.max() < 1000


def test_stages_name_what_is_missing(tmp_path):
    from face_fusion_pipeline.avatars.training.unet import load_frozen, load_unet

    with pytest.raises(TrainingError, match="train the stage `vae` first"):
        load_frozen(tmp_path)
    with pytest.raises(TrainingError, match="train the stage `unet` first"):
        load_unet(tmp_path)


def test_presets_fit_what_may_be_shipped():
    """float16 weights of all parts of a preset, without training them: below the limit of `publish`."""
    import types

    from accelerate import init_empty_weights

    from face_fusion_pipeline.avatars.training.clip import create_clip
    from face_fusion_pipeline.avatars.training.presets import PRESETS
    from face_fusion_pipeline.avatars.training.publish import SIZE_LIMIT
    from face_fusion_pipeline.avatars.training.tokenizer import train_tokenizer
    from face_fusion_pipeline.avatars.training.unet import create_unet
    from face_fusion_pipeline.avatars.training.vae import create_vae
    from face_fusion_pipeline.face_adapter import create_adapter

    tokenizer = train_tokenizer(["a person in a red shirt"] * 4)
    for name in ("cpu", "gpu"):
        with init_empty_weights():
            vae = create_vae(**PRESETS["vae"][name].network)
            clip = create_clip(tokenizer, 128, **PRESETS["clip"][name].network)
            frozen = types.SimpleNamespace(vae=vae, text_encoder=clip.text_model)
            unet = create_unet(frozen, 128, **PRESETS["unet"][name].network)
            adapter = create_adapter(unet, "xavier")
        # The text tower is there twice, as text encoder and for scores; the adapter's file may be float32.
        modules = (vae, clip, clip.text_model, unet, adapter, adapter)
        assert 2 * sum(p.numel() for module in modules for p in module.parameters()) < SIZE_LIMIT, name
