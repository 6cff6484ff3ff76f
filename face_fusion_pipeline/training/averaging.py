"""Weights between those of two trainings (arXiv 2109.01903): the second began where the first one ended.

Weights that were tuned towards one aim give up others. Halfway there they often keep most of what was gained and of
what would be lost: here likeness, gained by an identity loss, and faces that still look like faces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..face_adapter import ADAPTER_WEIGHTS_NAME, AdapterMetadata
from ..face_errors import AdapterMismatchError, FaceFusionError, also_named
from ..face_files import check_tensors, read_tensors, save_tensors
from ..face_studio import STUDIO_WEIGHTS_NAME, StudioMetadata, layer_of
from ..files.atomic import replacing
from ..unet_family import same_fingerprint
from .run_records import RECORD, read_records


NAMES = {AdapterMetadata: ADAPTER_WEIGHTS_NAME, StudioMetadata: STUDIO_WEIGHTS_NAME}


@also_named(share="fraction")
def average_adapters(first: Path, second: Path, fraction: float, out: Path) -> None:
    """Write (1 − fraction) · first + fraction · second to the folder `out`, with the record of the second's training.

    Args:
        first, second: weights of Face Fusion or of FaceStudio: files, or folders that `face-fusion train` wrote.
        fraction: from 0 to 1.

    Raises:
        AdapterMismatchError: they belong to different bases, or to different kinds of reference.
        FaceFusionError: `out` is one of them, or `fraction` is no fraction. ModelNotFoundError: one is not there.
    """
    if not 0 <= fraction <= 1:
        raise FaceFusionError(f"the fraction of the second must be from 0 to 1, got {fraction}")
    files = [_weights_in(path) if path.is_dir() else path for path in (first, second)]
    (a, said), (b, also_said) = (read_tensors(file, check=metadata_of) for file in files)
    one, other = metadata_of(said), metadata_of(also_said)
    target = out / NAMES[type(one)]
    if target.resolve() in [file.resolve() for file in files]:
        raise FaceFusionError(f"{out} holds what is averaged: take another folder for the result")
    if not _alike(one, other):
        raise AdapterMismatchError(f"{files[0]} and {files[1]} are for different bases or kinds of reference")
    if isinstance(one, StudioMetadata):
        a = with_new_layers(a, b)
    if {key: weight.shape for key, weight in a.items()} != {key: weight.shape for key, weight in b.items()}:
        raise AdapterMismatchError(f"{files[0]} and {files[1]} have different layers")
    for file, read in zip(files, (a, b), strict=True):
        check_tensors(read, str(file), AdapterMismatchError)
    mean = {key: torch.lerp(a[key].float(), b[key].float(), fraction).to(b[key].dtype) for key in b}
    records = averaged_records(files[0].with_name(RECORD), files[1].with_name(RECORD), fraction)
    with replacing(target) as weights, replacing(out / RECORD) as record:  # both, or neither
        save_tensors(weights, mean, one.to_strings())
        record.write_text(json.dumps(records, indent=2) + "\n")
    if not records:  # of a training of which nothing is known
        (out / RECORD).unlink()


def _weights_in(folder: Path) -> Path:
    return next((folder / name for name in NAMES.values() if (folder / name).is_file()), folder / ADAPTER_WEIGHTS_NAME)


def metadata_of(strings: Mapping[str, str]) -> AdapterMetadata | StudioMetadata:
    """Those of weights of either kind, from the strings of their file."""
    kind = StudioMetadata if strings.get("format") == StudioMetadata.FORMAT else AdapterMetadata
    return kind.from_strings(strings)


def _alike(one: AdapterMetadata | StudioMetadata, other: AdapterMetadata | StudioMetadata) -> bool:
    if isinstance(one, AdapterMetadata) and isinstance(other, AdapterMetadata):
        same = same_fingerprint(one.base_fingerprint, other.base_fingerprint)
        return same and one == replace(other, base_fingerprint=one.base_fingerprint)
    return one == other


def with_new_layers(earlier: dict[str, Tensor], later: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an earlier FaceStudio, and a LoRA that does nothing yet for the layers that only `later` has."""
    known = {layer_of(name) for name in earlier}
    new = {name: weight for name, weight in later.items() if ".lora_" in name and layer_of(name) not in known}
    return earlier | {name: torch.zeros_like(weight) if ".lora_B." in name else weight for name, weight in new.items()}


def averaged_records(first: Path, second: Path, fraction: float) -> dict[str, Any]:
    """The records of the second training, which say what its weights were averaged with.

    Raises [`FaceFusionError`] where one is damaged.
    """
    records, others = read_records(second), read_records(first)
    for name, training in records.items():
        same = {name: others[name]} if name in others else others
        averaged = {"fraction": fraction, "with": _described(same)}
        before = {"before": training["averaged"]} if "averaged" in training else {}
        training["averaged"] = averaged | before
    return records


def _described(records: dict[str, Any]) -> dict[str, object]:
    """Which training it was, if it is known, and what its weights were averaged with."""
    names = ("task", "steps", "date", "averaged")
    return {name: training[name] for training in records.values() for name in names if name in training}
