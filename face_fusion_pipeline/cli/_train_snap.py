"""The options of `face-fusion train --conditioner face-snap`, and the task they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._arguments import COUNT, FRACTION, real, whole
from ._driver_options import face_model
from ._train_tokens import Looks


if TYPE_CHECKING:
    from ..face_snap import FaceMixer
    from ..training.base_model import BaseModel
    from ..training.snap import SnapTask
    from ..training.snap_cache import SnapFeatures


def add_snap_arguments(parser: argparse.ArgumentParser) -> None:
    snap = parser.add_argument_group("FaceSnap (--conditioner face-snap)")
    snap.add_argument(
        "--face-model", metavar="FILE", help="that finds facial points; default: that of $FACE_FUSION_FACE_MODEL"
    )
    snap.add_argument("--landmarker", metavar="FILE_OR_NAME", help="of a face model of photos, see docs/facesnap.md")
    snap.add_argument("--snap-tokens", type=COUNT, default=16, help="context tokens that the mixer makes")
    snap.add_argument("--snap-depth", type=whole(1, 64), default=4, help="layers of the mixer's decoder")
    snap.add_argument(
        "--snap-context",
        choices=("none", "append"),
        default="none",
        help="what the UNet itself sees of the tokens: none, or they are appended to its text",
    )
    snap.add_argument(
        "--init-controlnet",
        metavar="DIR_OR_HUB_ID",
        help="ControlNet of this model to begin with, such as one of depth or of poses; default: the UNet's encoder",
    )
    snap.add_argument(
        "--snap-oval", type=real(0, 2), default=0.9, help="how much of a reference is seen, over its crop; 0: all"
    )
    snap.add_argument(
        "--hidden-phrases",
        metavar="FILE",
        help="what captions say that points show as well, such as expressions, one phrase a line, or 'avatars': not "
        "read in half of the examples, so that it is learned from the points; with --init-adapter",
    )
    snap.add_argument("--points-dropout", type=FRACTION, default=0.05, help="share of examples without their points")


def create_snap_task(
    args: argparse.Namespace, base: BaseModel, folder: Path, precision: Any, loss: dict[str, Any]
) -> SnapTask:
    """New weights, features of the prepared folder, and the task; the base gets its precision.

    Args:
        loss: the options that the training of every conditioner has.
    """
    from ..face_snap import NETWORK, FaceMixer, new_mixer, new_network
    from ..training.hidden_phrases import encode_without
    from ..training.initial_weights import continued_tokens
    from ..training.objective import load_face_embedder
    from ..training.snap import HIDDEN_FRACTION, IDENTITY_LOSS_WEIGHT, SnapOptions, SnapTask

    looks, features = snap_data(args, base, folder)
    pairs, held_out = looks.pairs(args, folder)
    phrases = hidden_phrases(args.hidden_phrases)
    hidden = encode_without(folder, base, looks.cache, phrases) if phrases else None
    base.cast(precision)
    seen_by = {**looks.metadata, "image_width": looks.encoder.config.hidden_size, "oval": args.snap_oval}
    start = args.init_controlnet
    if args.init_adapter is None:
        sizes = {"tokens": args.snap_tokens, "depth": args.snap_depth, "context": args.snap_context}
        mixer = new_mixer(base.unet, **seen_by, **sizes, image_encoder=args.image_encoder)
    else:
        mixer = continued_tokens(base.unet, FaceMixer, args.init_adapter, **seen_by)
        folder_of = args.init_adapter if args.init_adapter.is_dir() else args.init_adapter.parent
        start = start or str(folder_of / NETWORK)
    network = new_network(base.unet, base.pipeline.vae_scale_factor, start)
    embedder = load_face_embedder(args.identity_embedder) if args.identity_embedder else None
    options = SnapOptions(
        **loss,
        points_dropout=args.points_dropout,
        hidden_fraction=HIDDEN_FRACTION if hidden else 0.0,
        identity_loss_weight=(args.identity_loss_weight or IDENTITY_LOSS_WEIGHT) if embedder else 0.0,
        identity_loss_jitter=args.identity_loss_jitter,
    )
    teacher = snap_weights(base, args.teacher) if args.teacher else None
    return SnapTask(base, mixer, network, pairs, features, held_out, options, embedder, hidden, teacher)


def snap_weights(base: BaseModel, path: Path) -> tuple[FaceMixer, Any]:
    """Mixer and ControlNet in a folder, or beside the mixer's file, attached to nothing."""
    from ..face_attached import read_attached
    from ..face_snap import NETWORK, SNAP_WEIGHTS_NAME, FaceMixer, check_network, load_network

    folder = path if path.is_dir() else path.parent
    mixer, _ = read_attached(base.unet, FaceMixer, path / SNAP_WEIGHTS_NAME if path.is_dir() else path)
    network = load_network(folder / NETWORK)
    check_network(network, base.unet)
    return mixer, network


def snap_data(args: argparse.Namespace, base: BaseModel, folder: Path) -> tuple[Looks, SnapFeatures]:
    """What looks at a prepared folder, and its features, which are computed where they are missing."""
    from ..face_recognisers import name_with_digest
    from ..face_snap import FaceMixer
    from ..training.snap_cache import SnapFeatures, encode_snap_features

    looks, model = Looks.of(args, base, folder, FaceMixer), face_model(args)
    files = [str(path) for path in (args.face_model, args.landmarker) if path]
    names = [name_with_digest(Path(name)) if Path(name).is_file() else name for name in files]
    made = encode_snap_features(
        *(folder, base, looks.cache, looks.encoder, looks.embedder, model),
        model_name=" ".join([model.name, *names]),
        oval=args.snap_oval,
        processor=looks.processor,
    )
    features = SnapFeatures(made, len(looks.rows))
    print(f"facial points of {features.fitted} of {features.count} pictures are known")
    return looks, features


def hidden_phrases(given: str | None) -> tuple[str, ...]:
    """Those of a file; 'avatars' are the words of expressions in the captions of avatars."""
    from ..avatars.world.caption import EXPRESSION_WORDS
    from ..training.hidden_phrases import read_phrases

    if given is None:
        return ()
    if given == "avatars":
        return tuple(phrase for phrases in EXPRESSION_WORDS.values() for phrase in phrases)
    return read_phrases(Path(given))
