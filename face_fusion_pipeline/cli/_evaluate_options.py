"""What the actions of `avatars-evaluate` share: options, and what these name."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import ModelNotFoundError
from ..generation.arguments import guidance_scales
from ..generation.avatar_model import AVATAR_DEFAULTS, embedded_model
from ._arguments import COUNT, GUIDANCE, GUIDED, SEED, STEPS, STRENGTH


if TYPE_CHECKING:
    from ..avatars.evaluation.scoring import Panel
    from ..avatars.evaluation.trials import Trial
    from ..evaluation.generation import Settings
    from ..face_detectors import FaceDetector

logger = logging.getLogger(__name__)


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="diffusers folder (default: the embedded avatar model)")
    parser.add_argument("--out", type=Path, required=True, help="folder for images and tables; a stopped run goes on")
    parser.add_argument("--steps", type=STEPS, default=25, help="denoising steps (default: 25)")
    parser.add_argument(
        "--guidance-scale",
        type=GUIDANCE,
        help=f"default: {AVATAR_DEFAULTS.guidance_scale:g}, and {AVATAR_DEFAULTS.low_noise_guidance:g} at low noise",
    )
    parser.add_argument(
        "--low-noise-guidance", type=GUIDED, help="guidance in the low-noise half of the timesteps (default: the same)"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of people, prompts and noise")
    parser.add_argument("--batch", type=COUNT, default=4, help="prompts denoised together (default: 4)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--training-data",
        metavar="DIR",
        help="dataset whose captions are not to be asked, or avatars:N for so many scenes that were rendered",
    )
    parser.add_argument("--evaluators", type=Path, help="folder of evaluators (default: those in the package)")
    add_evaluator_arguments(parser)


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", help="adapter file or folder (default: the one beside the model, if any)")
    parser.add_argument("--scale", type=STRENGTH, default=1.0, help="face scale of the adapter (default: 1)")


def add_trial_arguments(parser: argparse.ArgumentParser, identities: int, prompts: int) -> None:
    """How many people and prompts, with their defaults."""
    people, each = f"test people (default: {identities})", f"prompts for each of them (default: {prompts})"
    parser.add_argument("--identities", type=COUNT, default=identities, help=people)
    parser.add_argument("--prompts", type=COUNT, default=prompts, help=each)


def add_evaluator_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recognisers", type=Path, metavar="DIR", help="folder of face recognisers as .onnx files")
    parser.add_argument("--recogniser", action="append", default=[], metavar="NAME=FILE.onnx[:PREPROCESSING]",
                        help="one recogniser; preprocessing: arcface (default), imagenet or raw")  # fmt: skip
    parser.add_argument(
        "--detector", type=Path, metavar="FILE", help="YuNet file (default: $FACE_FUSION_YUNET or cache)"
    )


def find_detector(args: argparse.Namespace) -> FaceDetector | None:
    """YuNet if its model is at hand, also among the recognisers, or can be fetched; else none."""
    from ..face_detectors import YuNetDetector, find_yunet

    beside = sorted(args.recognisers.glob("*yunet*.onnx")) if args.recognisers else []
    try:
        path = args.detector or find_yunet() or (beside[0] if beside else find_yunet(download=True))
    except ModelNotFoundError as error:
        logger.info("no face detector looks at the pictures: %s", error)
        return None
    assert path is not None
    return YuNetDetector(path)


def load_panel(args: argparse.Namespace) -> Panel:
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..avatars.evaluation.scoring import Panel
    from ..evaluation.recognisers import load_recognisers

    recognisers = load_recognisers(args.recogniser, args.recognisers)
    return Panel(load_evaluators(args.evaluators or SHIPPED), recognisers, find_detector(args))


def load_measured_panel(args: argparse.Namespace) -> Panel:
    """The panel, with the measures of drawing and of traits."""
    from ..avatars.measures.panel import load_measures

    panel = load_panel(args)
    panel.measures = load_measures(panel.evaluators)
    return panel


def portrait_trials(args: argparse.Namespace, seen: Iterable[str] = ()) -> list[Trial]:
    """Photographs of one test person each, by prompts that are neither in `--training-data` nor `seen`."""
    from ..avatars.evaluation.trials import plan_trials

    exclude = training_captions(args.training_data).union(seen)
    return plan_trials(args.identities, args.prompts, seed=args.seed, exclude=exclude, style="photo")


def model_folder(args: argparse.Namespace) -> str:
    return args.model or str(embedded_model())


def settings_of(args: argparse.Namespace, **more: Any) -> Settings:
    from ..evaluation.generation import Settings

    asked = args.guidance_scale, args.low_noise_guidance
    guidance, low_noise = guidance_scales(*asked, AVATAR_DEFAULTS, name="--guidance-scale")
    common = {"steps": args.steps, "guidance_scale": guidance, "low_noise_guidance": low_noise}
    return Settings.of(model_folder(args), **common, seed=args.seed, batch=args.batch, **more)


def training_captions(data: str | None) -> set[str]:
    """Captions of the training split; FaceFusionError if there is none."""
    if data is not None and data.startswith("avatars:"):
        from ..avatars.training.rendered import scene_count, scenes, windows
        from ..avatars.world.caption import caption
        from ..avatars.world.dataset import PER_IDENTITY, plan

        count = scene_count(data)
        drawn = {caption(plan("train", index, PER_IDENTITY)) for index in range(count)}
        prepared = {caption(scene) for window in windows(count) for scene in scenes(window)}  # with others together
        return drawn | prepared
    from ..face_errors import FaceFusionError

    if data is None:
        return set()
    path = Path(data) / "train" / "metadata.jsonl"
    if not path.is_file():
        raise FaceFusionError(f"--training-data: no {path}")
    from ..files.texts import read_json_lines

    return {row["text"] for row in read_json_lines(path, "make the dataset again with `face-fusion avatars-dataset`")}


def adapter_of(args: argparse.Namespace) -> str | None:
    """The adapter named, else the one beside the model, else None."""
    from ..face_adapter import ADAPTER_WEIGHTS_NAME

    model = Path(model_folder(args))
    return args.adapter or (str(model) if (model / ADAPTER_WEIGHTS_NAME).is_file() else None)
