"""Conditioners of the variants: an encoder of references, trained projections, and a form of attention.

All train by one task and draw by the package's pipeline, as any conditioner does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...conditioner import Conditioner, IdentityOptions, Person, PictureRow
from ...face_attention import FaceCall, FaceFusionAttnProcessor, LayerPeople
from ...face_errors import InvalidScaleError
from ...face_ownership import installed_processors
from ...joint_attention import PersonKeys
from ...training.pairs import Pairs
from .added_attention import AddedFaceAttnProcessor
from .encoders import Photo
from .variants import Variant


@dataclass(frozen=True, eq=False, repr=False)
class References:
    """What a frozen encoder makes of the photos of one person: name -> (n_refs, tokens, width)."""

    states: dict[str, Tensor]
    mode: str

    @property
    def n_refs(self) -> int:
        """Number of reference photos."""
        return len(next(iter(self.states.values())))


class Conditioning(Conditioner):
    """A frozen encoder of references and the way of its tokens into the UNet, which is what a variant trains.

    Attributes:
        adapter: what is trained of it.
    """

    unet: Any
    adapter: nn.Module

    def __init__(self, variant: Variant) -> None:
        self.variant, self.mode = variant, f"ablation {variant.name}"

    @abstractmethod
    def from_data(self, pairs: Pairs, references: list[tuple[int, int]]) -> Tensor:
        """What [`states`] takes (B, ...), of references of prepared data."""

    @abstractmethod
    def from_photos(self, photos: list[Photo]) -> Tensor:
        """The same of B photos."""

    @abstractmethod
    def states(self, inputs: Tensor) -> dict[str, Tensor]:
        """What the frozen encoder makes of them: name -> (B, tokens, width)."""

    @abstractmethod
    def seen(
        self, states: Mapping[str, Tensor], has_face: Tensor | None = None, scale: float = 1.0
    ) -> dict[str, PersonKeys]:
        """What each layer sees of the faces of a batch.

        Args:
            states: name -> (B or 1, references, tokens, width).
            has_face: bool (B,), False hides the face of that row.
            scale: strength >= 0.
        """

    def unseen(self, people: Sequence[Person]) -> dict[str, PersonKeys]:
        """What each layer sees in rows without a face, in pictures of `people`; nothing at all where it is missing."""
        return {}

    def applied(self, states: Mapping[str, Tensor], has_face: Tensor | None = None) -> AbstractContextManager[None]:
        """Within it a batch of the UNet sees the references, see [`seen`]; gradients reach `adapter`."""
        form = FaceFusionAttnProcessor if self.variant.attention == "joint" else AddedFaceAttnProcessor
        seen = self.seen(states, has_face)
        return installed_processors(self.unet, {name: form([LayerPeople((face,))]) for name, face in seen.items()})

    # --- As a conditioner of the pipeline ------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, pipe: Any, images: Any, options: IdentityOptions) -> References:
        """Of one or several [`Photo`]s of a person."""
        photos = [images] if isinstance(images, Photo) else list(images)
        return self.adjusted(pipe, References(self.states(self.from_photos(photos)), self.mode), options)

    def adjusted(self, pipe: Any, identity: References, options: IdentityOptions) -> References:
        if options.weights is not None:
            raise InvalidScaleError(f"face weights {options.weights}: references of an ablation count equally")
        return identity

    def keys(self, pipe: Any, person: Person) -> dict[str, PersonKeys]:
        return self.seen({name: state[None] for name, state in person.identity.states.items()}, scale=person.scale)

    def _processors(self, pipe: Any, rows: Sequence[PictureRow], call: FaceCall) -> dict[str, FaceFusionAttnProcessor]:
        processors = super()._processors(pipe, rows, call)
        if self.variant.attention == "joint":
            return processors
        unseen = self.unseen(rows[0].people)
        return {name: AddedFaceAttnProcessor(p.shares, call, unseen.get(name)) for name, p in processors.items()}
