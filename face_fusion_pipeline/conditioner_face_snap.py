"""FaceSnap: a ControlNet sees where the points of a face are, and reads who it is in the place of a text.

The people of a call are seen by it in their regions. They are FaceSnap's own, or those of another conditioner, such as
Face Fusion, which then carries the identity in the UNet. FaceSnap's own are seen by the UNet only where their tokens
are appended to its text.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .call_arguments import Call
from .conditioner import IdentityOptions, Person, PictureRow, is_identity, register_conditioner
from .conditioner_tokens import (
    EmbeddedIdentity,
    TokenConditioner,
    TokenContext,
    check_image_width,
    image_encoder_of,
    loaded,
    projected,
)
from .face_attached import at_home
from .face_attention import FaceCall
from .face_errors import FaceFusionError, IdentityMismatchError
from .face_ownership import installed_processors, sole_use
from .face_pictures import load_images
from .face_snap import FaceMixer
from .face_style import in_oval, picture_patches
from .joint_attention import PersonKeys


MODE = "face-snap"
IDENTITY_FORMAT = "face-snap-identity"


@dataclass(frozen=True, eq=False, repr=False)
class SnapIdentity(EmbeddedIdentity):
    """The face of one person as embeddings, see [`EmbeddedIdentity`], and as the patches `(n_refs, P, width)`."""

    features: Tensor

    mode = MODE
    FORMAT = IDENTITY_FORMAT
    TENSORS = {**EmbeddedIdentity.TENSORS, "features": 3}


class SnapContext(TokenContext):
    """What the ControlNet of a call reads: the tokens of its people.

    Args:
        network: the ControlNet.
        known: by `id(person)`, the identities of the people; who is missing is read as nobody, and so is everybody at
            strength 0.
    """

    def __init__(self, pipe: Any, network: Any, known: Mapping[int, SnapIdentity]) -> None:
        super().__init__(network, replaces=True)
        self.pipe, self.known = pipe, known
        self.mixer: FaceMixer = loaded(pipe, FaceMixer)

    def tokens(self, row: int, person: Person | None) -> Tensor:
        identity = None if person is None else self.known.get(id(person))
        if person is None or identity is None:
            return self.nothing()
        return torch.lerp(self.nothing(), mixed_tokens(self.pipe, identity), person.scale)

    @torch.no_grad()
    def nothing(self) -> Tensor:
        return at_home(self.mixer, self.pipe._execution_device)

    def shows(self, person: Person) -> bool:
        return True

    @contextmanager
    def installed(self, rows: Sequence[PictureRow], call: FaceCall) -> Iterator[None]:
        """Within it the ControlNet reads the tokens of the people of `rows`, and no text."""
        with sole_use(self.network), installed_processors(self.network, self.processors(rows, call, {})):
            yield


@torch.no_grad()
def mixed_tokens(pipe: Any, identity: SnapIdentity) -> Tensor:
    """Σ β_i f_mix^i: tokens `(1, N, width)` of a person."""
    found = at_home(loaded(pipe, FaceMixer), pipe._execution_device, identity.embeddings, identity.features)
    return (identity.shares.to(found)[:, None, None] * found).sum(0, keepdim=True)


class SnapConditioner(TokenConditioner):
    """Identity by FaceSnap: tokens of a face for its ControlNet, and perhaps for the UNet."""

    mode = MODE
    weights = FaceMixer

    def encode(self, pipe: Any, images: Any, options: IdentityOptions) -> SnapIdentity:
        """Embeddings of face crops, and the patches of what an oval shows of them."""
        metadata = loaded(pipe, FaceMixer).metadata
        pictures = load_images(images)
        embeddings, embedder = self.embeddings(pipe, pictures)
        encoder, processor = image_encoder_of(pipe, FaceMixer)
        features = picture_patches(encoder, [in_oval(picture, metadata.oval) for picture in pictures], processor)
        check_image_width(FaceMixer, metadata, features.shape[-1])
        return SnapIdentity(embeddings, torch.ones(len(pictures)), embedder, features).with_weights(options.weights)

    def adjusted(self, pipe: Any, identity: SnapIdentity, options: IdentityOptions) -> SnapIdentity:
        found: SnapIdentity = super().adjusted(pipe, identity, options)
        width = loaded(pipe, FaceMixer).metadata.image_width
        if found.features.shape[-1] != width:
            raise IdentityMismatchError(
                f"this identity has patches of {found.features.shape[-1]} numbers, the FaceSnap weights take {width}: "
                "encode the face again with `pipe.encode_face(...)`"
            )
        return found

    def keys(self, pipe: Any, person: Person) -> dict[str, PersonKeys]:
        """Those of the tokens, where the UNet sees them, too."""
        if loaded(pipe, FaceMixer).metadata.context == "none":
            return {}
        tokens = mixed_tokens(pipe, person.identity)
        return {
            name: PersonKeys(key[None], value[None], scale=person.scale * pipe._layer_scale(name), embedded=True)
            for name, (key, value) in projected(pipe.unet, tokens).items()
            if pipe._layer_scale(name) > 0
        }


def snap_context(
    pipe: Any,
    call: Call,
    wanted: Sequence[Sequence[Any]],
    people: Sequence[Sequence[Person]],
    options: Sequence[IdentityOptions],
) -> SnapContext | None:
    """What FaceSnap's ControlNet reads in a call; None where it takes no part.

    Args:
        wanted: the people as the call asked for them, see `face_people.Wanted`: by photos or an identity.
        people: the same, with the identities that the UNet sees.
        options: of each of them, see `face_people.Faces.options`.

    Raises:
        FaceFusionError: people of FaceSnap whom nothing would show, or `guess_mode`.
    """
    network = pipe._token_network
    if network is None:
        own = any(person.identity.mode == MODE for row in people for person in row)
        if own and loaded(pipe, FaceMixer).metadata.context == "none":
            raise FaceFusionError(
                "people of FaceSnap are seen by its ControlNet: give a driver_image, or name another system with "
                "identity_by="
            )
        return None
    if call.arguments.get("guess_mode") or network.config.global_pool_conditions:
        raise FaceFusionError("guess_mode is of ControlNets that read a text, FaceSnap's reads who is shown")
    conditioner, known = SnapConditioner(), {}
    for person, asked, each in zip(chain(*people), chain(*wanted), options, strict=True):
        if person.identity.mode == MODE:
            known[id(person)] = person.identity
        elif not is_identity(asked.face):
            known[id(person)] = conditioner.encode(pipe, asked.face, each)
    return SnapContext(pipe, network, known)


register_conditioner(SnapConditioner())
