"""`face-fusion avatars`: draw avatars to look at, or one portrait to use as a reference."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..files.atomic import replacing
from ._arguments import AVATAR_SIDE, whole


MOST_PIXELS = 200_000_000  # of one image
HELP = "draw a labelled grid of avatars, or one reference portrait"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for avatars.png, or for reference.png")
    parser.add_argument("--people", type=whole(1, 100), default=6, help="rows of the grid (default: %(default)s)")
    parser.add_argument(
        "--per-person", type=whole(1, 100), default=6, help="columns of the grid (default: %(default)s)"
    )
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="whose identities")
    parser.add_argument(
        "--seed", type=whole(0, 99_999), default=0, help="the first person of the split (default: %(default)s)"
    )
    parser.add_argument("--size", type=AVATAR_SIDE, default=128, help="pixels a side of a picture")
    parser.add_argument(
        "--portrait",
        type=whole(0, 1_199_999),
        metavar="SEED",
        help="draw only the reference portrait of this identity",
    )
    parser.add_argument("--json", action="store_true", help="print the path as JSON")


def run(args: argparse.Namespace) -> int:
    from ..avatars.world import sheet
    from ..face_errors import FaceFusionError

    if args.people * args.per_person * args.size**2 > MOST_PIXELS:
        raise FaceFusionError(
            f"{args.people} x {args.per_person} pictures of {args.size} pixels a side are too many for one image: "
            "give a smaller --size, --people or --per-person"
        )
    try:
        if args.portrait is None:
            name, image = (
                "avatars.png",
                sheet.identity_grid(args.people, args.per_person, args.split, args.size, args.seed),
            )
        else:
            name, image = "reference.png", sheet.portrait(args.portrait, max(args.size, 256))
    except ValueError as error:
        raise FaceFusionError(str(error)) from error
    with replacing(args.out / name) as partial:
        image.save(partial, "PNG")
    print(json.dumps({"image": str(args.out / name)}) if args.json else str(args.out / name))
    return 0
