"""The options of `face-fusion train --conditioner face-studio`, and the task they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import FaceFusionError
from ._arguments import COUNT, FRACTION, real, whole


if TYPE_CHECKING:
    from ..training.base_model import BaseModel
    from ..training.studio import StudioTask

CONDITIONERS = ("face-fusion", "face-studio")
CONTEXTS = ("replace", "append")


def add_studio_arguments(parser: argparse.ArgumentParser) -> None:
    studio = parser.add_argument_group("FaceStudio (--conditioner face-studio)")
    studio.add_argument(
        "--face-embedder",
        metavar="FILE_OR_NAME",
        help="what faces are known by: a .safetensors or .onnx file, 'insightface', or 'avatars'",
    )
    studio.add_argument(
        "--image-encoder", default="", metavar="DIR_OR_HUB_ID", help="of style pictures; default: the model's own"
    )
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
    studio.add_argument("--teacher", type=Path, metavar="PATH", help="Face Fusion weights to learn from")
    studio.add_argument("--teacher-weight", type=FRACTION, default=0.7, help="share of them in what is learned")
    studio.add_argument(
        "--fit-captions", action="store_true", help="begin with tokens that say what the captions say: a short way"
    )


def check_studio_arguments(args: argparse.Namespace) -> None:
    """Raise [`FaceFusionError`] for options that do not go together."""
    if args.conditioner != "face-studio":
        return
    if not args.face_embedder:
        raise FaceFusionError("--conditioner face-studio needs a --face-embedder: a file, 'insightface', or 'avatars'")
    for option in ("init_adapter", "identity_embedder", "keep_references", "validation_prompt"):
        if getattr(args, option, None):
            raise FaceFusionError(f"--{option.replace('_', '-')} is of Face Fusion's training, not of FaceStudio's")


def create_studio_task(
    args: argparse.Namespace, base: BaseModel, folder: Path, precision: Any, loss: dict[str, Any]
) -> StudioTask:
    """New weights in the UNet, embeddings of the prepared folder, and the task; the base gets its precision.

    Args:
        loss: the options that the training of every conditioner has.
    """
    from ..conditioner_tokens import image_encoder_of
    from ..face_studio import STUDIO, FaceStudio, new_studio
    from ..training.initial_weights import continued_adapter
    from ..training.latent_cache import cache_folders
    from ..training.pairs import Pairs, split_people
    from ..training.preparation import read_rows
    from ..training.studio import StudioOptions, StudioTask, fit_to_captions
    from ..training.studio_cache import Embeddings, encode_embeddings

    rows = read_rows(folder)
    cache = cache_folders(folder, base, args.augmentations)
    base.pipeline._token_parts = {STUDIO: {"image_encoder": args.image_encoder}}
    encoder, processor = image_encoder_of(base.pipeline, FaceStudio)
    embedder = face_embedder(args.face_embedder)
    made = encode_embeddings(folder, base, cache, encoder, embedder, mask=args.picture_mask, processor=processor)
    embeddings = Embeddings(made, len(rows))
    people, aside = split_people(rows, args.validation_people, args.seed)
    pairs, held_out = Pairs(folder, cache, people), Pairs(folder, cache, aside) if aside else None
    base.cast(precision)
    studio = new_studio(
        base.unet,
        image_width=encoder.config.projection_dim,
        face_width=embedder.width,
        face_embedder=embedder.name,
        image_encoder=args.image_encoder,
        prior=args.prior,
        tokens=args.studio_tokens,
        context=args.studio_context,
        rank=args.studio_rank,
        picture_mask=args.picture_mask,
    )
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


def face_embedder(name: str) -> Any:
    """See `face_embedders.load_face_embedder`; 'avatars' is the one of the embedded model."""
    from ..avatar_model import embedded_model
    from ..face_embedders import load_face_embedder

    return load_face_embedder(Path(embedded_model()) / "face_studio" if name == "avatars" else name)
