"""The training loop: AdamW, warm-up and decay, EMA, checkpoints that survive a kill, metrics and sample images.

A `Task` is an `nn.Module` that holds the networks, makes a batch from indices and returns the loss from `forward`.
Everything random in step `s` comes from one generator seeded by (seed, s), and the order of the data is a pure
function of (seed, s) too. So a checkpoint needs no random state, and an interrupted run that resumes equals an
uninterrupted one bit for bit (on one device, as long as the length is given in steps).

A run that is limited by time instead of steps takes its learning rate from the elapsed fraction, so that it still
decays to the end; a resumed run continues with the time it had used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, broadcast
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..face_pictures import load_image
from ..files.atomic import write_text
from ..files.texts import read_log
from .checkpoints import (
    CHECKPOINT,
    cannot_write,
    checkpoints_to_resume,
    load_newest,
    numbered_state,
    prune,
    save_checkpoint,
)
from .errors import TrainingError
from .kernels import training_kernels
from .optimizers import create_optimizer
from .run_records import RECORD, add_record, known_records


logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
SPLITS_WEIGHTS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast to train; the defaults come from `presets.py`."""

    batch_size: int
    lr: float
    steps: int | None = None
    minutes: float | None = None  # ends at whichever of `steps` and `minutes` comes first
    warmup: int = 200  # steps
    schedule: str = "cosine"  # or "linear"; both decay to zero; or "constant"
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0
    precision: str = "no"  # or "bf16", "fp16" (GPU); "auto": "bf16" where the device computes in it
    channels_last: bool = False  # memory format of convolution weights; quicker for purely convolutional networks
    compile: bool = False
    log_every: int = 20  # steps
    checkpoint_minutes: float = 2.0
    sample_minutes: float = 5.0
    resume: str = "auto"  # or "never", or the file or folder of a checkpoint
    accumulation: int = 1  # parts in which a process computes its share of a batch, one after another
    optimizer: str = "adamw"  # or "adamw-8bit"
    beta2: float = 0.99
    checkpoint_steps: int | None = None  # numbered checkpoints, see `checkpoints.py`, instead of one by time
    checkpoint_limit: int | None = None  # how many of them are kept
    sample_steps: int | None = None  # instead of `sample_minutes`
    report_to: str | None = None  # a tracker of Accelerate: "tensorboard", "wandb", ... or "all"


def process_group() -> PartialState:
    """The processes of this run; without a GPU Accelerate has to be told that CPU processes belong together."""
    return PartialState(cpu="RANK" in os.environ and not torch.cuda.is_available())


@dataclass(frozen=True)
class Part:
    """The rows (B,) of a step's whole batch of `batch_size` that one process computes at a time, and their images."""

    seed: int
    step: int
    batch_size: int
    rows: Tensor
    indices: Tensor


class Task(nn.Module):
    """What is trained. Only parameters with `requires_grad` are optimised, averaged and put into checkpoints."""

    name: str
    published_as: str | None = None  # where its record has another name in a published model
    size: int  # training images
    settings: dict[str, Any] = {}  # options of its own, for the record of a run

    @property
    def subject(self) -> dict[str, Any]:
        """What is learned from what, as JSON values: a run goes on from a checkpoint only where all of it is equal.

        The weights that the run began with are added to it.
        """
        return self.settings

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        """Tensors of the training images `indices` (B,), with all random choices drawn from `generator`."""
        raise NotImplementedError

    def part(self, part: Part, generator: torch.Generator, progress: float) -> Batch:
        """Tensors of a part of a batch.

        A task may draw its random choices from (seed, step, row) instead of from `generator`, which belongs to one
        process: then the gradients do not depend on the number of processes.
        """
        return self.batch(part.indices, generator, progress)

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
        indices.append(shuffled(seed, epoch, size)[start : start + wanted])
        position, wanted = position + len(indices[-1]), wanted - len(indices[-1])
    return torch.cat(indices)


@functools.lru_cache(maxsize=2)
def shuffled(seed: int, epoch: int, size: int) -> Tensor:
    """The images of an epoch in their order, kept for its other steps."""
    return torch.randperm(size, generator=seeded(seed, epoch, "epoch"))


