"""`face-fusion avatars-evaluate`: the figures of the avatar world, its model and Face Fusion on it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation.arguments import METHODS
from ..generation.loading import usable_device
from ._arguments import (
    AVATAR_SIDE,
    COUNT,
    SEED,
    STRENGTH,
    THREADS,
    Gather,
    whole,
)
from ._evaluate_options import (
    adapter_of,
    add_adapter_arguments,
    add_evaluator_arguments,
    add_generation_arguments,
    add_trial_arguments,
    find_detector,
    load_measured_panel,
    load_panel,
    model_folder,
    portrait_trials,
    settings_of,
    training_captions,
)
from ._evaluate_systems import SYSTEM_ACTIONS, add_system_actions


if TYPE_CHECKING:
    from ..avatars.evaluation.savings_table import Saving
    from ..evaluation.generation import Settings
    from ..face_recognisers import Recogniser


HELP = "measure avatars, the avatar model and Face Fusion on it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure on people and prompts that no training saw. Every table is also written as JSON."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    table = actions.add_parser("table", help="likeness and obedience: no face, training-free, trained Face Fusion")
    add_generation_arguments(table)
    add_adapter_arguments(table)
    table.add_argument("--methods", nargs="+", action=Gather, choices=METHODS, metavar="METHOD",
                       help="none, training-free, adapter (default: those that the model allows), both, and the last "
                       "three with -mirrored (the mirrored reference is a second one)")  # fmt: skip
    add_trial_arguments(table, 50, 4)
    table.add_argument("--training-free-scale", type=STRENGTH, default=1.0, help="scale without adapter (default: 1)")
    table.add_argument("--self-scale", type=STRENGTH, default=4.0, help="scale at the self-attention (default: 4)")

    table.add_argument(
        "--cut-out",
        choices=("true", "yunet", "haar"),
        default="true",
        help="whose face box the reference is cut out by: the true one (default), or a detector's, as of a photo",
    )

    model = actions.add_parser("model", help="VAE reconstruction and prompt obedience of the avatar model")
    add_generation_arguments(model)
    model.add_argument("--prompts", type=COUNT, default=200, help="unseen prompts (default: 200)")

    people = actions.add_parser("people", help="two or three people in a picture: likeness, leakage, who is missing")
    add_generation_arguments(people)
    add_adapter_arguments(people)
    people.add_argument("--people", type=whole(1, 3), default=2, help="people in a picture (default: 2)")
    people.add_argument("--identities", type=COUNT, default=25, help="groups of test people (default: 25)")
    people.add_argument("--prompts", type=COUNT, default=2, help="prompts for each group (default: 2)")

    depth = actions.add_parser("depth", help="faces under a depth ControlNet: pose followed, likeness kept")
    add_generation_arguments(depth)
    add_adapter_arguments(depth)
    depth.add_argument("--controlnet", help="folder or Hub id of a ControlNet (default: `controlnet` of the model)")
    add_trial_arguments(depth, 50, 2)

    morph = actions.add_parser("morph", help="from one person to another by weights: how likeness moves")
    add_generation_arguments(morph)
    add_adapter_arguments(morph)
    morph.add_argument("--identities", type=COUNT, default=50, help="pairs of test people (default: 50)")

    systems = add_system_actions(actions)

    savings = actions.add_parser("savings", help="smaller references, fewer steps or layers: the likeness lost")
    add_generation_arguments(savings)
    add_adapter_arguments(savings)
    reference = actions.add_parser("reference", help="what of it the self-attention sees: the likeness lost or won")
    add_generation_arguments(reference)
    for action in (savings, reference):
        add_trial_arguments(action, 50, 2)

    recognition = actions.add_parser("recognition", help="do tools made for photographs accept avatars?")
    add_evaluator_arguments(recognition)
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
    add_generation_arguments(generated)
    generated.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="a folder of `face-fusion prepare generated:N`"
    )
    add_trial_arguments(generated, 50, 2)
    generated.add_argument("--training-steps", type=COUNT, default=2000, help="of both trainings (default: 2000)")
    generated.add_argument("--train-batch-size", type=COUNT, default=16, help="of both trainings (default: 16)")
    generated.add_argument(
        "--mixed-precision",
        choices=("auto", "no", "bf16"),
        default="no",
        help="of both trainings; auto: bf16 where the processor computes in it",
    )

    judged = (*systems, table, model, people, depth, morph, savings, reference, recognition)
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
        **SYSTEM_ACTIONS,
        "table": _table,
        "model": _model,
        "people": _people,
        "depth": _depth,
        "morph": _morph,
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


def _table(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.avatar_table import as_markdown, compare
    from ..avatars.evaluation.trials import TRUE_BOX
    from ..evaluation.generation import METHODS, needs_adapter, pipeline_of
    from ..face_detectors import load_detector
    from ..face_errors import FaceFusionError

    adapter = adapter_of(args)
    methods = args.methods or [method for method in METHODS if adapter or not needs_adapter(method)]
    if adapter is None and any(map(needs_adapter, methods)):
        raise FaceFusionError("--methods adapter: no adapter beside the model, name one with --adapter")
    if args.cut_out != TRUE_BOX:
        load_detector(args.cut_out)  # that it is missing is said before any work
    scales = {"training_free_scale": args.training_free_scale, "self_scale": args.self_scale}
    scales["face_scale"] = args.scale
    settings = settings_of(args, adapter=adapter, cut_out=args.cut_out, **scales)
    trials = portrait_trials(args)
    panel = load_measured_panel(args)
    result = compare(pipeline_of(settings, args.device), trials, methods, panel, settings, args.out)
    return result, as_markdown(result, panel.names)


def _generated(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.generated_table import Schooling, compare_generated, table_of
    from ..training.base_model import load_base
    from ..training.loop import usable_precision

    trials = portrait_trials(args)
    panel = load_measured_panel(args)
    base = load_base(model_folder(args))
    base.pipeline.to(args.device)
    precision = usable_precision(args.mixed_precision)
    schooling = Schooling(args.training_steps, args.train_batch_size, seed=args.seed, precision=precision)
    result = compare_generated(base, args.data, trials, panel, settings_of(args), schooling, args.out)
    return result, table_of(result, panel.names)


def _model(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.model_quality import as_markdown, measure_model, quality_trials
    from ..evaluation.generation import pipeline_of

    settings = settings_of(args)
    exclude = training_captions(args.training_data)
    trials = quality_trials(args.prompts, seed=args.seed, exclude=exclude)
    panel = load_panel(args)
    pipe = pipeline_of(settings, args.device)
    result = measure_model(pipe, trials, panel, settings, args.out, unseen=bool(exclude))
    return result, as_markdown(result)


def _people(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..avatars.evaluation.people_table import as_markdown, compare_people
    from ..avatars.evaluation.trials import plan_trials
    from ..evaluation.generation import pipeline_of

    settings = settings_of(args, adapter=adapter_of(args), face_scale=args.scale)
    exclude = training_captions(args.training_data)
    trials = plan_trials(
        args.identities, args.prompts, seed=args.seed, people=args.people, exclude=exclude, style="photo"
    )
    evaluators = load_evaluators(args.evaluators or SHIPPED)
    result = compare_people(pipeline_of(settings, args.device), trials, evaluators, settings, args.out)
    return result, as_markdown(result)


def _depth(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.depth_table import as_markdown, compare_depth
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..evaluation.generation import pipeline_of

    controlnet = args.controlnet or str(Path(model_folder(args)) / "controlnet")
    settings = settings_of(args, adapter=adapter_of(args), controlnet=controlnet, face_scale=args.scale)
    trials = portrait_trials(args)
    evaluators = load_evaluators(args.evaluators or SHIPPED)
    result = compare_depth(pipeline_of(settings, args.device), trials, evaluators, settings, args.out)
    return result, as_markdown(result)


def _morph(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..avatars.evaluation.morph_table import as_markdown, compare_morphs
    from ..avatars.evaluation.trials import plan_trials
    from ..evaluation.generation import pipeline_of

    settings = settings_of(args, adapter=adapter_of(args), face_scale=args.scale)
    trials = plan_trials(
        args.identities, 1, seed=args.seed, exclude=training_captions(args.training_data), style="photo"
    )
    evaluators = load_evaluators(args.evaluators or SHIPPED)
    result = compare_morphs(pipeline_of(settings, args.device), trials, evaluators, settings, args.out)
    return result, as_markdown(result)


def _savings(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.savings_table import SAVINGS
    from ..face_errors import FaceFusionError

    settings = settings_of(args, adapter=adapter_of(args), face_scale=args.scale)
    if settings.adapter is None:
        raise FaceFusionError("no adapter beside the model, name one with --adapter")
    return _compare_savings(args, settings, SAVINGS)


def _reference(args: argparse.Namespace) -> tuple[dict, str]:
    from ..avatars.evaluation.savings_table import REFERENCES

    return _compare_savings(args, settings_of(args), REFERENCES)


def _compare_savings(args: argparse.Namespace, settings: Settings, savings: Sequence[Saving]) -> tuple[dict, str]:
    from ..avatars.evaluation.evaluators import SHIPPED, load_evaluators
    from ..avatars.evaluation.savings_table import as_markdown, compare_savings
    from ..evaluation.generation import pipeline_of

    trials = portrait_trials(args)
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
    result = measure_recognition(recognisers, find_detector(args), **asked)
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
