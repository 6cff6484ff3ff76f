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

from .face_attention import attention_layers
from .face_errors import AdapterMismatchError, FaceFusionError, short, shown
from .face_files import check_range, check_tensors, number, read_tensors, save_tensors
from .unet_family import base_family, face_widths


STUDIO_WEIGHTS_NAME = "face_studio.safetensors"
STUDIO = "face_studio"  # name of the module in the UNet, and of the LoRA
FORMAT, FORMAT_VERSION = "face-studio", "1"
CONTEXTS = ("replace", "append")
LORA_TARGETS = ("to_k", "to_v")  # of the cross-attention: what reads the tokens
PROJECTION = "projection."


@dataclass(frozen=True)
class StudioMetadata:
    """What besides shapes must agree between training and use; stored as strings in the weights file.

    Attributes:
        base_family: which UNets the weights fit, see `unet_family.base_family`.
        image_encoder: of the style picture: a Hub id or folder, or "" for the model's own `image_encoder`.
        image_width: of its embeddings.
        face_embedder, face_width: name and width of the embeddings of faces, see `face_embedders`.
        prior: from text to embeddings of pictures: a Hub id, a folder beside the weights, or "" for none.
        tokens: that the Linear makes.
        context: what they do where a call does not say: `"replace"` the text (the paper), or are `"append"`ed to it.
        rank: of the LoRA; 0 for none. Its strength is 1 (alpha = rank).
        picture_mask: side of what is covered of a face in a style picture, over its box; 0: nothing is.

    Raises:
        AdapterMismatchError: a value out of range.
    """

    base_family: str
    image_width: int
    face_width: int
    face_embedder: str
    image_encoder: str = ""
    prior: str = ""
    tokens: int = 8
    context: str = "replace"
    rank: int = 16
    picture_mask: float = 1.5

    def __post_init__(self) -> None:
        for name, low, high in (
            ("image_width", 1, 8192),
            ("face_width", 1, 8192),
            ("tokens", 1, 1024),
            ("rank", 0, 1024),
            ("picture_mask", 0, 5),
        ):
            check_range(name, getattr(self, name), low, high, AdapterMismatchError)
        if self.context not in CONTEXTS:
            raise AdapterMismatchError(f"context must be {' or '.join(CONTEXTS)}, got {shown(self.context)}")

    def to_strings(self) -> dict[str, str]:
        """The metadata block of the weights file."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **{key: str(value) for key, value in vars(self).items()},
        }

    @classmethod
    def from_strings(cls, strings: Mapping[str, str] | None) -> "StudioMetadata":
        """Inverse of [`to_strings`]; raises [`AdapterMismatchError`] on another format, version or a bad value."""
        strings = dict(strings or {})
        if strings.get("format") != FORMAT or strings.get("format_version") != FORMAT_VERSION:
            raise AdapterMismatchError(
                f"not FaceStudio weights: their metadata say format {shown(strings.get('format'))} version "
                f"{shown(strings.get('format_version'))}, expected {FORMAT!r} version {FORMAT_VERSION}"
            )
        kinds: dict[str, Any] = {
            "image_width": int,
            "face_width": int,
            "tokens": int,
            "rank": int,
            "picture_mask": float,
        }
        texts = ("base_family", "image_encoder", "face_embedder", "prior", "context")
        try:
            values: dict[str, Any] = {n: number(strings, n, kind, AdapterMismatchError) for n, kind in kinds.items()}
            return cls(**values | {name: strings[name] for name in texts})
        except KeyError as error:
            raise AdapterMismatchError(f"FaceStudio's metadata: {short(error)} is missing") from error


class FaceStudio(nn.Module):
    """e = Linear(picture ‖ face): the context tokens of both branches, e_i and e_p of the paper.

    Args:
        metadata: see [`StudioMetadata`].
        context_width: of the states that the UNet's cross-attention takes.
    """

    def __init__(self, metadata: StudioMetadata, context_width: int) -> None:
        super().__init__()
        self.metadata, self.context_width = metadata, context_width
        self.projection = nn.Linear(metadata.image_width + metadata.face_width, metadata.tokens * context_width)

    def forward(self, picture: Tensor, face: Tensor) -> Tensor:
        """Embeddings `(B, image_width)` of pictures and `(B, face_width)` of faces -> tokens `(B, N, context_width)`.

        Zeros stand for no picture and for no face.
        """
        tokens = self.projection(torch.cat([picture, face], -1).to(self.projection.weight.dtype))
        return tokens.unflatten(-1, (self.metadata.tokens, self.context_width))

    def guided(self, style: Tensor | None, text: Tensor | None, face: Tensor, style_scale: float) -> Tensor:
        """e_g = α e_i + (1 − α) e_p: tokens `(B, N, context_width)`.

        Args:
            style, text: embeddings `(B, image_width)` of the style picture, and of the picture that the prior makes of
                the prompt; None where α leaves it out.
            face: `(B, face_width)`, zeros for nobody.
            style_scale: α from 0, the prompt alone, to 1, the style picture alone.
        """
        parts = [
            share * self(picture, face)
            for share, picture in ((style_scale, style), (1 - style_scale, text))
            if picture is not None and share > 0
        ]
        return torch.stack(parts).sum(0)


def context_width(unet: Any) -> int:
    """Width of the states that the cross-attention of a UNet takes."""
    width = getattr(unet, "_orig_mod", unet).config.cross_attention_dim
    return width if isinstance(width, int) else width[-1]


def attach(unet: Any, studio: FaceStudio, lora: Mapping[str, Tensor] | None = None) -> None:
    """Make `studio` a module of `unet`, and add its LoRA, which sleeps until [`studio_lora`] wakes it.

    Args:
        lora: its weights by `layer.lora_A.weight`; None for new ones, which change nothing yet.

    Raises:
        AdapterMismatchError: weights of other layers or shapes. FaceFusionError: there is one already, or no peft.
    """
    unet = getattr(unet, "_orig_mod", unet)
    if hasattr(unet, STUDIO):
        raise FaceFusionError("FaceStudio is loaded already: call `unload_face_studio()` first")
    weight = unet.conv_in.weight
    if studio.metadata.rank:
        _inject(unet, studio.metadata.rank, lora)
    unet.add_module(STUDIO, studio.to(weight.device, weight.dtype))


def _inject(unet: Any, rank: int, weights: Mapping[str, Tensor] | None) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise FaceFusionError("FaceStudio's LoRA needs peft: `pip install peft`") from error
    acting = {name: list(layer.active_adapters) for name, layer in lora_layers(unet).items()}
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_targets(unet), init_lora_weights=True)
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
    own = lora_state(unet)
    if own.keys() != weights.keys() or any(own[name].shape != weights[name].shape for name in own):
        detach(unet)
        odd = next((name for name in own if name not in weights or own[name].shape != weights[name].shape), "more")
        raise AdapterMismatchError(f"FaceStudio's LoRA is for other layers than this UNet has: {shown(odd)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def _targets(unet: Any) -> list[str]:
    return [f"{layer}.{target}" for layer in attention_layers(unet, "attn2") for target in LORA_TARGETS]


def lora_layers(unet: Any) -> dict[str, Any]:
    """Layers of a UNet that hold LoRAs, by name."""
    return {name: layer for name, layer in unet.named_modules() if hasattr(layer, "lora_A")}


def lora_state(unet: Any) -> dict[str, Tensor]:
    """FaceStudio's LoRA in a UNet: `layer.lora_A.weight` and `layer.lora_B.weight`."""
    unet = getattr(unet, "_orig_mod", unet)
    return {
        f"{name}.{part}.weight": getattr(layer, part)[STUDIO].weight
        for name, layer in lora_layers(unet).items()
        for part in ("lora_A", "lora_B")
        if STUDIO in getattr(layer, part)
    }


