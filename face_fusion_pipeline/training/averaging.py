"""Weights between those of two trainings (arXiv 2109.01903): the second began where the first one ended.

Weights that were tuned towards one aim give up others. Halfway there they often keep most of what was gained and of
what would be lost: here likeness, gained by an identity loss, and faces that still look like faces.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..face_adapter import ADAPTER_WEIGHTS_NAME, AdapterMetadata
from ..face_errors import AdapterMismatchError, FaceFusionError, also_named
from ..face_files import check_tensors, read_tensors, save_tensors
from ..files.atomic import replacing
from ..unet_family import same_fingerprint
from .run_records import RECORD, read_records


@also_named(share="fraction")
def average_adapters(first: Path, second: Path, fraction: float, out: Path) -> None:
    """Write (1 − fraction) · first + fraction · second to the folder `out`, with the record of the second's training.

    Args:
        first, second: adapter files, or folders that `face-fusion train` wrote.
        fraction: from 0 to 1.

    Raises:
        AdapterMismatchError: they belong to different bases, or to different kinds of reference.
        FaceFusionError: `out` is one of them, or `fraction` is no fraction. ModelNotFoundError: one is not there.
    """
    if not 0 <= fraction <= 1:
        raise FaceFusionError(f"the fraction of the second must be from 0 to 1, got {fraction}")
    files = [path / ADAPTER_WEIGHTS_NAME if path.is_dir() else path for path in (first, second)]
    target = out / ADAPTER_WEIGHTS_NAME
    if target.resolve() in [file.resolve() for file in files]:
        raise FaceFusionError(f"{out} holds what is averaged: take another folder for the result")
    (a, said), (b, also_said) = (read_tensors(file, check=AdapterMetadata.from_strings) for file in files)
    one, other = (AdapterMetadata.from_strings(strings) for strings in (said, also_said))
    same_base = same_fingerprint(one.base_fingerprint, other.base_fingerprint)
    if not same_base or one != replace(other, base_fingerprint=one.base_fingerprint):
        raise AdapterMismatchError(f"{files[0]} and {files[1]} are for different bases or kinds of reference")
    if {key: weight.shape for key, weight in a.items()} != {key: weight.shape for key, weight in b.items()}:
        raise AdapterMismatchError(f"{files[0]} and {files[1]} have different layers")
    for file, read in zip(files, (a, b), strict=True):
        check_tensors(read, str(file), AdapterMismatchError)
    mean = {key: ((1 - fraction) * a[key].float() + fraction * b[key].float()).to(a[key].dtype) for key in a}
    records = averaged_records(files[0].with_name(RECORD), files[1].with_name(RECORD), fraction)
    with replacing(target) as weights, replacing(out / RECORD) as record:  # both, or neither
        save_tensors(weights, mean, one.to_strings())
        record.write_text(json.dumps(records, indent=2) + "\n")
    if not records:  # of a training of which nothing is known
        (out / RECORD).unlink()


def averaged_records(first: Path, second: Path, fraction: float) -> dict[str, Any]:
    """The records of the second training, which say what its weights were averaged with.

    Raises [`FaceFusionError`] where one is damaged.
    """
    records = read_records(second)
    for training in records.values():
        averaged = {"fraction": fraction, "with": _described(read_records(first))}
        before = {"before": training["averaged"]} if "averaged" in training else {}
        training["averaged"] = averaged | before
    return records


def _described(records: dict[str, Any]) -> dict[str, object]:
    """Which training it was, if it is known, and what its weights were averaged with."""
    names = ("task", "steps", "date", "averaged")
    return {name: training[name] for training in records.values() for name in names if name in training}
