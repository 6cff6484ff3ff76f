"""Checkpoints: the whole state of a run in one safetensors file, which is replaced or appears complete or not at all.

A run keeps one file that it replaces, or numbered folders, `checkpoint-500/`, of which the last few are kept.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.atomic import replacing
from .errors import TrainingError


if TYPE_CHECKING:
    from .loop import Ema, LoopOptions

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"
STATE = "training_state.safetensors"


def numbered_state(folder: Path, step: int) -> Path:
    """Where the state of step `step` goes. It is written last, so a folder that has it is complete."""
    return folder / f"checkpoint-{step}" / STATE


def numbered_states(folder: Path) -> list[Path]:
    """The states of all complete numbered checkpoints in `folder`, the earliest first."""
    found = {}
    for path in folder.glob(f"checkpoint-*/{STATE}"):
        if match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name):
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def prune(folder: Path, limit: int | None) -> None:
    """Delete the earliest numbered checkpoints but for the last `limit`."""
    if limit is not None:
        for path in numbered_states(folder)[: -max(1, limit)]:
            shutil.rmtree(path.parent)


def checkpoints_to_resume(options: LoopOptions, folder: Path, logs: Path) -> list[Path]:
    """The checkpoints that `options.resume` means, the best first: the next ones count where one is damaged."""
    if options.resume == "never":
        return []
    if options.resume == "auto":
        written = logs / CHECKPOINT
        return numbered_states(folder)[::-1] if options.checkpoint_steps else [written] if written.is_file() else []
    path = Path(options.resume)
    path = path / STATE if path.is_dir() else path
    if not path.is_file():
        raise TrainingError(f"there is no checkpoint {options.resume}")
    return [path]


def save_checkpoint(
    path: Path,
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    options: LoopOptions,
    step: int,
    seconds: float,
    scaler: Any = None,
    subject: Mapping[str, Any] | None = None,
) -> None:
    """Weights, average, optimiser state and counters in one safetensors file, replaced atomically.

    `subject` is what is learned from what, see `Task.subject`.

    Raises `TrainingError` where it cannot be written; what was there stays.
    """
    tensors = {f"model/{name}": p.detach() for name, p in named.items()}
    tensors |= {f"ema/{name}": value for name, value in zip(named, ema.average, strict=True)}
    state = optimizer.state_dict()["state"]
    for index, name in enumerate(named):
        tensors |= {f"optimizer/{key}/{name}": torch.as_tensor(value) for key, value in state.get(index, {}).items()}
    plain = {key for entry in state.values() for key, value in entry.items() if not isinstance(value, Tensor)}
    counters = {"step": step, "seconds": seconds, "options": asdict(options), "plain": sorted(plain)}
    counters["subject"] = dict(subject or {})
    counters["tensors"] = len(tensors)
    if scaler is not None:
        counters["scaler"] = scaler.state_dict()
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    try:
        with replacing(path) as partial:
            save_file(tensors, partial, {"state": json.dumps(counters)})
    except (SafetensorError, OSError) as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> TrainingError:
    """What is raised where a checkpoint cannot be written, for example on a full disk."""
    return TrainingError(
        f"cannot write {path}: {error}; earlier checkpoints are complete: make room and give the command again"
    )


class DamagedCheckpointError(TrainingError):
    """A checkpoint that cannot be read, or lacks something that it was written with."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was read, not yet restored.

    Attributes:
        path: its file.
        counters: what is no tensor, see [`save_checkpoint`].
        tensors: by name.
        damaged: later checkpoints, which could not be read.
    """

    path: Path
    counters: dict[str, Any]
    tensors: dict[str, Tensor]
    damaged: tuple[Path, ...] = ()

    @property
    def step(self) -> int:
        """Steps already done."""
        return self.counters["step"]

    @property
    def seconds(self) -> float:
        """Seconds that they took."""
        return self.counters["seconds"]

    def set_damaged_aside(self) -> None:
        """Rename the folders of damaged checkpoints: they are not taken for the last ones again, nor deleted."""
        for path in self.damaged:
            folder = path.parent
            names = (folder.with_name(f"{folder.name}.damaged{number or ''}") for number in range(1000))
            folder.rename(next(name for name in names if not name.exists()))


def load_newest(
    paths: Sequence[Path],
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    options: LoopOptions,
    scaler: Any = None,
    subject: Mapping[str, Any] | None = None,
) -> Saved | None:
    """Restore the first of the checkpoints `paths` that is whole, and warn of those that are not; None without any.

    Raises `TrainingError` if none is whole, or the one is of another run: another network, seed, batch or `subject`.
    """
    damaged: list[Path] = []
    for path in paths:
        try:
            saved = read_checkpoint(path, list(named))
        except DamagedCheckpointError as error:
            damaged.append(path)
            if path == paths[-1]:
                raise TrainingError(f"{error}; resume from another checkpoint, or begin anew without it") from error
            logger.warning("%s: the one before is taken", error)
            continue
        restore(saved, named, optimizer, ema, options, scaler, subject)
        return replace(saved, damaged=tuple(damaged))
    return None


def read_checkpoint(path: Path, names: Sequence[str]) -> Saved:
    """A checkpoint of the parameters `names`.

    Raises [`DamagedCheckpointError`] where it cannot be read or lacks counters, averages or state of the optimizer.
    """
    try:
        with safe_open(path, "pt") as file:
            counters = json.loads((file.metadata() or {})["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a safetensors file is no dict
        step, kept = counters["step"], counters["options"]
        plain = isinstance(kept, dict) and isinstance(counters.get("subject", {}), dict)
        if not (isinstance(step, int) and plain and float(counters["seconds"]) >= 0):
            raise ValueError("its counters are none")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DamagedCheckpointError(f"{path} cannot be read: {why}") from error
    states = ("step", "exp_avg", "exp_avg_sq")  # of AdamW; others keep different ones of large and small weights
    known = {name for name in names if any(f"optimizer/{state}/{name}" in tensors for state in states[1:])}
    wanted = [f"ema/{name}" for name in names if f"model/{name}" in tensors]
    wanted += [f"optimizer/{state}/{name}" for state in states for name in names if name in known]
    if step and not any(key.startswith("optimizer/") for key in tensors):
        raise DamagedCheckpointError(f"{path} lacks the state of the optimizer, without which the run would differ")
    if missing := next((key for key in wanted if key not in tensors), None):
        raise DamagedCheckpointError(f"{path} lacks {missing}")
    if len(tensors) != counters.get("tensors", len(tensors)):
        raise DamagedCheckpointError(f"{path} has {len(tensors)} of the {counters['tensors']} tensors it was given")
    return Saved(path, counters, tensors)


def restore(
    saved: Saved,
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    options: LoopOptions,
    scaler: Any = None,
    subject: Mapping[str, Any] | None = None,
) -> None:
    """Restore what `save_checkpoint` wrote.

    Raises `TrainingError` where it is of another run: another network, seed, batch or `subject`.
    """
    path, counters, tensors = saved.path, saved.counters, saved.tensors
    before = {key: counters["options"].get(key) for key in ("seed", "batch_size")} | counters.get("subject", {})
    now = asdict(options) | json.loads(json.dumps(dict(subject or {})))
    for key, value in before.items():
        if key in now and now[key] != value:
            raise TrainingError(
                f"{path} was made with {key} {value}, not {now[key]}: give the same value, or start again without it"
            )
    wrong = [n for n, p in named.items() if f"model/{n}" not in tensors or tensors[f"model/{n}"].shape != p.shape]
    if wrong:
        raise TrainingError(f"{path} is of another network ({wrong[0]} differs): start again without it")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"model/{name}"])
        for average, name in zip(ema.average, named, strict=True):
            average.copy_(tensors[f"ema/{name}"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": _optimizer_state(saved, list(named))})
    if scaler is not None and "scaler" in counters:
        scaler.load_state_dict(counters["scaler"])


def _optimizer_state(saved: Saved, names: Sequence[str]) -> dict[int, dict[str, Any]]:
    """The state of the optimizer by the index of a parameter; those without a gradient have none."""
    kinds = {key.split("/")[1] for key in saved.tensors if key.startswith("optimizer/")}
    plain = saved.counters.get("plain", ())
    return {
        index: {
            kind: found.item() if kind in plain else found
            for kind in kinds
            if (found := saved.tensors.get(f"optimizer/{kind}/{name}")) is not None
        }
        for index, name in enumerate(names)
        if f"optimizer/step/{name}" in saved.tensors
    }
