"""The training loop: AdamW, warm-up and decay, EMA, checkpoints that survive a kill, metrics and sample images.

A `Task` is an `nn.Module` that holds the networks, makes a batch from indices and returns the loss from `forward`.
Everything random in step `s` comes from one generator seeded by (seed, s), and the order of the data is a pure
function of (seed, s) too. So a checkpoint needs no random state, and an interrupted run that resumes equals an
uninterrupted one bit for bit (on one device, as long as the length is given in steps).

A run that is limited by time instead of steps takes its learning rate from the elapsed fraction, so that it still
decays to the end; a resumed run continues with the time it had used.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..face_errors import FaceFusionError


Batch = dict[str, Tensor]


class TrainingError(FaceFusionError):
    """Training cannot start or go on; the message says why and what to change."""


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast to train; the defaults come from `presets.py`."""

    batch_size: int
    lr: float
    steps: int | None = None
    minutes: float | None = None  # ends at whichever of `steps` and `minutes` comes first
    warmup: int = 200  # steps
    schedule: str = "cosine"  # or "linear"; both decay to zero
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    precision: str = "no"  # or "bf16", "fp16" (GPU)
    compile: bool = False
    log_every: int = 20  # steps
    checkpoint_minutes: float = 2.0
    sample_minutes: float = 5.0
    resume: str = "auto"  # or "never"


class Task(nn.Module):
    """What is trained. Only parameters with `requires_grad` are optimised, averaged and put into checkpoints."""

    name: str
    size: int  # training images

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        """Tensors of the training images `indices` (B,), with all random choices drawn from `generator`."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, and scalars to log beside it."""
        raise NotImplementedError

    def sample(self, path: Path) -> dict[str, float]:
        """Write an image grid to `path` and return validation figures; runs under the averaged weights."""
        return {}

    def export(self, folder: Path) -> None:
        """Write the result into the diffusers `folder`; runs under the averaged weights."""
        raise NotImplementedError


class Ema:
    """Exponential moving average e ← d·e + (1 − d)·p with the warm-up d = min(decay, (1 + t)/(10 + t))."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside the context and their own values again after it."""
        own = [p.detach().clone() for p in self.parameters]
        copy_into(self.parameters, self.average)
        try:
            yield
        finally:
            copy_into(self.parameters, own)


