"""A run of the kit: scenes are drawn once, then base, Face Fusion and depth ControlNet are trained, each for its time.

A second process meanwhile takes two steps of every training on made-up data, so that the graphs which the first one is
about to need are in the cache of compiled graphs when it comes to them.
"""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import shutil
import time
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, ControlNetModel, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ...face_adapter import ADAPTER_WEIGHTS_NAME, create_adapter
from ...pipeline import StableDiffusionFaceFusionPipeline
from ...training.base_model import base_of
from ...training.initial_weights import continued_adapter
from ...training.loop import LoopOptions, Task, TrainingError, train
from ..training.controlnet import create_controlnet
from ..training.unet import Frozen, create_unet, load_unet
from ..world.scene import MAX_PEOPLE
from .plans import plan_windows
from .presets import KitPreset
from .scene_tensors import SceneTensors, draw_scenes
from .tasks import BaseTask, DepthTask, FaceTask, ScenePairs


logger = logging.getLogger(__name__)

STAGES = ("base", "faces", "depth")
HELD_OUT = 1000  # scenes


@dataclass(frozen=True)
class Times:
    """Seconds: of drawing, and of each training; a training of 0 seconds is left out."""

    draw: float
    base: float
    faces: float
    depth: float

    def of(self, stage: str) -> float:
        return float(getattr(self, stage))


def run(model: Path, out: Path, preset: KitPreset, times: Times, scenes: int, workers: int, warm: bool) -> None:
    """Train what `times` says, going on from what `model` holds, into the folder `out`.

    `model` has at least the VAE and the tokenizer. What is finished is in `out` as soon as it is: its records, sample
    pictures and logs, and the model. Raises `TrainingError` where a part is missing.
    """
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = [stage for stage in STAGES if times.of(stage) > 0]
    context = multiprocessing.get_context("spawn")
    compiled = context.Semaphore(0)  # released once for each stage whose graphs are in the cache
    warmer = context.Process(target=warm_up, args=(model, preset, wanted, compiled)) if warm else None
    if warmer is not None:
        warmer.start()
    frozen = load_parts(model, preset).to(device)
    train_scenes = drawn(frozen, model, preset, "train", scenes, device, workers, began + times.draw)
    held_out = drawn(frozen, model, preset, "validation", min(HELD_OUT, scenes), device, 1, began + times.draw)
    logger.warning("%d scenes after %.0f s", len(train_scenes), time.monotonic() - began)
    report_rate(out, "scenes", len(train_scenes), time.monotonic() - began)
    unet = load_unet(model) if (model / "unet").is_dir() else new_unet(frozen, preset)
    try:
        for stage in wanted:
            task = create_task(stage, frozen, unet.to(device), train_scenes, held_out, model, preset)
            if device.type == "cuda":
                torch._dynamo.reset()  # what was compiled for another stage
            while warmer is not None and not compiled.acquire(timeout=1) and warmer.is_alive():
                pass  # to compile the same twice at once takes longer than to wait
            source = model if (model / "training.json").is_file() else None
            options = replace(preset.loops[stage], minutes=times.of(stage) / 60, steps=None)
            record = train_or_eager(task, options, out, source)
            report_rate(out, stage, record["samples"], record["seconds"])
            if stage == "base":  # what follows builds on the average, as it was exported
                unet = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)
                parts = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32)
                frozen.text_encoder = parts.to(device)
    finally:
        if warmer is not None:
            warmer.terminate()


def train_or_eager(task: Task, options: LoopOptions, out: Path, source: Path | None) -> dict[str, Any]:
    """Train compiled if the options say so, and without if compiling fails."""
    try:
        return train(task, options, out, source=source)
    except TrainingError:
        raise
    except Exception:
        if not options.compile:
            raise
        logger.exception("%s does not compile here: it is trained without", task.name)
        for module in task.modules():
            module._compiled_call_impl = None
        return train(task, replace(options, compile=False), out, source=source)


