"""FaceSnap's weights: the mixer, which makes context tokens of a face, and the ControlNet that reads them.

    q     = Linear(f_id)                                   one vector that says who it is
    kv    = [Linear(f_clip) ; Linear(f_id)]                the patches of the picture, and the vector
    x     = CrossAttention(q, kv)
    f_mix = TransformerDecoder(learned queries, memory = [x ; kv])

The mixer is a module of the UNet for as long as it is loaded. The ControlNet (FFRNet in the paper) is an ordinary one,
among those of the pipeline: it sees facial points, and f_mix takes the place of its text.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from torch import Tensor, nn
from torch.nn import functional as F

from .face_attached import (
    AttachedWeights,
    TokenMetadata,
    attach_module,
    attached,
    context_width,
    detach_module,
    whole,
)
from .face_errors import AdapterMismatchError, short
from .unet_family import base_family


SNAP_WEIGHTS_NAME = "face_snap.safetensors"
SNAP = "face_snap"  # name of the mixer in the UNet
NETWORK = "ffrnet"  # folder of the ControlNet beside the mixer's file
CONTEXTS = ("none", "append")
HEAD_WIDTH = 64
HINT_CHANNELS = (16, 32, 96, 256)  # diffusers' own, of the convolutions between the points and an eighth of their size


@dataclass(frozen=True)
class SnapMetadata(TokenMetadata):
    """What besides shapes must agree between training and use, see [`TokenMetadata`].

    Attributes:
        image_encoder, image_width: of the patches of reference pictures.
        tokens: that the mixer makes.
        depth: layers of its decoder.
        context: what the UNet itself sees of the tokens: `"none"` (the paper: the ControlNet alone reads them), or
            they are `"append"`ed to its text.
        oval: height and width of what is shown of a reference, over the side of its crop; 0: all of it.

    Raises:
        AdapterMismatchError: a value out of range.
    """

    tokens: int = 16
    depth: int = 4
    context: str = "none"
    oval: float = 0.9

    SYSTEM = "FaceSnap"
    FORMAT = "face-snap"
    RANGES = {**TokenMetadata.RANGES, "tokens": (1, 1024), "depth": (1, 64), "oval": (0, 2)}
    CHOICES = {"context": CONTEXTS}


class MixerAttention(nn.Module):
    """Queries of one sequence see keys and values of another; plain Linears, so that offloading finds them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // math.gcd(width, HEAD_WIDTH)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """`(B, N, width)` and `(B, M, width)` -> `(B, N, width)`."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(seen), self.value(seen))
        )
        found: Tensor = self.output(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return found


class MixerLayer(nn.Module):
    """A layer of the decoder: attention to each other, to the memory, and a perceptron, each added to what it sees."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.among, self.memory = MixerAttention(width), MixerAttention(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Tokens `(B, N, width)` and memory `(B, M, width)` -> tokens."""
        first, second, third = self.norms
        seen = first(x)
        x = x + self.among(seen, seen)
        x = x + self.memory(second(x), memory)
        return x + self.perceptron(third(x))


class FaceMixer(AttachedWeights):
    """f_mix: the tokens of a person, as wide as the states of a text.

    Args:
        metadata: see [`SnapMetadata`].
        context_width: of the states that the UNet's cross-attention takes.
    """

    NAME = SNAP
    METADATA = SnapMetadata

    def __init__(self, metadata: SnapMetadata, context_width: int) -> None:
        super().__init__(metadata, context_width)
        width = context_width
        self.who = nn.Sequential(nn.Linear(metadata.face_width, width), nn.LayerNorm(width))
        self.patches = nn.Sequential(nn.Linear(metadata.image_width, width), nn.LayerNorm(width))
        self.attention = MixerAttention(width)
        self.decoder = nn.ModuleList(MixerLayer(width) for _ in range(metadata.depth))
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(metadata.tokens, width) / math.sqrt(width))
        self.nobody = nn.Parameter(torch.randn(metadata.tokens, width))

    def forward(
        self, face: Tensor | None = None, features: Tensor | None = None, present: Tensor | None = None
    ) -> Tensor:
        """Embeddings `(B, face_width)` and patches `(B, P, image_width)` -> tokens `(B, N, context_width)`.

        Those of nobody are learned: where `present` `(B,)` is False, and `(1, N, context_width)` without a face.
        """
        if face is None or features is None:
            return self.nobody[None]
        dtype = self.queries.dtype
        who = self.who(face.to(dtype))[:, None]
        known = torch.cat([self.patches(features.to(dtype)), who], 1)
        memory = torch.cat([self.attention(who, known), known], 1)
        tokens = self.queries.expand(len(face), -1, -1)
        for layer in self.decoder:
            tokens = layer(tokens, memory)
        tokens = self.norm(tokens)
        return tokens if present is None else torch.where(present[:, None, None], tokens, self.nobody)


