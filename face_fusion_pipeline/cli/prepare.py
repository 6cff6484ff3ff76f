"""`face-fusion prepare`: from photos to training data: detect, filter, crop, pair, and cache latents and text."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import FaceFusionError
from ..files.atomic import check_new
from ..generation.arguments import add_version_arguments, check_version
from ._arguments import COUNT, real, whole
from ._generated import PREFIX, add_generated_arguments, run_generated


if TYPE_CHECKING:
    from ..training.base_model import BaseModel
    from ..training.preparation import PrepareOptions
    from ..training.sources import Piece

HELP = "turn photos into training data: detect, filter, crop, pair, encode"
DEFAULT_WORKERS = min(8, os.cpu_count() or 1)
MOST_RENDERING = 4  # processes share the GPU's memory
SIDE = whole(16, 2048, step=8)  # pixels
DEFAULT_RESOLUTION = 512  # pixels, where no model says another


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Turn photos into training data for `face-fusion train`. Bad photos are skipped, counted in OUT/report.json "
        "and listed in OUT/skipped.jsonl; of a bad field the photo is kept, and it is listed in OUT/left_out.jsonl. A "
        "run that was stopped goes on when the same command is given again."
    )
    parser.add_argument(
        "source",
        metavar="PHOTOS",
        help="folder with metadata.jsonl (file_name, text, and if known identity, box, reference_file_name), or with "
        "one folder of photos for each person, or of .tar shards; a pattern such as 'laion/{0000..0099}.tar'; the "
        "Hub id of a dataset; or avatars:N, so many scenes of the avatar world, rendered on the device of the model; "
        "or generated:N, so many people drawn by the model itself",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the training data")
    parser.add_argument(
        "--model",
        "--pretrained-model-name-or-path",
        metavar="DIR_OR_FILE_OR_HUB_ID",
        help="the base to train for: latents and text are encoded too, which `train` does otherwise",
    )
    add_version_arguments(parser)
    add_source_arguments(parser)
    add_selection_arguments(parser)
    add_generated_arguments(parser)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("source")
    source.add_argument("--limit", "--max-train-samples", type=COUNT, metavar="N", help="read only so many photos")
    source.add_argument("--image-column", default="image", help="of a Hugging Face dataset")
    source.add_argument("--caption-column", default="text")
    source.add_argument("--identity-column", default="identity")
    source.add_argument("--dataset-config-name", help="configuration of a Hugging Face dataset")
    source.add_argument("--dataset-split", default="train", help="split of a Hugging Face dataset")
    source.add_argument("--streaming", action="store_true", help="read a dataset from the Hub without storing it")


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_argument_group("selection")
    chosen.add_argument(
        "--resolution", type=SIDE, help=f"pixels a side (default: the model's, or {DEFAULT_RESOLUTION})"
    )
    chosen.add_argument("--reference-resolution", type=SIDE, help="of the face crop (default: --resolution)")
    chosen.add_argument("--min-side", type=COUNT, help="least side of a photo, pixels (default: half of --resolution)")
    chosen.add_argument("--min-face", type=real(1), help="least height of the face (default: --resolution / 8)")
    chosen.add_argument("--min-sharpness", type=real(), default=10.0, help="0 takes blurred faces too")
    chosen.add_argument(
        "--min-face-fraction", type=real(0.01, 1), default=0.15, help="faces that are smaller are cropped closer"
    )
    chosen.add_argument("--caption", default="a photo of a person", help="of photos that have none")
    chosen.add_argument(
        "--augmentations",
        type=whole(0, 64),
        default=4,
        help="pictures made of the crop of a person with a single photo",
    )
    chosen.add_argument("--detector", choices=("auto", "yunet", "haar", "insightface"), default="auto")
    chosen.add_argument("--detector-model", metavar="FILE", help="the detector's own model file")
    chosen.add_argument("--workers", type=whole(1, 256), default=DEFAULT_WORKERS, help="processes")


def given_words(args: argparse.Namespace, add: Callable[[argparse.ArgumentParser], None]) -> list[str]:
    """Those of the options that `add` adds which have other values in `args` than their defaults, as words."""
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    words: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest)
        if value is None or value == action.default:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [action.option_strings[0], *map(str, values)]
    return words


def run(args: argparse.Namespace) -> int:
    check_selection(args)
    check_version(args.model, args.revision, args.variant, args.model_config)
    if args.source.startswith(PREFIX):
        return run_generated(args)
    if words := given_words(args, add_generated_arguments):
        raise FaceFusionError(f"{words[0]} is for people whom the model draws, {PREFIX}N")
    if args.source.startswith("avatars:"):
        return run_rendered(args)
    pieces = first_look(args.source, args)
    base = None
    if args.model is not None:
        base = load(args.model, args)
    report = prepare_photos(pieces, args.out, args, base)
    if base is not None:
        from ..training.latent_cache import encode

        encode(args.out, base, args.augmentations)
    skipped = ", ".join(f"{reason} {number}" for reason, number in report["skipped"].items()) or "none"
    if left_out := ", ".join(f"{name} {number}" for name, number in report["fields_left_out"].items()):
        skipped += f"; fields left out: {left_out} (OUT/left_out.jsonl)"
    print(
        f"{report['kept']} of {report['read']} photos of {report['people']} people, "
        f"{report['paired_with_another_photo']} with another photo of the same person; skipped: {skipped}"
    )
    print(args.out)
    return 0


def run_rendered(args: argparse.Namespace) -> int:
    """The command for `avatars:N`."""
    from ..avatars.training.rendered import prepare_rendered, scene_count
    from ..training.sources import DataError

    count = scene_count(args.source)
    if args.model is None:
        raise DataError(f"{args.source} is rendered for one model, whose latents are all that is kept: give --model")
    photos = argparse.Namespace(**{**vars(args), "workers": DEFAULT_WORKERS})
    if words := given_words(photos, add_source_arguments) + given_words(photos, add_selection_arguments):
        raise DataError(f"{words[0]} chooses among photos: {args.source} is rendered as the model takes it")
    version = {"revision": args.revision, "variant": args.variant, "model_config": args.model_config}
    own = argparse.Namespace(**version)  # goes to other processes
    loading = partial(load, args.model, own)
    report = prepare_rendered(count, args.out, loading(), workers=min(args.workers, MOST_RENDERING), load=loading)
    print(f"{report['kept']} of {report['read']} scenes: portraits of {report['people']} people")
    print(args.out)
    return 0


def check_selection(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong at once. Raises [`FaceFusionError`]."""


