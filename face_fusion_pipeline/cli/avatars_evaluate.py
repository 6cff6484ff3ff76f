"""`face-fusion avatars-evaluate`: the figures of the avatar world, its model and Face Fusion on it."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import ModelNotFoundError
from ..generation.arguments import METHODS, guidance_scales
from ..generation.avatar_model import AVATAR_DEFAULTS, embedded_model
from ..generation.loading import usable_device
from ._arguments import (
    AVATAR_SIDE,
    COUNT,
    GUIDANCE,
    GUIDED,
    POSITIVE,
    RATE,
    SEED,
    STEPS,
    STRENGTH,
    THREADS,
    Gather,
    whole,
)


if TYPE_CHECKING:
    from ..avatars.evaluation.savings_table import Saving
    from ..avatars.evaluation.scoring import Panel
    from ..evaluation.generation import Settings
    from ..face_detectors import FaceDetector
    from ..face_recognisers import Recogniser

logger = logging.getLogger(__name__)

HELP = "measure avatars, the avatar model and Face Fusion on it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure on people and prompts that no training saw. Every table is also written as JSON."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    table = actions.add_parser("table", help="likeness and obedience: no face, training-free, trained Face Fusion")
    _add_generation(table)
    _add_adapter(table)
    table.add_argument("--methods", nargs="+", action=Gather, choices=METHODS, metavar="METHOD",
                       help="none, training-free, adapter (default: those that the model allows), both, and the last "
                       "three with -mirrored (the mirrored reference is a second one)")  # fmt: skip
    table.add_argument("--identities", type=COUNT, default=50, help="test people (default: 50)")
    table.add_argument("--prompts", type=COUNT, default=4, help="prompts for each of them (default: 4)")
    table.add_argument("--training-free-scale", type=STRENGTH, default=1.0, help="scale without adapter (default: 1)")
    table.add_argument("--self-scale", type=STRENGTH, default=4.0, help="scale at the self-attention (default: 4)")

    table.add_argument(
        "--cut-out",
        choices=("true", "yunet", "haar"),
        default="true",
        help="whose face box the reference is cut out by: the true one (default), or a detector's, as of a photo",
    )

    model = actions.add_parser("model", help="VAE reconstruction and prompt obedience of the avatar model")
    _add_generation(model)
    model.add_argument("--prompts", type=COUNT, default=200, help="unseen prompts (default: 200)")

    people = actions.add_parser("people", help="two or three people in a picture: likeness, leakage, who is missing")
    _add_generation(people)
    _add_adapter(people)
    people.add_argument("--people", type=whole(1, 3), default=2, help="people in a picture (default: 2)")
    people.add_argument("--identities", type=COUNT, default=25, help="groups of test people (default: 25)")
    people.add_argument("--prompts", type=COUNT, default=2, help="prompts for each group (default: 2)")

    depth = actions.add_parser("depth", help="faces under a depth ControlNet: pose followed, likeness kept")
    _add_generation(depth)
    _add_adapter(depth)
    depth.add_argument("--controlnet", help="folder or Hub id of a ControlNet (default: `controlnet` of the model)")
    depth.add_argument("--identities", type=COUNT, default=50, help="test people (default: 50)")
    depth.add_argument("--prompts", type=COUNT, default=2, help="prompts for each of them (default: 2)")

    morph = actions.add_parser("morph", help="from one person to another by weights: how likeness moves")
    _add_generation(morph)
    _add_adapter(morph)
    morph.add_argument("--identities", type=COUNT, default=50, help="pairs of test people (default: 50)")

    studio = actions.add_parser("studio", help="FaceStudio: likeness by text and picture, the slider, views, mixing")
    _add_generation(studio)
    _add_adapter(studio)
    studio.add_argument("--studio", help="FaceStudio weights, file or folder (default: face_studio of the model)")
    studio.add_argument("--identities", type=COUNT, default=24, help="test people (default: 24)")
    studio.add_argument("--prompts", type=COUNT, default=2, help="prompts for each of them (default: 2)")

    whole_unet = actions.add_parser(
        "studio-whole", help="FaceStudio: the whole UNet trained, as in the paper, against the LoRA"
    )
    _add_generation(whole_unet)
    _add_studio_training(whole_unet)
    whole_unet.add_argument("--identities", type=COUNT, default=24, help="test people (default: 24)")
    whole_unet.add_argument("--prompts", type=COUNT, default=1, help="prompts for each of them (default: 1)")

    snap = actions.add_parser("snap", help="FaceSnap: the driver's pose and expression, in the person's own shape")
    _add_generation(snap)
    _add_adapter(snap)
    snap.add_argument("--identities", type=COUNT, default=25, help="number of people (default: 25)")
    snap.add_argument("--prompts", type=COUNT, default=2, help="prompts for each person (default: 2)")
    snap.add_argument("--snap", help="FaceSnap weights, file or folder (default: face_snap of the model)")
    for action in (studio, snap):
        action.add_argument(
            "--face-model", help="face model of avatars, file or folder (default: the one in the package)"
        )

    parts = actions.add_parser("snap-parts", help="FaceSnap: what its parts give, by variants that are trained alike")
    _add_generation(parts)
    parts.add_argument("--data", type=Path, required=True, metavar="DIR", help="avatars that `prepare` made")
    parts.add_argument("--identities", type=COUNT, default=12, help="test people (default: 12)")
    parts.add_argument("--prompts", type=COUNT, default=2, help="prompts for each of them (default: 2)")
    parts.add_argument("--variants", nargs="+", action=Gather, metavar="NAME", help="only these")
    parts.add_argument("--seeds", type=SEED, nargs="+", action=Gather, default=[0, 1, 2], help="a training for each")
    parts.add_argument("--training-steps", type=COUNT, default=200, help="of every training (default: 200)")
    parts.add_argument("--train-batch-size", type=COUNT, default=16, help="of every training (default: 16)")
    parts.add_argument("--learning-rate", type=RATE, default=4e-4, help="of every training (default: 4e-4)")
    parts.add_argument("--mixed-precision", choices=("auto", "no", "bf16"), default="no", help="of every training")
    parts.add_argument(
        "--snap", type=Path, metavar="DIR", help="FaceSnap weights to begin with (default: face_snap of the model)"
    )

    savings = actions.add_parser("savings", help="smaller references, fewer steps or layers: the likeness lost")
    _add_generation(savings)
    _add_adapter(savings)
    reference = actions.add_parser("reference", help="what of it the self-attention sees: the likeness lost or won")
    _add_generation(reference)
    for action in (savings, reference):
        action.add_argument("--identities", type=COUNT, default=50, help="test people (default: 50)")
        action.add_argument("--prompts", type=COUNT, default=2, help="prompts for each of them (default: 2)")

    recognition = actions.add_parser("recognition", help="do tools made for photographs accept avatars?")
    _add_evaluators(recognition)
    recognition.add_argument("--identities", type=COUNT, default=100, help="test people (default: 100)")
    recognition.add_argument("--portraits", type=COUNT, default=4, help="portraits of each (default: 4)")
    recognition.add_argument("--seed", type=SEED, default=0, help="of people, prompts and noise")
    recognition.add_argument(
        "--size", type=AVATAR_SIDE, default=128, help="pixels of a portrait's side (default: 128)"
    )
    recognition.add_argument("--world", type=whole(1, 2), help="world of the avatars (default: the model's)")

    train = actions.add_parser(
        "train-evaluators", help="train the classifiers and the recogniser that measure avatars"
    )
    train.add_argument("--data", type=Path, required=True, help="dataset folder with train and validation")
    train.add_argument("--out", type=Path, required=True, help="folder for the evaluators")
    train.add_argument("--steps", type=COUNT, default=1200, help="batches (default: 1200)")
    train.add_argument(
        "--only",
        nargs="+",
        action=Gather,
        metavar="JUDGE",
        choices=("locator", "scene", "expression", "recogniser", "depth"),
        help="train only these and keep the others that are in --out (locator, scene, expression, recogniser, depth)",
    )
    train.add_argument("--start", type=Path, metavar="DIR", help="evaluators to go on from (default: begin anew)")
    train.add_argument("--limit", type=COUNT, default=20000, help="images to use at most (default: 20000)")
    train.add_argument("--seed", type=SEED, default=0, help="of people, prompts and noise")

    choose = actions.add_parser(
        "choose", help="which of several weights ship, by their tables: drawing, then likeness"
    )
    choose.add_argument(
        "tables", nargs="+", type=Path, metavar="TABLE", help="folders of `table`, or their table.json"
    )
    choose.add_argument(
        "--method", choices=METHODS, default="both-mirrored", help="of the tables (default: both-mirrored)"
    )

    eyes = actions.add_parser("eyes", help="does the evaluator of eyes agree with verdicts given by eye?")
    eyes.add_argument(
        "verdicts", type=Path, metavar="FILE", help="FILE.json and FILE.webp, as tests/data/eye_verdicts"
    )
    eyes.add_argument(
        "--model", help="diffusers folder that drew them, to draw them anew (default: bands in the file)"
    )
    eyes.add_argument("--out", type=Path, help="folder for the pictures that --model draws")
    eyes.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    eyes.add_argument("--renders", type=COUNT, default=1000, help="true renders that have to pass (default: 1000)")

    generated = actions.add_parser(
        "generated", help="weights trained on people whom the model drew itself, beside weights trained on renders"
    )
    _add_generation(generated)
    generated.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="a folder of `face-fusion prepare generated:N`"
    )
    generated.add_argument("--identities", type=COUNT, default=50, help="test people (default: 50)")
    generated.add_argument("--prompts", type=COUNT, default=2, help="prompts for each of them (default: 2)")
    generated.add_argument("--training-steps", type=COUNT, default=2000, help="of both trainings (default: 2000)")
    generated.add_argument("--train-batch-size", type=COUNT, default=16, help="of both trainings (default: 16)")
    generated.add_argument(
        "--mixed-precision",
        choices=("auto", "no", "bf16"),
        default="no",
        help="of both trainings; auto: bf16 where the processor computes in it",
    )

    judged = (table, model, people, depth, morph, studio, whole_unet, snap, parts, savings, reference, recognition)
    for action in (*judged, eyes, generated, train, choose):
        action.add_argument("--threads", type=THREADS, help="CPU threads of torch (default: torch decides)")
        action.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if "device" in args:
        usable_device(args.device)  # known before evaluators and models are loaded
    actions = {
        "table": _table,
        "model": _model,
        "people": _people,
        "depth": _depth,
        "morph": _morph,
        "studio": _studio,
        "studio-whole": _studio_whole,
        "snap": _snap,
        "snap-parts": _snap_parts,
        "savings": _savings,
        "reference": _reference,
        "recognition": _recognition,
        "train-evaluators": _train,
        "choose": _choose,
        "eyes": _eyes,
        "generated": _generated,
    }
    result, text = actions[args.action](args)
    print(json.dumps(result, indent=1) if args.json else text)
    return 0


def _add_generation(parser: argparse.ArgumentParser) -> None:
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
    _add_evaluators(parser)


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", help="adapter file or folder (default: the one beside the model, if any)")
    parser.add_argument("--scale", type=STRENGTH, default=1.0, help="face scale of the adapter (default: 1)")


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


def _add_evaluators(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recognisers", type=Path, metavar="DIR", help="folder of face recognisers as .onnx files")
    parser.add_argument("--recogniser", action="append", default=[], metavar="NAME=FILE.onnx[:PREPROCESSING]",
                        help="one recogniser; preprocessing: arcface (default), imagenet or raw")  # fmt: skip
    parser.add_argument(
        "--detector", type=Path, metavar="FILE", help="YuNet file (default: $FACE_FUSION_YUNET or cache)"
    )


def _detector(args: argparse.Namespace) -> FaceDetector | None:
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


def _panel(args: argparse.Namespace) -> Panel:
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..avatars.evaluation.scoring import Panel
    from ..evaluation.recognisers import load_recognisers

    recognisers = load_recognisers(args.recogniser, args.recognisers)
    return Panel(load_evaluators(args.evaluators or SHIPPED), recognisers, _detector(args))


def _model_folder(args: argparse.Namespace) -> str:
    return args.model or str(embedded_model())


def _settings(args: argparse.Namespace, **more: Any) -> Settings:
    from ..evaluation.generation import Settings

    asked = args.guidance_scale, args.low_noise_guidance
    guidance, low_noise = guidance_scales(*asked, AVATAR_DEFAULTS, name="--guidance-scale")
    common = {"steps": args.steps, "guidance_scale": guidance, "low_noise_guidance": low_noise}
    return Settings.of(_model_folder(args), **common, seed=args.seed, batch=args.batch, **more)


def _training_captions(data: str | None) -> set[str]:
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


def _adapter(args: argparse.Namespace) -> str | None:
    """The adapter named, else the one beside the model, else None."""
    from ..face_adapter import ADAPTER_WEIGHTS_NAME

    model = Path(_model_folder(args))
    return args.adapter or (str(model) if (model / ADAPTER_WEIGHTS_NAME).is_file() else None)


def _table(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.avatar_table import as_markdown, compare
    from ..avatars.evaluation.trials import TRUE_BOX, plan_trials
    from ..avatars.measures.panel import load_measures
    from ..evaluation.generation import METHODS, needs_adapter, pipeline_of
    from ..face_detectors import load_detector
    from ..face_errors import FaceFusionError

    adapter = _adapter(args)
    methods = args.methods or [method for method in METHODS if adapter or not needs_adapter(method)]
    if adapter is None and any(map(needs_adapter, methods)):
        raise FaceFusionError("--methods adapter: no adapter beside the model, name one with --adapter")
    if args.cut_out != TRUE_BOX:
        load_detector(args.cut_out)  # that it is missing is said before any work
    scales = {"training_free_scale": args.training_free_scale, "self_scale": args.self_scale}
    scales["face_scale"] = args.scale
    settings = _settings(args, adapter=adapter, cut_out=args.cut_out, **scales)
    exclude = _training_captions(args.training_data)
    trials = plan_trials(args.identities, args.prompts, seed=args.seed, exclude=exclude, style="photo")
    panel = _panel(args)
    panel.measures = load_measures(panel.evaluators)
    result = compare(pipeline_of(settings, args.device), trials, methods, panel, settings, args.out)
    return result, as_markdown(result, panel.names)


def _generated(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.generated_table import Schooling, compare_generated, table_of
    from ..avatars.evaluation.trials import plan_trials
    from ..avatars.measures.panel import load_measures
    from ..training.base_model import load_base
    from ..training.loop import usable_precision

    exclude = _training_captions(args.training_data)
    trials = plan_trials(args.identities, args.prompts, seed=args.seed, exclude=exclude, style="photo")
    panel = _panel(args)
    panel.measures = load_measures(panel.evaluators)
    base = load_base(_model_folder(args))
    base.pipeline.to(args.device)
    precision = usable_precision(args.mixed_precision)
    schooling = Schooling(args.training_steps, args.train_batch_size, seed=args.seed, precision=precision)
    result = compare_generated(base, args.data, trials, panel, _settings(args), schooling, args.out)
    return result, table_of(result, panel.names)


def _model(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.model_quality import as_markdown, measure_model, quality_trials
    from ..evaluation.generation import pipeline_of

    settings = _settings(args)
    exclude = _training_captions(args.training_data)
    trials = quality_trials(args.prompts, seed=args.seed, exclude=exclude)
    panel = _panel(args)
    pipe = pipeline_of(settings, args.device)
    result = measure_model(pipe, trials, panel, settings, args.out, unseen=bool(exclude))
    return result, as_markdown(result)


def _people(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..avatars.evaluation.people_table import as_markdown, compare_people
    from ..avatars.evaluation.trials import plan_trials
    from ..evaluation.generation import pipeline_of

    settings = _settings(args, adapter=_adapter(args), face_scale=args.scale)
    exclude = _training_captions(args.training_data)
    trials = plan_trials(
        args.identities, args.prompts, seed=args.seed, people=args.people, exclude=exclude, style="photo"
    )
    evaluators = load_evaluators(args.evaluators or SHIPPED)
    result = compare_people(pipeline_of(settings, args.device), trials, evaluators, settings, args.out)
    return result, as_markdown(result)


def _depth(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.depth_table import as_markdown, compare_depth
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..avatars.evaluation.trials import plan_trials
    from ..evaluation.generation import pipeline_of

    controlnet = args.controlnet or str(Path(_model_folder(args)) / "controlnet")
    settings = _settings(args, adapter=_adapter(args), controlnet=controlnet, face_scale=args.scale)
    exclude = _training_captions(args.training_data)
    trials = plan_trials(args.identities, args.prompts, seed=args.seed, exclude=exclude, style="photo")
    evaluators = load_evaluators(args.evaluators or SHIPPED)
    result = compare_depth(pipeline_of(settings, args.device), trials, evaluators, settings, args.out)
    return result, as_markdown(result)


def _morph(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..avatars.evaluation.morph_table import as_markdown, compare_morphs
    from ..avatars.evaluation.trials import plan_trials
    from ..evaluation.generation import pipeline_of

    settings = _settings(args, adapter=_adapter(args), face_scale=args.scale)
    trials = plan_trials(
        args.identities, 1, seed=args.seed, exclude=_training_captions(args.training_data), style="photo"
    )
    evaluators = load_evaluators(args.evaluators or SHIPPED)
    result = compare_morphs(pipeline_of(settings, args.device), trials, evaluators, settings, args.out)
    return result, as_markdown(result)


def _studio(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.studio_table import as_markdown, compare_studio
    from ..avatars.evaluation.studio_views import DETECTOR
    from ..avatars.evaluation.trials import plan_trials
    from ..avatars.face_model import SHIPPED, load_avatar_face_model
    from ..avatars.measures.panel import load_measures
    from ..evaluation.generation import pipeline_of

    weights = args.studio or str(Path(_model_folder(args)) / "face_studio")
    settings = _settings(args, adapter=_adapter(args), face_scale=args.scale, beside=[weights])
    pipe = pipeline_of(settings, args.device)
    pipe.load_face_studio(weights)
    exclude = _training_captions(args.training_data)
    trials = plan_trials(args.identities, args.prompts, seed=args.seed, exclude=exclude, style="photo")
    panel = _panel(args)
    panel.measures = load_measures(panel.evaluators)
    model = load_avatar_face_model(args.face_model or SHIPPED, DETECTOR)
    result = compare_studio(pipe, trials, panel, settings, model, args.out)
    return result, as_markdown(result, panel.names)


def _studio_whole(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.ablations.studio_whole import StudioBudget, StudioTrainer
    from ..avatars.ablations.studio_whole_table import as_markdown, compare_whole
    from ..avatars.evaluation.trials import plan_trials
    from ..avatars.measures.panel import load_measures
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
    parts = args.studio or str(Path(_model_folder(args)) / "face_studio")
    trainer = StudioTrainer(_model_folder(args), args.data, args.out, budget, parts, args.teacher)
    exclude = _training_captions(args.training_data) | {row["text"] for row in read_rows(args.data)}
    trials = plan_trials(args.identities, args.prompts, seed=args.seed, exclude=exclude, style="photo")
    panel = _panel(args)
    panel.measures = load_measures(panel.evaluators)
    result = compare_whole(trainer, args.seeds, trials, panel, _settings(args), args.device)
    return result, as_markdown(result, panel.names)


def _snap(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.snap_table import DETECTOR, as_markdown, compare_snap
    from ..avatars.evaluation.trials import plan_trials
    from ..avatars.face_model import SHIPPED, load_avatar_face_model
    from ..avatars.measures.panel import load_measures
    from ..evaluation.generation import pipeline_of

    weights, points = args.snap or str(Path(_model_folder(args)) / "face_snap"), args.face_model or str(SHIPPED)
    settings = _settings(args, adapter=_adapter(args), face_scale=args.scale, beside=[*snap_files(weights), points])
    pipe = pipeline_of(settings, args.device)
    pipe.load_face_snap(weights)
    exclude = _training_captions(args.training_data)
    trials = plan_trials(args.identities, args.prompts, seed=args.seed, exclude=exclude, style="photo")
    panel = _panel(args)
    panel.measures = load_measures(panel.evaluators)
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
    from ..avatars.evaluation.trials import plan_trials
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
    base = load_base(_model_folder(args))
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
    start = args.snap or Path(_model_folder(args)) / SNAP_FOLDER
    workshop = Workshop(base, pairs, features, start, loop, args.out)
    exclude = _training_captions(args.training_data)
    trials = plan_trials(args.identities, args.prompts, seed=args.seed, exclude=exclude, style="photo")
    settings = _settings(args, beside=snap_files(str(start)))
    drawer = Drawer(settings, args.device, looks.embedder, load_avatar_face_model(detector=DETECTOR))
    result = compare_parts(workshop, drawer, names, args.seeds, trials, _panel(args))
    return result, as_markdown(result)


def _savings(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.savings_table import SAVINGS
    from ..face_errors import FaceFusionError

    settings = _settings(args, adapter=_adapter(args), face_scale=args.scale)
    if settings.adapter is None:
        raise FaceFusionError("no adapter beside the model, name one with --adapter")
    return _compare_savings(args, settings, SAVINGS)


def _reference(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.savings_table import REFERENCES

    return _compare_savings(args, _settings(args), REFERENCES)


def _compare_savings(args: argparse.Namespace, settings: Settings, savings: Sequence[Saving]) -> tuple[dict, str]:
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..avatars.evaluation.savings_table import as_markdown, compare_savings
    from ..avatars.evaluation.trials import plan_trials
    from ..evaluation.generation import pipeline_of

    exclude = _training_captions(args.training_data)
    trials = plan_trials(args.identities, args.prompts, seed=args.seed, exclude=exclude, style="photo")
    evaluators = load_evaluators(args.evaluators or SHIPPED)
    result = compare_savings(pipeline_of(settings, args.device), trials, evaluators, settings, args.out, savings)
    return result, as_markdown(result)


def _recognition(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.evaluators import load_evaluators
    from ..avatars.evaluation.recognition import measure_recognition
    from ..evaluation.recognisers import load_recognisers
    from ..evaluation.reports import markdown_table

    recognisers: list[Recogniser] = [*load_recognisers(args.recogniser, args.recognisers), load_evaluators()]
    asked = {name: getattr(args, name) for name in ("identities", "portraits", "seed", "size", "world")}
    result = measure_recognition(recognisers, _detector(args), **asked)
    detected = result.get("auc_detected", {})
    rows = [[f"{name}: AUC", auc, detected.get(name)] for name, auc in result["auc"].items()]
    rows += [
        [f"{name}: likeness left at a quarter of the resolution", round(k, 3), None]
        for name, k in result["coarse"].items()
    ]
    for figure in ("found", "iou_above_half", "mean_iou") if "detector" in result else ():
        rows.append([f"{result['detector']['name']}: {figure.replace('_', ' ')}", None, result["detector"][figure]])
    return result, markdown_table(["figure", "true landmarks", "detected landmarks"], rows)


def _train(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.evaluator_training import train_evaluators
    from ..evaluation.reports import markdown_table

    only: dict[str, Any] = {"only": args.only} if args.only else {}
    only |= {"start": args.start}
    result = train_evaluators(args.data, args.out, steps=args.steps, limit=args.limit, seed=args.seed, **only)
    rows = [[f"{trait} right", value] for trait, value in result["accuracy"].items()]
    rows += [["landmark error, pixels", result["landmark_error_pixels"]], ["recogniser AUC", result["recogniser_auc"]]]
    return result, markdown_table(["evaluators on held-out people", "value"], rows)


def _choose(args: argparse.Namespace) -> tuple[dict, str]:
    from dataclasses import asdict

    from ..avatars.measures.choice import candidate, choose, read_table
    from ..evaluation.reports import markdown_table

    found = [candidate(read_table(place), args.method, str(place)) for place in args.tables]
    best = choose(found)
    rows = [
        [c.name, *(f"{100 * v:.0f} %" for v in (c.eyes, c.eyes_without_face, c.traits, c.published)), c.drawn_well]
        for c in found
    ]
    header = ["table", "eyes well drawn", "without a face", "traits", "published recognisers", "drawn well enough"]
    said = f"\nShips: {best.name}\n" if best else "\nNone ships: all draw worse and show too little of the person.\n"
    return {"candidates": [asdict(c) for c in found], "ships": best and best.name}, markdown_table(header, rows) + said


def _eyes(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.measures.agreement import measure_agreement
    from ..evaluation.reports import markdown_table

    result = measure_agreement(args.verdicts, args.model, args.out, device=args.device, renders=args.renders)
    rows = [[name.replace("_", " "), f"{100 * value:.1f} %"] for name, value in result["fractions"].items()]
    return result, markdown_table(
        ["fraction", "value"], rows
    ) + f"\n{result['good']} good and {result['broken']} broken.\n"