def seeded(seed: int, number: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on all of (seed, number, purpose); string hashes would differ between runs."""
    mixed = (seed * 1_000_003 + number) * 1_000_003 + sum(ord(c) * 31**i for i, c in enumerate(purpose))
    return torch.Generator(device).manual_seed(mixed % 2**63)


def learning_rate(options: LoopOptions, step: int, progress: float) -> float:
    """Linear warm-up times the decay at `progress` in [0, 1]."""
    progress = min(progress, 1.0)
    decay = 1 - progress if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    if options.schedule == "constant":
        decay = 1.0
    return options.lr * min(1.0, (step + 1) / max(options.warmup, 1)) * decay


@training_kernels()
def train(
    task: Task, options: LoopOptions, folder: Path, *, export_only: bool = False, source: Path | None = None
) -> dict[str, Any]:
    """Train `task`, export it into `folder` and return the record that was added to `folder/training.json`.

    Checkpoint, metrics and sample images are under `folder/logs/<task name>/`, numbered checkpoints in `folder`, with
    what the task exports at their step. `export_only` skips the training and exports the last checkpoint. `source` is
    the model folder whose weights the run starts from, if any: its record is kept inside the new one as "continues",
    so that the whole training stays known.

    Raises `TrainingError` where the loss is not finite or a checkpoint does not fit.
    """
    if options.steps is None and options.minutes is None:
        raise TrainingError("the length of the training is open: give --steps or --minutes")
    process_group()
    options = replace(options, precision=usable_precision(options.precision))
    accelerator = create_accelerator(options, folder / "logs" / task.name)
    task = task.to(accelerator.device)
    if options.channels_last:
        task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    named = {name: p for name, p in task.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    optimizer = create_optimizer(parameters, options)
    ema = Ema(parameters, options.ema_decay)
    logs = folder / "logs" / task.name
    logs.mkdir(parents=True, exist_ok=True)

    step, used = 0, 0.0
    subject = {**task.subject, "initial_weights": digest(named)}
    checkpoints = checkpoints_to_resume(options, folder, logs)
    if not checkpoints and export_only:
        raise TrainingError(f"no checkpoint to export: {logs / CHECKPOINT} does not exist")
    saved = load_newest(checkpoints, named, optimizer, ema, options, accelerator.scaler, subject)
    if saved is not None:
        step, used = saved.step, saved.seconds
    check_same_start(accelerator, step, folder)
    if saved is not None and accelerator.is_main_process:
        saved.set_damaged_aside()
    metrics = Metrics(logs / "metrics.jsonl", step, accelerator.is_main_process, accelerator.log)
    if options.compile:
        # One graph: cutting it where gradients could already be exchanged pays between machines only.
        torch._dynamo.config.optimize_ddp = False
        task.compile()  # before Accelerate wraps it, so that what reads the task itself stays uncompiled
    prepared, optimizer = accelerator.prepare(task, optimizer)

    started = time.monotonic() - used  # as if the earlier parts of a resumed run had just been done
    last_checkpoint = last_sample = time.monotonic()
    sampled_at = -1

    def progress() -> float:
        by_steps = step / options.steps if options.steps else 0.0
        by_time = (time.monotonic() - started) / (60 * options.minutes) if options.minutes else 0.0
        done = max(by_steps, by_time)
        if options.minutes and accelerator.num_processes > 1:  # the clocks differ, the decision to stop must not
            done = float(broadcast(torch.tensor(done, device=accelerator.device)))
        return done

    def save() -> None:
        if accelerator.is_main_process:
            # Not only now and then: what is written replaces the last good weights.
            norms = torch.stack(torch._foreach_norm([p.detach().float() for p in parameters]))
            if not (metrics.finite and bool(torch.isfinite(norms).all())):
                raise TrainingError(
                    f"the weights are not finite after {step} steps: try a smaller --lr than {options.lr}"
                )
            path = numbered_state(folder, step) if options.checkpoint_steps else logs / CHECKPOINT
            if options.checkpoint_steps:
                try:
                    with ema.applied(), torch.no_grad():
                        task.export(path.parent)
                except (SafetensorError, OSError) as error:
                    raise cannot_write(path, error) from error
            seconds = time.monotonic() - started
            save_checkpoint(path, named, optimizer, ema, options, step, seconds, accelerator.scaler, subject)
            if options.checkpoint_steps:
                prune(folder, options.checkpoint_limit)

    def sample() -> None:
        if accelerator.is_main_process:
            with ema.applied(), torch.no_grad():
                task.eval()
                metrics.write(step, task.sample(logs / f"sample_{step:07d}.png"))
                log_image(accelerator, logs / f"sample_{step:07d}.png", step)
                task.train()

    task.train()
    silent = export_only or not accelerator.is_main_process
    bar = progress_bar(options, task.name, step, used, silent)
    while (done := progress()) < 1 and not export_only:
        lr = learning_rate(options, step, done)
        for group in optimizer.param_groups:
            group["lr"] = lr
        indices = data_order(options.seed, step, options.batch_size, task.size)
        rows = torch.arange(options.batch_size)[accelerator.process_index :: accelerator.num_processes]
        generator = seeded(options.seed, step, f"noise {accelerator.process_index}", accelerator.device)
        for part_rows in rows.chunk(options.accumulation):
            part = Part(options.seed, step, options.batch_size, part_rows, indices[part_rows])
            with accelerator.accumulate(prepared):
                loss, extra = prepared(task.part(part, generator, done))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, options.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            metrics.add(loss, extra, 1 / options.accumulation)
        step += 1
        ema.update(step)
        # the last step may end after the time
        bar.update(1 if options.steps else min(time.monotonic() - started, bar.total) - bar.n)

        if step % options.log_every == 0:
            logged = metrics.flush(step, lr=lr, batch_size=options.batch_size)
            if not math.isfinite(logged["loss"]):
                loss_now = logged["loss"]
                raise TrainingError(f"the loss is {loss_now} after {step} steps: try a smaller --lr than {options.lr}")
            speed = f"{logged['images_per_second']:.3g}/s"
            steps = {} if options.steps else {"step": step}
            bar.set_postfix(**steps, loss=f"{logged['loss']:.4f}", images=speed)
        now = time.monotonic()
        if is_due(step, options.checkpoint_steps, now - last_checkpoint, options.checkpoint_minutes):
            save()
            last_checkpoint = time.monotonic()
        if is_due(step, options.sample_steps, now - last_sample, options.sample_minutes):
            sample()
            sampled_at = step
            metrics.restart_clock()
            last_sample = time.monotonic()
    bar.close()

    if not export_only:
        save()
        if sampled_at != step:
            sample()
        for tracker in accelerator.trackers:
            tracker.finish()
    record = describe_run(task, options, step, time.monotonic() - started if not export_only else used, accelerator)
    if accelerator.is_main_process:
        if source is not None:
            records = known_records(source / RECORD)
            earlier = records.get(task.name) or records.get(task.published_as or task.name)
            same = earlier is not None and all(earlier.get(key) == record[key] for key in ("steps", "options"))
            record |= {"continues": earlier} if earlier and not same else {}  # a finished run may be given again
        with ema.applied(), torch.no_grad():
            task.eval()
            task.export(folder)
        add_record(folder / RECORD, task.name, record)
    return record


def progress_bar(options: LoopOptions, name: str, step: int, seconds: float, silent: bool) -> tqdm:
    """A bar over the steps; without a number of steps over the time, with what is left of it.

    Args:
        step, seconds: where a run goes on.
    """
    if options.steps:
        return tqdm(total=options.steps, initial=step, desc=name, unit="step", disable=silent)
    whole = 60 * (options.minutes or 0)
    line = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
    return tqdm(total=whole, initial=min(seconds, whole), desc=name, bar_format=line, disable=silent)


def usable_precision(asked: str) -> str:
    """What "auto" means on this machine; says so where what was asked for is possible but very slow."""
    if asked == "auto":
        return "bf16" if _computes_in_bf16() else "no"
    if asked == "bf16" and not _computes_in_bf16():
        logger.warning("this processor has no bf16 arithmetic and imitates it many times slower: take precision no")
    return asked


def _computes_in_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def create_accelerator(options: LoopOptions, logs: Path) -> Accelerator:
    """The processes, precision and trackers of a run; refuses a batch that they cannot share evenly."""
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accumulation = GradientAccumulationPlugin(options.accumulation, sync_with_dataloader=False)
    try:
        accelerator = Accelerator(
            mixed_precision=options.precision,
            gradient_accumulation_plugin=accumulation,
            log_with=options.report_to,
            project_dir=logs,
        )
    except (ValueError, ImportError) as error:  # a precision or tracker that is not possible here
        raise TrainingError(str(error)) from error
    if accelerator.distributed_type in SPLITS_WEIGHTS:
        raise TrainingError(
            f"{accelerator.distributed_type.value} splits the weights, and checkpoints would be incomplete: choose "
            "plain data parallelism in `accelerate config`; what is trained here is small enough for one device"
        )
    parts = accelerator.num_processes * options.accumulation
    if options.accumulation > 1 and options.batch_size % parts:
        raise TrainingError(
            f"a batch of {options.batch_size} cannot be shared evenly by {accelerator.num_processes} processes in "
            f"{options.accumulation} parts each: take a multiple of {parts}"
        )
    if options.report_to and not accelerator.log_with:
        raise TrainingError(f"{options.report_to} cannot be reported to: pip install {options.report_to}")
    if options.report_to:
        simple = {key: value for key, value in asdict(options).items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("face-fusion", simple)
    return accelerator


def check_same_start(accelerator: Accelerator, step: int, folder: Path) -> None:
    """Raise `TrainingError` where another process begins at another step, for they would wait for each other."""
    if accelerator.num_processes > 1:
        first = int(broadcast(torch.tensor(step, device=accelerator.device)))
        apart = accelerator.reduce(torch.tensor(float(first != step), device=accelerator.device))
        if float(apart):
            raise TrainingError(
                f"this process begins at step {step}, the first one at {first}: {folder} must be on a disk that all "
                "machines share"
            )


def digest(weights: Mapping[str, Tensor]) -> str:
    """Hash of all weights, as they are in float16."""
    found = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        found.update(name.encode() + weight.detach().cpu().half().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def log_image(accelerator: Accelerator, path: Path, step: int) -> None:
    """Show the picture at `path`, if there is one, in the trackers that take pictures."""
    if path.is_file() and accelerator.trackers:
        pixels = np.asarray(load_image(path))[None]
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                tracker.log_images({"samples": pixels}, step)


def is_due(step: int, every: int | None, seconds: float, minutes: float) -> bool:
    """Whether something is due that happens every so many steps, or without `every` every so many minutes."""
    return step % every == 0 if every else seconds > 60 * minutes


class Metrics:
    """Means over the steps since the last line, one JSON object a line; `log` shows them elsewhere too."""

    def __init__(
        self, path: Path, step: int, writes: bool = True, log: Callable[[dict[str, float], int], None] | None = None
    ) -> None:
        self.path, self.writes, self.log = path, writes, log
        if writes:
            # Lines after the checkpoint belong to steps that are about to be repeated.
            rows = read_log(path) if step else []
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows if row.get("step", step + 1) <= step))
        self.sums: dict[str, Tensor] = {}
        self.count = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock, self.counted_from = time.monotonic(), self.count

    def add(self, loss: Tensor, extra: dict[str, Tensor], fraction: float = 1.0) -> None:
        """Count values of one part of a step, the `fraction` of it."""
        for key, value in {"loss": loss, **extra}.items():
            self.sums[key] = self.sums.get(key, 0) + value.detach().float() * fraction
        self.count += fraction

    @property
    def finite(self) -> bool:
        """Whether everything counted since the last line is a finite number."""
        return all(bool(torch.isfinite(total).all()) for total in self.sums.values())

    def flush(self, step: int, lr: float, batch_size: int) -> dict[str, float]:
        values = {key: float(value) / self.count for key, value in self.sums.items()}
        steps, seconds = self.count - self.counted_from, time.monotonic() - self.clock
        values |= {"lr": lr, "images_per_second": batch_size * steps / max(seconds, 1e-9)}
        self.write(step, values)
        self.sums, self.count = {}, 0.0
        self.restart_clock()
        return values

    def write(self, step: int, values: dict[str, float]) -> None:
        if values and self.writes:
            rounded = {key: round(value, 7) for key, value in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **rounded}) + "\n")
            if self.log is not None:
                self.log(rounded, step)


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
        "options": {**asdict(options), **task.settings, "resume": Path(options.resume).name},
    }


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"
