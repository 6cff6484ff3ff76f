"""The options of `face-fusion train`: their names, what can be wrong with them, and the command they came from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..face_errors import FaceFusionError
from ..generation.arguments import add_version_arguments
from ._arguments import COUNT, DECAY, FRACTION, POSITIVE, POWER, RATE, SEED, STEPS, Gather, real, whole
from ._train_snap import add_snap_arguments
from ._train_studio import add_studio_arguments
from ._train_tokens import CONDITIONERS, add_token_arguments, check_token_arguments
from .prepare import add_selection_arguments, add_source_arguments, check_selection, given_words


SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train to_k_face and to_v_face for a Stable Diffusion model. A run that was killed goes on from its last "
        "checkpoint when the same command is given again. OUT gets the weights, a model card, checkpoints and logs."
    )
    parser.add_argument("--model", "--pretrained-model-name-or-path", required=True, metavar="DIR_OR_FILE_OR_HUB_ID")
    parser.add_argument(
        "--data",
        "--train-data-dir",
        "--dataset-name",
        required=True,
        metavar="DIR_OR_HUB_ID",
        help="a folder that `face-fusion prepare` made, or whatever that takes: it is prepared in OUT/prepared then",
    )
    parser.add_argument("--out", "--output-dir", type=Path, required=True, metavar="DIR")
    add_version_arguments(parser)
    parser.add_argument(
        "--seed", type=SEED, default=0, help="equal seeds give equal weights, on any number of processes"
    )

    parser.add_argument(
        "--conditioner", choices=CONDITIONERS, default=CONDITIONERS[0], help="what is trained: the system's weights"
    )

    length = parser.add_argument_group("length and speed")
    length.add_argument("--train-batch-size", type=COUNT, default=4, help="for each process and step of accumulation")
    length.add_argument("--gradient-accumulation-steps", type=COUNT, default=1, help="batches of a step")
    length.add_argument("--max-train-steps", type=COUNT, help="default: 10000, if no other length is given")
    length.add_argument("--num-train-epochs", type=POSITIVE, help="instead of --max-train-steps")
    length.add_argument("--max-train-minutes", type=POSITIVE, help="end by time; the learning rate decays with it")
    length.add_argument("--learning-rate", type=RATE, default=1e-4, help="the largest")
    length.add_argument("--lr-scheduler", choices=SCHEDULES, default="cosine")
    length.add_argument("--lr-warmup-steps", type=whole(0), default=200, help="steps in which the learning rate grows")
    length.add_argument("--adam-beta2", type=DECAY, default=0.999, help="of AdamW")
    length.add_argument("--adam-weight-decay", type=FRACTION, default=0.01, help="of AdamW")
    length.add_argument("--max-grad-norm", type=POSITIVE, default=1.0, help="larger gradients are scaled down")
    length.add_argument("--use-8bit-adam", action="store_true", help="less memory; needs bitsandbytes")
    length.add_argument(
        "--mixed-precision",
        choices=("auto", "no", "fp16", "bf16"),
        help="auto: bf16 where the device computes in it; default: as the launcher says, or no",
    )
    length.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    length.add_argument("--compile", action="store_true", help="torch.compile the UNet: worth it on a GPU")
    length.add_argument("--allow-tf32", action="store_true", help="quicker float32 products on recent GPUs")
    length.add_argument(
        "--keep-references", action="store_true", help="hold the reference pass of all faces in memory"
    )
    length.add_argument("--use-ema", action="store_true", help="average the weights")
    length.add_argument("--ema-decay", type=DECAY, default=0.999, help="of --use-ema")

    what = parser.add_argument_group("what is learned")
    what.add_argument("--init", choices=("attn1", "zero_v", "xavier"), default="attn1", help="initial weights")
    what.add_argument("--init-adapter", type=Path, metavar="PATH", help="start from these weights, a file or folder")
    what.add_argument("--reference-timestep", type=whole(0, 999), default=0, help="noise level of the reference pass")
    what.add_argument(
        "--face-mode",
        choices=("adapter", "both"),
        default="adapter",
        help="how the weights will be used: with both, the reference is at the self-attention as well, and they learn "
        "what it lacks",
    )
    what.add_argument("--token-count-bias", action="store_true", help="log(text tokens / face tokens) on face logits")
    what.add_argument("--text-dropout", type=FRACTION, default=0.05, help="fraction of examples without their prompt")
    what.add_argument("--face-dropout", type=FRACTION, default=0.05, help="fraction without their face")
    what.add_argument("--both-dropout", type=FRACTION, default=0.05, help="fraction without both")
    what.add_argument("--timestep-power", type=POWER, default=1.0, help="below 1: noisy steps more often")
    what.add_argument("--snr-gamma", type=POSITIVE, help="min-SNR weighting of the loss, for example 5")
    what.add_argument("--snr-keep-noisy", action="store_true", help="with v-prediction: noisy steps at full weight")
    what.add_argument("--face-loss-weight", type=POSITIVE, default=1.0, help="weight of the loss inside the face box")
    what.add_argument(
        "--identity-loss-weight",
        type=real(),
        default=0.0,
        help="weight of the predicted face's likeness; of FaceSnap 0.1, where there is an embedder",
    )
    what.add_argument("--identity-embedder", metavar="NAME", help="'avatars', or MODULE:FUNCTION that returns one")
    what.add_argument(
        "--identity-loss-from",
        type=FRACTION,
        default=0.0,
        help="fraction of the timesteps that are at too little noise to have it",
    )
    what.add_argument(
        "--identity-loss-until", type=FRACTION, default=0.25, help="fraction of the timesteps up to which they have it"
    )
    what.add_argument(
        "--identity-loss-jitter",
        type=FRACTION,
        default=0.0,
        help="0 to 1: look at faces a little differently each time",
    )

    look = parser.add_argument_group("checkpoints, validation, publishing")
    look.add_argument("--checkpointing-steps", type=COUNT, default=500, help="between two checkpoints")
    look.add_argument("--checkpoints-total-limit", type=COUNT, help="keep only so many")
    look.add_argument(
        "--resume-from-checkpoint",
        default="latest",
        metavar="latest|none|DIR",
        help="latest: go on where an earlier run in OUT ended, if there was one",
    )
    look.add_argument(
        "--validation-prompt", nargs="+", action=Gather, metavar="TEXT", help="what pictures are drawn of meanwhile"
    )
    look.add_argument(
        "--validation-image", nargs="+", action=Gather, metavar="FILE", help="of whom; default: people set aside"
    )
    look.add_argument("--validation-steps", type=COUNT, default=500, help="between two validations")
    look.add_argument("--validation-inference-steps", type=STEPS, default=25, help="denoising steps of a picture")
    look.add_argument(
        "--validation-people",
        type=whole(0),
        metavar="N",
        help="set aside; default: 1 in 20, 2 to 32, of four or more",
    )
    look.add_argument(
        "--log-every", type=COUNT, default=20, metavar="STEPS", help="steps between two lines of the log"
    )
    look.add_argument("--report-to", metavar="TRACKER", help="tensorboard, wandb, ... or all")
    look.add_argument("--push-to-hub", action="store_true")
    look.add_argument("--hub-model-id", metavar="OWNER/NAME", help="you, and the repository; default: the name of OUT")
    look.add_argument("--hub-private-repo", action="store_true")
    add_token_arguments(parser)
    add_studio_arguments(parser)
    add_snap_arguments(parser)
    add_source_arguments(parser)
    add_selection_arguments(parser)


def command_line(args: argparse.Namespace) -> list[str]:
    """The command that gives these arguments, without those that are at their defaults."""
    return ["face-fusion", "train", *given_words(args, add_arguments)]


def loss_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say that the training of every conditioner asks for, see `training.task.FaceFusionOptions`."""
    return {
        "text_dropout": args.text_dropout,
        "face_dropout": args.face_dropout,
        "both_dropout": args.both_dropout,
        "timestep_power": args.timestep_power,
        "snr_gamma": args.snr_gamma,
        "keep_noisy": args.snr_keep_noisy,
        "face_loss_weight": args.face_loss_weight,
        "gradient_checkpointing": args.gradient_checkpointing,
    }


