"""From a reference to what the UNet attends to: an encoder, trained projections, and a place in the attention layers.

Both kinds answer the same calls, so that one task trains and one loop generates with either. While `applied` lasts,
any call of the UNet sees the faces, diffusers' own pipelines included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from torch import Tensor, nn

from ...face_adapter import FaceFusionAdapter, create_adapter
from ...face_attention import (
    GUIDED,
    FaceCall,
    FaceFusionAttnProcessor,
    LayerPeople,
    attention_layers,
    installed_processors,
)
from ...face_self_attention import SelfAttentionReference
from ...joint_attention import PersonKeys, reference_log_weights
from ...reference_pass import (
    capture_hidden_states,
    face_tensors,
    noise_latents,
    self_attention_projections,
)
from ...training.base_model import BaseModel
from ...training.latent_cache import read_picture
from ...training.pairs import Pairs
from ...training.preparation import read_report
from ...training.sources import DataError
from .added_attention import AddedFaceAttnProcessor
from .encoders import FaceEmbedderEncoder, ImageEncoder, Photo, TokenEncoder, load_conditioner
from .variants import Variant, chosen_layers


class Conditioning(Protocol):
    """An encoder of references and the way of its tokens into the UNet."""

    @property
    def adapter(self) -> nn.Module:
        """What is trained of it."""
        ...

    def from_data(self, pairs: Pairs, references: list[tuple[int, int]]) -> Tensor:
        """What [`states`] takes (B, ...), of references of prepared data."""
        ...

    def from_photos(self, photos: list[Photo]) -> Tensor:
        """The same of B photos."""
        ...

    def states(self, inputs: Tensor) -> dict[str, Tensor]:
        """What the frozen encoder makes of them: name -> (B, tokens, width)."""
        ...

    def applied(
        self, states: Mapping[str, Tensor], has_face: Tensor | None = None, scale: float = 1.0, guided: bool = False
    ) -> AbstractContextManager[None]:
        """Within it the UNet sees the references.

        Args:
            states: name -> (B or 1, references, tokens, width).
            has_face: bool (B,), False hides the face of that row.
            scale: strength >= 0.
            guided: the first half of every batch is the unconditional half of guidance, which sees no face.
        """
        ...


def create_conditioning(base: BaseModel, variant: Variant, data: Path, embedder: str | None = None) -> Conditioning:
    """A new conditioning for `base`; torch's random state decides its random weights.

    Args:
        data: the prepared folder, for crop and resolution of its references.
        embedder: of the variant that takes one, see `encoders.load_conditioner`.

    Raises:
        FaceFusionError: SDXL, or the base has no image encoder.
    """
    if base.is_xl:
        raise DataError(f"{base.name} is a Stable Diffusion XL: ablations are made for 1.x and 2.x")
    if variant.encoder == "unet":
        return UNetFeatures(base, variant, data)
    if variant.encoder == "face embedder":
        return EncoderTokens(base.unet, FaceEmbedderEncoder(load_conditioner(embedder)), data, "embedding")
    model = getattr(base.pipeline, "image_encoder", None)
    patches = variant.encoder == "clip patches"
    encoder = ImageEncoder(model, getattr(base.pipeline, "feature_extractor", None), patches=patches)
    return EncoderTokens(base.unet, encoder, data, "patches" if patches else "image")


# --- Hidden states of the UNet -----------------------------------------------------------------------------------


class UNetFeatures:
    """Face Fusion, with what a variant changes in it: attention, layers, region, noise, initial weights.

    Without training it is the mode of that name: `SelfAttentionReference` says what is seen, and how strongly.
    """

    def __init__(self, base: BaseModel, variant: Variant, data: Path) -> None:
        settings = read_report(data)["settings"]
        self.base, self.unet, self.variant = base, base.unet, variant
        self.kind = "attn2" if variant.trained else "attn1"
        self.own = None if variant.trained else SelfAttentionReference()
        self.layers = chosen_layers(list(attention_layers(self.unet, self.kind)), variant.layers)
        self.resolution: int = settings["reference_resolution"]
        self.face_crop: float = settings["face_crop"]
        self.timestep = self.own.timestep if self.own else round(variant.reference_noise * len(base.schedule))
        self.empty = base.conditions([""])["text"]
        metadata = {
            "reference_mode": "noised" if self.timestep else "clean",
            "reference_timestep": self.timestep,
            "token_count_bias": variant.token_count_bias,
            "face_crop": self.face_crop,
            "resolution": self.resolution,
        }
        self.adapter: nn.Module = nn.Identity()  # training-free: nothing is learned
        if variant.trained:
            self.adapter = with_layers(create_adapter(self.unet, variant.init, metadata=metadata), self.layers)

    def from_data(self, pairs: Pairs, references: list[tuple[int, int]]) -> Tensor:
        return pairs.reference_latents(references)

    def from_photos(self, photos: list[Photo]) -> Tensor:
        return self.base.latents(torch.cat(face_tensors([photo.face for photo in photos], self.resolution)))

    @torch.no_grad()
    def states(self, inputs: Tensor) -> dict[str, Tensor]:
        """h_f of Eq. 2 in the variant's layers and region."""
        latents = noise_latents(inputs, self.base.schedule.alphas, self.timestep).to(self.unet.device, self.unet.dtype)
        text = self.empty.to(latents.device, latents.dtype)
        return self.chosen(capture_hidden_states(self.unet, latents, self.timestep, text, self.kind))

    def chosen(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the states of all layers (B, N_f, C) those of the variant's layers and region."""
        if self.own:
            return self.own.chosen(states)[0]
        states = {name: states[name] for name in self.layers}
        if self.variant.region == "face":
            states = {
                name: state[:, central_cells(state.shape[1], 1 / self.face_crop)] for name, state in states.items()
            }
        return states

    @contextmanager
    def applied(
        self, states: Mapping[str, Tensor], has_face: Tensor | None = None, scale: float = 1.0, guided: bool = False
    ) -> Iterator[None]:
        if scale == 0:
            yield
            return
        trained = self.variant.trained
        projected = self.adapter(states) if trained else self_attention_projections(self.unet, states)
        references = next(iter(states.values())).shape[1]
        weights = reference_log_weights(torch.ones(references), None if has_face is None else ~has_face.bool())
        weights = None if weights is None else weights.to(self.unet.device)
        added, call = self.variant.attention == "added", FaceCall(GUIDED) if guided else FaceCall()
        processor = AddedFaceAttnProcessor if added else FaceFusionAttnProcessor
        bias = trained and self.variant.token_count_bias
        scale = scale * self.own.scale if self.own else scale
        people = {name: PersonKeys(key, value, weights, scale, bias) for name, (key, value) in projected.items()}
        with installed_processors(
            self.unet, {name: processor([LayerPeople((person,))], call) for name, person in people.items()}
        ):
            yield


def with_layers(adapter: FaceFusionAdapter, names: list[str]) -> FaceFusionAdapter:
    """The adapter without the other layers."""
    weights = adapter.state_dict()
    shapes = {name: weights[f"{name}.to_k_face.weight"].shape for name in names}
    kept = FaceFusionAdapter({name: (shape[1], shape[0]) for name, shape in shapes.items()}, adapter.metadata)
    kept.load_state_dict({key: weights[key] for key in kept.state_dict()})
    return kept.to(next(adapter.parameters()))


def central_cells(count: int, fraction: float) -> Tensor:
    """Indices of those cells of a square grid of `count` whose centres lie in its central square of side `fraction`.

    A face crop is the box's longer side enlarged: its box lies in the middle, 1 / enlargement of it wide.
    """
    side = math.isqrt(count)
    centres = (torch.arange(side) + 0.5) / side
    inside = (centres - 0.5).abs() <= fraction / 2
    return (inside[:, None] & inside[None]).flatten().nonzero()[:, 0]


# --- Tokens of another encoder -----------------------------------------------------------------------------------


class IPAdapter(nn.Module):
    """The trained parts of an IP-Adapter, all of them diffusers' classes, for every cross-attention layer of `unet`.

    `to_k_ip` and `to_v_ip` start as copies of the text's, as in IP-Adapter's own training.
    """

    def __init__(self, unet: Any, projection: nn.Module, tokens: int) -> None:
        super().__init__()
        self.image_projection = MultiIPAdapterImageProjection([projection])
        self.processors = nn.ModuleList()
        for attn in attention_layers(unet, "attn2").values():
            processor = IPAdapterAttnProcessor2_0(attn.to_q.out_features, attn.to_k.in_features, (tokens,))
            for own, text in ((processor.to_k_ip[0], attn.to_k), (processor.to_v_ip[0], attn.to_v)):
                own.weight.data.copy_(text.weight)
            self.processors.append(processor)


def projection_of(kind: str, width: int, text_width: int) -> tuple[nn.Module, int]:
    """Projection to the text's width and its number of tokens, with IP-Adapter's own numbers.

    `kind` is "image" (IP-Adapter), "patches" (Plus) or "embedding" (FaceID).
    """
    if kind == "image":
        return ImageProjection(width, text_width, 4), 4
    if kind == "embedding":
        return IPAdapterFaceIDImageProjection(width, text_width, mult=2, num_tokens=4), 4
    heads = max(1, text_width // 64)
    return IPAdapterPlusImageProjection(width, text_width, text_width, depth=4, heads=heads, num_queries=16), 16


class EncoderTokens:
    """IP-Adapter on the tokens of `encoder`; several references are several images of it.

    A hidden face is zeros, as in IP-Adapter's training and in the unconditional half of its guidance.
    """

    def __init__(self, unet: Any, encoder: TokenEncoder, data: Path, kind: str) -> None:
        self.unet, self.encoder, self.data, self.kind = unet, encoder, data, kind
        self.adapter = IPAdapter(unet, *projection_of(kind, encoder.width, unet.config.cross_attention_dim))

    def from_data(self, pairs: Pairs, references: list[tuple[int, int]]) -> Tensor:
        photos = []
        for index, number in references:
            if number:
                raise DataError(f"{self.data} has people with a single photo: ablations need two of everybody")
            row = pairs.rows[index]
            face, picture = (read_picture(self.data / row[key]) for key in ("face_file_name", "file_name"))
            photos.append(Photo(face, picture, torch.tensor(row["landmarks5"])))
        return self.encoder(photos)

    def from_photos(self, photos: list[Photo]) -> Tensor:
        return self.encoder(photos)

    def states(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"tokens": inputs}

    @contextmanager
    def applied(
        self, states: Mapping[str, Tensor], has_face: Tensor | None = None, scale: float = 1.0, guided: bool = False
    ) -> Iterator[None]:
        tokens = states["tokens"].to(self.unet.device)  # (B or 1, references, N, width)
        tokens = tokens if self.kind == "patches" else tokens.squeeze(2)
        if has_face is not None:
            tokens = tokens * has_face.view(-1, *[1] * (tokens.ndim - 1))

        def with_images(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            sample = args[0] if args else kwargs["sample"]
            rows = len(sample) // 2 if guided else len(sample)
            images = tokens.expand(rows, *tokens.shape[1:]).to(sample.dtype)
            images = torch.cat([torch.zeros_like(images), images]) if guided else images
            return args, {**kwargs, "added_cond_kwargs": {"image_embeds": [images]}}

        layers: list[Any] = list(attention_layers(self.unet, "attn2").values())
        processors: list[Any] = list(self.adapter.processors)
        originals = [layer.processor for layer in layers]
        hook = self.unet.register_forward_pre_hook(with_images, with_kwargs=True)
        try:
            self.unet.encoder_hid_proj = self.adapter.image_projection
            self.unet.config.encoder_hid_dim_type = "ip_image_proj"
            for layer, processor in zip(layers, processors, strict=True):
                processor.scale = [scale]
                layer.set_processor(processor)
            yield
        finally:
            hook.remove()
            self.unet.encoder_hid_proj = None
            self.unet.config.encoder_hid_dim_type = None
            for layer, original in zip(layers, originals, strict=True):
                layer.set_processor(original)