@torch.no_grad()
def copy_into(targets: list[nn.Parameter], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def data_order(seed: int, step: int, batch_size: int, size: int) -> Tensor:
    """Indices (batch_size,) of step `step`: consecutive slices of one shuffled epoch after another."""
    indices: list[Tensor] = []
    position, wanted = step * batch_size, batch_size
    while wanted:
        epoch, start = divmod(position, size)
        shuffled = torch.randperm(size, generator=seeded(seed, epoch, "epoch"))
        indices.append(shuffled[start : start + wanted])
        position, wanted = position + len(indices[-1]), wanted - len(indices[-1])
    return torch.cat(indices)


def seeded(seed: int, number: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on all of (seed, number, purpose); string hashes would differ between runs."""
    mixed = (seed * 1_000_003 + number) * 1_000_003 + sum(ord(c) * 31**i for i, c in enumerate(purpose))
    return torch.Generator(device).manual_seed(mixed % 2**63)


def learning_rate(options: LoopOptions, step: int, progress: float) -> float:
    """Linear warm-up times the decay at `progress` in [0, 1]."""
    progress = min(progress, 1.0)
    decay = 1 - progress if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return options.lr * min(1.0, (step + 1) / max(options.warmup, 1)) * decay


def train(
    task: Task, options: LoopOptions, folder: Path, *, export_only: bool = False, source: Path | None = None
) -> dict[str, Any]:
    """Train `task`, export it into `folder` and return the record that was added to `folder/training.json`.

    Checkpoint, metrics and sample images are under `folder/logs/<task name>/`. `export_only` skips the training and
    exports the last checkpoint. `source` is the model folder whose weights the run starts from, if any: its record
    is kept inside the new one as "continues", so that the whole training stays known.

    Raises `TrainingError` where the loss is not finite or a checkpoint does not fit.
    """
    if options.steps is None and options.minutes is None:
        raise TrainingError("the length of the training is open: give --steps or --minutes")
    accelerator = Accelerator(mixed_precision=options.precision)
    task = task.to(accelerator.device)
    named = {name: p for name, p in task.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    optimizer = torch.optim.AdamW(
        parameters, lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, 0.99), fused=True
    )
    ema = Ema(parameters, options.ema_decay)
    logs = folder / "logs" / task.name
    logs.mkdir(parents=True, exist_ok=True)
    checkpoint = logs / "checkpoint.safetensors"

    step, used = 0, 0.0
    if options.resume == "auto" and checkpoint.is_file():
        step, used = load_checkpoint(checkpoint, named, optimizer, ema, options)
    elif export_only:
        raise TrainingError(f"no checkpoint to export: {checkpoint} does not exist")
    metrics = Metrics(logs / "metrics.jsonl", step)
    prepared, optimizer = accelerator.prepare(task, optimizer)
    if options.compile:
        prepared = torch.compile(prepared)

    started = time.monotonic() - used  # as if the earlier parts of a resumed run had just been done
    last_checkpoint = last_sample = time.monotonic()

    def progress() -> float:
        by_steps = step / options.steps if options.steps else 0.0
        by_time = (time.monotonic() - started) / (60 * options.minutes) if options.minutes else 0.0
        return max(by_steps, by_time)

    def save() -> None:
        if accelerator.is_main_process:
            save_checkpoint(checkpoint, named, optimizer, ema, options, step, time.monotonic() - started)

    def sample() -> None:
        if accelerator.is_main_process:
            with ema.applied(), torch.no_grad():
                task.eval()
                metrics.write(step, task.sample(logs / f"sample_{step:07d}.png"))
                task.train()

    task.train()
    bar = tqdm(total=options.steps, initial=step, desc=task.name, unit="step", disable=export_only)
    while (done := progress()) < 1 and not export_only:
        lr = learning_rate(options, step, done)
        for group in optimizer.param_groups:
            group["lr"] = lr
        indices = data_order(options.seed, step, options.batch_size, task.size)
        indices = indices[accelerator.process_index :: accelerator.num_processes]
        generator = seeded(options.seed, step, f"noise {accelerator.process_index}", accelerator.device)
        loss, extra = prepared(task.batch(indices, generator, done))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, options.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        ema.update(step)
        metrics.add(loss, extra)
        bar.update()

        if step % options.log_every == 0:
            logged = metrics.flush(step, lr=lr, batch_size=options.batch_size)
            if not math.isfinite(logged["loss"]):
                loss_now = logged["loss"]
                raise TrainingError(f"the loss is {loss_now} after {step} steps: try a smaller --lr than {options.lr}")
            bar.set_postfix(loss=f"{logged['loss']:.4f}", images=f"{logged['images_per_second']:.0f}/s")
        now = time.monotonic()
        if now - last_checkpoint > 60 * options.checkpoint_minutes:
            save()
            last_checkpoint = time.monotonic()
        if now - last_sample > 60 * options.sample_minutes:
            sample()
            metrics.restart_clock()
            last_sample = time.monotonic()
    bar.close()

    if not export_only:
        save()
        sample()
    record = describe_run(task, options, step, time.monotonic() - started if not export_only else used, accelerator)
    if accelerator.is_main_process:
        if source is not None and (source / "training.json").is_file():
            earlier = json.loads((source / "training.json").read_text()).get(task.name)
            same = earlier is not None and all(earlier[key] == record[key] for key in ("steps", "options"))
            record |= {"continues": earlier} if earlier and not same else {}  # a finished run may be given again
        with ema.applied(), torch.no_grad():
            task.eval()
            task.export(folder)
        add_record(folder / "training.json", task.name, record)
    return record


class Metrics:
    """Means over the steps since the last line, one JSON object a line."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        # Lines after the checkpoint belong to steps that are about to be repeated.
        lines = path.read_text().splitlines() if step and path.is_file() else []
        write_atomic(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock, self.counted_from = time.monotonic(), self.count

    def add(self, loss: Tensor, extra: dict[str, Tensor]) -> None:
        for key, value in {"loss": loss, **extra}.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach().float()
        self.count += 1

    def flush(self, step: int, lr: float, batch_size: int) -> dict[str, float]:
        values = {key: float(value) / self.count for key, value in self.sums.items()}
        steps, seconds = self.count - self.counted_from, time.monotonic() - self.clock
        values |= {"lr": lr, "images_per_second": batch_size * steps / max(seconds, 1e-9)}
        self.write(step, values)
        self.sums, self.count = {}, 0
        self.restart_clock()
        return values

    def write(self, step: int, values: dict[str, float]) -> None:
        if values:
            rounded = {key: round(value, 7) for key, value in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **rounded}) + "\n")


def save_checkpoint(
    path: Path,
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    options: LoopOptions,
    step: int,
    seconds: float,
) -> None:
    """Weights, average, optimiser state and counters in one safetensors file, replaced atomically."""
    tensors = {f"model/{name}": p.detach() for name, p in named.items()}
    tensors |= {f"ema/{name}": value for name, value in zip(named, ema.average, strict=True)}
    state = optimizer.state_dict()["state"]
    for index, name in enumerate(named):
        tensors |= {f"optimizer/{key}/{name}": value for key, value in state.get(index, {}).items()}
    counters = {"step": step, "seconds": seconds, "options": asdict(options)}
    partial = path.with_suffix(".partial")
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    save_file(tensors, partial, {"state": json.dumps(counters)})
    os.replace(partial, path)


def load_checkpoint(
    path: Path, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: Ema, options: LoopOptions
) -> tuple[int, float]:
    """Restore what `save_checkpoint` wrote; returns (steps, seconds) already done."""
    with safe_open(path, "pt") as file:
        counters = json.loads(file.metadata()["state"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a safetensors file is no dict
    for key in ("seed", "batch_size"):
        if counters["options"][key] != getattr(options, key):
            raise TrainingError(
                f"{path} was made with {key} {counters['options'][key]}, not {getattr(options, key)}: "
                "give the same value, or --resume never to start again"
            )
    wrong = [n for n, p in named.items() if f"model/{n}" not in tensors or tensors[f"model/{n}"].shape != p.shape]
    if wrong:
        raise TrainingError(f"{path} is of another network ({wrong[0]} differs): use --resume never to start again")
    copy_into(list(named.values()), [tensors[f"model/{name}"] for name in named])
    for average, name in zip(ema.average, named, strict=True):
        average.copy_(tensors[f"ema/{name}"])
    state = optimizer.state_dict()
    kinds = {key.split("/")[1] for key in tensors if key.startswith("optimizer/")}
    state["state"] = {
        index: {kind: tensors[f"optimizer/{kind}/{name}"] for kind in kinds}
        for index, name in enumerate(named)
        if f"optimizer/step/{name}" in tensors
    }
    optimizer.load_state_dict(state)
    return counters["step"], counters["seconds"]


def describe_run(
    task: Task, options: LoopOptions, step: int, seconds: float, accelerator: Accelerator
) -> dict[str, Any]:
    """What a model card says about a training."""
    import accelerate
    import diffusers
    import transformers

    return {
        "task": task.name,
        "steps": step,
        "samples": step * options.batch_size,
        "training_images": task.size,
        "seconds": round(seconds),
        "trained_parameters": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "machine": machine_name(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, accelerate)},
        "options": asdict(options),
    }


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


def add_record(path: Path, name: str, record: dict[str, Any]) -> None:
    """Set `records[name]` in the JSON file, which is made where it is missing."""
    records = json.loads(path.read_text()) if path.is_file() else {}
    write_atomic(path, json.dumps(records | {name: record}, indent=2) + "\n")


def write_atomic(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
