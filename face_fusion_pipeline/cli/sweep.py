"""`face-fusion sweep`: one picture by many settings of the self-attention, to choose from for a checkpoint."""

from __future__ import annotations

import argparse
import itertools
import json
from typing import TYPE_CHECKING

from ..face_errors import FaceFusionError
from ._arguments import STRENGTH, Gather, whole
from ._driver_options import posed
from .generate import (
    BATCH_SIZE,
    check_arguments,
    check_model_arguments,
    denoising,
    load_model,
    read_faces,
    set_defaults,
    warn,
)
from .generate import add_arguments as add_generate_arguments


if TYPE_CHECKING:
    from PIL import Image

HELP = "draw a grid of the settings of the reference at the self-attention, to choose from"
SHEET = "sweep.png"
# Words for sets of layers, as `SelfAttentionReference.layers` takes them.
LAYERS = {
    "up": ("up_blocks",),
    "mid-up": ("mid_block", "up_blocks"),
    "down": ("down_blocks",),
    "all": ("down_blocks", "mid_block", "up_blocks"),
}
MOST = 100  # pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_generate_arguments(parser)
    parser.description = (
        "The reference at the self-attention has settings whose best values depend on the checkpoint: its noise "
        f"level, its strength, and the layers that see it. OUT/{SHEET} shows all combinations with the same noise: a "
        "column for each strength, a row for each level and set of layers; the first column is without a face."
    )
    parser.add_argument(
        "--timesteps",
        type=whole(0, 999),
        nargs="+",
        action=Gather,
        default=[0, 150, 300],
        help="noise levels",
    )
    parser.add_argument("--scales", type=STRENGTH, nargs="+", action=Gather, default=[2.0, 4.0, 8.0], help="strengths")
    parser.add_argument(
        "--layers", choices=LAYERS, nargs="+", action=Gather, default=["up", "all"], help="sets of layers"
    )
    parser.set_defaults(num_images=1)


def check(args: argparse.Namespace) -> None:
    """Raise [`FaceFusionError`] for what cannot be swept, and for options that would do nothing."""
    if args.mode == "adapter" or args.face[0].endswith(".safetensors"):
        raise FaceFusionError(
            "sweep changes how photos are seen at the self-attention: give photos, no --mode adapter"
        )
    idle = {
        "--num-images": args.num_images != 1,
        "--batch-size": args.batch_size != BATCH_SIZE,
        "--refine-faces": args.refine_faces,
        "--no-sheet": args.no_sheet,
        "the pose": posed(args),
        "--self-scale": args.self_scale is not None,
        "the second --prompt": len(args.prompt) > 1,
    }
    if given := [name for name, wrong in idle.items() if wrong]:
        raise FaceFusionError(f"sweep draws one picture by each setting: leave {given[0]} out")
    count = len(args.timesteps) * len(args.scales) * len(args.layers)
    if count > MOST:
        raise FaceFusionError(f"{count} settings are more than {MOST}: give fewer --timesteps, --scales or --layers")
    check_arguments(args)


def run(args: argparse.Namespace) -> int:
    check_model_arguments(args)
    set_defaults(args)
    check(args)

    from ..face_self_attention import SelfAttentionReference

    faces = read_faces(args)

    import torch

    from ..generation.contact_sheet import contact_sheet, save_new_png
    from ..generation.references import reference_crops

    pipe = load_model(args)
    warn(pipe, args)
    if args.watermark:
        from ..generation.watermark import add_watermark

    mode = args.mode or ("both" if args.adapter else "training-free")
    crops = reference_crops(pipe, faces)

    def picture(identity: object, scale: float | None = None) -> Image.Image:
        return pipe(
            args.prompt[0],
            negative_prompt=args.negative_prompt,
            face_image=identity,
            face_scale=args.scale,
            face_self_scale=scale,
            **denoising(args),
            height=args.height,
            width=args.width,
            generator=torch.Generator("cpu").manual_seed(args.seed),
        ).images[0]

    columns: dict[str, list[Image.Image]] = {"without": [picture(None)]}
    for layers, timestep in itertools.product(args.layers, args.timesteps):
        chosen = SelfAttentionReference(1.0, timestep, layers=LAYERS[layers])
        identity = pipe.encode_face(crops, face_mode=mode, self_attention=chosen, mirrored=bool(args.mirror))
        for scale in args.scales:
            columns.setdefault(f"strength {scale:g}", []).append(picture(identity, scale))
    rows = [f"{layers}, timestep {timestep}" for layers, timestep in itertools.product(args.layers, args.timesteps)]
    sheet = contact_sheet(columns, rows)
    text = {"prompt": args.prompt[0], "seed": args.seed, "watermark": args.watermark}
    names = (f"sweep_{number:03d}.png" if number else SHEET for number in itertools.count())
    path = save_new_png(add_watermark(sheet) if args.watermark else sheet, args.out, names, text)
    if args.json:
        print(json.dumps({"files": [str(path)], "columns": list(columns), "rows": rows, **text}))
    else:
        print("\n".join([str(path), *(f"row: {row}" for row in rows)]))
    return 0
