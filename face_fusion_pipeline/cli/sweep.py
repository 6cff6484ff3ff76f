"""`face-fusion sweep`: one picture by many settings of the self-attention, to choose from for a checkpoint."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING

from ..face_errors import FaceFusionError
from .generate import add_arguments as add_generate_arguments
from .generate import check_arguments, check_model_arguments, denoising, load_model, read_faces, set_defaults


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
    parser.add_argument("--timesteps", type=int, nargs="+", default=[0, 150, 300], help="noise levels (0 150 300)")
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0, 4.0, 8.0], help="strengths (2 4 8)")
    parser.add_argument("--layers", choices=LAYERS, nargs="+", default=["up", "all"], help="sets of layers (up all)")
    parser.set_defaults(num_images=1)


def run(args: argparse.Namespace) -> int:
    check_model_arguments(args)
    set_defaults(args)
    if args.mode == "adapter" or args.face[0].endswith(".safetensors"):
        raise FaceFusionError(
            "sweep changes how photos are seen at the self-attention: give photos, no --mode adapter"
        )
    if (args.num_images, args.refine_faces) != (1, False):
        raise FaceFusionError("sweep draws one picture by each setting: leave --num-images and --refine-faces out")
    count = len(args.timesteps) * len(args.scales) * len(args.layers)
    if count > MOST:
        raise FaceFusionError(f"{count} settings are more than {MOST}: give fewer --timesteps, --scales or --layers")
    check_arguments(args)

    from ..face_self_attention import SelfAttentionReference

    for timestep, scale in itertools.product(args.timesteps, args.scales):
        SelfAttentionReference(scale, timestep)  # bad numbers are known before the model is loaded
    faces = read_faces(args)

    import torch

    from ..generation.contact_sheet import contact_sheet, save_new_png
    from ..generation.references import reference_crops

    pipe = load_model(args)
    mode = args.mode or ("both" if args.adapter else "training-free")
    crops = reference_crops(pipe, faces)

    def picture(identity: object, scale: float | None = None) -> Image.Image:
        return pipe(
            args.prompt,
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
    names = (f"sweep_{number:03d}.png" if number else SHEET for number in itertools.count())
    text = {"prompt": args.prompt, "seed": args.seed}
    path = save_new_png(contact_sheet(columns, rows), args.out, names, text)
    print(path)
    for row in rows:
        print(f"row: {row}")
    return 0
