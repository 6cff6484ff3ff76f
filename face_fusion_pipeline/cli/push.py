"""`face-fusion push`: weights with their card and the pipeline, as a repository of the Hugging Face Hub."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from ..face_errors import FaceFusionError, ModelNotFoundError
from ..files.atomic import check_new
from ..files.texts import read_text


HELP = "upload weights, their card and the pipeline to the Hugging Face Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("weights_card"),
        metavar="FOLDER",
        help="what `face-fusion train` wrote; the avatar model: weights_card of the repository",
    )
    parser.add_argument(
        "--to",
        metavar="OWNER/NAME",
        help="your name or organisation on the Hub, and the repository, which is made if it is not there",
    )
    parser.add_argument("--private", action="store_true", help="make it private")
    parser.add_argument("--license", metavar="ID", help="licence in the card's metadata, such as openrail")
    parser.add_argument(
        "--table",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="Markdown table of an evaluation for the card; repeat for several",
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would go up; needs no network")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the folder there instead of uploading it")
    parser.add_argument("--json", action="store_true", help="print what went up, or would, as JSON")


def run(args: argparse.Namespace) -> int:
    local = args.dry_run or args.out is not None
    if args.to is None and not local:
        raise FaceFusionError("name the repository with --to OWNER/NAME, or look at what goes up with --dry-run")
    if args.to is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.to):
        raise FaceFusionError(f"--to takes a repository of the Hub, OWNER/NAME, got {args.to!r}")
    if missing := [str(path) for path in args.table if not path.is_file()]:
        raise ModelNotFoundError(f"there is no table {', '.join(missing)}; `--table` takes Markdown files")

    from ..publishing import card, hub, repository

    if args.out is not None and not args.dry_run:
        check_new(args.out)
    tables = [read_text(path, "--table") for path in args.table]
    files = repository.repository_files(args.folder, args.to or card.REPOSITORY, tables, args.license)
    if args.out is not None and not args.dry_run:
        repository.write_folder(files, args.out)
    address = None if local else hub.upload(files, hub.create_repository(args.to, args.private))

    sizes = {name: repository.size(file) for name, file in files.items()}
    if args.json:
        print(json.dumps({"repository": args.to, "address": address, "files": sizes}))
        return 0
    print("\n".join(f"{bytes:>12,} {name}" for name, bytes in sizes.items()))
    where = address or (args.out if args.out is not None and not args.dry_run else "nothing was uploaded")
    print(f"{len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB: {where}")
    return 0
