"""What is looked at before weights and identities of others are used: header first, then bounds, then every number.

Nothing here trusts a file: a header is read and bounded before any tensor is, and no message repeats a long value.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .face_attention import attention_layers
from .face_errors import FaceFusionError, IdentityMismatchError, ModelNotFoundError, short, shown


MAX_HEADER = 2**22  # bytes: Stable Diffusion XL's 140 tensors take 20 kB
MAX_TENSORS = 10_000
MAX_BYTES = 2**32  # of all tensors: the largest adapter has 0.8 GB, a reference in Stable Diffusion 1.5 less than 0.1
MAX_NUMBERS = 20_000  # in a fingerprint
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CELLS = {"adapter": ("attn2",), "training-free": ("attn1",), "both": ("attn1", "attn2")}  # layers of each mode


# --- Headers ------------------------------------------------------------------------------------------------------


def read_header(path: str | os.PathLike[str], unreadable: type[FaceFusionError]) -> dict[str, str]:
    """The metadata of a safetensors file, of which nothing but the header is read, and that within bounds.

    Raises:
        ModelNotFoundError: no such file.
        FaceFusionError: no regular file, no safetensors, or more in it than weights of this kind have, as the type
            `unreadable`.
    """
    try:
        header = _json_header(path)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        metadata = header.get("__metadata__") or {}
        if len(entries) > MAX_TENSORS:
            raise ValueError(f"it has {len(entries)} tensors, at most {MAX_TENSORS} are read")
        last = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        if last > MAX_BYTES:
            raise ValueError(f"its tensors take {last} bytes, at most {MAX_BYTES} are read")
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError("its metadata are not text")
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"no such file: {path}") from error
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        reason = short(error) or type(error).__name__
        raise unreadable(f"{path} is not a readable safetensors file: {reason}") from error
    return metadata


def _json_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"its header claims {length} bytes, at most {MAX_HEADER} are read")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header


def number(strings: Mapping[str, str], name: str, kind: Callable[[str], Any], error: type[FaceFusionError]) -> Any:
    """The number that metadata have under a name; raises `error` with the text, cut, where it is none."""
    try:
        return kind(strings[name])
    except ValueError:
        raise error(f"metadata: {name} is {shown(strings[name])}, which is no {kind.__name__}") from None


def check_range(name: str, value: Any, low: float, high: float, error: type[FaceFusionError]) -> None:
    """Raise `error` unless `value` is a finite number from `low` to `high`."""
    try:
        inside = low <= value <= high
    except TypeError:
        inside = False
    if not inside:
        raise error(f"{name} must be from {low:g} to {high:g}, got {shown(value)}")


def is_fingerprint(text: Any) -> bool:
    """Whether a text is one that `face_adapter.fingerprint` makes: finite numbers, or nothing."""
    if not isinstance(text, str) or len(text) > 32 * MAX_NUMBERS:
        return False
    try:
        return all(math.isfinite(float(part)) for part in text.split())
    except ValueError:
        return False


# --- Tensors ------------------------------------------------------------------------------------------------------


def check_tensors(tensors: Mapping[str, Any], what: str, error: type[FaceFusionError]) -> None:
    """Raise `error` unless all are finite floating-point tensors of one precision.

    Args:
        what: how the message begins, such as "the adapter".
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise error(f"{what}: {shown(name)} is of type {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in FLOATS:
            raise error(
                f"{what}: {shown(name)} has numbers of type {tensor.dtype}; weights are floating-point numbers"
            )
        if tensor.device.type != "meta" and not tensor.isfinite().all():
            raise error(f"{what}: {shown(name)} has values that are NaN or infinite: the file is damaged")
    if len(kinds := {str(tensor.dtype) for tensor in tensors.values()}) > 1:
        raise error(f"{what} mixes {' and '.join(sorted(kinds))}: save it in one precision")


# --- Identities ---------------------------------------------------------------------------------------------------


def check_identity(identity: Any, what: str) -> None:
    """Raise [`IdentityMismatchError`] unless the parts of an identity go together, whatever the model.

    Args:
        identity: a `FaceIdentity`.
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


def check_identity_fits(identity: Any, unet: Any, adapter: Any) -> None:
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
