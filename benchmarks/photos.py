"""The path with photographs, walked once at true size: prepare, train, validate, with random weights.

    python -m benchmarks.photos --photos DIR --out DIR [--shape sd15] [--resolution 256] [--steps 10]

Says what each command takes in time and memory, whether every layer gets a gradient that is finite and not zero, and
whether the loss at fixed noise falls on one pair. Random weights cost what trained ones do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from face_fusion_pipeline import create_adapter
from face_fusion_pipeline.evaluation.reports import markdown_table
from face_fusion_pipeline.training.base_model import load_base
from face_fusion_pipeline.training.latent_cache import AUGMENTATIONS, cache_folders
from face_fusion_pipeline.training.loop import Part
from face_fusion_pipeline.training.pairs import Pairs, split_people
from face_fusion_pipeline.training.preparation import read_rows
from face_fusion_pipeline.training.task import FaceFusionOptions, FaceFusionTask

from .shapes import OF_XL, SHAPES, Model, StableDiffusionPipeline


LEAST_FALL = 0.01  # of the loss on one pair


@dataclass(frozen=True)
class Walked:
    """What a command took: seconds, and peak memory of its processes in bytes."""

    seconds: float
    memory: int


def walk(words: list[str]) -> Walked:
    """Run a command of the package by itself. Raises SystemExit where it fails."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "face_fusion_pipeline", *words])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"face-fusion {words[0]} ended with {os.waitstatus_to_exitcode(status)}")
    return Walked(time.monotonic() - started, used.ru_maxrss * 1024)


def random_model(shape: str, folder: Path) -> Path:
    """A pipeline of this shape with random weights, saved unless it is there."""
    if not (folder / "model_index.json").is_file():
        model = Model(SHAPES[shape])
        kind: Any = OF_XL[StableDiffusionPipeline] if model.is_xl else StableDiffusionPipeline
        extra: dict[str, Any] = {} if model.is_xl else {"safety_checker": None, "requires_safety_checker": False}
        kind(**model.components, **extra, **({} if model.is_xl else {"feature_extractor": None})).save_pretrained(
            folder
        )
    return folder


def overfit(model: Path, data: Path, steps: int, rate: float) -> tuple[list[float], list[str]]:
    """Losses of one pair at fixed noise, and the parameters whose first gradient is zero or not finite."""
    base = load_base(model)
    people, _ = split_people(read_rows(data), 0, seed=0)
    pairs = Pairs(data, cache_folders(data, base, AUGMENTATIONS), people)
    adapter = create_adapter(base.unet, metadata={"resolution": base.resolution}).requires_grad_(True)
    never = {"text_dropout": 0.0, "face_dropout": 0.0, "both_dropout": 0.0}
    task = FaceFusionTask(base, adapter, pairs, None, FaceFusionOptions(**never, gradient_checkpointing=True))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=rate)
    one = torch.zeros(1, dtype=torch.long)
    batch = task.part(Part(0, 0, 1, one, one), torch.Generator(), 0.0)
    losses, bad = [], list[str]()
    for step in range(steps):
        loss, _ = task(batch)
        loss.backward()
        if not step:
            bad = [
                name
                for name, weight in adapter.named_parameters()
                if weight.grad is None or not weight.grad.isfinite().all() or not weight.grad.any()
            ]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, bad


def report(args: argparse.Namespace) -> str:
    """Walk the path; returns its table."""
    model, data, weights = random_model(args.shape, args.out / "model"), args.out / "data", args.out / "weights"
    side = ["--resolution", str(args.resolution)] if args.resolution else []
    prepared = walk(["prepare", str(args.photos), "--model", str(model), "--out", str(data), *side, "--workers", "1"])
    options = ["--train-batch-size", "1", "--max-train-steps", str(args.steps), "--log-every", "1"]
    options += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
    options += ["--validation-prompt", "a portrait", "--validation-inference-steps", "2", "--validation-people", "1"]
    trained = walk(["train", "--model", str(model), "--data", str(data), "--out", str(weights), *options])
    logged = (weights / "logs" / "face-fusion" / "metrics.jsonl").read_text().splitlines()
    speeds = [row["images_per_second"] for row in map(json.loads, logged) if "images_per_second" in row]
    losses, bad = overfit(model, data, args.steps, args.learning_rate)
    fall = 1 - min(losses[1:]) / losses[0]
    examples = len(read_rows(data))
    rows: list[list[Any]] = [
        [f"prepare, {examples} photos", f"{prepared.seconds:.0f}", f"{prepared.memory / 2**30:.1f}"],
        [f"train, {args.steps} steps and a picture", f"{trained.seconds:.0f}", f"{trained.memory / 2**30:.1f}"],
        ["a step of it", f"{1 / statistics.median(speeds[1:] or speeds):.1f}", None],
    ]
    return (
        markdown_table([f"{args.shape}, {args.resolution or SHAPES[args.shape].size} pixels", "s", "peak GiB"], rows)
        + f"\nParameters without a gradient, or with one that is not finite: {', '.join(bad) or 'none'}. The loss of "
        f"one pair at fixed noise went from {losses[0]:.4f} to {min(losses):.4f} in {args.steps} steps "
        f"({fall:.1%} less, at least {LEAST_FALL:.0%} is asked). {torch.get_num_threads()} threads.\n"
    )


def main() -> None:
    """Parse, walk, print, write `OUT/photos.md`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.photos", description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="what `face-fusion prepare` takes")
    parser.add_argument("--out", type=Path, required=True, help="folder for model, data and weights; goes on there")
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    parser.add_argument("--resolution", type=int, help="pixels a side (default: the shape's own)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the pair that is overfitted")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    text = report(args)
    (args.out / "photos.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
