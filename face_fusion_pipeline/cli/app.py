"""`face-fusion app`: the web page, served on this machine."""

import argparse
import logging
import signal
import sys
import threading
from typing import Any

from ..face_errors import FaceFusionError, ModelNotFoundError
from ..generation.arguments import add_version_arguments, check_model, check_version
from ..generation.loading import (
    SNAP_FOLDER,
    STUDIO_FOLDER,
    adapter_beside,
    controlnet_beside,
    load_pipeline,
    snap_beside,
    studio_beside,
)
from ..generation.watermark import blind_watermark
from ._arguments import real, whole
from ._driver_options import face_model


HELP = "a web page on this machine: photos and a prompt in, pictures out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR_OR_FILE_OR_HUB_ID", help="Stable Diffusion 1.x, 2.x or XL model; default: the avatars"
    )
    add_version_arguments(parser)
    parser.add_argument(
        "--adapter",
        metavar="DIR_OR_FILE_OR_HUB_ID",
        help="trained Face Fusion weights; default: those in the model's folder, else training-free mode",
    )
    parser.add_argument(
        "--controlnet",
        metavar="DIR_OR_HUB_ID",
        help="depth ControlNet, to follow a layout picture; default: the one in the model's folder, if there is one",
    )
    parser.add_argument(
        "--face-studio",
        metavar="DIR_OR_FILE_OR_HUB_ID",
        help=f"FaceStudio weights, to take the style of a picture; default: {STUDIO_FOLDER} in the model's folder",
    )
    parser.add_argument(
        "--face-snap",
        metavar="DIR_OR_FILE_OR_HUB_ID",
        help="FaceSnap weights, to take pose and expression of another photo; "
        f"default: {SNAP_FOLDER} in the model's folder",
    )
    parser.add_argument(
        "--face-model",
        metavar="FILE",
        help="goes with FaceSnap: a face model of photos (see `face-fusion face-model`); the avatars have their own",
    )
    parser.add_argument(
        "--landmarker", metavar="FILE", help="goes with FaceSnap: MediaPipe's model of facial points, for photos"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=whole(0, 65535), default=7860, help="port to listen on; 0 takes a free one")
    parser.add_argument("--steps", type=whole(1, 200), default=25, help="denoising steps that the page begins with")
    parser.add_argument(
        "--max-upload",
        type=real(0, 10_000, above=True),
        default=400,
        metavar="MB",
        help="largest file to upload; the files of all pages may take ten times as much",
    )
    parser.add_argument("--detector", choices=("auto", "yunet", "haar", "insightface"), default="auto")
    parser.add_argument("--detector-model", metavar="FILE", help="the detector's own model file")
    parser.add_argument("--watermark", action="store_true", help="mark the pixels, too, invisibly, as generated")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")


def run(args: argparse.Namespace) -> int:
    check_arguments(args)
    serving = import_server()

    engine = load_engine(args)
    stop = threading.Event()
    logging.getLogger("face_fusion_pipeline").setLevel(logging.WARNING)  # where faces were found is nobody's business
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # all end with the uploads removed; the last is a closed terminal
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, lambda *_: stop.set())
    with serving(engine, args.host, args.port, args.steps, args.max_upload) as address:
        print(f"Face Fusion is at {address}  (Ctrl+C ends it)", flush=True)
        stop.wait()
    return 0


def load_engine(args: argparse.Namespace) -> Any:
    """The `app.engine.Engine` that the options ask for. Raises [`FaceFusionError`]."""
    from ..app.engine import Engine
    from ..conditioner_tokens import image_encoder_of
    from ..face_detectors import load_detector
    from ..face_studio import FaceStudio

    detector = load_detector(args.detector, args.detector_model)
    adapter = args.adapter or adapter_beside(args.model)
    controlnet = args.controlnet or controlnet_beside(args.model)
    version = (args.revision, args.variant, args.model_config)
    pipe = load_pipeline(args.model, adapter, args.device, args.dtype, controlnet, *version)
    if studio := args.face_studio or studio_beside(args.model):
        pipe.load_face_studio(studio)
        image_encoder_of(pipe, FaceStudio)  # one that is missing is said now, not at the first picture
    load_snap(pipe, args)
    return Engine(pipe, args.model, adapter, detector, args.watermark)


def load_snap(pipe: Any, args: argparse.Namespace) -> None:
    """Load FaceSnap's weights, if there are any, and the face model that they take poses by.

    Without a face model, which only some users have, the app goes without poses and a line says so.

    Raises:
        FaceFusionError: weights or a face model that were named and cannot be used, or would do nothing.
    """
    from ..conditioner_tokens import face_embedder_of, image_encoder_of
    from ..face_snap import FaceMixer

    named = [option for option in ("face_model", "landmarker") if getattr(args, option) is not None]
    weights = args.face_snap or snap_beside(args.model)
    if weights is None:
        if named:
            option = named[0].replace("_", "-")
            raise FaceFusionError(f"--{option} goes with FaceSnap weights: name them with --face-snap")
        return
    pipe.load_face_snap(weights)
    image_encoder_of(pipe, FaceMixer)  # as above: what is missing is said now
    face_embedder_of(pipe, FaceMixer)
    try:
        model = face_model(args)
        getattr(model, "landmarker", None)  # is loaded when it is first asked for
    except ModelNotFoundError as error:
        if named:
            raise
        print(f"face-fusion: the page is without poses, see --face-model: {error}", file=sys.stderr)
        return
    pipe.face_model = model


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before anything is loaded. Raises [`FaceFusionError`]."""
    check_version(args.model, args.revision, args.variant, args.model_config)
    if args.model is not None:
        check_model(args.model)
    if args.watermark:
        blind_watermark()


def import_server() -> Any:
    """`app.server.serving`. Raises [`FaceFusionError`] without Gradio."""
    try:
        from ..app.server import serving
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise FaceFusionError(
            "the app needs Gradio, which is not installed: pip install 'face-fusion-pipeline[app]'"
        ) from error
    return serving
