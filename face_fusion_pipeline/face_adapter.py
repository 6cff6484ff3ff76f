"""The trainable weights W_kf, W_vf of Eq. 2: create, apply, save, load, and refuse what does not fit."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .face_attention import attention_layers
from .face_errors import AdapterMismatchError, FaceFusionError, short, shown
from .face_files import check_range, check_tensors, number, save_tensors
from .joint_attention import KeysAndValues
from .unet_family import base_family, face_widths, fingerprint, is_fingerprint, plain_weight, unet_fingerprint


ADAPTER_WEIGHTS_NAME = "face_fusion_adapter.safetensors"
FORMAT = "face-fusion-adapter"
FORMAT_VERSION = 1
PROJECTIONS = ("to_k_face", "to_v_face")


@dataclass(frozen=True)
class AdapterMetadata:
    """What besides shapes must agree between training and use; stored as strings in the weights file.

    Attributes:
        base_family: which UNets the weights fit, see `unet_family.base_family`.
        reference_mode: `"clean"` (timestep 0) or `"noised"` (to `reference_timestep`).
        reference_timestep: timestep of the reference pass, 0 for `"clean"`.
        token_count_bias: see `joint_attention.constant_bias`.
        face_crop: side of the square face crop over the longer side of the face box, from 0.5 to 5.
        resolution: side of the reference image in pixels, from 8 to 2048.
        base_fingerprint: `unet_family.fingerprint` of the UNet trained on, for information: fine-tunes may be used.

    Raises:
        AdapterMismatchError: a value out of range.
    """

    base_family: str
    reference_mode: str = "clean"
    reference_timestep: int = 0
    token_count_bias: bool = False
    face_crop: float = 1.6
    resolution: int = 512
    base_fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.reference_mode not in ("clean", "noised"):
            raise AdapterMismatchError(f"reference_mode must be 'clean' or 'noised', got {shown(self.reference_mode)}")
        check_range("reference_timestep", self.reference_timestep, 0, 999, AdapterMismatchError)
        check_range("face_crop", self.face_crop, 0.5, 5, AdapterMismatchError)
        check_range("resolution", self.resolution, 8, 2048, AdapterMismatchError)
        if not is_fingerprint(self.base_fingerprint):
            raise AdapterMismatchError(f"base_fingerprint is {shown(self.base_fingerprint)}, not numbers of a UNet")
        if (self.reference_timestep > 0) != (self.reference_mode == "noised"):
            raise AdapterMismatchError(
                f"reference_timestep {self.reference_timestep} does not go with mode {self.reference_mode!r}; "
                "'clean' means 0, 'noised' a positive timestep"
            )

    def to_strings(self) -> dict[str, str]:
        """The metadata block of the weights file."""
        values = {key: str(value) for key, value in vars(self).items()}
        values["token_count_bias"] = str(self.token_count_bias).lower()
        return {"format": FORMAT, "format_version": str(FORMAT_VERSION), **values}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str] | None) -> "AdapterMetadata":
        """Inverse of [`to_strings`]; raises [`AdapterMismatchError`] on another format, version or a bad value."""
        strings = dict(strings or {})
        if strings.get("format") != FORMAT:
            raise AdapterMismatchError(
                f"not a Face Fusion adapter: its metadata say format {shown(strings.get('format'))}, "
                f"expected {FORMAT!r}"
            )
        if strings.get("format_version") != str(FORMAT_VERSION):
            raise AdapterMismatchError(
                f"adapter format version {shown(strings.get('format_version'))} cannot be read, only "
                f"{FORMAT_VERSION}; update face-fusion-pipeline or convert the file"
            )
        try:
            return cls(
                base_family=strings["base_family"],
                reference_mode=strings["reference_mode"],
                reference_timestep=number(strings, "reference_timestep", int, AdapterMismatchError),
                token_count_bias={"true": True, "false": False}[strings["token_count_bias"]],
                face_crop=number(strings, "face_crop", float, AdapterMismatchError),
                resolution=number(strings, "resolution", int, AdapterMismatchError),
                base_fingerprint=strings.get("base_fingerprint", ""),
            )
        except KeyError as error:
            raise AdapterMismatchError(f"adapter metadata: {short(error)} is missing or not 'true'/'false'") from error


class FaceFusionAdapter(nn.Module):
    """One pair `to_k_face`, `to_v_face` (Linear C -> inner, no bias) for each cross-attention layer of a UNet.

    The modules are nested as in the UNet, so `state_dict()` has the keys of the weights file:
    `down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k_face.weight`.

    Args:
        widths: layer name -> (in_features, out_features).
        metadata: see [`AdapterMetadata`].
    """

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        metadata: AdapterMetadata,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.metadata = metadata
        self.layer_names = list(widths)
        for name, (in_features, out_features) in widths.items():
            layer: nn.Module = self
            for part in name.split("."):
                if part not in layer._modules:
                    layer.add_module(part, nn.Module())
                layer = layer.get_submodule(part)
            for projection in PROJECTIONS:
                linear = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
                layer.add_module(projection, linear)

    def forward(self, hidden_states: Mapping[str, Tensor]) -> KeysAndValues:
        """Eq. 2: reference hidden states `(..., N_f, C)` of each layer -> keys and values `(..., N_f, inner)`."""
        keys_and_values = {}
        for name in self.layer_names:
            layer: Any = self.get_submodule(name)
            tokens = hidden_states[name].to(layer.to_k_face.weight.dtype)
            keys_and_values[name] = (layer.to_k_face(tokens), layer.to_v_face(tokens))
        return keys_and_values


# --- Creating ----------------------------------------------------------------------------------------------------


def create_adapter(
    unet: Any,
    init: str = "attn1",
    *,
    metadata: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float32,
) -> FaceFusionAdapter:
    """New weights for `unet`, on its device.

    Args:
        init: `"attn1"` copies the self-attention's keys and values of the same block (same shape C -> C), `"zero_v"`
            copies the keys and zeroes the values, `"xavier"` draws both at random.
        metadata: fields of [`AdapterMetadata`] other than the base's.

    Raises:
        FaceFusionError: unknown `init`.
    """
    if init not in ("attn1", "zero_v", "xavier"):
        raise FaceFusionError(f"init must be 'attn1', 'zero_v' or 'xavier', got {init!r}")
    described = AdapterMetadata(base_family=base_family(unet), base_fingerprint=unet_fingerprint(unet))
    device = next(unet.parameters()).device
    adapter = FaceFusionAdapter(face_widths(unet), replace(described, **(metadata or {})), device=device, dtype=dtype)  # type: ignore[arg-type]
    self_attention = attention_layers(unet, "attn1")
    with torch.no_grad():
        for name in adapter.layer_names:
            layer: Any = adapter.get_submodule(name)
            source = self_attention.get(name.removesuffix("2") + "1")
            for projection in PROJECTIONS:
                weight = getattr(layer, projection).weight
                if init == "xavier" or source is None:
                    nn.init.xavier_uniform_(weight)
                else:
                    weight.copy_(plain_weight(getattr(source, projection.removesuffix("_face"))))
            if init == "zero_v":
                layer.to_v_face.weight.zero_()
    return adapter


def adapter_fingerprint(adapter: FaceFusionAdapter) -> str:
    """[`unet_family.fingerprint`] of up to sixteen projections."""
    weights = list(adapter.parameters())
    return fingerprint(weights[:: max(1, len(weights) // 16)][:16])


# --- Files -------------------------------------------------------------------------------------------------------


def save_adapter(adapter: FaceFusionAdapter, path: str | os.PathLike[str]) -> None:
    """Write weights and metadata to `path`."""
    save_tensors(path, adapter.state_dict(), adapter.metadata.to_strings())


def load_adapter(
    unet: Any, state_dict: Mapping[str, Tensor], metadata: AdapterMetadata | None = None
) -> FaceFusionAdapter:
    """The adapter with these weights, checked against `unet`.

    Args:
        metadata: `None` (a bare state dict) takes the defaults and the UNet's family.

    Raises:
        AdapterMismatchError: other base family, missing or unknown keys, other shapes, what is no finite weight.
    """
    metadata = metadata or AdapterMetadata(base_family=base_family(unet))
    if metadata.base_family != base_family(unet):
        raise AdapterMismatchError(
            f"the adapter was trained for base family {shown(metadata.base_family)}, this model is "
            f"{base_family(unet)!r}; load the base it was trained on, or another adapter"
        )
    adapter = FaceFusionAdapter(face_widths(unet), metadata, device="meta")
    expected = adapter.state_dict()
    for what, keys in (("unknown", state_dict.keys() - expected), ("missing", expected.keys() - state_dict)):
        if keys:
            example = shown(min(keys, key=str))
            raise AdapterMismatchError(f"the adapter has {len(keys)} {what} keys, for example {example}")
    check_tensors(state_dict, "the adapter", AdapterMismatchError)
    for key, weight in state_dict.items():
        if weight.shape != expected[key].shape:
            raise AdapterMismatchError(
                f"{key} has shape {tuple(weight.shape)}, this model needs {tuple(expected[key].shape)}"
            )
    adapter.load_state_dict(dict(state_dict), assign=True)
    return adapter