def report_rate(out: Path, what: str, count: int, seconds: float) -> None:
    """Add a line to `out/rates.jsonl`, which says where the time went."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "rates.jsonl").open("a") as file:
        rate = round(count / max(seconds, 1e-9), 1)
        file.write(json.dumps({"what": what, "count": count, "seconds": round(seconds, 1), "rate": rate}) + "\n")


# --- Parts -------------------------------------------------------------------------------------------------------


def load_parts(model: Path, preset: KitPreset) -> Frozen:
    """VAE and tokenizer of the folder, its text encoder or a new one, in float32."""
    for part in ("vae", "tokenizer"):
        if not (model / part).is_dir():
            raise TrainingError(f"{model / part} does not exist: the kit goes on from a VAE and a tokenizer")
    vae = AutoencoderTiny.from_pretrained(model / "vae", torch_dtype=torch.float32).requires_grad_(False).eval()
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    if (model / "text_encoder").is_dir():
        text_encoder = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    else:
        text_encoder = new_text_encoder(tokenizer, preset)
    return Frozen(vae, text_encoder, tokenizer, None)


def new_text_encoder(tokenizer: CLIPTokenizer, preset: KitPreset) -> CLIPTextModel:
    """Stable Diffusion's kind of text encoder, of the preset's size."""
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            hidden_size=preset.text_width,
            intermediate_size=4 * preset.text_width,
            num_hidden_layers=preset.text_layers,
            num_attention_heads=max(1, preset.text_width // 32),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet(frozen: Frozen, preset: KitPreset) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return create_unet(frozen, preset.size, preset.widths, (True,) * len(preset.widths), preset.head_size)


def drawn(
    frozen: Frozen,
    model: Path,
    preset: KitPreset,
    split: str,
    count: int,
    device: torch.device,
    workers: int,
    deadline: float,
) -> SceneTensors:
    """Scenes of a split, see `draw_scenes`; encoded in bfloat16 on a GPU."""
    vae = copy.deepcopy(frozen.vae).to(memory_format=torch.channels_last)

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return vae.encode(images).latents.float() * vae.config.scaling_factor

    windows = plan_windows(model / "tokenizer", split, workers)
    return draw_scenes(windows, encode, preset.size, device, count, deadline, preset.drawn_at_once)


def create_task(
    stage: str,
    frozen: Frozen,
    unet: UNet2DConditionModel,
    scenes: SceneTensors,
    held_out: SceneTensors,
    model: Path,
    preset: KitPreset,
) -> Task:
    """The training of a stage; what `model` already has of it is gone on from."""
    key = f"scenes of {preset.size} pixels"  # how many there are depends on the time, and a run may go on with others
    if stage == "base":
        return BaseTask(unet, frozen, scenes, held_out, key)
    if stage == "depth":
        kept = model / "controlnet"
        controlnet = (
            ControlNetModel.from_pretrained(kept) if kept.is_dir() else create_controlnet(unet, reads_text=False)
        )
        return DepthTask(controlnet, unet, frozen, scenes, held_out, key)
    pipeline = StableDiffusionFaceFusionPipeline(**frozen.pipeline(unet).components, requires_safety_checker=False)
    base = base_of(pipeline)
    metadata = {"face_crop": preset.face_crop, "resolution": preset.size}
    if (model / ADAPTER_WEIGHTS_NAME).is_file():
        adapter = continued_adapter(unet, model, metadata)
    else:
        adapter = create_adapter(unet, "attn1", metadata=metadata)
    pairs = [ScenePairs(data, frozen.text_encoder, key) for data in (scenes, held_out)]
    if not all(map(len, pairs)):
        raise TrainingError(f"{len(scenes)} scenes show nobody twice as a photo: draw more")
    return FaceTask(frozen, base, adapter, *pairs)


# --- Compiling ahead ---------------------------------------------------------------------------------------------


def warm_up(model: Path, preset: KitPreset, stages: list[str], compiled: Semaphore | None = None) -> None:
    """Take two steps of each training on made-up scenes: what was compiled for them is found by another process.

    `compiled` is released after each stage.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.45)  # the rest belongs to those who work
    scratch = Path(model).parent / f"warm-{Path(model).name}"
    try:
        for stage in stages:
            began = time.monotonic()
            frozen = load_parts(model, preset).to(device)
            unet = new_unet(frozen, preset).to(device)
            scenes = made_up(frozen, preset, 2 * preset.loops[stage].batch_size, device)
            task = create_task(stage, frozen, unet, scenes, scenes, scratch, preset)
            task.sample = lambda path: {}  # type: ignore[method-assign]
            train(task, replace(preset.loops[stage], steps=2, minutes=None, resume="never"), scratch)
            torch._dynamo.reset()
            logger.warning("%s compiled ahead in %.0f s", stage, time.monotonic() - began)
            if compiled is not None:
                compiled.release()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def made_up(frozen: Frozen, preset: KitPreset, count: int, device: torch.device) -> SceneTensors:
    """`count` scenes of noise: as many, of the same shapes and types, as if drawn. Everybody is there twice."""
    side, channels = preset.size // 8, frozen.vae.config.latent_channels
    nobody = torch.full((count, MAX_PEOPLE, 4), torch.nan, device=device)
    nobody[:, 0] = torch.tensor([0.25, 0.25, 0.75, 0.75], device=device) * preset.size
    identities = torch.full((count, MAX_PEOPLE), -1, device=device)
    identities[:, 0] = torch.arange(count, device=device) // 2
    length = frozen.tokenizer.model_max_length
    return SceneTensors(
        latents=torch.randn(count, channels, side, side, device=device).half(),
        crops=torch.randn(count, channels, side, side, device=device).half(),
        tokens=torch.zeros(count, 2, length, dtype=torch.int32, device=device),
        boxes=nobody,
        landmarks5=torch.full((count, MAX_PEOPLE, 5, 2), preset.size / 2, device=device),
        emphasis=torch.zeros(count, 1, side, side, dtype=torch.uint8, device=device),
        identities=identities,
        target=torch.zeros(count, dtype=torch.long, device=device),
        photo=torch.ones(count, dtype=torch.bool, device=device),
        depth=torch.zeros(count, 1, preset.size, preset.size, dtype=torch.uint8, device=device),
    )
