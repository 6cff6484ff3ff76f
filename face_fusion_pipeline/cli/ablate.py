"""`face-fusion ablate`: the reviewers' questions, answered on avatars with people that no training saw."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..face_errors import FaceFusionError
from ..files.texts import read_text
from ..generation.arguments import check_model
from ._arguments import COUNT, GUIDED, RATE, SEED, STEPS, THREADS, Gather, real, whole


HELP = "answer a reviewer's question: train variants of the method alike and compare them on avatars"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train the variants of a question with equal budgets, generate people that no training saw, and write table, "
        "plot and JSON to OUT. Finished runs are not repeated: a stopped command goes on when it is given again, and "
        "questions in one OUT share their runs."
    )
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="see --list; several, or 'all'")
    parser.add_argument(
        "--variants", nargs="+", action=Gather, metavar="VARIANT", help="only these of the questions' variants"
    )
    parser.add_argument("--list", action="store_true", help="list the questions and their variants")
    parser.add_argument("--data", type=Path, metavar="DIR", help="avatars prepared with `face-fusion prepare`")
    parser.add_argument("--model", metavar="DIR", help="the base model (default: the embedded avatar model)")
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="a page with markers to write the answers to")
    parser.add_argument("--threads", type=THREADS, help="CPU threads of torch (default: torch decides)")

    budget = parser.add_argument_group("training, the same for every variant")
    budget.add_argument("--steps", type=whole(0), metavar="N", help="steps of training; 0 with --init-adapter: none")
    budget.add_argument(
        "--init-adapter",
        type=Path,
        metavar="PATH",
        help="Face Fusion weights that all variants begin with; of those that can",
    )
    budget.add_argument(
        "--teacher",
        type=Path,
        metavar="PATH",
        help="Face Fusion weights whose predictions all variants learn, not the noise: far fewer steps",
    )
    budget.add_argument(
        "--seeds", type=SEED, nargs="+", action=Gather, default=[0, 1, 2], metavar="SEED", help="one run for each"
    )
    budget.add_argument("--batch-size", type=COUNT, default=32, help="pictures of a step")
    budget.add_argument("--learning-rate", type=RATE, default=1.5e-3, help="of all variants without a --rate")
    budget.add_argument(
        "--rate", action="append", default=[], metavar="VARIANT=RATE", help="another learning rate for one variant"
    )
    budget.add_argument(
        "--identity-loss-weight",
        type=real(),
        default=0.0,
        help="of the likeness that the face embedder of trainings sees, which is not one that measures (default: 0)",
    )
    budget.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    budget.add_argument(
        "--keep-references", action="store_true", help="hold what the UNet makes of all references in memory"
    )
    budget.add_argument(
        "--condition-embedder",
        metavar="NAME",
        help="what ip-adapter-faceid is given: a folder of evaluators, or NAME=FILE.onnx (default: the face embedder "
        "of trainings)",
    )

    measure = parser.add_argument_group("measurement")
    measure.add_argument("--identities", type=COUNT, default=50, help="test people")
    measure.add_argument("--prompts", type=COUNT, default=4, help="prompts for each of them")
    measure.add_argument("--inference-steps", type=STEPS, default=20, help="denoising steps of a picture")
    measure.add_argument("--guidance-scale", type=GUIDED, default=4.0, help="classifier-free guidance")
    measure.add_argument("--batch", type=COUNT, default=4, help="pictures denoised together")
    measure.add_argument(
        "--scales",
        type=real(0, 100, above=True),
        nargs="+",
        action=Gather,
        metavar="SCALE",
        help="points of the scale curve",
    )
    measure.add_argument(
        "--evaluator",
        metavar="NAME",
        help="who measures likeness: a folder of evaluators, or NAME=FILE.onnx (default: the package's); where a "
        "variant is conditioned on a face embedder it must be another one",
    )


def run(args: argparse.Namespace) -> int:
    if args.list:
        print(listing())
        return 0
    check_arguments(args)

    import torch

    from ..avatars.ablations.laboratory import Laboratory
    from ..avatars.ablations.pictures import Sampling
    from ..avatars.ablations.questions import QUESTIONS
    from ..avatars.ablations.report import fill, write_answer
    from ..avatars.ablations.training import Budget, Trainer
    from ..generation.avatar_model import embedded_model
    from ..training.base_model import load_base
    from ..training.loop import process_group

    if args.threads:
        torch.set_num_threads(args.threads)
    base = load_base(args.model or embedded_model())
    base.pipeline.to(process_group().device)  # where the trainings will be
    budget = Budget(
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        precision=args.mixed_precision,
        identity_loss_weight=args.identity_loss_weight,
        rates=rates(args.rate),
    )
    sampling = Sampling(args.identities, args.prompts, args.inference_steps, args.guidance_scale, args.batch)
    trainer = Trainer(
        base,
        args.data,
        args.out,
        budget,
        args.condition_embedder,
        args.keep_references,
        start=args.init_adapter,
        teacher=args.teacher,
    )
    laboratory = Laboratory(trainer, sampling, tuple(args.seeds), args.evaluator)
    for name in QUESTIONS if "all" in args.questions else args.questions:
        question = QUESTIONS[name].among(args.variants) if args.variants else QUESTIONS[name]
        if question.axis == "scale" and args.scales:
            question = question.along(args.scales)
        text = write_answer(question, laboratory.answer(question), laboratory, args.out / "answers")
        if args.docs is not None:
            fill(args.docs, question, text, args.out / "answers" / f"{name}.png")
        print(f"{question.number}. {question.name}: {question.asks}\n\n{text}\n")
    return 0


def listing() -> str:
    """Questions and variants, as text."""
    from ..avatars.ablations.questions import QUESTIONS
    from ..avatars.ablations.variants import VARIANTS

    lines = [f"{q.number}  {q.name:<12} {q.asks}\n{'':16}{', '.join(q.variants)}" for q in QUESTIONS.values()]
    lines += ["", *(f"{variant.name:<18} {variant.about}" for variant in VARIANTS.values())]
    return "\n".join(lines)


def rates(texts: list[str]) -> dict[str, float]:
    """`VARIANT=RATE` texts as numbers. Raises [`FaceFusionError`]."""
    from ..avatars.ablations.variants import VARIANTS

    found = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            found[name] = RATE(number)
        except argparse.ArgumentTypeError as error:
            raise FaceFusionError(f"--rate {text!r}: the rate {error}") from error
        if name not in VARIANTS:
            raise FaceFusionError(
                f"--rate {text!r}: write VARIANT=RATE, for example ip-adapter=5e-4; --list names them"
            )
    return found


def check_arguments(args: argparse.Namespace) -> None:
    """What can be known to be wrong before torch is imported. Raises [`FaceFusionError`]."""
    from ..avatars.ablations.questions import QUESTIONS
    from ..avatars.ablations.variants import METHOD, VARIANTS

    if not args.questions:
        raise FaceFusionError("no question given: name one, --list shows them")
    unknown = [name for name in args.questions if name not in (*QUESTIONS, "all")]
    if unknown:
        raise FaceFusionError(f"no question {unknown[0]!r}: choose from {', '.join(QUESTIONS)}, or all")
    for name in ("data", "out", "steps"):
        if getattr(args, name) is None:
            raise FaceFusionError(f"--{name} is missing")
    if args.steps < (1 if args.init_adapter is None else 0):
        raise FaceFusionError(f"--steps must be at least 1, or 0 with --init-adapter, got {args.steps}")
    if args.teacher is not None and not args.steps:
        raise FaceFusionError("--teacher teaches nothing without --steps")
    for name in args.variants or ():
        if name not in VARIANTS:
            raise FaceFusionError(f"no variant {name!r}: --list names them")
    if args.variants and METHOD not in args.variants:
        raise FaceFusionError(f"--variants needs {METHOD}, with which all are compared")
    rates(args.rate)
    if args.model is not None:
        check_model(args.model)
    if args.docs is not None:
        read_text(args.docs, "--docs")  # now, and not after the trainings
    if len(set(args.seeds)) != len(args.seeds):
        raise FaceFusionError(f"--seeds must be different numbers, got {args.seeds}")
