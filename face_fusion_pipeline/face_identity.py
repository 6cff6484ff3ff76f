"""The identity of a person, ready to use: keys and values of references, kept, saved and read."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .face_attention import attention_layers
from .face_defaults import FACE_MODES
from .face_errors import IdentityMismatchError, InvalidScaleError, shown
from .face_files import check_tensors, read_tensors, save_tensors
from .face_self_attention import WHOLE_AND_CLEAN, SelfAttentionReference
from .joint_attention import reference_log_weights
from .unet_family import is_fingerprint, same_fingerprint, same_weights


IDENTITY_FORMAT = "face-fusion-identity"
CELLS = {"adapter": ("attn2",), "training-free": ("attn1",), "both": ("attn1", "attn2")}  # layers of each mode
WITHOUT_SELF_ATTENTION, WITH_SELF_ATTENTION = "1", "2"  # format versions; all of an adapter alone is in the first


@dataclass(frozen=True, eq=False, repr=False)  # comparing tensors would raise
class FaceIdentity:
    """The face of one person, ready to use: encode once, generate with any prompt (Eq. 2 and 6).

    Attributes:
        keys, values: layer name -> `(n_refs, N_f, inner)`.
        weights: `(n_refs,)`, >= 0; only their ratios matter.
        mode: `"adapter"` (layers are `attn2`), `"training-free"` (`attn1`) or `"both"`.
        base_fingerprint, adapter_fingerprint: the models it was made with (see `unet_family.fingerprint`).
        weights_fingerprint: all weights of the UNet, its LoRAs and their strengths (see
            `unet_family.weights_fingerprint`); empty in older files.
        self_attention: what its `attn1` layers see of the references and how strongly; None in mode `"adapter"`.
        cells: layer name -> bool `(h_f, w_f)`, the cells of a reference that N_f are; all where a name is missing.
        familiarity: below 0 the model does not know the like of the references; None where nobody looked. Not saved.
    """

    keys: dict[str, Tensor]
    values: dict[str, Tensor]
    weights: Tensor
    mode: str
    base_fingerprint: str = ""
    adapter_fingerprint: str = ""
    self_attention: SelfAttentionReference | None = None
    cells: dict[str, Tensor] = field(default_factory=dict)
    weights_fingerprint: str = ""
    familiarity: float | None = None

    def __repr__(self) -> str:
        tokens = sum(key.shape[0] * key.shape[1] for key in self.keys.values())
        return f"FaceIdentity(mode={self.mode!r}, n_refs={self.n_refs}, layers={len(self.keys)}, tokens={tokens})"

    @property
    def needs_adapter(self) -> bool:
        """Whether it was projected by trained weights, and so goes with these alone."""
        return self.mode != "training-free"

    @property
    def n_refs(self) -> int:
        """Number of reference images."""
        return next(iter(self.keys.values())).shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "FaceIdentity":
        """The identity on a device and in a precision."""
        keys, values = ({n: t.to(device, dtype) for n, t in kv.items()} for kv in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def with_weights(self, weights: Any) -> "FaceIdentity":
        """The same references in another proportion; `None` means equal. Checked against the number of references."""
        return replace(self, weights=checked_weights(weights, self.n_refs))

    def with_self_scale(self, scale: float) -> "FaceIdentity":
        """The same with another strength at the self-attention, in [0, 100].

        Raises:
            InvalidScaleError: out of range, or an identity of mode `"adapter"`, which has no such part.
        """
        if self.self_attention is None:
            raise InvalidScaleError(
                f"face_self_scale={scale:g} is of the modes 'both' and 'training-free': this face is in 'adapter'"
            )
        return replace(self, self_attention=self.self_attention.with_scale(scale))

    def scale_at(self, name: str) -> float:
        """Strength at a layer, which the strengths of the call multiply."""
        return self.self_attention.scale if self.self_attention and name.endswith(".attn1") else 1.0

    def check(self, base_fingerprint: str, adapter_fingerprint: str, weights_fingerprint: str = "") -> None:
        """Raise [`IdentityMismatchError`] unless the models are those the identity was made with."""
        if not same_fingerprint(self.base_fingerprint, base_fingerprint):
            raise IdentityMismatchError(
                "this identity was encoded with another base model; encode the face again with `pipe.encode_face(...)`"
            )
        if not same_weights(self.weights_fingerprint, weights_fingerprint):
            raise IdentityMismatchError(
                "this identity was encoded with other weights of the base model, or with other LoRAs or strengths of "
                "them; bring these back, or encode the face again with `pipe.encode_face(...)`"
            )
        if self.needs_adapter and not same_fingerprint(self.adapter_fingerprint, adapter_fingerprint):
            raise IdentityMismatchError(
                "this identity was encoded with other adapter weights; load those, or encode the face again"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the fingerprints as metadata."""
        tensors = {f"{name}.key": key for name, key in self.keys.items()}
        tensors |= {f"{name}.value": value for name, value in self.values.items()}
        tensors |= {f"{name}.cells": cells for name, cells in self.cells.items()}
        metadata = {
            "format": IDENTITY_FORMAT,
            "format_version": WITHOUT_SELF_ATTENTION if self.self_attention is None else WITH_SELF_ATTENTION,
            "mode": self.mode,
            "base_fingerprint": self.base_fingerprint,
            "adapter_fingerprint": self.adapter_fingerprint,
            "weights_fingerprint": self.weights_fingerprint,
            **({} if self.self_attention is None else self.self_attention.to_strings()),
        }
        save_tensors(path, {"weights": self.weights, **tensors}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FaceIdentity":
        """Read what `save` wrote.

        Raises:
            ModelNotFoundError: no such file.
            IdentityMismatchError: not an identity, damaged, or of another format version.
        """
        tensors, metadata = read_tensors(path, IdentityMismatchError, lambda strings: _check_metadata(strings, path))
        keys, values, cells = (
            {name.removesuffix(suffix): tensor for name, tensor in tensors.items() if name.endswith(suffix)}
            for suffix in (".key", ".value", ".cells")
        )
        if "weights" not in tensors or keys.keys() != values.keys() or not keys:
            raise IdentityMismatchError(
                f"{path} lacks weights, or a key and a value for each layer: it is damaged; encode the face again "
                "with `pipe.encode_face(...)`"
            )
        if len(tensors) != 1 + 2 * len(keys) + len(cells):
            raise IdentityMismatchError(f"{path} has tensors that are of no identity: it is damaged")
        mode, fingerprints = metadata["mode"], (metadata["base_fingerprint"], metadata["adapter_fingerprint"])
        own = None
        if metadata["format_version"] == WITH_SELF_ATTENTION:
            own = SelfAttentionReference.from_strings(metadata)
        elif mode == "training-free":
            own = WHOLE_AND_CLEAN
        every = metadata.get("weights_fingerprint", "")
        identity = cls(keys, values, tensors["weights"], mode, *fingerprints, own, cells, every)
        check_identity(identity, str(path))
        return identity


def checked_weights(weights: Any, references: int) -> Tensor:
    """`weights` as a tensor `(references,)`; None means equal.

    Raises:
        InvalidScaleError: no numbers, another count, negative or all zero.
    """
    if weights is None:
        return torch.ones(references)
    try:
        tensor = torch.as_tensor(weights, dtype=torch.float32).cpu().flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidScaleError(f"face weights must be numbers, got {weights!r}") from error
    if tensor.numel() != references:
        raise InvalidScaleError(f"{tensor.numel()} face weights for {references} face images; give one for each")
    reference_log_weights(tensor)  # raises on negative or all-zero weights
    return tensor


def _check_metadata(strings: Mapping[str, str], path: str | os.PathLike[str]) -> None:
    """Raise [`IdentityMismatchError`] unless these are the metadata of an identity file that can be read."""
    form, version = strings.get("format"), strings.get("format_version")
    if form != IDENTITY_FORMAT or version not in (WITHOUT_SELF_ATTENTION, WITH_SELF_ATTENTION):
        raise IdentityMismatchError(
            f"{path} has format {shown(form)} version {shown(version)}, expected {IDENTITY_FORMAT!r} version "
            f"{WITHOUT_SELF_ATTENTION} or {WITH_SELF_ATTENTION}"
        )
    if lacking := [name for name in ("mode", "base_fingerprint", "adapter_fingerprint") if name not in strings]:
        raise IdentityMismatchError(
            f"{path} lacks {', '.join(lacking)}: it is damaged; encode the face again with `pipe.encode_face(...)`"
        )
    if strings["mode"] not in FACE_MODES:
        raise IdentityMismatchError(
            f"{path} has mode {shown(strings['mode'])}, expected one of {', '.join(FACE_MODES)}"
        )
    names = ("base_fingerprint", "adapter_fingerprint", "weights_fingerprint")
    if wrong := [name for name in names if not is_fingerprint(strings.get(name, ""))]:
        raise IdentityMismatchError(f"{path} has the {wrong[0]} {shown(strings[wrong[0]])}, not numbers of a model")


# --- Identities of others --------------------------------------------------------------------------------------------


def check_identity(identity: FaceIdentity, what: str) -> None:
    """Raise [`IdentityMismatchError`] unless the parts of an identity go together, whatever the model.

    Args:
        what: how messages begin, such as the file's name.
    """
    keys, values = identity.keys, identity.values
    if not keys or keys.keys() != values.keys():
        raise IdentityMismatchError(f"{what} must have a key and a value for each layer")
    if identity.mode not in CELLS or {name.rpartition(".")[2] for name in keys} != set(CELLS[identity.mode]):
        raise IdentityMismatchError(f"{what} has other layers than those of the mode {shown(identity.mode)}")
    if (identity.self_attention is None) != (identity.mode == "adapter"):
        raise IdentityMismatchError(f"{what} of the mode {identity.mode!r} does not say how it is seen at attn1")
    for kind in CELLS[identity.mode]:  # the weights that made one kind may have another precision than the UNet
        parts = {f"{name}.{part}": kv[name] for part, kv in (("key", keys), ("value", values)) for name in kv}
        check_tensors({n: t for n, t in parts.items() if f".{kind}." in n}, what, IdentityMismatchError)
    for name, key in keys.items():
        if key.ndim != 3 or key.shape != values[name].shape or not key.numel():
            raise IdentityMismatchError(
                f"{what}: {shown(name)} has keys {tuple(key.shape)} and values {tuple(values[name].shape)}; both are "
                "(references, cells, width)"
            )
    references = {key.shape[0] for key in keys.values()}
    if len(references) > 1:
        raise IdentityMismatchError(f"{what} has layers of {' and '.join(map(str, sorted(references)))} references")
    _check_reference_weights(identity.weights, references.pop(), what)
    for name, cells in identity.cells.items():
        known = name in keys and name.endswith(".attn1")
        if not (known and cells.dtype == torch.bool and cells.ndim == 2 and int(cells.sum()) == keys[name].shape[1]):
            raise IdentityMismatchError(f"{what}: the cells of {shown(name)} are not those of its keys")


def _check_reference_weights(weights: Tensor, references: int, what: str) -> None:
    if weights.ndim != 1 or len(weights) != references or not weights.is_floating_point():
        raise IdentityMismatchError(
            f"{what} has weights {tuple(weights.shape)} of {weights.dtype} for {references} references"
        )
    if not (weights.isfinite().all() and weights.min() >= 0 and weights.max() > 0):
        raise IdentityMismatchError(f"{what} has weights {shown(weights.tolist())}: they are 0 or more, and not all 0")


def check_identity_fits(identity: FaceIdentity, unet: Any, adapter: Any) -> None:
    """Raise [`IdentityMismatchError`] unless an identity has exactly the layers that it should have, in their widths.

    At the cross-attention these are the layers of the adapter, at the self-attention those that its
    `SelfAttentionReference` chooses.
    """
    layers = {}
    if identity.needs_adapter:
        layers = {name: attn for name, attn in attention_layers(unet, "attn2").items() if name in adapter.layer_names}
    if identity.self_attention is not None:
        layers = layers | _chosen(attention_layers(unet, "attn1"), identity.self_attention.layers)
    for what, names in (
        ("unknown", identity.keys.keys() - layers.keys()),
        ("missing", layers.keys() - identity.keys.keys()),
    ):
        if names:
            raise IdentityMismatchError(
                f"this identity has {len(names)} {what} layers, for example {shown(min(names))}: encode the face "
                "again with this model"
            )
    for name, layer in layers.items():
        if identity.keys[name].shape[-1] != layer.to_k.out_features:
            raise IdentityMismatchError(
                f"{name} of this identity is {identity.keys[name].shape[-1]} wide, in this model "
                f"{layer.to_k.out_features}: encode the face again with this model"
            )


def _chosen(layers: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    prefixes = tuple(prefixes)
    return {name: layer for name, layer in layers.items() if any(f"{name}.".startswith(f"{p}.") for p in prefixes)}
