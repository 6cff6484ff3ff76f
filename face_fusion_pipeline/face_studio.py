"""FaceStudio's weights: one Linear that makes context tokens of a picture and a face, and a LoRA for the UNet.

The Linear is a module of the UNet for as long as it is loaded, so that it moves and changes precision with it. The
LoRA is there too, but acts only inside [`studio_lora`].
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .face_attached import (
    AttachedWeights,
    TokenMetadata,
    at_home,
    attach_module,
    attached,
    context_width,
    detach_module,
    read_attached,
    save_attached,
    whole,
)
from .face_attention import attention_layers
from .face_errors import AdapterMismatchError, FaceFusionError, shown
from .unet_family import base_family


STUDIO_WEIGHTS_NAME = "face_studio.safetensors"
STUDIO = "face_studio"  # name of the module in the UNet, and of the LoRA
FORMAT = "face-studio"
CONTEXTS = ("replace", "append")
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of the cross-attention: what reads the tokens


@dataclass(frozen=True)
class StudioMetadata(TokenMetadata):
    """What besides shapes must agree between training and use, see [`TokenMetadata`].

    Attributes:
        image_encoder, image_width: of the embeddings of style pictures.
        prior: from text to embeddings of pictures: a Hub id, a folder beside the weights, or "" for none.
        tokens: that the Linear makes.
        context: what they do where a call does not say: `"replace"` the text (the paper), or are `"append"`ed to it.
        rank: of the LoRA; 0 for none. Its strength is 1 (alpha = rank).
        picture_mask: side of what is covered of a face in a style picture, over its box; 0: nothing is.

    Raises:
        AdapterMismatchError: a value out of range.
    """

    prior: str = ""
    tokens: int = 8
    context: str = "replace"
    rank: int = 16
    picture_mask: float = 1.5

    SYSTEM = "FaceStudio"
    FORMAT = FORMAT
    RANGES = {**TokenMetadata.RANGES, "tokens": (1, 1024), "rank": (0, 1024), "picture_mask": (0, 5)}
    CHOICES = {"context": CONTEXTS}


class FaceStudio(AttachedWeights):
    """e = Linear(picture ‖ face): the context tokens of both branches, e_i and e_p of the paper.

    Args:
        metadata: see [`StudioMetadata`].
        context_width: of the states that the UNet's cross-attention takes.
    """

    NAME = STUDIO
    METADATA = StudioMetadata

    def __init__(self, metadata: StudioMetadata, context_width: int) -> None:
        super().__init__(metadata, context_width)
        self.projection = nn.Linear(metadata.image_width + metadata.face_width, metadata.tokens * context_width)

    def forward(self, picture: Tensor, face: Tensor) -> Tensor:
        """Embeddings `(B, image_width)` of pictures and `(B, face_width)` of faces -> tokens `(B, N, context_width)`.

        Zeros stand for no picture and for no face.
        """
        tokens = self.projection(torch.cat([picture, face], -1).to(self.projection.weight.dtype))
        return tokens.unflatten(-1, (self.metadata.tokens, self.context_width))

    def guided(
        self,
        style: Tensor | None,
        text: Tensor | None,
        face: Tensor,
        style_scale: float,
        device: torch.device | None = None,
    ) -> Tensor:
        """e_g = α e_i + (1 − α) e_p: tokens `(B, N, context_width)`.

        Args:
            style, text: embeddings `(B, image_width)` of the style picture, and of the picture that the prior makes of
                the prompt; None where α leaves it out.
            face: `(B, face_width)`, zeros for nobody.
            style_scale: α from 0, the prompt alone, to 1, the style picture alone.
            device: of the tokens; None: that of the weights.
        """
        device = device or self.projection.weight.device
        parts = [
            share * at_home(self, device, picture, face)
            for share, picture in ((style_scale, style), (1 - style_scale, text))
            if picture is not None and share > 0
        ]
        return torch.stack(parts).sum(0)


def attach(
    unet: Any, studio: FaceStudio, lora: Mapping[str, Tensor] | None = None, *, every_layer: bool = False
) -> None:
    """Make `studio` a module of `unet`, and add its LoRA, which sleeps until [`studio_lora`] wakes it.

    Args:
        lora: its weights by `layer.lora_A.weight`; None for new ones, which change nothing yet.
        every_layer: layers that `lora` leaves out get new ones, to be trained; else they are left as they are.

    Raises:
        AdapterMismatchError: weights of other layers or shapes. FaceFusionError: there is one already, or no peft.
    """
    attach_module(unet, studio)
    try:
        if studio.metadata.rank:
            _inject(whole(unet), studio.metadata.rank, lora, every_layer)
    except FaceFusionError:
        detach_module(unet, STUDIO)
        raise


def _inject(unet: Any, rank: int, weights: Mapping[str, Tensor] | None, every_layer: bool) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise FaceFusionError("FaceStudio's LoRA needs peft: `pip install peft`") from error
    acting = {name: list(layer.active_adapters) for name, layer in lora_layers(unet).items()}
    targets, known = _targets(unet), {layer_of(name) for name in weights or ()}
    if weights and not every_layer:
        targets = [target for target in targets if target in known] or targets
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of another LoRA: as intended
        inject_adapter_in_model(config, unet, STUDIO)
    unet._hf_peft_config_loaded = True
    for name, layer in lora_layers(unet).items():
        layer._active_adapter = acting.get(name, [])  # peft's `set_adapter` would also change what may learn
        for part in (layer.lora_A, layer.lora_B):
            if STUDIO in part:
                part[STUDIO].requires_grad_(False)
    if weights is None:
        return
    own = {name: tensor for name, tensor in lora_state(unet).items() if not every_layer or layer_of(name) in known}
    if own.keys() != weights.keys() or any(own[name].shape != weights[name].shape for name in own):
        detach(unet)
        odd = next((name for name in own if name not in weights or own[name].shape != weights[name].shape), "more")
        raise AdapterMismatchError(f"FaceStudio's LoRA is for other layers than this UNet has: {shown(odd)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _targets(unet: Any) -> list[str]:
    return [f"{layer}.{target}" for layer in attention_layers(unet, "attn2") for target in LORA_TARGETS]


def layer_of(name: str) -> str:
    """The layer of a weight of the LoRA."""
    return name.rsplit(".lora_", 1)[0]


def lora_layers(unet: Any) -> dict[str, Any]:
    """Layers of a UNet that hold LoRAs, by name."""
    return {name: layer for name, layer in unet.named_modules() if hasattr(layer, "lora_A")}


def lora_state(unet: Any) -> dict[str, Tensor]:
    """FaceStudio's LoRA in a UNet: `layer.lora_A.weight` and `layer.lora_B.weight`."""
    unet = whole(unet)
    return {
        f"{name}.{part}.weight": getattr(layer, part)[STUDIO].weight
        for name, layer in lora_layers(unet).items()
        for part in ("lora_A", "lora_B")
        if STUDIO in getattr(layer, part)
    }


