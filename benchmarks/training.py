"""What a step of Face Fusion training takes, beside a bare forward and backward of the same UNet.

The training is the real loop (`training.loop.train`) on random latents held in memory, as they are when cached. Bare
is the least that anybody spends who trains this UNet: a forward pass and the gradients of all weights, nothing else.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline
from face_fusion_pipeline.evaluation.reports import markdown_table
from face_fusion_pipeline.training.base_model import BaseModel, base_of
from face_fusion_pipeline.training.loop import LoopOptions, train
from face_fusion_pipeline.training.task import FaceFusionOptions, FaceFusionTask

from .measure import Setup, device_bytes, forget_peak
from .report import machine, ratio


PAPER_PAIRS = 80_000  # image and text pairs that the paper trained on (its section on experiments)
PRECISION = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
EXAMPLES = 256


class RandomPairs:
    """Stands for `training.pairs.Pairs`: latents, references and texts of nobody, in memory."""

    key = "random"

    def __init__(self, base: BaseModel, reference: int) -> None:
        factor, channels = base.pipeline.vae_scale_factor, base.unet.config.in_channels
        generator = torch.Generator().manual_seed(0)
        small, large = reference // factor, base.resolution // factor
        self.latents = torch.randn(EXAMPLES, channels, large, large, generator=generator)
        self.references = torch.randn(EXAMPLES, channels, small, small, generator=generator)
        self.conditions = {key: state.float().cpu() for key, state in base.conditions(["a portrait"]).items()}
        self.box = torch.tensor([0.3, 0.2, 0.7, 0.7]) * base.resolution

    def __len__(self) -> int:
        return EXAMPLES

    def choose(self, rows: Tensor, draws: Tensor) -> list[int]:
        return ((rows + 1) % EXAMPLES).tolist()

    def reference_latents(self, references: Sequence[int]) -> Tensor:
        return self.references[torch.tensor(references)]

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        count = len(rows)
        conditions = {key: state.expand(count, *state.shape[1:]).clone() for key, state in self.conditions.items()}
        faces = {"boxes": self.box.expand(count, 4), "others": torch.empty(count, 0, 4)}
        return {"latents": self.latents[rows], **faces, "landmarks5": torch.zeros(count, 5, 2), **conditions}


@dataclass(frozen=True)
class Round:
    """Seconds a step and peak memory in bytes, bare and of the training."""

    bare: float
    training: float
    bare_memory: int
    memory: int


def bare_step(base: BaseModel, batch: int, setup: Setup) -> None:
    """A forward pass of `batch` noise images and the gradients of all weights."""
    unet, device = base.unet, base.unet.device
    side = base.resolution // base.pipeline.vae_scale_factor
    noisy = torch.randn(batch, unet.config.in_channels, side, side, device=device)
    text = base.conditions([""])["text"].expand(batch, -1, -1).to(device)
    timesteps = torch.randint(0, 1000, (batch,), device=device)
    dtype = getattr(torch, setup.dtype)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        predicted = unet(noisy.to(unet.dtype), timesteps, text.to(unet.dtype)).sample.float()
    (predicted - noisy).square().mean().backward()


def time_bare(base: BaseModel, batch: int, steps: int, setup: Setup) -> float:
    """Seconds of a bare step: the median of `steps`, after one that is not counted."""
    base.unet.requires_grad_(True)
    times = []
    try:
        for _ in range(steps + 1):
            setup.synchronize()
            start = time.perf_counter()
            bare_step(base, batch, setup)
            base.unet.zero_grad(set_to_none=True)
            setup.synchronize()
            times.append(time.perf_counter() - start)
    finally:
        base.unet.requires_grad_(False)
    return statistics.median(times[1:])


def time_training(task: FaceFusionTask, batch: int, steps: int, setup: Setup) -> float:
    """Seconds of a step of the real loop: the median of `steps`, after one that is not counted."""
    options = LoopOptions(
        batch_size=batch,
        lr=1e-4,
        steps=steps + 1,
        precision=PRECISION[setup.dtype],
        log_every=1,
        checkpoint_minutes=1e9,
        sample_minutes=1e9,
        resume="never",
    )
    with tempfile.TemporaryDirectory() as folder:
        train(task, options, Path(folder))
        metrics = Path(folder) / "logs" / task.name / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return statistics.median(batch / row["images_per_second"] for row in rows[1:] if "images_per_second" in row)


def measure_training(setup: Setup, reference: int, batch: int, steps: int, rounds: int) -> list[Round]:
    """`rounds` times in alternation, in one process."""
    torch.backends.cudnn.benchmark = True  # as the training has it
    model = setup.model()
    pipe = model.pipeline(StableDiffusionFaceFusionPipeline)
    base = base_of(pipe, setup.shape)
    pairs: Any = RandomPairs(base, reference)
    adapter = model.adapter.float().requires_grad_(True)  # weights that are trained stay in float32
    task = FaceFusionTask(base, adapter, pairs, None, FaceFusionOptions())
    found = []
    for _ in range(rounds):
        memory = []
        seconds = []
        for way in (lambda: time_bare(base, batch, steps, setup), lambda: time_training(task, batch, steps, setup)):
            gc.collect()
            forget_peak(setup)
            seconds.append(way())
            memory.append(device_bytes(setup, peak=True))
        found.append(Round(*seconds, *memory))
    return found


def training_table(setup: Setup, reference: int, batch: int, found: Sequence[Round]) -> str:
    """Both ways, their ratio, and what one pass over the paper's data would take."""
    rows = []
    for name, seconds, memory in (
        ("bare forward and backward", [one.bare for one in found], [one.bare_memory for one in found]),
        ("Face Fusion training", [one.training for one in found], [one.memory for one in found]),
    ):
        step = statistics.median(seconds)
        rows.append([name, f"{step:.4g}", f"{batch / step:.4g}", f"{max(memory) / 2**30:.2f}"])
    table = markdown_table(["", "step, s", "images/s", "peak memory, GiB"], rows)
    step = statistics.median(one.training for one in found)
    hours = PAPER_PAIRS / batch * step / 3600
    return (
        f"**{setup}, batch {batch}, reference {reference} px**\n\n{table}\n"
        f"The training reaches {ratio([one.bare / one.training for one in found])} of the bare images/s (median "
        f"[least, greatest] of {len(found)} rounds in alternation; goal .85). One pass over the {PAPER_PAIRS:,} pairs "
        f"of the paper takes {hours:.3g} hours here. {machine(setup)}"
    )
