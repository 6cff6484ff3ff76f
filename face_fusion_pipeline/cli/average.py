"""`face-fusion average`: weights between those of two trainings."""

from __future__ import annotations

import argparse
from pathlib import Path

from ._arguments import FRACTION


HELP = "weights between those of two trainings, of which the second went on from the first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What a second training gained and what it gave up lie along one line. Weights on the way often keep most of "
        "both: measure them as you would measure the two."
    )
    parser.add_argument(
        "first",
        type=Path,
        help="weights of Face Fusion or FaceStudio: a file, or a folder that `face-fusion train` wrote",
    )
    parser.add_argument("second", type=Path, help="of a training that went on from the first (--init-adapter)")
    parser.add_argument("--fraction", type=FRACTION, default=0.5, help="of the second")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    from ..training.averaging import average_adapters

    average_adapters(args.first, args.second, args.fraction, args.out)
    print(args.out)
    return 0