def new_mixer(unet: Any, **metadata: Any) -> FaceMixer:
    """Untrained weights for `unet`, attached to it; see [`SnapMetadata`] for what `metadata` are."""
    mixer = FaceMixer(SnapMetadata(base_family(unet), **metadata), context_width(unet))
    attach_module(unet, mixer)
    return mixer


@contextmanager
def mixer_left_out(unet: Any) -> Iterator[None]:
    """Within it the mixer is not in the UNet, which can be saved as the one that it was."""
    mixer = attached(unet, SNAP)
    if mixer is None:
        yield
        return
    detach_module(unet, SNAP)
    try:
        yield
    finally:
        attach_module(unet, mixer)


# --- The ControlNet ----------------------------------------------------------------------------------------------


def new_network(unet: Any, vae_scale_factor: int = 8, start: str | None = None) -> ControlNetModel:
    """An untrained ControlNet for `unet`: a copy of its encoder, whose output is zero.

    Args:
        vae_scale_factor: how many pixels of a control picture are a cell of the latents, a power of two.
        start: folder or Hub id of another ControlNet for this model, to begin with in its place.

    Raises:
        AdapterMismatchError: another one that cannot be loaded, or is of another model.
    """
    if start is not None:
        other = load_network(start)
        check_network(other, unet)
        config = {name: value for name, value in other.config.items() if name != "_name_or_path"}  # whose it was
        begun: ControlNetModel = ControlNetModel.from_config(config)
        begun.load_state_dict(other.state_dict())
        return begun
    stages = int(math.log2(vae_scale_factor)) + 1
    channels = HINT_CHANNELS[:stages] if stages <= len(HINT_CHANNELS) else (*HINT_CHANNELS, HINT_CHANNELS[-1])
    network: ControlNetModel = ControlNetModel.from_unet(whole(unet), conditioning_embedding_out_channels=channels)
    return network


def load_network(folder: str | os.PathLike[str], **hub: Any) -> ControlNetModel:
    """The ControlNet of a folder or Hub id, frozen. Raises [`AdapterMismatchError`] where it cannot be loaded."""
    try:
        network = ControlNetModel.from_pretrained(str(folder), use_safetensors=True, **hub)
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterMismatchError(f"cannot load the ControlNet in {str(folder)!r}: {short(error)}") from error
    return network.requires_grad_(False).eval()


def check_network(network: Any, unet: Any) -> None:
    """Raise [`AdapterMismatchError`] unless a ControlNet fits `unet` and reads tokens as wide as its text's."""
    own, base = (list(whole(net).config.block_out_channels) for net in (network, unet))
    if context_width(network) != context_width(unet) or own != base:
        raise AdapterMismatchError(
            f"the ControlNet is {own} wide and reads states of {context_width(network)}, the UNet is {base} wide and "
            f"reads {context_width(unet)}: take one that was trained for this model"
        )


def networks_of(controlnet: Any) -> list[Any]:
    """The ControlNets of a pipeline one by one."""
    several = whole(controlnet)
    if isinstance(several, MultiControlNetModel):
        return list(several.nets)
    return [] if controlnet is None else [controlnet]


def as_component(networks: Sequence[Any]) -> Any:
    """ControlNets as a pipeline takes them: none, one, or several as one."""
    if len(networks) < 2:
        return networks[0] if networks else None
    return MultiControlNetModel(list(networks))


def save_network(network: Any, folder: str | os.PathLike[str]) -> None:
    """Write the ControlNet into `folder/ffrnet`."""
    whole(network).save_pretrained(Path(folder) / NETWORK)
