"""The options of `face-fusion train --conditioner face-studio`, and the task they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import COUNT, FRACTION, real, whole
from ._train_tokens import Looks


if TYPE_CHECKING:
    from ..training.base_model import BaseModel
    from ..training.studio import StudioTask

CONTEXTS = ("replace", "append")


def add_studio_arguments(parser: argparse.ArgumentParser) -> None:
    studio = parser.add_argument_group("FaceStudio (--conditioner face-studio)")
    studio.add_argument(
        "--prior", default="", metavar="DIR_OR_HUB_ID", help="from text to its embeddings, for the weights' metadata"
    )
    studio.add_argument("--studio-tokens", type=COUNT, default=8, help="context tokens that the Linear makes")
    studio.add_argument("--studio-rank", type=whole(0, 1024), default=16, help="of the LoRA; 0: none")
    studio.add_argument(
        "--studio-context", choices=("replace", "append"), default="replace", help="what calls default to"
    )
    studio.add_argument(
        "--picture-mask", type=real(0, 5), default=1.5, help="side of what covers a face, over its box"
    )
    studio.add_argument("--style-dropout", type=FRACTION, default=0.64, help="share of examples without their picture")
    studio.add_argument("--whole-pictures", type=FRACTION, default=0.0, help="share of pictures that are not covered")
    studio.add_argument(
        "--appended", type=FRACTION, default=0.5, help="share of batches in which tokens follow the text"
    )
    studio.add_argument(
        "--teacher",
        type=Path,
        metavar="PATH",
        help="Face Fusion weights to learn from; with --hidden-phrases FaceSnap weights that know poses (default: "
        "those of --init-adapter)",
    )
    studio.add_argument("--teacher-weight", type=FRACTION, default=0.7, help="share of them in what is learned")
    studio.add_argument(
        "--fit-captions", action="store_true", help="begin with tokens that say what the captions say: a shortcut"
    )


def create_studio_task(
    args: argparse.Namespace, base: BaseModel, folder: Path, precision: Any, loss: dict[str, Any]
) -> StudioTask:
    """New weights in the UNet, embeddings of the prepared folder, and the task; the base gets its precision.

    Args:
        loss: the options that the training of every conditioner has.
    """
    from ..face_studio import FaceStudio, new_studio
    from ..training.initial_weights import continued_adapter, continued_tokens
    from ..training.studio import StudioOptions, StudioTask, fit_to_captions
    from ..training.studio_cache import Embeddings, encode_embeddings

    looks = Looks.of(args, base, folder, FaceStudio)
    encoder, embedder = looks.encoder, looks.embedder
    made = encode_embeddings(
        *(folder, base, looks.cache, encoder, embedder), mask=args.picture_mask, processor=looks.processor
    )
    embeddings = Embeddings(made, len(looks.rows))
    pairs, held_out = looks.pairs(args, folder)
    base.cast(precision)
    seen_by = {**looks.metadata, "image_width": encoder.config.projection_dim, "picture_mask": args.picture_mask}
    if args.init_adapter is None:
        sizes = {"tokens": args.studio_tokens, "context": args.studio_context, "rank": args.studio_rank}
        studio = new_studio(base.unet, **seen_by, **sizes, image_encoder=args.image_encoder, prior=args.prior)
    else:
        studio = continued_tokens(base.unet, FaceStudio, args.init_adapter, **seen_by)
    studio.float()
    if args.fit_captions:
        explained = fit_to_captions(studio, pairs, embeddings)
        print(f"the tokens begin with {100 * explained:.0f} % of what the captions' last states say")
    options = StudioOptions(
        **loss,
        style_dropout=args.style_dropout,
        whole_pictures=args.whole_pictures,
        appended=args.appended,
        teacher_weight=args.teacher_weight if args.teacher else 0.0,
    )
    teacher = None
    if args.teacher:
        teacher = continued_adapter(base.unet, args.teacher, {})
    return StudioTask(base, studio, pairs, embeddings, held_out, options, teacher)
