"""`face-fusion refine`: a face in finished pictures drawn again, larger, as the person in a photo."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import FaceFusionError, UnreadableImageError
from ..generation.arguments import check_prompt
from ..generation.provenance import DISCLOSURE_OF_FACE, SOURCE_TYPE_OF_FACE
from ._arguments import POSITIVE, SEED, real, whole
from .generate import (
    add_driver_arguments,
    add_face_argument,
    add_model_arguments,
    add_output_arguments,
    add_photo_arguments,
    add_studio_arguments,
    check_arguments,
    check_model_arguments,
    denoising,
    encode,
    known_words,
    load_model,
    pictures_in,
    read_faces,
    set_defaults,
    settings_of,
    warn_of_words,
)


if TYPE_CHECKING:
    from PIL import Image

    from ..face_layout import Box

HELP = "finished pictures with their faces drawn again, larger, as the person in a photo"
PROMPT = "a photo of a person"  # of a picture that does not say with which it was drawn
SHEET = "contact_sheet"  # how the names of those begin that `generate` puts beside its pictures


@dataclass(frozen=True)
class Finished:
    """A picture that is not changed yet: its file, its prompt, and the face that is meant.

    Attributes:
        box: XYXY in pixels of the upright picture; None: no such face is found.
        faces: how many were found.
    """

    path: Path
    prompt: str
    box: "Box | None"
    faces: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = known_words()
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="finished picture of any origin, or a folder of pictures"
    )
    add_face_argument(parser)
    parser.add_argument(
        "--prompt",
        nargs=1,
        default=[],
        metavar="TEXT",
        help="what is seen of this person alone; default: the prompt that `generate` wrote into the picture, else "
        f"“{PROMPT}”",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what it should not show")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the new pictures")
    parser.add_argument(
        "--strength",
        type=real(0, 1, above=True),
        help="part of the steps that is done again: how far the face may depart from what is there; default: from "
        ".48 to .8, more for smaller faces",
    )
    parser.add_argument(
        "--max-face",
        type=POSITIVE,
        metavar="PIXELS",
        help="leave faces alone whose longer side is above this; default: those that would be enlarged less than "
        "1.25 times (above 234 for a model of 512 pixels, above 58 for the avatars)",
    )
    parser.add_argument(
        "--picture-face",
        type=whole(0, 999),
        metavar="NUMBER",
        help="which face of each picture, from the left, counted from 0; default: the largest",
    )
    add_model_arguments(parser)
    parser.add_argument("--seed", type=SEED, default=0, help="of the noise, the same for each picture")
    add_photo_arguments(parser)
    add_output_arguments(parser)
    parser.set_defaults(**of_generate_alone())


def of_generate_alone() -> dict[str, Any]:
    """The options that `generate` alone has, at their defaults: what it shares with this command reads them."""
    parser = argparse.ArgumentParser()
    for add in (add_studio_arguments, add_driver_arguments):
        add(parser)
    return {**vars(parser.parse_args([])), "height": None, "width": None, "refine_faces": True}


def run(args: argparse.Namespace) -> int:
    check_model_arguments(args)
    set_defaults(args)
    check(args)
    paths = pictures_of(args.pictures)
    faces = read_faces(args)
    finished = look_at(paths, args)
    pipe = load_model(args)
    warn_of_words(pipe, [picture.prompt for picture in finished])
    _, identity = encode(pipe, faces, args.mirror, args.mode)
    settings = {
        **settings_of(args, pipe, identity),
        "seed": args.seed,
        "description": DISCLOSURE_OF_FACE,
        "digital_source_type": SOURCE_TYPE_OF_FACE,
    }
    del settings["prompt"]  # each picture has its own

    from ..generation.contact_sheet import save_new_png
    from ..generation.watermark import add_watermark

    written, left = [], []
    for picture in finished:  # each is saved at once: a stop keeps what there is
        drawn, own = draw_again(pipe, args, identity, picture)
        if drawn is None:
            left.append({"file": str(picture.path), **own})
            print(f"face-fusion: {picture.path} is left as it is: {own['reason']}", file=sys.stderr)
            continue
        marked = add_watermark(drawn) if args.watermark else drawn
        path = save_new_png(marked, args.out, names_for(picture.path), {**settings, **own})
        written.append({"file": str(path), **own})
        if not args.json:
            print(path)
    if args.json:
        files = [each["file"] for each in written]
        print(json.dumps({**settings, "files": files, "pictures": written, "left": left}, default=str))
    return 0


def check(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before torch is imported. Raises [`FaceFusionError`]."""
    if not args.face:
        raise FaceFusionError("whose face is it? give a photo of the person, --face")
    if args.mode == "face-studio":
        raise FaceFusionError("--mode face-studio is of `generate`: refine draws by adapter, training-free or both")
    check_arguments(args)
    if args.strength is not None and int(args.strength * args.steps) < 1:
        raise FaceFusionError(
            f"--strength {args.strength:g} of --steps {args.steps} is not one step: give more steps or strength"
        )


