"""Weights of an earlier training to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from ..face_adapter import (
    ADAPTER_WEIGHTS_NAME,
    AdapterMetadata,
    FaceFusionAdapter,
    load_adapter,
)
from ..face_attached import AttachedWeights, attach_module, read_attached
from ..face_files import read_tensors
from ..face_snap import SNAP_WEIGHTS_NAME, FaceMixer
from ..face_studio import STUDIO_WEIGHTS_NAME, FaceStudio, load_studio
from ..unet_family import unet_fingerprint
from .errors import TrainingError


WEIGHTS = {FaceStudio: STUDIO_WEIGHTS_NAME, FaceMixer: SNAP_WEIGHTS_NAME}


def continued_adapter(unet: UNet2DConditionModel, path: Path, metadata: Mapping[str, object]) -> FaceFusionAdapter:
    """The weights in a file or folder in float32, to be trained on; `TrainingError` where its metadata are others."""
    path = path / ADAPTER_WEIGHTS_NAME if path.is_dir() else path
    tensors, strings = read_tensors(path, check=AdapterMetadata.from_strings)
    stored = AdapterMetadata.from_strings(strings)
    changed = [name for name, value in metadata.items() if getattr(stored, name) != value]
    if changed:
        raise TrainingError(
            f"{path} has {changed[0]} {getattr(stored, changed[0])}, not {metadata[changed[0]]}: "
            "give the same option to go on from it"
        )
    adapter = load_adapter(unet, tensors, stored).float()
    adapter.metadata = replace(adapter.metadata, base_fingerprint=unet_fingerprint(unet))  # what it is trained on now
    return adapter


def continued_tokens(unet: UNet2DConditionModel, kind: type[AttachedWeights], path: Path, **seen_by: object) -> Any:
    """FaceStudio's or FaceSnap's weights in a file or folder in float32, attached to `unet`, to be trained on.

    Args:
        seen_by: metadata of what looks at pictures and faces now; `TrainingError` where the weights know others.
    """
    path = path / WEIGHTS[kind] if path.is_dir() else path
    if kind is FaceStudio:
        module: Any = load_studio(unet, path, every_layer=True)  # earlier weights have a LoRA for fewer layers
    else:
        module, _ = read_attached(unet, kind, path)
        attach_module(unet, module)
    for name, value in seen_by.items():
        if getattr(module.metadata, name) != value:
            raise TrainingError(f"{path} has {name} {getattr(module.metadata, name)!r}, not {value!r}: take the same")
    return module.float()
