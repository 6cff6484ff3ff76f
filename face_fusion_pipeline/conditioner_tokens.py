"""What the conditioners have in common that know a person by embeddings and make context tokens of them.

FaceStudio's tokens are seen by the UNet, FaceSnap's by its ControlNet, and perhaps by the UNet, too.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .conditioner import Conditioner, IdentityOptions, Person, PictureRow
from .face_attached import AttachedWeights, at_home, attached
from .face_attention import FaceCall, FaceFusionAttnProcessor, LayerPeople, attention_layers
from .face_embedders import load_face_embedder
from .face_errors import FaceFusionError, IdentityMismatchError, InvalidScaleError, shown
from .face_files import check_tensors, read_tensors, save_tensors
from .face_identity import checked_weights
from .face_style import unit_length
from .joint_attention import PersonKeys


# --- Who ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddedIdentity:
    """The face of one person as embeddings: `(n_refs, width)` of length 1, and how much each counts.

    Attributes:
        embedder: name of the face embedder that made them.
    """

    embeddings: Tensor
    weights: Tensor
    embedder: str

    mode: ClassVar[str]
    FORMAT: ClassVar[str]
    TENSORS: ClassVar[dict[str, int]] = {"embeddings": 2}  # number of dimensions, of which the first is the references

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n_refs={self.n_refs}, embedder={self.embedder!r})"

    @property
    def n_refs(self) -> int:
        """Number of reference images."""
        return len(self.embeddings)

    @property
    def shares(self) -> Tensor:
        """How much each reference counts, of 1."""
        return self.weights / self.weights.sum()

    def with_weights(self, weights: Any) -> Self:
        """The same references in another proportion; None means equal."""
        return replace(self, weights=checked_weights(weights, self.n_refs))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        metadata = {"format": self.FORMAT, "format_version": "1", "embedder": self.embedder}
        tensors = {name: getattr(self, name) for name in self.TENSORS}
        save_tensors(path, {**tensors, "weights": self.weights}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Raises ModelNotFoundError, IdentityMismatchError."""

        def check(strings: Mapping[str, str]) -> None:
            if strings.get("format") != cls.FORMAT or strings.get("format_version") != "1":
                raise IdentityMismatchError(
                    f"{path} has format {shown(strings.get('format'))}, expected {cls.FORMAT!r} version 1"
                )

        tensors, strings = read_tensors(path, IdentityMismatchError, check)
        weights = tensors.get("weights", torch.zeros(0))
        for name, dimensions in cls.TENSORS.items():
            found = tensors.get(name)
            if found is None or found.ndim != dimensions or not len(found) or weights.shape != (len(found),):
                raise IdentityMismatchError(f"{path} lacks {name}, or a weight of each: it is damaged")
        kept = {name: tensors[name] for name in cls.TENSORS}
        check_tensors(kept, str(path), IdentityMismatchError)
        return cls(
            **{name: tensor.float() for name, tensor in kept.items()},
            weights=checked_weights(weights, len(weights)),
            embedder=strings.get("embedder", ""),
        )


class TokenConditioner(Conditioner):
    """Identity by embeddings of faces, for weights that are attached to the UNet.

    Attributes:
        weights: their class.
    """

    weights: type[AttachedWeights]

    def embeddings(self, pipe: Any, pictures: Sequence[Any]) -> tuple[Tensor, str]:
        """Embeddings `(n, width)` of face crops, of length 1, and the name of the embedder."""
        embedder = face_embedder_of(pipe, self.weights)
        found, width = unit_length(embedder(pictures)), loaded(pipe, self.weights).metadata.face_width
        if found.shape != (len(pictures), width):
            raise IdentityMismatchError(
                f"the face embedder {embedder.name!r} gave {tuple(found.shape)} numbers for {len(pictures)} "
                f"faces: these {self.weights.METADATA.SYSTEM} weights take {width} of each"
            )
        return found, embedder.name

    def adjusted(self, pipe: Any, identity: Any, options: IdentityOptions) -> Any:
        metadata, system = loaded(pipe, self.weights).metadata, self.weights.METADATA.SYSTEM
        if identity.embedder != metadata.face_embedder or identity.embeddings.shape[1] != metadata.face_width:
            raise IdentityMismatchError(
                f"this identity was embedded by {identity.embedder!r} ({identity.embeddings.shape[1]} numbers), the "
                f"{system} weights know faces by {metadata.face_embedder!r} ({metadata.face_width}): encode the "
                "face again with `pipe.encode_face(...)`"
            )
        if options.self_scale is not None:
            raise InvalidScaleError(f"face_self_scale is of the modes 'both' and 'training-free', not of {system}")
        return identity if options.weights is None else identity.with_weights(options.weights)


# --- What a network sees of them ---------------------------------------------------------------------------------


