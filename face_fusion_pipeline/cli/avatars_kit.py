"""`face-fusion avatars-kit`: train the avatar model in minutes on one GPU, from scenes that are drawn on it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..face_errors import FaceFusionError
from ._arguments import COUNT, real, whole


HELP = "train base, Face Fusion and depth ControlNet of the avatars in minutes on one GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw scenes on the device, keep them there, and train base, Face Fusion and depth ControlNet on them, each "
        "for its time. Training starts from what --model already holds; it needs a VAE and a tokenizer at least "
        "(`face-fusion avatars-train vae` and `clip`). A run that was killed goes on from its last checkpoint when "
        "the same command is given again."
    )
    parser.add_argument("--model", type=Path, required=True, help="folder with vae/ and tokenizer/, and what there is")
    parser.add_argument("--out", type=Path, required=True, help="model folder; logs go to its logs/")
    parser.add_argument("--preset", choices=("gpu", "cpu", "tiny"), default="gpu", help="sizes (default: gpu)")
    parser.add_argument("--scenes", type=COUNT, default=100_000, help="draw at most so many (default: 100000)")
    parser.add_argument("--draw-seconds", type=real(0, 1e6), default=70, help="stop drawing then (default: 70)")
    parser.add_argument("--base-seconds", type=real(0, 1e6), default=0, help="of training UNet and text encoder")
    parser.add_argument("--faces-seconds", type=real(0, 1e6), default=0, help="of training Face Fusion weights")
    parser.add_argument("--depth-seconds", type=real(0, 1e6), default=0, help="of training the depth ControlNet")
    parser.add_argument("--workers", type=whole(1, 256), default=1, help="processes that plan scenes (default: 1)")
    parser.add_argument("--warm", action="store_true", help="compile in a second process while the first one draws")


def run(args: argparse.Namespace) -> int:
    numbers = {name: getattr(args, f"{name}_seconds") for name in ("draw", "base", "faces", "depth")}
    if not any(numbers[name] for name in ("base", "faces", "depth")):
        raise FaceFusionError("nothing to train: give --base-seconds, --faces-seconds or --depth-seconds")

    from ..avatars.kit.presets import KIT_PRESETS
    from ..avatars.kit.stages import Times
    from ..avatars.kit.stages import run as run_stages

    run_stages(args.model, args.out, KIT_PRESETS[args.preset], Times(**numbers), args.scenes, args.workers, args.warm)
    return 0
