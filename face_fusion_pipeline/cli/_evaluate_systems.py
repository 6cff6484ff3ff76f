"""What `avatars-evaluate` measures of FaceStudio and FaceSnap."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._arguments import COUNT, POSITIVE, RATE, SEED, Gather
from ._evaluate_options import (
    adapter_of,
    add_adapter_arguments,
    add_generation_arguments,
    add_trial_arguments,
    load_measured_panel,
    load_panel,
    model_folder,
    portrait_trials,
    settings_of,
)


def add_system_actions(actions: Any) -> list[argparse.ArgumentParser]:
    """Add the actions to those of the command, whose parsers they are."""
    studio = actions.add_parser("studio", help="FaceStudio: likeness by text and picture, the slider, views, mixing")
    add_generation_arguments(studio)
    add_adapter_arguments(studio)
    studio.add_argument("--studio", help="FaceStudio weights, file or folder (default: face_studio of the model)")
    add_trial_arguments(studio, 24, 2)

    whole_unet = actions.add_parser(
        "studio-whole", help="FaceStudio: the whole UNet trained, as in the paper, against the LoRA"
    )
    add_generation_arguments(whole_unet)
    _add_studio_training(whole_unet)
    add_trial_arguments(whole_unet, 24, 1)

    snap = actions.add_parser("snap", help="FaceSnap: the driver's pose and expression, in the person's own shape")
    add_generation_arguments(snap)
    add_adapter_arguments(snap)
    add_trial_arguments(snap, 25, 2)
    snap.add_argument("--snap", help="FaceSnap weights, file or folder (default: face_snap of the model)")
    for action in (studio, snap):
        action.add_argument(
            "--face-model", help="face model of avatars, file or folder (default: the one in the package)"
        )

    parts = actions.add_parser("snap-parts", help="FaceSnap: what its parts give, by variants that are trained alike")
    add_generation_arguments(parts)
    parts.add_argument("--data", type=Path, required=True, metavar="DIR", help="avatars that `prepare` made")
    add_trial_arguments(parts, 12, 2)
    parts.add_argument("--variants", nargs="+", action=Gather, metavar="NAME", help="only these")
    parts.add_argument("--seeds", type=SEED, nargs="+", action=Gather, default=[0, 1, 2], help="a training for each")
    parts.add_argument("--training-steps", type=COUNT, default=200, help="of every training (default: 200)")
    parts.add_argument("--train-batch-size", type=COUNT, default=16, help="of every training (default: 16)")
    parts.add_argument("--learning-rate", type=RATE, default=4e-4, help="of every training (default: 4e-4)")
    parts.add_argument("--mixed-precision", choices=("auto", "no", "bf16"), default="no", help="of every training")
    parts.add_argument(
        "--snap", type=Path, metavar="DIR", help="FaceSnap weights to begin with (default: face_snap of the model)"
    )
    return [studio, whole_unet, snap, parts]


def _add_studio_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="avatars prepared with `face-fusion prepare`"
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--training-steps", type=COUNT, help="of every training: equal steps")
    length.add_argument("--training-minutes", type=POSITIVE, help="of every training: equal time")
    parser.add_argument(
        "--seeds", type=SEED, nargs="+", action=Gather, default=[0, 1, 2], metavar="SEED", help="one training for each"
    )
    parser.add_argument("--train-batch-size", type=COUNT, default=16, help="of every training (default: 16)")
    parser.add_argument("--learning-rate", type=RATE, default=1e-3, help="of the LoRA's trainings (default: 0.001)")
    parser.add_argument(
        "--whole-learning-rate", type=RATE, default=1e-4, help="of the whole UNet's trainings (default: 0.0001)"
    )
    parser.add_argument("--teacher", type=Path, metavar="PATH", help="Face Fusion weights to learn from")
    parser.add_argument(
        "--studio",
        metavar="DIR",
        help="folder whose prior and face embedder are used (default: face_studio of the model)",
    )
    parser.add_argument(
        "--mixed-precision",
        choices=("auto", "no", "fp16", "bf16"),
        default="no",
        help="of every training; auto: bf16 where the device computes in it",
    )


def _studio(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.studio_table import as_markdown, compare_studio
    from ..avatars.evaluation.studio_views import DETECTOR
    from ..avatars.face_model import SHIPPED, load_avatar_face_model
    from ..evaluation.generation import pipeline_of

    weights = args.studio or str(Path(model_folder(args)) / "face_studio")
    settings = settings_of(args, adapter=adapter_of(args), face_scale=args.scale, beside=[weights])
    pipe = pipeline_of(settings, args.device)
    pipe.load_face_studio(weights)
    trials = portrait_trials(args)
    panel = load_measured_panel(args)
    model = load_avatar_face_model(args.face_model or SHIPPED, DETECTOR)
    result = compare_studio(pipe, trials, panel, settings, model, args.out)
    return result, as_markdown(result, panel.names)


def _studio_whole(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.ablations.studio_whole import StudioBudget, StudioTrainer
    from ..avatars.ablations.studio_whole_table import as_markdown, compare_whole
    from ..face_errors import FaceFusionError
    from ..training.preparation import read_rows

    if len(set(args.seeds)) != len(args.seeds):
        raise FaceFusionError(f"--seeds must be different numbers, got {args.seeds}")
    budget = StudioBudget(
        steps=args.training_steps,
        minutes=args.training_minutes,
        batch_size=args.train_batch_size,
        learning_rate=args.learning_rate,
        whole_learning_rate=args.whole_learning_rate,
        precision=args.mixed_precision,
    )
    parts = args.studio or str(Path(model_folder(args)) / "face_studio")
    trainer = StudioTrainer(model_folder(args), args.data, args.out, budget, parts, args.teacher)
    trials = portrait_trials(args, {row["text"] for row in read_rows(args.data)})
    panel = load_measured_panel(args)
    result = compare_whole(trainer, args.seeds, trials, panel, settings_of(args), args.device)
    return result, as_markdown(result, panel.names)


def _snap(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.snap_table import DETECTOR, as_markdown, compare_snap
    from ..avatars.face_model import SHIPPED, load_avatar_face_model
    from ..evaluation.generation import pipeline_of

    weights, points = args.snap or str(Path(model_folder(args)) / "face_snap"), args.face_model or str(SHIPPED)
    settings = settings_of(
        args, adapter=adapter_of(args), face_scale=args.scale, beside=[*snap_files(weights), points]
    )
    pipe = pipeline_of(settings, args.device)
    pipe.load_face_snap(weights)
    trials = portrait_trials(args)
    panel = load_measured_panel(args)
    model = load_avatar_face_model(points, DETECTOR)
    result = compare_snap(pipe, trials, panel, settings, model, args.out)
    return result, as_markdown(result, panel.names)


def snap_files(weights: str) -> list[str]:
    """Where FaceSnap's weights lie: its mixer, and the ControlNet beside it."""
    from ..face_snap import NETWORK

    folder = Path(weights).parent if Path(weights).is_file() else Path(weights)
    return [weights, str(folder / NETWORK)]


