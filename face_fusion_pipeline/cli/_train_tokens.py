"""What the trainings of FaceStudio and FaceSnap share, whose weights make context tokens.

Options, and what looks at the pictures of a prepared folder.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import FaceFusionError


if TYPE_CHECKING:
    from ..training.base_model import BaseModel

CONDITIONERS = ("face-fusion", "face-studio", "face-snap")


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    both = parser.add_argument_group("FaceStudio and FaceSnap")
    both.add_argument(
        "--face-embedder",
        metavar="FILE_OR_NAME",
        help="what faces are known by: a .safetensors or .onnx file, 'insightface', or 'avatars'",
    )
    both.add_argument(
        "--image-encoder",
        default="",
        metavar="DIR_OR_HUB_ID",
        help="of style pictures, and of faces; default: the model's own",
    )


def check_token_arguments(args: argparse.Namespace) -> None:
    """Raise [`FaceFusionError`] for options that do not go with the conditioner that is trained."""
    snap = args.conditioner == "face-snap"
    if args.hidden_phrases and not snap:
        raise FaceFusionError(f"--hidden-phrases is of FaceSnap's training, not of {args.conditioner}'s: leave it out")
    if args.hidden_phrases and args.init_adapter is None:
        raise FaceFusionError(
            "--hidden-phrases teaches expressions to weights that know poses: train without it first, and name the "
            "result with --init-adapter"
        )
    if args.teacher and snap and not args.hidden_phrases:
        raise FaceFusionError("--teacher teaches FaceSnap what --hidden-phrases hides: name a file of phrases")
    if args.conditioner == "face-fusion":
        if args.teacher:
            raise FaceFusionError("--teacher is of FaceStudio's and FaceSnap's trainings: leave it out")
        return
    if not args.face_embedder:
        raise FaceFusionError(
            f"--conditioner {args.conditioner} needs a --face-embedder: a file, 'insightface', or 'avatars'"
        )
    not_of = ["keep_references", "validation_prompt", "face_mode"]
    not_of += ["identity_embedder"] if args.conditioner == "face-studio" else []
    for option in not_of:
        value = getattr(args, option, None)
        if value and value != "adapter":  # which is what --face-mode is by default
            flag = f"--{option.replace('_', '-')}"
            raise FaceFusionError(f"{flag} is of Face Fusion's training, not of {args.conditioner}'s: leave it out")


@dataclass(frozen=True)
class Looks:
    """A prepared folder, and what looks at its pictures."""

    rows: list[Any]
    cache: Any
    encoder: Any
    processor: Any
    embedder: Any

    @classmethod
    def of(cls, args: argparse.Namespace, base: BaseModel, folder: Path, kind: Any) -> Looks:
        """Those that the options name for weights of this kind."""
        from ..conditioner_tokens import image_encoder_of
        from ..training.latent_cache import cache_folders
        from ..training.preparation import read_rows

        base.pipeline._token_parts = {kind.NAME: {"image_encoder": args.image_encoder}}
        encoder, processor = image_encoder_of(base.pipeline, kind)
        cache = cache_folders(folder, base, args.augmentations)
        return cls(read_rows(folder), cache, encoder, processor, face_embedder(args.face_embedder))

    @property
    def metadata(self) -> dict[str, Any]:
        """What weights have to agree with."""
        return {"face_width": self.embedder.width, "face_embedder": self.embedder.name}

    def pairs(self, args: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
        """Examples of training, and of people set aside, or None."""
        from ..training.pairs import Pairs, split_people

        people, aside = split_people(self.rows, args.validation_people, args.seed)
        return Pairs(folder, self.cache, people), Pairs(folder, self.cache, aside) if aside else None


def face_embedder(name: str) -> Any:
    """See `face_embedders.load_face_embedder`; 'avatars' is the one of the embedded model."""
    from ..face_embedders import load_face_embedder
    from ..generation.avatar_model import embedded_model

    return load_face_embedder(Path(embedded_model()) / "face_studio" if name == "avatars" else name)
