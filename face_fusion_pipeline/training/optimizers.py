"""AdamW, in 32 or in 8 bits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import TrainingError


if TYPE_CHECKING:
    from .loop import LoopOptions


def create_optimizer(parameters: list[nn.Parameter], options: LoopOptions) -> torch.optim.Optimizer:
    """The optimiser that `options.optimizer` names: "adamw", or "adamw-8bit" of bitsandbytes.

    Raises `TrainingError` for another name, or where bitsandbytes is missing.
    """
    settings: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay, "betas": (0.9, options.beta2)}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if options.optimizer != "adamw-8bit":
        raise TrainingError(f"unknown optimizer {options.optimizer!r}: take 'adamw' or 'adamw-8bit'")
    try:
        library = importlib.import_module("bitsandbytes")
    except Exception as error:  # it also fails to load where its CUDA library does not fit
        raise TrainingError(
            f"8-bit AdamW needs bitsandbytes ({error}): pip install 'face-fusion-pipeline[8bit]', or train without it"
        ) from error
    return library.optim.AdamW8bit(parameters, **settings)
