"""Sizes and options of the kit for one large GPU, for two cores, and for a test."""

from __future__ import annotations

from dataclasses import dataclass

from ...face_images import CROP_ENLARGE
from ...training.loop import LoopOptions


@dataclass(frozen=True)
class KitPreset:
    """`size` in pixels of the pictures; UNet and text encoder, if there are none yet; how each stage is trained."""

    size: int
    widths: tuple[int, ...]
    head_size: int
    text_width: int
    text_layers: int
    drawn_at_once: int
    loops: dict[str, LoopOptions]
    face_crop: float = CROP_ENLARGE


def _gpu(batch_size: int, lr: float, warmup: int, ema_decay: float) -> LoopOptions:
    return LoopOptions(
        batch_size=batch_size,
        lr=lr,
        warmup=warmup,
        weight_decay=0.0,
        ema_decay=ema_decay,
        precision="bf16",
        channels_last=True,
        compile=True,
        checkpoint_minutes=60,
        sample_minutes=2,
    )


def _cpu(batch_size: int, lr: float) -> LoopOptions:
    return LoopOptions(batch_size=batch_size, lr=lr, warmup=2, weight_decay=0.0, ema_decay=0.9, log_every=1)


KIT_PRESETS = {
    "gpu": KitPreset(
        size=256,
        widths=(128, 256, 256),
        head_size=64,
        text_width=192,
        text_layers=4,
        drawn_at_once=256,
        loops={
            "base": _gpu(512, 1e-3, 300, 0.999),
            "faces": _gpu(256, 1.5e-3, 50, 0.99),
            "depth": _gpu(256, 8e-4, 50, 0.99),
        },
    ),
    "cpu": KitPreset(
        size=64,
        widths=(32, 64, 64),
        head_size=32,
        text_width=64,
        text_layers=2,
        drawn_at_once=32,
        loops={"base": _cpu(16, 1e-3), "faces": _cpu(8, 1e-3), "depth": _cpu(8, 8e-4)},
    ),
    "tiny": KitPreset(
        size=64,
        widths=(32, 32, 32),
        head_size=32,
        text_width=32,
        text_layers=1,
        drawn_at_once=32,
        loops={"base": _cpu(4, 1e-3), "faces": _cpu(4, 1e-3), "depth": _cpu(4, 8e-4)},
    ),
}
