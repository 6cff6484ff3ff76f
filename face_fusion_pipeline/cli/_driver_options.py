"""Options of `generate` for the pose and expression of another photo, or by numbers: FaceSnap's, or a ControlNet's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import FaceFusionError, ModelNotFoundError
from ..generation.avatar_model import embedded_model
from ..generation.loading import SNAP_FOLDER, snap_beside
from ._arguments import STRENGTH, real


if TYPE_CHECKING:
    import numpy as np

    from ..face_models import FaceModel
    from ..generation.photos import FacePhoto

ANGLES = {"yaw": "to the picture's right", "pitch": "up", "roll": "clockwise"}
LANDMARK_FOLDER = "controlnet_landmarks"  # in a model's folder
BY_SNAP = "face-snap"  # of --mode


def add_driver_arguments(parser: argparse.ArgumentParser) -> None:
    driver = parser.add_argument_group("pose", "of another photo, or by numbers, in the shape of the person's face")
    driver.add_argument("--driver", metavar="FILE", help="photo whose pose and expression the person takes")
    for name, where in ANGLES.items():
        driver.add_argument(f"--{name}", type=real(-90, 90), help=f"degrees {where}, in place of the driver's")
    driver.add_argument("--expression", metavar="NAME", help="in place of the driver's, such as smiling")
    driver.add_argument(
        "--face-snap",
        metavar="DIR_OR_FILE_OR_HUB_ID",
        help=f"FaceSnap weights, which see the pose; default: {SNAP_FOLDER} in the model's folder",
    )
    driver.add_argument(
        "--controlnet",
        metavar="DIR_OR_HUB_ID",
        help="a ControlNet of facial points instead; default, without FaceSnap: "
        f"{LANDMARK_FOLDER} in the model's folder",
    )
    driver.add_argument(
        "--face-model",
        metavar="FILE",
        help="a face model of photos (see `face-fusion face-model`); the avatars have their own",
    )
    driver.add_argument("--landmarker", metavar="FILE", help="MediaPipe's model of facial points, for photos")
    driver.add_argument("--control-scale", type=STRENGTH, help="strength of the pose; default: 1")


def posed(args: argparse.Namespace) -> bool:
    """Whether a pose is asked for; commands without these options ask for none."""
    return any(getattr(args, name, None) is not None for name in ("driver", *ANGLES, "expression"))


def check_driver(args: argparse.Namespace) -> None:
    """Raise [`FaceFusionError`] for an option that would do nothing, or a pose that lacks what it needs."""
    if not posed(args):
        for name in ("face_snap", "controlnet", "face_model", "landmarker", "control_scale"):
            if getattr(args, name) is not None:
                raise FaceFusionError(f"--{name.replace('_', '-')} goes with --driver or a pose, such as --yaw 20")
        if args.mode == BY_SNAP:
            raise FaceFusionError(f"--mode {BY_SNAP} needs a --driver or a pose, such as --yaw 20: it shows them both")
        return
    if args.controlnet is not None and (args.face_snap is not None or args.mode == BY_SNAP):
        raise FaceFusionError("--controlnet takes the place of FaceSnap's: leave one of them out")
    if args.refine_faces and args.mode == BY_SNAP:
        raise FaceFusionError(f"--refine-faces draws without a pose, and --mode {BY_SNAP} with one: leave one out")
    if not args.face or any(face.endswith(".safetensors") for face in args.face):
        raise FaceFusionError("a pose needs the photo of the person as --face: an identity does not say their shape")
    if args.driver is not None and not Path(args.driver).is_file():
        raise ModelNotFoundError(f"there is no driver {args.driver}")
    if args.controlnet is None:
        on_hub = args.model is not None and not Path(args.model).exists()
        args.face_snap = args.face_snap or (args.model if on_hub else snap_beside(args.model))
        args.controlnet = None if args.face_snap else landmark_net_beside(args.model)


def load_snap(pipe: Any, args: argparse.Namespace) -> None:
    """Load FaceSnap's weights if they are to see the pose. Raises [`FaceFusionError`] where they do not fit."""
    if args.face_snap is not None:
        pipe.load_face_snap(args.face_snap, subfolder=SNAP_FOLDER if args.face_snap == args.model else None)


def landmark_net_beside(model: str | None) -> str:
    """The folder of the ControlNet of facial points in the folder of `model`. Raises [`ModelNotFoundError`]."""
    path = Path(model or embedded_model()) / LANDMARK_FOLDER
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"{model or 'the embedded model'} has no weights that see a pose: name FaceSnap's with --face-snap, "
            "which `face-fusion train --conditioner face-snap` makes, or a ControlNet of points with --controlnet"
        )
    return str(path)


def driver_points(pipe: Any, args: argparse.Namespace, faces: list[FacePhoto]) -> np.ndarray:
    """Points (1, 72, 2) of the person's shape in the pose that is asked for, in pixels of the pictures."""
    from ..control_landmarks import driven_faces, shape_of
    from ..face_detectors import load_detector
    from ..face_images import detect_faces

    model = face_model(args)
    fits = [model.fit(photo.image, None if photo.face is None else photo.face.box) for photo in faces]
    height, width = (args.height, args.width) if args.height else pipe._default_size()
    driven = driven_faces(
        model,
        [shape_of(model, fits)],
        args.driver,
        lambda photo: [face.box for face in detect_faces(photo, load_detector(args.detector, args.detector_model))],
        size=(width, height),
        turned=(args.yaw, args.pitch, args.roll),
        expression=args.expression,
    )
    return driven.points[..., :2]


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
    """Arguments of a pipeline's call: the [`driver_points`], if a pose was asked for."""
    if not posed(args):
        return {}
    scale = {"controlnet_conditioning_scale": 1.0 if args.control_scale is None else args.control_scale}
    if args.face_snap is not None:
        return {"driver_image": args.points, **scale}
    return {"control_image": args.points, "control_kind": "landmarks", **scale}


def driver_settings(args: argparse.Namespace) -> dict[str, object]:
    """What of the pose is written into the pictures; the driver's name says nothing of them and is left out."""
    if not posed(args):
        return {}
    return {"posed": True, **{name: getattr(args, name) for name in (*ANGLES, "expression", "control_scale")}}
