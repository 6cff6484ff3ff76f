"""`face-fusion avatars-publish`: from a training folder to a model folder that can be shipped."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..files.texts import read_text


HELP = "copy a trained avatar model without its logs, and write its card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="folder that avatars-train wrote")
    parser.add_argument(
        "--adapter", type=Path, metavar="DIR", help="folder that `face-fusion train` wrote (default: --model)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its README.md")
    parser.add_argument("--table", type=Path, action="append", default=[], help="Markdown table for the card; repeat")
    parser.add_argument("--note", default="", help="a sentence about the training for the card")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    for path in args.table:
        read_text(path, "--table")  # before anything is written

    from ..avatars.training.publish import publish

    size = publish(args.model, args.out, args.table, args.note, args.adapter)
    line = {"out": str(args.out), "bytes": size}
    print(json.dumps(line) if args.json else f"{args.out}: {size / 1e6:.1f} MB of weights")
    return 0
