"""Conditioners: ways in which a picture depends on references, each under the name that `face_mode` asks for it by.

A conditioner turns references into an identity that is kept and reused (`encode`), says what an identity adds to the
keys and values of each attention layer (`keys`), and lets a UNet see people for the time of a call (`installed`).
A new one is a file with a subclass, registered by [`register_conditioner`].
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .face_attention import FaceCall, FaceFusionAttnProcessor, LayerPeople
from .face_errors import FaceFusionError, IdentityMismatchError
from .face_layout import Regions
from .face_ownership import installed_processors
from .joint_attention import PersonKeys


@dataclass(frozen=True)
class Person:
    """Somebody in a picture: an identity of a conditioner, and how strongly it is seen."""

    identity: Any
    scale: float = 1.0


@dataclass(frozen=True)
class PictureRow:
    """Who is in the pictures of one row, and which queries see whom: number of queries -> regions; None: all."""

    people: tuple[Person, ...]
    regions: Mapping[int, Regions] | None = None


@dataclass(frozen=True)
class IdentityOptions:
    """What a call wants of an identity; None: as it is, or as the model recommends. See `FaceFusionMixin.encode_face`.

    Attributes:
        weights: of the references.
        resolution: of the pictures that are encoded, in pixels.
        self_attention, self_scale: what the self-attention sees, and how strongly.
        mirrored: whether each picture is shown mirrored as well.
        lora_scale: strength of LoRAs in this call alone.
        familiarity: a `face_familiarity.Familiarity` that is to say whether the model knows such pictures.
    """

    weights: Any = None
    resolution: int | None = None
    self_attention: Any = None
    self_scale: float | None = None
    mirrored: bool | None = None
    lora_scale: float | None = None
    familiarity: Any = None


def is_identity(face: Any) -> bool:
    """Whether `face` is an identity of a conditioner; a class loaded through diffusers is not the installed one, hence
    no type."""
    return isinstance(getattr(face, "n_refs", None), int) and isinstance(getattr(face, "mode", None), str)


class Conditioner(ABC):
    """A way from references to what attention layers see of them.

    Attributes:
        mode: its name, and the `mode` of its identities. An identity also has `n_refs`, its number of references.
    """

    mode: str

    @abstractmethod
    def encode(self, pipe: Any, images: Any, options: IdentityOptions) -> Any:
        """An identity of one or several references of one person, by the models of `pipe`."""

    @abstractmethod
    def adjusted(self, pipe: Any, identity: Any, options: IdentityOptions) -> Any:
        """An identity with the weights and strength of `options`, checked against the models of `pipe`.

        Raises:
            IdentityMismatchError: other models encoded it.
        """

    @abstractmethod
    def keys(self, pipe: Any, person: Person) -> dict[str, PersonKeys]:
        """Layer name -> what a person adds to its keys and values; layers where nobody sees it may be left out."""

    @contextmanager
    def installed(self, pipe: Any, rows: Sequence[PictureRow], call: FaceCall, context: Any = None) -> Iterator[None]:
        """Within it the UNet of `pipe` sees the people of `rows`.

        Args:
            rows: one for all pictures, or one for each equal share of them, in order.
            call: which rows of a batch see faces, and when.
            context: what else they see than text, a `conditioner_tokens.TokenContext`.

        Raises:
            IdentityMismatchError: people are seen at different layers.
        """
        processors = self._processors(pipe, rows, call)
        if context is not None:
            processors = context.processors(rows, call, processors)
        with installed_processors(pipe.unet, processors):
            yield

    def _processors(self, pipe: Any, rows: Sequence[PictureRow], call: FaceCall) -> dict[str, FaceFusionAttnProcessor]:
        people = {id(person): person for row in rows for person in row.people}  # one may be in several rows
        keys = {key: self.keys(pipe, person) for key, person in people.items()}
        if len({frozenset(layers) for layers in keys.values()}) > 1:
            raise IdentityMismatchError(
                "people of one call must be seen at the same layers: encode them again with one `self_attention`"
            )
        seen = {name for layers in keys.values() for name, added in layers.items() if added.seen}
        if "perturbed" in call.roles:
            check_not_perturbed(seen, pipe.pag_applied_layers)
        return {
            name: FaceFusionAttnProcessor(
                [LayerPeople(tuple(keys[id(person)][name] for person in row.people), row.regions) for row in rows],
                call,
            )
            for name in next(iter(keys.values()), {})
            if name in seen
        }


def one_mode(people: Sequence[Sequence[Person]]) -> str | None:
    """The mode of all people of a call, None without people. Raises IdentityMismatchError: there are several."""
    modes = {person.identity.mode for row in people for person in row}
    if len(modes) > 1:
        raise IdentityMismatchError(
            f"people of one call must be encoded in one mode, got {' and '.join(sorted(modes))}: encode them together "
            "with `encode_people`, or each with the same `face_mode`"
        )
    return modes.pop() if modes else None


SYSTEMS = ("face-fusion", "face-studio", "face-snap")  # of `identity_by`; the modes of all but the first are theirs


def mode_by(pipe: Any, identity_by: str | None, mode: str | None) -> str | None:
    """The mode that a call asks for by `identity_by` and `face_mode`.

    Raises:
        FaceFusionError: a system that there is not, or the two contradict each other.
    """
    if identity_by is None:
        return mode
    if identity_by not in SYSTEMS:
        raise FaceFusionError(f"identity_by must be {' or '.join(SYSTEMS)}, got {identity_by!r}")
    if mode is not None and (mode if mode in SYSTEMS else SYSTEMS[0]) != identity_by:
        raise FaceFusionError(f"identity_by={identity_by!r} and face_mode={mode!r} name two systems: give one of them")
    if identity_by != SYSTEMS[0]:
        return identity_by
    return "training-free" if mode is None and pipe._face_adapter is None else mode


def check_not_perturbed(seen: set[str], patterns: Sequence[str]) -> None:
    """Raise FaceFusionError where PAG would take the place of a self-attention layer that sees faces."""
    for name in sorted(seen):
        if name.endswith(".attn1") and any(re.search(pattern, name) for pattern in patterns):
            raise FaceFusionError(
                f"{name} sees a face, and its attention is perturbed (pag_applied_layers={list(patterns)}): encode "
                "the face in the mode 'adapter', or with `self_attention=SelfAttentionReference(layers=...)` of others"
            )


_conditioners: dict[str, Conditioner] = {}


def register_conditioner(conditioner: Conditioner) -> None:
    """Let `face_mode=conditioner.mode` and identities of this mode mean `conditioner`."""
    _conditioners[conditioner.mode] = conditioner


def conditioner_of(mode: Any) -> Conditioner:
    """The conditioner of this name. Raises FaceFusionError that lists those that there are."""
    if mode not in _conditioners:
        raise FaceFusionError(f"face_mode must be one of {', '.join(_conditioners)} or None, got {mode!r}")
    return _conditioners[mode]