def detach(unet: Any) -> None:
    """Undo [`attach`]: other LoRAs stay as they are."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    unet = getattr(unet, "_orig_mod", unet)
    if hasattr(unet, STUDIO):
        delattr(unet, STUDIO)
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
    unet = getattr(unet, "_orig_mod", unet)
    return [layer for layer in lora_layers(unet).values() if STUDIO in layer.lora_A]


# --- Files -------------------------------------------------------------------------------------------------------


def save_studio(unet: Any, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write the weights that are attached to `unet`. Raises [`FaceFusionError`] if there are none."""
    studio = getattr(getattr(unet, "_orig_mod", unet), STUDIO, None)
    if studio is None:
        raise FaceFusionError("no FaceStudio weights to save; load some with `load_face_studio(...)`")
    tensors = {**studio.state_dict(), **lora_state(unet)}
    kept = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    save_tensors(path, kept, studio.metadata.to_strings())


def load_studio(unet: Any, path: str | os.PathLike[str]) -> FaceStudio:
    """Read what [`save_studio`] wrote and attach it to `unet`.

    Raises:
        ModelNotFoundError: no such file. AdapterMismatchError: another format, base family, or shapes.
    """
    tensors, strings = read_tensors(path, check=StudioMetadata.from_strings)
    metadata = StudioMetadata.from_strings(strings)
    check_tensors(tensors, "FaceStudio's weights", AdapterMismatchError)
    if (family := base_family(unet)) != metadata.base_family:
        raise AdapterMismatchError(
            f"these FaceStudio weights are for {metadata.base_family}, this model is {family}: take weights that were "
            "trained for it, `face-fusion train --conditioner face-studio`"
        )
    studio = FaceStudio(metadata, context_width(unet))
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(PROJECTION)}
    try:
        studio.load_state_dict(own)
    except RuntimeError as error:
        raise AdapterMismatchError(f"FaceStudio's Linear does not fit its metadata: {short(error)}") from error
    attach(unet, studio, {name: tensor for name, tensor in tensors.items() if name not in own})
    return studio.requires_grad_(False).eval()


def new_studio(unet: Any, **metadata: Any) -> FaceStudio:
    """Untrained weights for `unet`, attached to it; see [`StudioMetadata`] for what `metadata` are."""
    face_widths(unet)  # refuses a UNet without cross-attention
    studio = FaceStudio(StudioMetadata(base_family(unet), **metadata), context_width(unet))
    attach(unet, studio)
    return studio