def first_look(source: str, args: argparse.Namespace) -> Iterator[Piece]:
    """The pieces of the source; the first one is read at once, so that a wrong path is known before a model loads."""
    from ..training.sources import DataError, SourceOptions, open_source

    options = SourceOptions(
        image_column=args.image_column,
        caption_column=args.caption_column,
        identity_column=args.identity_column,
        config=args.dataset_config_name,
        split=args.dataset_split,
        streaming=args.streaming,
        limit=args.limit,
        exclude=(args.out,),
    )
    if source.startswith(("avatars:", PREFIX)):
        raise DataError(f"{source} takes a command of its own first: `face-fusion prepare {source} --model ...`")
    check_place(Path(source), args.out)
    pieces = iter(open_source(source, options))
    first = next(pieces, None)
    if first is None:
        raise DataError(f"{source} has no photos")
    return chain([first], pieces)


def check_place(source: Path, out: Path) -> None:
    """Raise [`FaceFusionError`] where the results would lie among photos, and those be taken for results."""
    if source.is_dir() and out.resolve() == source.resolve():
        raise FaceFusionError(f"--out {out} is the folder of the photos: name another")
    begun = any((out / name).exists() for name in ("settings.json", "prepared"))
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()) and not begun:
        check_new(out)


def load(model: str, args: argparse.Namespace) -> BaseModel:
    """The base on the device of this process, in float32: encoding happens once, and exactly."""
    from ..generation.arguments import check_model

    check_model(model)

    from ..training.base_model import load_base
    from ..training.loop import process_group

    base = load_base(model, config=args.model_config, revision=args.revision, variant=args.variant)
    base.pipeline.to(process_group().device)
    return base


def prepare_photos(
    pieces: Iterator[Piece], out: Path, args: argparse.Namespace, base: BaseModel | None
) -> dict[str, Any]:
    """Run the first half of the command, see `preparation.prepare`; returns the report."""
    from ..training.preparation import prepare

    return prepare(pieces, out, prepare_options(args, base.resolution if base else DEFAULT_RESOLUTION))


def prepare_options(args: argparse.Namespace, default_resolution: int) -> PrepareOptions:
    from ..training.preparation import PrepareOptions
    from ..training.selection import SelectionOptions

    resolution = args.resolution or default_resolution
    selection = SelectionOptions(
        resolution=resolution,
        reference_resolution=args.reference_resolution or resolution,
        min_side=args.min_side or resolution // 2,
        min_face=args.min_face or resolution / 8,
        min_sharpness=args.min_sharpness,
        min_face_fraction=args.min_face_fraction,
        caption=args.caption,
    )
    return PrepareOptions(selection, args.detector, args.detector_model, args.workers)
