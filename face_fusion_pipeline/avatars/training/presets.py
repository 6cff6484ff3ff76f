"""Sizes and training options of every task for two machines: `cpu` (two cores) and `gpu` (one large GPU).

All parts of either preset together stay below 60 MB in float16, what `publish` allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...training.loop import LoopOptions


@dataclass(frozen=True)
class Preset:
    """Arguments of the network's `create_*` function, and how to train it."""

    network: dict[str, Any]
    loop: LoopOptions


PRESETS: dict[str, dict[str, Preset]] = {
    "vae": {
        "cpu": Preset(
            {"encoder_width": 48, "decoder_width": 48, "blocks": (0, 1, 3, 5), "latent_channels": 16},
            LoopOptions(
                batch_size=16,
                lr=1.2e-3,
                steps=16000,
                warmup=100,
                ema_decay=0.998,
                precision="auto",
                channels_last=True,
            ),
        ),
        "gpu": Preset(
            {"encoder_width": 64, "decoder_width": 64, "blocks": (1, 1, 2, 3), "latent_channels": 16},
            LoopOptions(batch_size=128, lr=1e-3, steps=20000, precision="bf16", compile=True),
        ),
    },
    "clip": {
        "cpu": Preset(
            {"text_width": 128, "text_layers": 3, "vision_width": 128, "vision_layers": 4, "projection": 128},
            LoopOptions(batch_size=128, lr=1e-3, steps=450, warmup=50, weight_decay=0.1, ema_decay=0.98, log_every=5),
        ),
        "gpu": Preset(
            {"text_width": 128, "text_layers": 3, "vision_width": 192, "vision_layers": 4, "projection": 128},
            LoopOptions(
                batch_size=1024, lr=1e-3, steps=3000, warmup=200, weight_decay=0.1, precision="bf16", compile=True
            ),
        ),
    },
    "unet": {
        "cpu": Preset(
            {"widths": (64, 128, 256), "attention": (True, True, True), "head_size": 32},
            LoopOptions(batch_size=64, lr=1e-3, steps=8000, ema_decay=0.998, weight_decay=0.0, precision="auto"),
        ),
        "gpu": Preset(
            {"widths": (128, 192, 256), "attention": (True, True, True), "head_size": 32},
            LoopOptions(
                batch_size=512,
                lr=1.2e-3,
                steps=12000,
                warmup=300,
                weight_decay=0.0,
                precision="bf16",
                channels_last=True,
                compile=True,
            ),
        ),
    },
    "controlnet": {
        "cpu": Preset({}, LoopOptions(batch_size=32, lr=3e-4, steps=2000, ema_decay=0.998, precision="auto")),
        "gpu": Preset(
            {}, LoopOptions(batch_size=256, lr=8e-4, steps=3000, warmup=50, ema_decay=0.99, precision="bf16")
        ),
    },
    "prior": {
        "cpu": Preset(
            {"width": 128, "layers": 2},
            LoopOptions(batch_size=64, lr=1.5e-3, steps=600, warmup=50, ema_decay=0.99, precision="auto"),
        ),
        "gpu": Preset({"width": 128, "layers": 4}, LoopOptions(batch_size=512, lr=2e-3, steps=6000, warmup=200)),
    },
    "face-embedder": {
        "cpu": Preset({}, LoopOptions(batch_size=96, lr=2e-3, steps=2400, warmup=50, ema_decay=0.99)),
        "gpu": Preset({}, LoopOptions(batch_size=512, lr=4e-3, steps=2000, warmup=50, ema_decay=0.99)),
    },
    "crop-embedder": {
        "cpu": Preset({}, LoopOptions(batch_size=64, lr=4e-4, steps=300, warmup=50, ema_decay=0.995)),
        "gpu": Preset({}, LoopOptions(batch_size=256, lr=8e-4, steps=2000, warmup=50, ema_decay=0.995)),
    },
    "landmarks": {
        "cpu": Preset(
            {}, LoopOptions(batch_size=32, lr=2e-3, steps=6000, warmup=100, ema_decay=0.99, precision="auto")
        ),
        "gpu": Preset({}, LoopOptions(batch_size=256, lr=3e-3, steps=6000, warmup=100, ema_decay=0.995)),
    },
    "traits": {
        "cpu": Preset(
            {},
            LoopOptions(
                batch_size=64, lr=3e-3, steps=3000, warmup=100, ema_decay=0.99, precision="auto", channels_last=True
            ),
        ),
        "gpu": Preset({}, LoopOptions(batch_size=512, lr=4e-3, steps=3000, warmup=100, ema_decay=0.99)),
    },
    "drawing": {
        "cpu": Preset(
            {},
            LoopOptions(
                batch_size=96,
                lr=2e-3,
                steps=1700,
                warmup=100,
                weight_decay=0.05,
                ema_decay=0.99,
                precision="auto",
                channels_last=True,
            ),
        ),
        "gpu": Preset({}, LoopOptions(batch_size=384, lr=3e-3, steps=3000, warmup=100, ema_decay=0.99)),
    },
}
