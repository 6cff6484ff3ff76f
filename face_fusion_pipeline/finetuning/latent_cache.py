"""Latents and text embeddings of a prepared folder, computed once for a base and kept as safetensors shards.

A shard holds `SHARD` examples: `latents` (n, c, h, w); `references` (m, c, r, r), those of example i from
`reference_start[i]` to `reference_start[i + 1]`: the plain face crop, then its augmentations for people of whom there
is no other photo; the conditions (u, ...) of its u different captions, and `caption` (n,), which of them is whose. All
are float16. A finished shard is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..face_adapter import save_tensors
from ..training.unet import fingerprint
from .augmentation import augmented
from .base_model import BaseModel
from .preparation import METADATA, Row, read_rows, write_text
from .sources import DataError


SHARD = 512  # examples
BATCH = 8  # images encoded at a time
CONDITION = "condition/"
AUGMENTATIONS = 4


def cache_folder(folder: Path, base: BaseModel, augmentations: int) -> Path:
    """Where the latents of a prepared folder lie for this base: another VAE, text encoder or data is another place."""
    parts = [fingerprint(module) for module in (base.vae, *base.text_encoders)]
    data = hashlib.sha256((folder / METADATA).read_bytes()).hexdigest()
    described = json.dumps([parts, base.vae.config.scaling_factor, data, augmentations])
    return folder / "latents" / hashlib.sha256(described.encode()).hexdigest()[:16]


def is_encoded(folder: Path, base: BaseModel, augmentations: int = AUGMENTATIONS) -> bool:
    return (cache_folder(folder, base, augmentations) / "complete.json").is_file()


def encode(folder: Path, base: BaseModel, augmentations: int = AUGMENTATIONS, progress: bool = True) -> Path:
    """Compute what is missing of the latents of a prepared folder; returns the folder of the shards.

    Args:
        augmentations: pictures made of the face crop of a person of whom there is no other photo.

    Raises:
        DataError: not a prepared folder, or a picture of it cannot be read.
    """
    rows = read_rows(folder)
    target = cache_folder(folder, base, augmentations)
    starts = range(0, len(rows), SHARD)
    partnered = has_partner(rows)
    for start in tqdm(starts, desc="encoding", unit="shard", disable=not progress):
        path = shard_path(target, start // SHARD)
        if path.is_file() and is_whole(path):
            continue
        members = range(start, min(start + SHARD, len(rows)))
        tensors = encode_shard(folder, base, rows, members, [0 if partnered[i] else augmentations for i in members])
        save_tensors(path, tensors, {"first": str(start), "base": base.name})
    described = {"examples": len(rows), "base": Path(base.name).name, "augmentations": augmentations}
    write_text(target / "complete.json", json.dumps(described) + "\n")
    return target


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def is_whole(path: Path) -> bool:
    """False for a file that is no safetensors file or was cut off, which is then made again."""
    try:
        with safe_open(path, "pt") as file:
            return bool(file.metadata())
    except (SafetensorError, OSError):
        return False


def has_partner(rows: list[Row]) -> list[bool]:
    """Whether another photo serves as reference of each row: one of the same person, or one that the source named."""
    people = Counter(row["identity"] for row in rows if row["identity"] is not None)
    return [row["own_reference"] or people[row["identity"]] > 1 for row in rows]


def encode_shard(
    folder: Path, base: BaseModel, rows: list[Row], members: range, augmentations: list[int]
) -> dict[str, Tensor]:
    def pictures(index: int) -> list[Image.Image]:
        row = rows[index]
        crop = read_picture(folder / row["face_file_name"])
        copies = [augmented(crop, random.Random(f"{index} {k}")) for k in range(augmentations[index - members.start])]
        return [read_picture(folder / row["file_name"]), crop, *copies]

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(pictures, members))
    starts = torch.tensor([0, *(len(item) - 1 for item in found)]).cumsum(0)
    captions = list(dict.fromkeys(rows[index]["text"] for index in members))
    conditions = [base.conditions(captions[k : k + BATCH]) for k in range(0, len(captions), BATCH)]
    return {
        "latents": encode_pictures(base, [item[0] for item in found]),
        "references": encode_pictures(base, [picture for item in found for picture in item[1:]]),
        "reference_start": starts,
        "caption": torch.tensor([captions.index(rows[index]["text"]) for index in members]),
        **{CONDITION + key: torch.cat([part[key].half().cpu() for part in conditions]) for key in conditions[0]},
    }


def encode_pictures(base: BaseModel, pictures: list[Image.Image]) -> Tensor:
    """float16 latents (n, c, h, w) of n pictures of one size."""
    parts = []
    for start in range(0, len(pictures), BATCH):
        arrays = [np.asarray(picture) for picture in pictures[start : start + BATCH]]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(base.latents(pixels).half().cpu())
    return torch.cat(parts)


def read_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; run `face-fusion prepare` again") from error


class Shards:
    """Random access to the shards of one folder; files are mapped into memory, not read."""

    def __init__(self, folder: Path, count: int) -> None:
        paths = [shard_path(folder, number) for number in range(-(-count // SHARD))]
        try:
            self.files = [safe_open(path, "pt") for path in paths]
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"a shard of {folder} cannot be read ({error}): run `face-fusion prepare` again"
            ) from error
        self.starts = [file.get_tensor("reference_start").tolist() for file in self.files]
        self.captions = [file.get_tensor("caption").tolist() for file in self.files]
        self.keys = [key for key in self.files[0].keys() if key.startswith(CONDITION)]  # noqa: SIM118, no dict

    def latents(self, index: int) -> Tensor:
        """(c, h, w) of example `index`."""
        return self.files[index // SHARD].get_slice("latents")[index % SHARD]

    def reference_count(self, index: int) -> int:
        starts = self.starts[index // SHARD]
        return starts[index % SHARD + 1] - starts[index % SHARD]

    def reference(self, index: int, number: int) -> Tensor:
        """(c, r, r) of reference `number` of example `index`: 0 is the plain crop."""
        row = self.starts[index // SHARD][index % SHARD] + number
        return self.files[index // SHARD].get_slice("references")[row]

    def conditions(self, index: int) -> dict[str, Tensor]:
        """The conditions of the caption of example `index`, see `BaseModel.conditions`."""
        file, row = self.files[index // SHARD], self.captions[index // SHARD][index % SHARD]
        return {key.removeprefix(CONDITION): file.get_slice(key)[row] for key in self.keys}
