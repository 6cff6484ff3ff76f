"""Safetensors files: written whole or not at all; of others, header first, then bounds, then every number.

Nothing here trusts a file: a header is read and bounded before any tensor is, and no message repeats a long value.
"""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .face_errors import AdapterMismatchError, FaceFusionError, ModelNotFoundError, short, shown


MAX_HEADER = 2**22  # bytes: Stable Diffusion XL's 140 tensors take 20 kB
MAX_TENSORS = 10_000
MAX_BYTES = 2**32  # of all tensors: the largest adapter has 0.8 GB, a reference in Stable Diffusion 1.5 less than 0.1
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file by renaming a finished one, so that no half-written file can be left behind.

    Raises OSError where it cannot be written, for example on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, temporary, metadata)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(
    path: str | os.PathLike[str],
    unreadable: type[FaceFusionError] = AdapterMismatchError,
    check: Callable[[dict[str, str]], Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Args:
        check: called with the metadata before any tensor is read; raises where they are not those wanted.

    Raises:
        ModelNotFoundError: no such file.
        FaceFusionError: not a safetensors file, or one too large, as the type `unreadable`.
    """
    metadata = read_header(path, unreadable)
    if check is not None:
        check(metadata)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()  # the file itself cannot be iterated
            return {name: file.get_tensor(name) for name in names}, metadata
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"no such file: {path}") from error
    except (SafetensorError, OSError) as error:
        raise unreadable(f"{path} is not a readable safetensors file: {short(error)}") from error


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