def detach(unet: Any) -> None:
    """Undo [`attach`]: other LoRAs stay as they are."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    unet = whole(unet)
    detach_module(unet, STUDIO)
    layers = lora_layers(unet)
    for layer in layers.values():
        if STUDIO in layer.lora_A:
            acting = [name for name in layer.active_adapters if name != STUDIO]
            layer.delete_adapter(STUDIO)
            layer._active_adapter = acting
    getattr(unet, "peft_config", {}).pop(STUDIO, None)
    if layers and not any(layer.lora_A for layer in layers.values()):
        recurse_remove_peft_layers(unet)
        if hasattr(unet, "peft_config"):
            del unet.peft_config
        unet._hf_peft_config_loaded = None


@contextmanager
def studio_lora(unet: Any, acts: bool = True) -> Iterator[None]:
    """Within it the LoRA acts, or does not, beside those that act already."""
    layers = _studio_layers(unet)
    before = [layer._active_adapter for layer in layers]
    try:
        set_lora(unet, acts)
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def set_lora(unet: Any, acts: bool) -> None:
    """Let the LoRA act from now on, or not."""
    for layer in _studio_layers(unet):
        others = [name for name in layer.active_adapters if name != STUDIO]
        layer._active_adapter = [*others, STUDIO] if acts else others


def _studio_layers(unet: Any) -> list[Any]:
    unet = whole(unet)
    return [layer for layer in lora_layers(unet).values() if STUDIO in layer.lora_A]


# --- Files -------------------------------------------------------------------------------------------------------


def save_studio(unet: Any, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write the weights that are attached to `unet`. Raises [`FaceFusionError`] if there are none."""
    save_attached(unet, FaceStudio, path, dtype, beside=lora_state(unet))


def load_studio(unet: Any, path: str | os.PathLike[str], *, every_layer: bool = False) -> FaceStudio:
    """Read what [`save_studio`] wrote and attach it to `unet`, in the place of what was; `every_layer` as [`attach`].

    Raises:
        ModelNotFoundError: no such file. AdapterMismatchError: another format, base family, or shapes.
    """
    studio, lora = read_attached(unet, FaceStudio, path, beside=".lora_")
    detach(unet)
    attach(unet, studio, lora, every_layer=every_layer)
    return studio


def new_studio(unet: Any, **metadata: Any) -> FaceStudio:
    """Untrained weights for `unet`, attached to it; see [`StudioMetadata`] for what `metadata` are."""
    studio = FaceStudio(StudioMetadata(base_family(unet), **metadata), context_width(unet))
    attach(unet, studio)
    return studio


@contextmanager
def studio_left_out(unet: Any) -> Iterator[None]:
    """Within it nothing of FaceStudio is in the UNet, which can be saved as the one that it was."""
    studio = attached(unet, STUDIO)
    if studio is None:
        yield
        return
    lora = {name: tensor.detach().clone() for name, tensor in lora_state(unet).items()}
    detach(unet)
    try:
        yield
    finally:
        attach(unet, studio, lora)
