"""IP-Adapter as a variant: tokens of an encoder that knows nothing of the UNet, in an attention of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)
from torch import Tensor, nn

from ...conditioner import Person
from ...face_attention import (
    attention_layers,
)
from ...joint_attention import KeysAndValues, PersonKeys
from ...training.fused_unet import face_keys
from ...training.latent_cache import read_picture
from ...training.pairs import Pairs
from ...training.sources import DataError
from .conditioning import Conditioning
from .encoders import Photo, TokenEncoder
from .variants import Variant


class IPAdapter(nn.Module):
    """The trained parts of an IP-Adapter, all of them diffusers' classes, for every cross-attention layer of `unet`.

    `to_k_ip` and `to_v_ip` start as copies of the text's, as in IP-Adapter's own training.
    """

    def __init__(self, unet: Any, projection: nn.Module, tokens: int) -> None:
        super().__init__()
        self.image_projection = MultiIPAdapterImageProjection([projection])
        self.processors = nn.ModuleList()
        layers = attention_layers(unet, "attn2")
        self.layers = list(layers)
        for attn in layers.values():
            processor = IPAdapterAttnProcessor2_0(attn.to_q.out_features, attn.to_k.in_features, (tokens,))
            for own, text in ((processor.to_k_ip[0], attn.to_k), (processor.to_v_ip[0], attn.to_v)):
                own.weight.data.copy_(text.weight)
            self.processors.append(processor)

    def forward(self, tokens: Mapping[str, Tensor]) -> KeysAndValues:
        """Tokens (B, references, N, width), or of images as wholes (B, references, width), to keys and values."""
        (images,) = self.image_projection([tokens["tokens"]])
        layers: list[tuple[str, Any]] = list(zip(self.layers, self.processors, strict=True))
        return {name: (layer.to_k_ip[0](images), layer.to_v_ip[0](images)) for name, layer in layers}


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


class EncoderTokens(Conditioning):
    """IP-Adapter on the tokens of `encoder`; several references are several images of it.

    A hidden face is zeros, as in IP-Adapter's training and in the unconditional half of its guidance.
    """

    def __init__(self, unet: Any, variant: Variant, encoder: TokenEncoder, data: Path, kind: str) -> None:
        super().__init__(variant)
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

    def seen(
        self, states: Mapping[str, Tensor], has_face: Tensor | None = None, scale: float = 1.0
    ) -> dict[str, PersonKeys]:
        tokens = states["tokens"].to(self.unet.device)
        tokens = tokens if self.kind == "patches" else tokens.squeeze(2)
        if has_face is not None:
            tokens = tokens * has_face.view(-1, *[1] * (tokens.ndim - 1))
        return face_keys(self.adapter, {"tokens": tokens}, scale=scale, token_count_bias=False)

    def unseen(self, people: Sequence[Person]) -> dict[str, PersonKeys]:
        """An image of zeros, as strongly as the first of `people`."""
        zeros = torch.zeros_like(people[0].identity.states["tokens"][None, :1])
        return self.seen({"tokens": zeros}, scale=people[0].scale)
