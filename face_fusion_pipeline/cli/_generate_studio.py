"""The options of `face-fusion generate` that are FaceStudio's: a style picture, and identity by FaceStudio."""

import argparse
from pathlib import Path
from typing import Any

from ..face_errors import FaceFusionError
from ..generation.loading import STUDIO_FOLDER, studio_beside
from ._arguments import FRACTION


def add_studio_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--style-image", metavar="FILE", help="picture whose style, clothing and surroundings are taken (FaceStudio)"
    )
    parser.add_argument(
        "--style-scale",
        type=FRACTION,
        help="how much of it: 0 the prompt alone, 1 the picture alone; default: 0.5",
    )
    parser.add_argument(
        "--face-studio",
        metavar="DIR_OR_FILE_OR_HUB_ID",
        help=f"FaceStudio weights; default: {STUDIO_FOLDER} in the model's folder",
    )


def check_studio(args: argparse.Namespace) -> None:
    """Raise [`FaceFusionError`] for options of FaceStudio that do not go together."""
    if args.style_scale is not None and args.style_image is None:
        raise FaceFusionError("--style-scale needs a --style-image")
    if args.style_image is not None and not Path(args.style_image).is_file():
        raise FaceFusionError(f"--style-image {args.style_image}: there is no such file")


def load_studio(pipe: Any, args: argparse.Namespace) -> None:
    """Load FaceStudio's weights if an option asks for them. Raises [`FaceFusionError`] where there are none."""
    if not (args.style_image or args.face_studio or args.mode == "face-studio"):
        return
    weights = args.face_studio or studio_beside(args.model)
    if weights is not None:
        pipe.load_face_studio(weights)
    elif args.model is not None and not Path(args.model).exists():  # a Hub id
        pipe.load_face_studio(args.model, subfolder=STUDIO_FOLDER)
    else:
        raise FaceFusionError(
            f"{args.model or 'this package'} has no FaceStudio weights: name some with --face-studio, or train them, "
            "`face-fusion train --conditioner face-studio`"
        )


def read_identity(path: str) -> Any:
    """A saved identity, of Face Fusion or of FaceStudio."""
    from ..conditioner_face_studio import IDENTITY_FORMAT, StudioIdentity
    from ..face_errors import IdentityMismatchError
    from ..face_files import read_header
    from ..face_identity import FaceIdentity

    of_studio = read_header(path, IdentityMismatchError).get("format") == IDENTITY_FORMAT
    return StudioIdentity.load(path) if of_studio else FaceIdentity.load(path)


def style_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a pipeline's call: the picture takes the place of the words, so that 1 is the picture alone."""
    if args.style_image is None:
        return {}
    style = {"style_image": args.style_image, "style_scale": args.style_scale, "style_context": "replace"}
    return {**style, "face_detector": args.detector}


def style_settings(args: argparse.Namespace) -> dict[str, object]:
    """What of FaceStudio made a picture, for its PNG text; the style picture's own name is nobody's business."""
    if args.style_image is None:
        return {}
    return {"style_image": True, "style_scale": 0.5 if args.style_scale is None else args.style_scale}
