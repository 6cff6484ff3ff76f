"""`face-fusion avatars-dataset`: write a data set of rendered portraits with ground truth."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ._arguments import AVATAR_SIDE, COUNT, whole


HELP = "write a data set of avatars: images, captions, identities, boxes, landmarks, depth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for images/ and metadata.jsonl (ImageFolder form)"
    )
    parser.add_argument("--count", type=COUNT, default=1000, help="number of pictures (default: %(default)s)")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train", help="whose identities")
    parser.add_argument("--size", type=AVATAR_SIDE, default=128, help="pixels a side (default: %(default)s)")
    parser.add_argument(
        "--per-identity", type=COUNT, default=5, help="single portraits a person (default: %(default)s)"
    )
    parser.add_argument("--workers", type=whole(1, 256), default=2, help="processes (default: %(default)s)")
    parser.add_argument("--depth", action="store_true", help="also write depth maps and instance masks")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    from ..avatars.world import dataset
    from ..face_errors import FaceFusionError

    try:
        written = dataset.write(
            args.out, args.split, args.count, args.size, args.per_identity, args.workers, args.depth, not args.json
        )
    except ValueError as error:
        raise FaceFusionError(str(error)) from error
    if args.json:
        print(json.dumps({"out": str(args.out), "pictures": args.count, "written": written}))
    else:
        print(f"{args.count} pictures in {args.out} ({written} new)")
    return 0
