"""`face-fusion prepare generated:N`: training data of people whom the checkpoint draws itself."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import FaceFusionError
from ..generation.arguments import guidance_scales
from ..generation.loading import defaults_beside
from ._arguments import COUNT, GUIDANCE, SEED, STEPS, real, whole


if TYPE_CHECKING:
    from ..training.base_model import BaseModel
    from ..training.generated_pairs import Plan

PREFIX = "generated:"
DEFAULT_STEPS = 25
OF_PHOTOS = ("--resolution", "--min-side", "--caption", "--augmentations", "--workers")


def add_generated_arguments(parser: argparse.ArgumentParser) -> None:
    drawn = parser.add_argument_group("people whom the model draws (generated:N)")
    drawn.add_argument("--per-person", type=whole(2, 100), default=2, help="pictures of each person")
    drawn.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="your own people, one a line, and scenes ('scene: a photo of {} on a beach'); default: a grammar that "
        "comes along, or the words of a model that knows few",
    )
    drawn.add_argument("--steps", type=STEPS, help="denoising steps; default: as the model recommends, else 25")
    drawn.add_argument("--guidance", type=GUIDANCE, help="default: as the model recommends, else 5")
    drawn.add_argument("--batch-size", type=COUNT, default=8, help="pictures drawn together (memory)")
    drawn.add_argument("--people-seed", type=SEED, default=0, help="other people, and other pictures of them")
    drawn.add_argument(
        "--adapter",
        metavar="DIR_OR_FILE_OR_HUB_ID",
        help="weights that draw further pictures of a person; default: the training-free mode",
    )
    drawn.add_argument(
        "--embedder",
        metavar="DIR_OR_FILE",
        help="who says whether two faces are one person's: a face embedder (.onnx, .safetensors or 'insightface'); "
        "default: the model's own UNet",
    )
    drawn.add_argument(
        "--false-matches",
        type=real(0, 0.5, above=True),
        default=0.05,
        help="fraction of pairs of two people that would pass for one",
    )
    drawn.add_argument(
        "--rounds", type=whole(1, 20), default=1, help="train on each round, and draw the next with its weights"
    )
    drawn.add_argument(
        "--round-training", default="", metavar="OPTIONS", help="options of `train` between rounds, in quotes"
    )


def check_generated(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong at once. Raises [`FaceFusionError`]."""
    from .prepare import add_selection_arguments, add_source_arguments, given_words

    if args.model is None:
        raise FaceFusionError(f"{args.source} is drawn by the model that weights are trained for: give --model")
    source, selection = (given_words(args, add) for add in (add_source_arguments, add_selection_arguments))
    if words := [word for word in source + selection if word in source or word in OF_PHOTOS]:
        raise FaceFusionError(f"{words[0]} is for photos: {args.source} is drawn as the model draws")
    if args.round_training and args.rounds == 1:
        raise FaceFusionError("--round-training is what happens between --rounds: give 2 or more of these")
    training_arguments(args, args.out, args.out)


def run_generated(args: argparse.Namespace) -> int:
    """The command for `generated:N`."""
    from ..training.generated_folder import prepare_generated
    from ..training.generated_rounds import prepare_rounds
    from .prepare import load

    check_generated(args)
    version = {"revision": args.revision, "variant": args.variant, "model_config": args.model_config}
    load_again: Callable[[], BaseModel] = partial(load, args.model, argparse.Namespace(**version))
    loaded = [load_again()]
    plan = plan_of(args, loaded[0].resolution)

    def loading() -> BaseModel:
        return loaded.pop() if loaded else load_again()

    def learn(data: Path, out: Path) -> None:
        from .train import run

        run(training_arguments(args, data, out))

    def draw(out: Path, plan: Plan, earlier: Path | None) -> dict[str, Any]:
        return prepare_generated(out, loading, plan, earlier)

    report = draw(args.out, plan, None) if args.rounds == 1 else prepare_rounds(args.out, plan, draw, learn)
    said_of(report, args.out)
    return 0


def plan_of(args: argparse.Namespace, resolution: int) -> Plan:
    """What the options ask of a model that draws `resolution` pixels a side. Raises [`FaceFusionError`]."""
    from ..face_defaults import FaceDefaults
    from ..face_embedders import load_face_embedder
    from ..training.generated import Cast, Checks, people_count
    from ..training.generated_pairs import Plan
    from ..training.generated_people import NaturalGrammar, VocabularyGrammar, read_prompts
    from ..training.generated_pictures import Drawing
    from .prepare import prepare_options

    count = people_count(args.source)
    recommended = defaults_beside(args.model, args.revision, args.model_config, args.steps) or FaceDefaults()
    guidance, low_noise = guidance_scales(args.guidance, None, recommended)
    grammar: Any = NaturalGrammar()
    if args.prompts is not None:
        grammar = read_prompts(args.prompts)
    elif recommended.vocabulary is not None:
        grammar = VocabularyGrammar(recommended.vocabulary)
    embedder = None if args.embedder is None else load_face_embedder(args.embedder)
    options = prepare_options(args, resolution).decided()
    steps = args.steps or recommended.num_inference_steps or DEFAULT_STEPS
    return Plan(
        model=args.model,
        cast=Cast(count, grammar, args.per_person, args.people_seed),
        drawing=Drawing(steps, guidance, low_noise, args.batch_size, grammar.negative),
        checks=Checks(options.selection, options.detector, options.detector_model, embedder),
        false_matches=args.false_matches,
        adapter=args.adapter,
        rounds=args.rounds,
    )


def training_arguments(args: argparse.Namespace, data: Path, out: Path) -> argparse.Namespace:
    """The arguments of `face-fusion train` between two rounds. Raises [`FaceFusionError`] for bad ones."""
    from .train import add_arguments

    parser = argparse.ArgumentParser(prog="--round-training", add_help=False)
    add_arguments(parser)
    words = ["--model", args.model, "--data", str(data), "--out", str(out)]
    for flag in ("revision", "variant", "model_config"):
        if (value := getattr(args, flag)) is not None:
            words += [f"--{flag.replace('_', '-')}", value]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args([*words, *shlex.split(args.round_training)])
    except (SystemExit, ValueError) as error:
        why = next(iter(said.getvalue().splitlines()[-1:]), str(error)).partition("error: ")
        raise FaceFusionError(f"--round-training {args.round_training!r}: {why[2] or why[0]}") from error


def said_of(report: dict[str, Any], out: Path) -> None:
    similarity = report["similarity"]
    skipped = ", ".join(f"{reason} {number}" for reason, number in report["skipped"].items()) or "none"
    print(
        f"{report['kept']} of {report['read']} pictures of {report['people']} people; similarity of pairs kept "
        f"{similarity['kept']:.3f}, of unrelated people {similarity['unrelated']:.3f}, threshold "
        f"{similarity['threshold']:.3f}; skipped: {skipped}"
    )
    print(out)
