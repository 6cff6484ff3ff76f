"""Options of `generate` for the pose and expression of another photo, or by numbers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import FaceFusionError, ModelNotFoundError
from ..generation.avatar_model import embedded_model
from ._arguments import STRENGTH, real


if TYPE_CHECKING:
    from PIL import Image

    from ..face_models import FaceModel
    from ..generation.photos import FacePhoto

ANGLES = {"yaw": "to the picture's right", "pitch": "up", "roll": "clockwise"}
LANDMARK_FOLDER = "controlnet_landmarks"  # in a model's folder


def add_driver_arguments(parser: argparse.ArgumentParser) -> None:
    driver = parser.add_argument_group("pose", "of another photo, or by numbers, with a ControlNet of facial points")
    driver.add_argument("--driver", metavar="FILE", help="photo whose pose and expression the person takes")
    for name, where in ANGLES.items():
        driver.add_argument(f"--{name}", type=real(-90, 90), help=f"degrees {where}, in place of the driver's")
    driver.add_argument("--expression", metavar="NAME", help="in place of the driver's, such as smiling")
    driver.add_argument(
        "--controlnet",
        metavar="DIR_OR_HUB_ID",
        help=f"ControlNet that sees facial points; default: {LANDMARK_FOLDER} in the model's folder",
    )
    driver.add_argument(
        "--face-model", metavar="FILE", help="of photos, see `face-fusion face-model`; the avatars have their own"
    )
    driver.add_argument("--landmarker", metavar="FILE", help="MediaPipe's model of facial points, for photos")
    driver.add_argument("--control-scale", type=STRENGTH, help="strength of the pose; default: 1")


def posed(args: argparse.Namespace) -> bool:
    """Whether a pose is asked for; commands without these options ask for none."""
    return any(getattr(args, name, None) is not None for name in ("driver", *ANGLES, "expression"))


def check_driver(args: argparse.Namespace) -> None:
    """Raise [`FaceFusionError`] for an option that would do nothing, or a pose that lacks what it needs."""
    if not posed(args):
        for name in ("controlnet", "face_model", "landmarker", "control_scale"):
            if getattr(args, name) is not None:
                raise FaceFusionError(f"--{name.replace('_', '-')} goes with --driver or a pose, such as --yaw 20")
        return
    if not args.face or any(face.endswith(".safetensors") for face in args.face):
        raise FaceFusionError("a pose needs the photo of the person as --face: an identity does not say their shape")
    if args.driver is not None and not Path(args.driver).is_file():
        raise ModelNotFoundError(f"there is no driver {args.driver}")
    args.controlnet = args.controlnet or landmark_net_beside(args.model)


def landmark_net_beside(model: str | None) -> str:
    """The folder of the ControlNet of facial points in the folder of `model`. Raises [`ModelNotFoundError`]."""
    path = Path(model or embedded_model()) / LANDMARK_FOLDER
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"{model or 'the embedded model'} has no {LANDMARK_FOLDER}: name a ControlNet of facial points with "
            "--controlnet, or train one for avatars, `face-fusion avatars-train controlnet --control landmarks`"
        )
    return str(path)


def driver_picture(pipe: Any, args: argparse.Namespace, faces: list[FacePhoto]) -> Image.Image:
    """The dots of the person's shape in the pose that is asked for, as large as the pictures are to be."""
    from ..control_landmarks import landmark_control, shape_of

    model = face_model(args)
    fits = [model.fit(photo.image, None if photo.face is None else photo.face.box) for photo in faces]
    source = shape_of(model, fits)
    height, width = (args.height, args.width) if args.height else pipe._default_size()
    angles = {name: getattr(args, name) for name in ANGLES}
    return landmark_control(
        source,
        args.driver,
        face_model=model,
        expression=args.expression,
        size=(width, height),
        face_detector=args.detector,
        **angles,
    )


def face_model(args: argparse.Namespace) -> FaceModel:
    """That of `--face-model`, of photos or of avatars; else that of the avatars, if they are the model."""
    from ..face_errors import LandmarksError
    from ..face_files import read_header
    from ..face_models import load_face_model

    if args.face_model is None and args.model is not None:
        return load_face_model(None, args.landmarker, args.detector)
    from ..avatars.face_model import FORMAT, load_avatar_face_model

    if args.face_model is None:
        return load_avatar_face_model(detector=args.detector)
    if not Path(args.face_model).is_file():
        raise ModelNotFoundError(f"there is no face model {args.face_model}")
    if read_header(args.face_model, LandmarksError).get("format") == FORMAT:
        return load_avatar_face_model(args.face_model, args.detector)
    return load_face_model(args.face_model, args.landmarker, args.detector)


def driven(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of a pipeline's call: the dots that [`driver_picture`] drew, if a pose was asked for."""
    if not posed(args):
        return {}
    scale = 1.0 if args.control_scale is None else args.control_scale
    return {"control_image": args.dots, "control_kind": "map", "controlnet_conditioning_scale": scale}


def driver_settings(args: argparse.Namespace) -> dict[str, object]:
    """What of the pose is written into the pictures; the driver's name says nothing of them and is left out."""
    if not posed(args):
        return {}
    return {"posed": True, **{name: getattr(args, name) for name in (*ANGLES, "expression", "control_scale")}}
