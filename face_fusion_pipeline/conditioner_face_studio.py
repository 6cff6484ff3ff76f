"""FaceStudio: text, a style picture and people together make the context tokens of the cross-attention.

e_g = α Linear(style ‖ face) + (1 − α) Linear(prior(text) ‖ face) takes the text's place in every cross-attention
layer, or follows the text. Of several people each region has an e_g of its own; what nobody is in has that of no face.
Keys and values are projected once, before the denoising loop. It is a conditioner by itself (identity by FaceStudio),
and the context of another one (style by FaceStudio, identity by Face Fusion).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .call_arguments import Call
from .conditioner import IdentityOptions, Person, register_conditioner
from .conditioner_tokens import (
    EmbeddedIdentity,
    TokenConditioner,
    TokenContext,
    check_image_width,
    image_encoder_of,
    loaded,
)
from .face_attached import at_home
from .face_errors import FaceFusionError, InvalidScaleError, shown
from .face_pictures import load_images
from .face_prior import load_prior
from .face_studio import CONTEXTS, STUDIO, FaceStudio, studio_lora
from .face_style import picture_embeddings, unit_length, without_faces
from .joint_attention import PersonKeys


MODE = "face-studio"
IDENTITY_FORMAT = "face-studio-identity"
STYLE_SCALE = 0.5  # where a style picture is given and no strength


class StudioIdentity(EmbeddedIdentity):
    """The face of one person as embeddings, see [`EmbeddedIdentity`]."""

    mode = MODE
    FORMAT = IDENTITY_FORMAT

    @property
    def face(self) -> Tensor:
        """e_f = Σ β_i e_f^i, `(1, width)`, scaled to length 1."""
        return unit_length((self.shares[:, None] * self.embeddings).sum(0, keepdim=True))


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


class StudioContext(TokenContext):
    """What FaceStudio makes of one call: embeddings of style pictures and prompts, and tokens for whoever is there.

    Args:
        styles, texts: `(1 or prompts, image width)`; None where α leaves them out.
        alpha: α.
        replaces: whether tokens take the text's place.
    """

    def __init__(self, pipe: Any, styles: Tensor | None, texts: Tensor | None, alpha: float, replaces: bool) -> None:
        super().__init__(pipe.unet, replaces)
        self.pipe, self.styles, self.texts, self.alpha = pipe, styles, texts, alpha
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
        return self.studio.guided(style, text, face, self.alpha, self.pipe._execution_device)

    def nothing(self) -> Tensor:
        """Tokens `(1, N, width)` of no picture and no face, as training drops them: those of unconditional rows."""
        metadata = self.studio.metadata
        zeros = torch.zeros(1, metadata.image_width), torch.zeros(1, metadata.face_width)
        return at_home(self.studio, self.pipe._execution_device, *zeros)

    def shows(self, person: Person) -> bool:
        return person.identity.mode == MODE

    def sees(self, name: str) -> bool:
        return self.pipe._layer_scale(name) > 0


class StudioConditioner(TokenConditioner):
    """Identity by FaceStudio: embeddings of faces in the context tokens."""

    mode = MODE
    weights = FaceStudio

    def encode(self, pipe: Any, images: Any, options: IdentityOptions) -> StudioIdentity:
        found, embedder = self.embeddings(pipe, load_images(images))
        return StudioIdentity(found, torch.ones(len(found)), embedder).with_weights(options.weights)

    def keys(self, pipe: Any, person: Person) -> dict[str, PersonKeys]:
        """Nothing beside the context, see [`StudioContext`]."""
        return {}


def studio_of(pipe: Any) -> FaceStudio:
    """The loaded weights. Raises [`FaceFusionError`] if there are none."""
    studio: FaceStudio = loaded(pipe, FaceStudio)
    return studio


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
    encoder, processor = image_encoder_of(pipe, FaceStudio)
    found = picture_embeddings(encoder, pictures, processor)
    check_image_width(FaceStudio, metadata, found.shape[1])
    return found


def prompt_embeddings(pipe: Any, call: Call) -> Tensor:
    """`(prompts, width)`: the pictures that the prior imagines for the prompts."""
    prompt = call.arguments.get("prompt")
    if prompt is None:
        raise FaceFusionError(
            "FaceStudio's prior reads the prompt itself: give `prompt=` as text, or style_scale=1 with a style_image"
        )
    source = pipe._token_parts[STUDIO].get("prior")
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