def pictures_of(given: Sequence[str]) -> list[Path]:
    """The pictures that are meant, each once; of a folder all but contact sheets. Raises [`FaceFusionError`]."""
    found: list[Path] = []
    for path in map(Path, given):
        pictures = [Path(name) for name in pictures_in(path)] if path.is_dir() else [path]
        pictures = [name for name in pictures if name == path or not name.name.startswith(SHEET)]
        if not pictures:
            raise FaceFusionError(f"{path} has no pictures in it")
        found += pictures
    return list(dict.fromkeys(found))


def look_at(paths: Sequence[Path], args: argparse.Namespace) -> list[Finished]:
    """The face that is meant in each picture, before the model is loaded.

    Raises [`FaceFusionError`] that names every picture that cannot be read, or is too small for a watermark.
    """
    from ..face_detectors import load_detector
    from ..face_images import detect_faces
    from ..face_pictures import load_image
    from ..generation.watermark import check_size

    detector = load_detector(args.detector, args.detector_model)
    finished: list[Finished] = []
    bad = []
    for path in paths:
        try:
            picture = load_image(path)
            if args.watermark:
                check_size(*picture.size)
        except FaceFusionError as error:
            bad.append(str(error) if isinstance(error, UnreadableImageError) else f"{path}: {error}")
            continue
        boxes = [face.box for face in detect_faces(picture, detector)]
        prompt = next(iter(args.prompt), None) or prompt_in(path) or PROMPT
        finished.append(Finished(path, prompt, meant(boxes, args.picture_face), len(boxes)))
    if bad:
        raise FaceFusionError(f"{len(bad)} of {len(paths)} pictures cannot be used: {'; '.join(bad)}")
    return finished


def meant(boxes: Sequence["Box"], number: int | None) -> "Box | None":
    """The box of that number, or (None) the largest of those from left to right; None if there is none."""
    if number is not None:
        return boxes[number] if number < len(boxes) else None
    return max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]), default=None)


def prompt_in(path: Path) -> str | None:
    """The prompt that this package wrote into a PNG file; others' chunks of that name hold other things."""
    from ..face_pictures import open_picture

    text = open_picture(path).info
    ours = str(text.get("software", "")).startswith("face-fusion-pipeline")
    prompt = text.get("prompt")
    try:
        check_prompt(prompt if ours and isinstance(prompt, str) else "", "the prompt")
    except FaceFusionError:
        return None
    return prompt


def draw_again(
    pipe: Any, args: argparse.Namespace, identity: Any, finished: Finished
) -> "tuple[Image.Image | None, dict[str, object]]":
    """The picture with its face drawn again and how, or None and the reason why it is left as it is."""
    import torch

    from ..face_pictures import load_image
    from ..face_refinement import enlargement, is_large, longer_side, strength_for

    box, side = finished.box, pipe._default_resolution()
    if box is None:
        which = "no face" if args.picture_face is None else f"no face {args.picture_face}"
        return None, {"reason": f"{which} is found in it" + (f", only {finished.faces}" if finished.faces else "")}
    if is_large(box, side, args.max_face):
        return None, {"reason": f"its face is large enough ({longer_side(box):.0f} pixels)"}
    strength = strength_for(enlargement(box, side)) if args.strength is None else args.strength
    picture = load_image(finished.path)
    (drawn,) = pipe.refine_faces(
        picture,
        finished.prompt,
        face_image=identity,
        face_boxes=[box],
        strength=strength,
        max_face=args.max_face,
        face_scale=args.scale,
        face_self_scale=args.self_scale,
        negative_prompt=args.negative_prompt,
        **denoising(args),
        generator=torch.Generator("cpu").manual_seed(args.seed),
    )
    if drawn.tobytes() == picture.tobytes():
        return None, {"reason": "the safety checker refused the new face: try another prompt or seed"}
    return drawn, {
        "source": finished.path.name,
        "prompt": finished.prompt,
        "face_box": [round(value, 1) for value in box],
        "strength": round(strength, 3),
    }


def names_for(path: Path) -> Iterator[str]:
    """The name of a new picture: that of the old one, with a number where it is taken."""
    yield f"{path.stem}.png"
    yield from (f"{path.stem}_{number}.png" for number in range(1, 10**6))
