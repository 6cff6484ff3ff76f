"""Safetensors files: written whole or not at all, read without running anything."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .face_errors import AdapterMismatchError, FaceFusionError, ModelNotFoundError, short
from .face_file_checks import read_header


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
