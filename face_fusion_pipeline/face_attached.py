"""Weights that make context tokens, a module of the UNet for as long as they are loaded: metadata, module and file.

So they move and change precision with the UNet. FaceStudio's Linear and FaceSnap's mixer are such modules.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .face_errors import AdapterMismatchError, FaceFusionError, short, shown
from .face_files import check_range, check_tensors, number, read_tensors, save_tensors
from .unet_family import base_family


@dataclass(frozen=True)
class TokenMetadata:
    """What besides shapes must agree between training and use; stored as strings in the weights file.

    A subclass adds fields and says what its values may be.

    Attributes:
        base_family: which UNets the weights fit, see `unet_family.base_family`.
        image_width: of what the image encoder makes of a picture.
        face_width, face_embedder: width and name of the embeddings of faces, see `face_embedders`.
        image_encoder: a Hub id or folder, or "" for the model's own `image_encoder`.

    Raises:
        AdapterMismatchError: a value out of range.
    """

    base_family: str
    image_width: int
    face_width: int
    face_embedder: str
    image_encoder: str = ""

    SYSTEM: ClassVar[str]  # how messages call it
    FORMAT: ClassVar[str]
    FORMAT_VERSION: ClassVar[str] = "1"
    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"image_width": (1, 8192), "face_width": (1, 8192)}
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        for name, (low, high) in self.RANGES.items():
            check_range(name, getattr(self, name), low, high, AdapterMismatchError)
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise AdapterMismatchError(f"{name} must be {' or '.join(choices)}, got {shown(getattr(self, name))}")

    def to_strings(self) -> dict[str, str]:
        """The metadata block of the weights file."""
        return {
            "format": self.FORMAT,
            "format_version": self.FORMAT_VERSION,
            **{key: str(value) for key, value in vars(self).items()},
        }

    @classmethod
    def from_strings(cls, strings: Mapping[str, str] | None) -> Self:
        """Inverse of [`to_strings`]; raises [`AdapterMismatchError`] on another format, version or a bad value."""
        strings = dict(strings or {})
        if strings.get("format") != cls.FORMAT or strings.get("format_version") != cls.FORMAT_VERSION:
            raise AdapterMismatchError(
                f"not {cls.SYSTEM} weights: their metadata say format {shown(strings.get('format'))} version "
                f"{shown(strings.get('format_version'))}, expected {cls.FORMAT!r} version {cls.FORMAT_VERSION}"
            )
        values: dict[str, Any] = {}
        for field in fields(cls):
            if field.name not in strings:
                raise AdapterMismatchError(f"{cls.SYSTEM}'s metadata: {field.name!r} is missing")
            kind: Any = field.type
            text = strings[field.name]
            values[field.name] = text if kind is str else number(strings, field.name, kind, AdapterMismatchError)
        return cls(**values)


class AttachedWeights(nn.Module):
    """A module that makes context tokens for the cross-attention of a UNet.

    Args:
        metadata: see [`TokenMetadata`].
        context_width: of the states that the UNet's cross-attention takes.
    """

    is_attached = True  # `unet_family.weights_fingerprint` passes it over: no weight of the UNet's own
    NAME: ClassVar[str]  # of the module in the UNet
    METADATA: ClassVar[type[TokenMetadata]]

    def __init__(self, metadata: Any, context_width: int) -> None:
        super().__init__()
        self.metadata, self.context_width = metadata, context_width


def at_home(module: nn.Module, device: torch.device, *tensors: Tensor | None) -> Tensor:
    """What `module` makes of tensors, on `device`: where models take turns on a GPU, its weights are elsewhere."""
    home = next(module.parameters()).device
    home = device if home.type == "meta" else home  # hooks bring weights and tensors together
    found: Tensor = module(*(None if tensor is None else tensor.to(home) for tensor in tensors))
    return found.to(device)


def whole(unet: Any) -> Any:
    """The UNet in `torch.compile`'s wrapper, or as it is."""
    return getattr(unet, "_orig_mod", unet)


def context_width(unet: Any) -> int:
    """Width of the states that the cross-attention of a UNet takes."""
    width = whole(unet).config.cross_attention_dim
    return width if isinstance(width, int) else width[-1]


def attached(unet: Any, name: str) -> Any:
    """The module of this name that is attached to a UNet, or None."""
    return getattr(whole(unet), name, None)


def move_to(module: nn.Module, unet: Any) -> None:
    """Bring `module` to the device and precision of a UNet; if that is offloaded, to the CPU."""
    weight = whole(unet).conv_in.weight
    device = "cpu" if weight.device.type == "meta" else weight.device
    nn.Module.to(module, device, weight.dtype)  # that of diffusers warns of nothing


def attach_module(unet: Any, module: AttachedWeights) -> None:
    """Make `module` a part of `unet`. Raises [`FaceFusionError`]: there is one already."""
    unet = whole(unet)
    if hasattr(unet, module.NAME):
        raise FaceFusionError(f"{module.METADATA.SYSTEM} is loaded already: call `unload_{module.NAME}()` first")
    move_to(module, unet)
    unet.add_module(module.NAME, module)


def detach_module(unet: Any, name: str) -> None:
    """Undo [`attach_module`]."""
    if hasattr(whole(unet), name):
        delattr(whole(unet), name)


# --- Files -------------------------------------------------------------------------------------------------------


def save_attached(
    unet: Any,
    kind: type[AttachedWeights],
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the weights of this kind that are attached to `unet`, and what lies `beside` them in the file.

    Raises:
        FaceFusionError: there are none.
    """
    module = attached(unet, kind.NAME)
    if module is None:
        raise FaceFusionError(f"no {kind.METADATA.SYSTEM} weights to save; load some with `load_{kind.NAME}(...)`")
    tensors = {**module.state_dict(), **(beside or {})}
    kept = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
    save_tensors(path, kept, module.metadata.to_strings())


def read_attached(
    unet: Any, kind: type[AttachedWeights], path: str | os.PathLike[str], beside: str = "\0"
) -> tuple[Any, dict[str, Tensor]]:
    """Read what [`save_attached`] wrote for a UNet, to which nothing is attached yet.

    Args:
        beside: what the names of tensors have in them that are none of the module's own.

    Returns:
        The module, frozen, and the tensors beside it.

    Raises:
        ModelNotFoundError: no such file. AdapterMismatchError: another format, base family, or shapes.
    """
    metadata_kind, system = kind.METADATA, kind.METADATA.SYSTEM
    tensors, strings = read_tensors(path, check=metadata_kind.from_strings)
    metadata = metadata_kind.from_strings(strings)
    check_tensors(tensors, f"{system}'s weights", AdapterMismatchError)
    if (family := base_family(unet)) != metadata.base_family:
        raise AdapterMismatchError(
            f"these {system} weights are for {metadata.base_family}, this model is {family}: take weights that were "
            f"trained for it, `face-fusion train --conditioner {metadata.FORMAT}`"
        )
    module = kind(metadata, context_width(unet))
    try:
        module.load_state_dict({name: tensor for name, tensor in tensors.items() if beside not in name})
    except RuntimeError as error:
        raise AdapterMismatchError(f"{system}'s weights do not fit their metadata: {short(error)}") from error
    others = {name: tensor for name, tensor in tensors.items() if beside in name}
    return module.requires_grad_(False).eval(), others