def _snap_parts(args: argparse.Namespace) -> tuple[dict, str]:
    import torch

    from ..avatars.ablations.snap_parts import VARIANTS, Drawer, Workshop, as_markdown, compare_parts
    from ..avatars.evaluation.snap_table import DETECTOR
    from ..avatars.face_model import SHIPPED, WEIGHTS_NAME, load_avatar_face_model
    from ..face_errors import FaceFusionError
    from ..generation.loading import SNAP_FOLDER
    from ..training.base_model import load_base
    from ..training.latent_cache import AUGMENTATIONS, encode
    from ..training.loop import LoopOptions, usable_precision
    from ._train_snap import snap_data

    names = args.variants or list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise FaceFusionError(f"no variant {name!r}: choose from {', '.join(map(repr, VARIANTS))}")
    base = load_base(model_folder(args))
    base.pipeline.to(args.device)
    encode(args.data, base)
    given: dict[str, Any] = {"face_embedder": "avatars", "face_model": str(SHIPPED / WEIGHTS_NAME)}
    given |= {
        "landmarker": None,
        "image_encoder": "",
        "augmentations": AUGMENTATIONS,
        "snap_oval": 0.9,
        "validation_people": None,
    }
    seen = argparse.Namespace(**vars(args) | given)
    looks, features = snap_data(seen, base, args.data)
    pairs, _ = looks.pairs(seen, args.data)
    base.cast(torch.bfloat16 if usable_precision(args.mixed_precision) == "bf16" else torch.float32)
    loop = LoopOptions(
        args.train_batch_size,
        args.learning_rate,
        args.training_steps,
        warmup=min(50, args.training_steps // 4),
        ema_decay=0.99,
        precision=args.mixed_precision,
        sample_minutes=1e9,
    )
    start = args.snap or Path(model_folder(args)) / SNAP_FOLDER
    workshop = Workshop(base, pairs, features, start, loop, args.out)
    trials = portrait_trials(args)
    settings = settings_of(args, beside=snap_files(str(start)))
    drawer = Drawer(settings, args.device, looks.embedder, load_avatar_face_model(detector=DETECTOR))
    result = compare_parts(workshop, drawer, names, args.seeds, trials, load_panel(args))
    return result, as_markdown(result)


SYSTEM_ACTIONS = {"studio": _studio, "studio-whole": _studio_whole, "snap": _snap, "snap-parts": _snap_parts}
