"""Checkpoints: the whole state of a run in one safetensors file, which is replaced or appears complete or not at all.

A run keeps one file that it replaces, or numbered folders, `checkpoint-500/`, of which the last few are kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import TrainingError


if TYPE_CHECKING:
    from .loop import Ema, LoopOptions

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


def checkpoint_to_resume(options: LoopOptions, folder: Path, logs: Path) -> Path | None:
    """The checkpoint that `options.resume` means, or None to begin anew."""
    if options.resume == "never":
        return None
    if options.resume == "auto":
        written = logs / CHECKPOINT
        found = numbered_states(folder) if options.checkpoint_steps else [written] if written.is_file() else []
        return found[-1] if found else None
    path = Path(options.resume)
    path = path / STATE if path.is_dir() else path
    if not path.is_file():
        raise TrainingError(f"there is no checkpoint {options.resume}")
    return path


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
    if scaler is not None:
        counters["scaler"] = scaler.state_dict()
    partial = path.with_suffix(".partial")
    tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"state": json.dumps(counters)})
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> TrainingError:
    """What is raised where a checkpoint cannot be written, for example on a full disk."""
    return TrainingError(
        f"cannot write {path}: {error}; earlier checkpoints are complete: make room and give the command again"
    )


def load_checkpoint(
    path: Path,
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    options: LoopOptions,
    scaler: Any = None,
    subject: Mapping[str, Any] | None = None,
) -> tuple[int, float]:
    """Restore what `save_checkpoint` wrote; returns (steps, seconds) already done.

    Raises `TrainingError` where it cannot be read, or is of another run: another network, seed, batch or `subject`.
    """
    try:
        with safe_open(path, "pt") as file:
            counters = json.loads(file.metadata()["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a safetensors file is no dict
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path} cannot be read: {error}; resume from an earlier checkpoint") from error
    before = {key: counters["options"][key] for key in ("seed", "batch_size")} | counters.get("subject", {})
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
    state = optimizer.state_dict()
    kinds = {key.split("/")[1] for key in tensors if key.startswith("optimizer/")}
    state["state"] = {
        index: {
            kind: found.item() if kind in counters.get("plain", ()) else found
            for kind in kinds
            if (found := tensors.get(f"optimizer/{kind}/{name}")) is not None
        }
        for index, name in enumerate(named)
        if f"optimizer/step/{name}" in tensors
    }
    optimizer.load_state_dict(state)
    if scaler is not None and "scaler" in counters:
        scaler.load_state_dict(counters["scaler"])
    return counters["step"], counters["seconds"]
