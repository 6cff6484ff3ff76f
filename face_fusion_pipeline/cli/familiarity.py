"""`face-fusion familiarity`: by which a model tells faces that it does not know, and takes the training-free mode."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import FaceFusionError
from ._arguments import COUNT, SEED, STRENGTH, Gather, whole


if TYPE_CHECKING:
    from ..training.familiarity import FaceIn

HELP = "make the judge by which a model tells faces unlike those that it was trained with"
FILE_NAME = "face_familiarity.safetensors"
PREFIX = "avatars:"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Weights that were trained with one kind of picture alone badly distort others. This fits a judge to both "
        f"kinds and writes {FILE_NAME} into the model's folder, whose face_fusion_defaults.json then names it: where "
        "no mode is asked for, faces unlike the model's take the training-free mode."
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model in a diffusers folder")
    parser.add_argument(
        "--familiar",
        required=True,
        metavar="DIR_OR_AVATARS",
        help=f"pictures that it knows, or {PREFIX}N, so many renders",
    )
    parser.add_argument("--unfamiliar", type=Path, required=True, metavar="DIR", help="pictures that it does not know")
    parser.add_argument(
        "--try",
        dest="tried",
        type=Path,
        nargs="+",
        action=Gather,
        default=[],
        metavar="DIR",
        help="folders that are judged at the end",
    )
    parser.add_argument("--limit", type=COUNT, metavar="N", help="take N pictures of each folder at most")
    parser.add_argument("--repeats", type=whole(1, 100), default=2, help="variations of each picture")
    parser.add_argument("--timestep", type=whole(0, 999), default=150, help="noise of the reference that is looked at")
    parser.add_argument("--self-scale", type=STRENGTH, default=4.0, help="strength for faces that it does not know")
    parser.add_argument("--seed", type=SEED, default=0, help="of the variations")
    parser.add_argument("--detector", choices=("auto", "yunet", "haar", "insightface"), default="auto")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..face_defaults import FaceDefaults, read_defaults
    from ..face_self_attention import SelfAttentionReference
    from ..generation.loading import load_pipeline
    from ..training.familiarity import Judged, fit_familiarity, judged_unfamiliar

    if not args.model.is_dir():
        raise FaceFusionError(f"--model {args.model} is no folder: the judge is written into it")
    defaults = read_defaults(args.model) or FaceDefaults()
    for folder in (args.unfamiliar, *args.tried):
        if not folder.is_dir():
            raise FaceFusionError(f"there is no folder {folder}")
    pipe = load_pipeline(str(args.model))
    judge, figures = fit_familiarity(
        pipe,
        faces_of(args.familiar, args),
        faces_of(args.unfamiliar, args),
        SelfAttentionReference(args.self_scale),
        Judged(args.repeats, seed=args.seed, timestep=args.timestep),
    )
    judge.save(args.model / FILE_NAME)
    replace(defaults, face_familiarity=FILE_NAME, folder=None).save(args.model)
    for folder in args.tried:
        found = judged_unfamiliar(pipe, judge, faces_of(folder, args))
        figures.setdefault("tried", {})[folder.name] = {"unfamiliar": sum(found), "of": len(found)}
    print(json.dumps({"file": str(args.model / FILE_NAME), **figures}, indent=None if args.json else 1))
    return 0


def faces_of(source: str | Path, args: argparse.Namespace) -> Iterator[FaceIn]:
    """The faces of a folder in the order of its names, or of rendered avatars, each of another person."""
    if str(source).startswith(PREFIX):
        from ..avatars.training.rendered import scene_count

        return rendered(scene_count(str(source)))
    return found_in(Path(source), args)


def rendered(count: int) -> Iterator[FaceIn]:
    """Portraits of so many people of the training split, by all expressions, clothes, places and styles."""
    from ..avatars import SPLITS, render, sample_scene
    from ..avatars.world.sheet import to_pil

    first = SPLITS["train"][0]
    for person in range(count):
        scene = render([sample_scene(person, [first + person])], 128)
        yield to_pil(scene.images[0]), tuple(scene.boxes[0][0].tolist())


def found_in(folder: Path, args: argparse.Namespace) -> Iterator[Any]:
    """The main face of each picture in a folder, and in those below it; without the pictures that show none."""
    from ..face_detectors import load_detector
    from ..generation.photos import locate_face
    from ..training.photos import begins_as_picture

    detector = load_detector(args.detector)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and begins_as_picture(path)]
    random.Random(args.seed).shuffle(files)
    taken = 0
    for path in files:
        try:
            photo = locate_face(path, detector)
        except FaceFusionError:  # no face, several, or no picture that can be read
            continue
        if photo.face is not None:
            taken += 1
            yield photo.image, photo.face.box
        if taken == args.limit:
            return