class TokenContext(ABC):
    """Context tokens of the people of a call, at every cross-attention of a network.

    Keys and values are projected once, before the denoising loop. Of several people each region sees its own; what
    nobody is in sees the tokens of nobody.

    Attributes:
        rows: number of rows that the tokens of a call differ in beside its people: 1, or one a prompt.
    """

    rows = 1

    def __init__(self, network: Any, replaces: bool) -> None:
        """`network` is a UNet or ControlNet, in which tokens take the place of the text or follow it."""
        self.network, self.replaces = network, replaces

    @abstractmethod
    def tokens(self, row: int, person: Person | None) -> Tensor:
        """Tokens `(1, N, width)` of a person, or of nobody, in the picture of a row."""

    @abstractmethod
    def nothing(self) -> Tensor:
        """Tokens `(1, N, width)` of unconditional rows."""

    @abstractmethod
    def shows(self, person: Person) -> bool:
        """Whether tokens are what somebody is seen by."""

    def sees(self, name: str) -> bool:
        """Whether a layer of the network sees tokens."""
        return True

    @torch.no_grad()
    def keys(self, tokens: Tensor) -> dict[str, PersonKeys]:
        """Layer name -> keys and values of tokens at every cross-attention, by the layer's own projections."""
        found = {}
        for name, (key, value) in projected(self.network, tokens).items():
            if self.sees(name):
                found[name] = PersonKeys(key[None], value[None], context=True, replaces_text=self.replaces)
        return found

    def processors(
        self, rows: Sequence[PictureRow], call: FaceCall, seen: Mapping[str, FaceFusionAttnProcessor]
    ) -> dict[str, FaceFusionAttnProcessor]:
        """Processors of all layers that see faces or tokens.

        Args:
            rows: who is where.
            seen: processors that another conditioner made for the same rows.
        """
        count = max(len(rows), self.rows)
        cache: dict[tuple[int, int | None], dict[str, PersonKeys]] = {}

        def keys(row: int, person: Person | None) -> dict[str, PersonKeys]:
            mark = (row, None if person is None else id(person))
            if mark not in cache:
                cache[mark] = self.keys(self.tokens(row, person))
            return cache[mark]

        unconditional = self.keys(self.nothing())
        found = dict(seen)
        for name in unconditional:
            shares = []
            for index in range(count):
                place, row = index * len(rows) // count, index * self.rows // count
                default = keys(row, None)[name]
                own = seen.get(name)
                if own is not None:
                    shares.append(replace(own.shares[place * len(own.shares) // len(rows)], context=default))
                    continue
                people = tuple(keys(row, person)[name] for person in rows[place].people if self.shows(person))
                shares.append(LayerPeople(people, rows[place].regions if people else None, default))
            found[name] = FaceFusionAttnProcessor(shares, call, unconditional[name])
        return found


@torch.no_grad()
def projected(network: Any, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> keys and values `(1, N, inner)` of tokens, by the projections of every cross-attention."""
    return {
        name: (at_home(layer.to_k, tokens.device, tokens), at_home(layer.to_v, tokens.device, tokens))
        for name, layer in attention_layers(network, "attn2").items()
    }


# --- What comes with the weights ---------------------------------------------------------------------------------


def loaded(pipe: Any, kind: type[AttachedWeights]) -> Any:
    """The weights of this kind. Raises [`FaceFusionError`] if there are none."""
    weights = attached(pipe.unet, kind.NAME)
    if weights is None:
        raise FaceFusionError(f"{kind.METADATA.SYSTEM} needs weights: call `load_{kind.NAME}(...)` first")
    return weights


def face_embedder_of(pipe: Any, kind: type[AttachedWeights]) -> Any:
    """The embedder that came with the weights, or that `load_...(face_embedder=...)` named.

    Raises:
        IdentityMismatchError: it is another one than the weights were trained with.
    """
    metadata, system = loaded(pipe, kind).metadata, kind.METADATA.SYSTEM
    embedder = pipe._kept("face embedder", pipe._token_parts[kind.NAME].get("face_embedder"), load_face_embedder)
    if embedder.name != metadata.face_embedder or embedder.width != metadata.face_width:
        raise IdentityMismatchError(
            f"the face embedder {embedder.name!r} ({embedder.width} numbers) is not the one these {system} weights "
            f"were trained with: {metadata.face_embedder!r} ({metadata.face_width}); name that one with "
            f"`load_{kind.NAME}(..., face_embedder=...)`"
        )
    return embedder


def image_encoder_of(pipe: Any, kind: type[AttachedWeights]) -> tuple[Any, Any]:
    """CLIP's vision tower and its processor (None: pixels from -1 to 1), the model's own or the one that is named."""
    named = pipe._token_parts.get(kind.NAME, {}).get("image_encoder")
    if named:
        return pipe._kept("image encoder", named, load_image_encoder)
    if getattr(pipe, "image_encoder", None) is None:
        raise FaceFusionError(
            f"these {kind.METADATA.SYSTEM} weights look at pictures with the model's own image encoder, and this "
            "pipeline has none: load it with `image_encoder=...`, or name one with "
            f"`load_{kind.NAME}(..., image_encoder=...)`"
        )
    return pipe.image_encoder, getattr(pipe, "feature_extractor", None)


def load_image_encoder(name: str) -> tuple[Any, Any]:
    """A vision tower with its processor, by folder or Hub id. Raises [`FaceFusionError`] if there is none."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    try:
        encoder = CLIPVisionModelWithProjection.from_pretrained(name, use_safetensors=True)
        return encoder.eval().requires_grad_(False), CLIPImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FaceFusionError(f"cannot load the image encoder {name!r}: {error}") from error


def check_image_width(kind: type[AttachedWeights], metadata: Any, found: int) -> None:
    """Raise [`FaceFusionError`] where an image encoder gives other vectors than the weights were trained with."""
    if found != metadata.image_width:
        raise FaceFusionError(
            f"the image encoder makes embeddings of {found} numbers, these {kind.METADATA.SYSTEM} weights take "
            f"{metadata.image_width}: they were trained with {metadata.image_encoder or 'that of their base'}"
        )
