"""FaceStudio: text, a style picture and people together make the context tokens of the cross-attention.

e_g = α Linear(style ‖ face) + (1 − α) Linear(prior(text) ‖ face) takes the text's place in every cross-attention
layer, or follows the text. Of several people each region has an e_g of its own; what nobody is in has that of no face.
Keys and values are projected once, before the denoising loop. It is a conditioner by itself (identity by FaceStudio),
and the context of another one (style by FaceStudio, identity by Face Fusion).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .call_arguments import Call
from .conditioner import Conditioner, IdentityOptions, Person, PictureRow, register_conditioner
from .face_attention import FaceCall, FaceFusionAttnProcessor, LayerPeople, attention_layers
from .face_embedders import load_face_embedder
from .face_errors import FaceFusionError, IdentityMismatchError, InvalidScaleError, shown
from .face_files import check_tensors, read_tensors, save_tensors
from .face_identity import checked_weights
from .face_pictures import load_images
from .face_prior import load_prior
from .face_studio import CONTEXTS, STUDIO, FaceStudio, studio_lora
from .face_style import picture_embeddings, unit_length, without_faces
from .joint_attention import PersonKeys


MODE = "face-studio"
SYSTEMS = ("face-fusion", MODE)  # of `identity_by`
IDENTITY_FORMAT = "face-studio-identity"
STYLE_SCALE = 0.5  # where a style picture is given and no strength


@dataclass(frozen=True, eq=False, repr=False)
class StudioIdentity:
    """The face of one person as embeddings: `(n_refs, width)` of length 1, and how much each counts.

    Attributes:
        embedder: name of the face embedder that made them.
    """

    embeddings: Tensor
    weights: Tensor
    embedder: str
    mode: str = MODE

    def __repr__(self) -> str:
        return f"StudioIdentity(n_refs={self.n_refs}, embedder={self.embedder!r})"

    @property
    def n_refs(self) -> int:
        """Number of reference images."""
        return len(self.embeddings)

    @property
    def face(self) -> Tensor:
        """e_f = Σ β_i e_f^i, `(1, width)`, scaled to length 1."""
        shares = self.weights / self.weights.sum()
        return unit_length((shares[:, None] * self.embeddings).sum(0, keepdim=True))

    def with_weights(self, weights: Any) -> "StudioIdentity":
        """The same references in another proportion; None means equal."""
        return replace(self, weights=checked_weights(weights, self.n_refs))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file."""
        metadata = {"format": IDENTITY_FORMAT, "format_version": "1", "embedder": self.embedder}
        save_tensors(path, {"embeddings": self.embeddings, "weights": self.weights}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "StudioIdentity":
        """Read what `save` wrote. Raises ModelNotFoundError, IdentityMismatchError."""

        def check(strings: Mapping[str, str]) -> None:
            if strings.get("format") != IDENTITY_FORMAT or strings.get("format_version") != "1":
                raise IdentityMismatchError(
                    f"{path} has format {shown(strings.get('format'))}, expected {IDENTITY_FORMAT!r} version 1"
                )

        tensors, strings = read_tensors(path, IdentityMismatchError, check)
        found, weights = tensors.get("embeddings"), tensors.get("weights")
        if found is None or weights is None or found.ndim != 2 or not len(found) or weights.shape != (len(found),):
            raise IdentityMismatchError(f"{path} lacks embeddings, or a weight of each: it is damaged")
        check_tensors({"embeddings": found}, str(path), IdentityMismatchError)
        return cls(found.float(), checked_weights(weights, len(found)), strings.get("embedder", ""))


@dataclass(frozen=True)
class Style:
    """What a call wants of FaceStudio.

    Attributes:
        image: style picture, or one for each prompt; None for none.
        scale: α, see `FaceStudio.guided`.
        context: "replace" or "append"; None: as the weights say.
    """

    image: Any = None
    scale: float | None = None
    context: str | None = None

    def check(self) -> None:
        """Raise [`FaceFusionError`] for a strength or context that there is not."""
        if self.context not in (None, *CONTEXTS):
            raise FaceFusionError(f"style_context must be {' or '.join(CONTEXTS)}, got {shown(self.context)}")
        if self.scale is not None:
            try:
                inside = 0 <= self.scale <= 1
            except TypeError:
                inside = False
            if not inside or isinstance(self.scale, bool):
                raise InvalidScaleError(
                    f"style_scale must be from 0 (the prompt alone) to 1 (the style picture alone), got {self.scale!r}"
                )
        if self.image is None and self.scale not in (None, 0):
            raise FaceFusionError(f"style_scale={self.scale} needs a style_image")

    @property
    def alpha(self) -> float:
        """The strength of this call."""
        return 0.0 if self.image is None else STYLE_SCALE if self.scale is None else float(self.scale)


class StudioContext:
    """What FaceStudio makes of one call: embeddings of style pictures and prompts, and tokens for whoever is there.

    Args:
        styles, texts: `(1 or prompts, image width)`; None where α leaves them out.
        alpha: α.
        replaces: whether tokens take the text's place.
    """

    def __init__(self, pipe: Any, styles: Tensor | None, texts: Tensor | None, alpha: float, replaces: bool) -> None:
        self.pipe, self.styles, self.texts, self.alpha, self.replaces = pipe, styles, texts, alpha, replaces
        self.rows = max(len(part) for part in (styles, texts) if part is not None)

    @property
    def studio(self) -> FaceStudio:
        return studio_of(self.pipe)

    def tokens(self, row: int, person: Person | None) -> Tensor:
        """e_g `(1, N, width)` of a prompt and a person, or of nobody."""
        style, text = (
            None if part is None else part[row * len(part) // self.rows][None] for part in (self.styles, self.texts)
        )
        face = torch.zeros(1, self.studio.metadata.face_width)
        if person is not None:
            face = person.scale * person.identity.face
        style, text, face = self._at_home(style, text, face)
        return self.studio.guided(style, text, face, self.alpha)

    def nothing(self) -> Tensor:
        """Tokens `(1, N, width)` of no picture and no face, as training drops them: those of unconditional rows."""
        metadata = self.studio.metadata
        zeros = torch.zeros(1, metadata.image_width), torch.zeros(1, metadata.face_width)
        return self.studio(*self._at_home(*zeros))

    def _at_home(self, *tensors: Tensor | None) -> list[Any]:
        device = self.pipe._execution_device
        return [None if tensor is None else tensor.to(device) for tensor in tensors]

    @torch.no_grad()
    def keys(self, tokens: Tensor) -> dict[str, PersonKeys]:
        """Layer name -> keys and values of tokens at every cross-attention, by the layer's own projections."""
        found = {}
        for name, layer in attention_layers(self.pipe.unet, "attn2").items():
            if self.pipe._layer_scale(name) > 0:
                key, value = layer.to_k(tokens), layer.to_v(tokens)
                found[name] = PersonKeys(key[None], value[None], context=True, replaces_text=self.replaces)
        return found

    def processors(
        self, rows: Sequence[PictureRow], call: FaceCall, seen: Mapping[str, FaceFusionAttnProcessor]
    ) -> dict[str, FaceFusionAttnProcessor]:
        """Processors of all layers that see faces or tokens.

        Args:
            rows: who is where; people of FaceStudio are in the tokens.
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
                people = tuple(
                    keys(row, person)[name] for person in rows[place].people if person.identity.mode == MODE
                )
                shares.append(LayerPeople(people, rows[place].regions if people else None, default))
            found[name] = FaceFusionAttnProcessor(shares, call, unconditional[name])
        return found


class StudioConditioner(Conditioner):
    """Identity by FaceStudio: embeddings of faces in the context tokens."""

    mode = MODE

    def encode(self, pipe: Any, images: Any, options: IdentityOptions) -> StudioIdentity:
        studio = studio_of(pipe)
        embedder = face_embedder_of(pipe)
        pictures = load_images(images)
        embeddings = unit_length(embedder(pictures))
        if embeddings.shape != (len(pictures), studio.metadata.face_width):
            raise IdentityMismatchError(
                f"the face embedder {embedder.name!r} gave {tuple(embeddings.shape)} numbers for {len(pictures)} "
                f"faces: these FaceStudio weights take {studio.metadata.face_width} of each"
            )
        identity = StudioIdentity(embeddings, torch.ones(len(pictures)), embedder.name)
        return identity.with_weights(options.weights)

    def adjusted(self, pipe: Any, identity: StudioIdentity, options: IdentityOptions) -> StudioIdentity:
        metadata = studio_of(pipe).metadata
        if identity.embedder != metadata.face_embedder or identity.embeddings.shape[1] != metadata.face_width:
            raise IdentityMismatchError(
                f"this identity was embedded by {identity.embedder!r} ({identity.embeddings.shape[1]} numbers), the "
                f"FaceStudio weights know faces by {metadata.face_embedder!r} ({metadata.face_width}): encode the "
                "face again with `pipe.encode_face(...)`"
            )
        if options.self_scale is not None:
            raise InvalidScaleError("face_self_scale is of the modes 'both' and 'training-free', not of FaceStudio")
        return identity if options.weights is None else identity.with_weights(options.weights)

    def keys(self, pipe: Any, person: Person) -> dict[str, PersonKeys]:
        """Nothing beside the context, see [`StudioContext`]."""
        return {}


def mode_by(pipe: Any, identity_by: str | None, mode: str | None) -> str | None:
    """The mode that a call asks for by `identity_by` and `face_mode`.

    Raises:
        FaceFusionError: a system that there is not, or the two contradict each other.
    """
    if identity_by is None:
        return mode
    if identity_by not in SYSTEMS:
        raise FaceFusionError(f"identity_by must be {' or '.join(SYSTEMS)}, got {identity_by!r}")
    if mode is not None and (mode == MODE) != (identity_by == MODE):
        raise FaceFusionError(f"identity_by={identity_by!r} and face_mode={mode!r} name two systems: give one of them")
    if identity_by == MODE:
        return MODE
    return "training-free" if mode is None and pipe._face_adapter is None else mode


def studio_of(pipe: Any) -> FaceStudio:
    """The loaded weights. Raises [`FaceFusionError`] if there are none."""
    studio = getattr(getattr(pipe.unet, "_orig_mod", pipe.unet), STUDIO, None)
    if studio is None:
        raise FaceFusionError("FaceStudio needs weights: call `load_face_studio(...)` first")
    return studio


def face_embedder_of(pipe: Any) -> Any:
    """The embedder that came with the weights, or that `load_face_studio(face_embedder=...)` named.

    Raises:
        IdentityMismatchError: it is another one than the weights were trained with.
    """
    metadata = studio_of(pipe).metadata
    embedder = pipe._kept("face embedder", pipe._studio_parts.get("face_embedder"), load_face_embedder)
    if embedder.name != metadata.face_embedder or embedder.width != metadata.face_width:
        raise IdentityMismatchError(
            f"the face embedder {embedder.name!r} ({embedder.width} numbers) is not the one these FaceStudio weights "
            f"were trained with: {metadata.face_embedder!r} ({metadata.face_width}); name that one with "
            "`load_face_studio(..., face_embedder=...)`"
        )
    return embedder


def studio_context(pipe: Any, style: Style, call: Call, detector: Any, *, wanted: bool) -> StudioContext | None:
    """What FaceStudio adds to a call; None where nothing of it is asked for.

    Args:
        wanted: whether people of the call are FaceStudio's.
    """
    style.check()
    if style.image is None and not wanted:
        return None
    metadata, alpha = studio_of(pipe).metadata, style.alpha
    styles = texts = None
    if alpha > 0:
        styles = style_embeddings(pipe, style.image, detector, call.prompts)
    if alpha < 1:
        texts = prompt_embeddings(pipe, call)
    return StudioContext(pipe, styles, texts, alpha, (style.context or metadata.context) == "replace")


def style_embeddings(pipe: Any, image: Any, detector: Any, prompts: int) -> Tensor:
    """`(1 or prompts, width)` of style pictures, their faces covered as in training."""
    pictures = load_images(image)
    if len(pictures) not in (1, prompts):
        raise FaceFusionError(
            f"style_image has {len(pictures)} pictures, but there are {prompts} prompts: give one for each, or one"
        )
    metadata = studio_of(pipe).metadata
    if metadata.picture_mask > 0:
        boxes = [pipe._detect_boxes(picture, detector) for picture in pictures]
        pictures = [
            without_faces(picture, found, metadata.picture_mask)
            for picture, found in zip(pictures, boxes, strict=True)
        ]
    encoder, processor = image_encoder_of(pipe)
    found = picture_embeddings(encoder, pictures, processor)
    if found.shape[1] != metadata.image_width:
        raise FaceFusionError(
            f"the image encoder makes embeddings of {found.shape[1]} numbers, these FaceStudio weights take "
            f"{metadata.image_width}: they were trained with {metadata.image_encoder or 'that of their base'}"
        )
    return found


def image_encoder_of(pipe: Any) -> tuple[Any, Any]:
    """CLIP's vision tower and its processor (None: pixels from -1 to 1), the model's own or the one that is named."""
    named = pipe._studio_parts.get("image_encoder")
    if named:
        return pipe._kept("image encoder", named, load_image_encoder)
    if getattr(pipe, "image_encoder", None) is None:
        raise FaceFusionError(
            "these FaceStudio weights look at style pictures with the model's own image encoder, and this pipeline "
            "has none: load it with `image_encoder=...`, or name one with `load_face_studio(..., image_encoder=...)`"
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


def prompt_embeddings(pipe: Any, call: Call) -> Tensor:
    """`(prompts, width)`: the pictures that the prior imagines for the prompts."""
    prompt = call.arguments.get("prompt")
    if prompt is None:
        raise FaceFusionError(
            "FaceStudio's prior reads the prompt itself: give `prompt=` as text, or style_scale=1 with a style_image"
        )
    source = pipe._studio_parts.get("prior")
    if not source:
        raise FaceFusionError(
            "these FaceStudio weights have no prior, which prompts need: name one with `load_face_studio(..., "
            "prior=...)`, or give style_scale=1 with a style_image"
        )
    prior = source if callable(source) else pipe._kept("prior", source, load_studio_prior)
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return unit_length(prior(texts))


def load_studio_prior(source: str) -> Any:
    """A prior by folder or Hub id. One without a text tower of its own has that of the model that it lies in."""
    own, around = os.path.join(source, "tokenizer"), os.path.dirname(os.path.abspath(source))
    inside = os.path.isdir(source) and not os.path.isdir(own) and os.path.isdir(os.path.join(around, "tokenizer"))
    return load_prior(source, text=around if inside else None)


@contextmanager
def studio_acting(pipe: Any, context: StudioContext | None) -> Iterator[None]:
    """Within it FaceStudio's LoRA acts, if the call has anything of FaceStudio."""
    if context is None:
        yield
        return
    with studio_lora(pipe.unet):
        yield


register_conditioner(StudioConditioner())
