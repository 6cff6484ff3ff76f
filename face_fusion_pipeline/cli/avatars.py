"""`face-fusion avatars`: draw avatars to look at, or one portrait to use as a reference."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..files.atomic import replacing


HELP = "draw a labelled grid of avatars, or one reference portrait"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for avatars.png, or for reference.png")
    parser.add_argument("--people", type=int, default=6, help="rows of the grid (default: %(default)s)")
    parser.add_argument("--per-person", type=int, default=6, help="columns of the grid (default: %(default)s)")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="whose identities")
    parser.add_argument("--seed", type=int, default=0, help="the first person of the split (default: %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="pixels a side of a picture, a multiple of 8")
    parser.add_argument(
        "--portrait", type=int, metavar="SEED", help="draw only the reference portrait of this identity"
    )
    parser.add_argument("--json", action="store_true", help="print the path as JSON")


def run(args: argparse.Namespace) -> int:
    from ..avatars.world import sheet
    from ..face_errors import FaceFusionError

    if not (1 <= args.people <= 100 and 1 <= args.per_person <= 100):
        raise FaceFusionError(f"--people {args.people} --per-person {args.per_person}: each must be 1 to 100")
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