def check_arguments(args: argparse.Namespace) -> None:
    """Everything that can be known to be wrong before torch is imported. Raises [`FaceFusionError`]."""
    check_selection(args)
    check_token_arguments(args)
    if args.text_dropout + args.face_dropout + args.both_dropout > 1:
        raise FaceFusionError("--text-dropout, --face-dropout and --both-dropout add up to more than 1")
    weighed = args.identity_loss_weight > 0 or (args.conditioner == "face-snap" and args.identity_embedder is not None)
    if weighed != (args.identity_embedder is not None):
        raise FaceFusionError("--identity-loss-weight and --identity-embedder go together")
    if args.identity_loss_from >= args.identity_loss_until and args.identity_loss_weight:
        raise FaceFusionError(
            f"--identity-loss-from {args.identity_loss_from} leaves nothing below --identity-loss-until "
            f"{args.identity_loss_until}"
        )
    if args.validation_image and not args.validation_prompt:
        raise FaceFusionError("--validation-image needs a --validation-prompt")
    resume(args.resume_from_checkpoint, args.out)


def resume(given: str, out: Path) -> str:
    """`LoopOptions.resume` for what was given; refuses what would mix the checkpoints of two runs."""
    from ..training.checkpoints import numbered_states

    if given == "latest":
        return "auto"
    folder = None
    if given != "none":
        folder = next((path.resolve() for path in (Path(given), out / given) if path.is_dir()), None)
        if folder is None:
            raise FaceFusionError(f"--resume-from-checkpoint {given}: there is no such folder, nor one in {out}")
    there = [state.parent.resolve() for state in numbered_states(out)]
    in_the_way = there[there.index(folder) + 1 :] if folder in there else there
    if in_the_way:
        raise FaceFusionError(
            f"{out} has {in_the_way[-1].name} of an earlier run: resume it (--resume-from-checkpoint latest), move "
            "it away, or take another --out"
        )
    return "never" if folder is None else str(folder)
