"""Latents and text embeddings of a prepared folder, computed once and kept as safetensors shards.

Pictures and captions lie apart: another text encoder does not encode the pictures again. A shard holds `SHARD`
examples in float16. Of the pictures: `latents` (n, c, h, w), and `references` (m, c, r, r), those of example i from
`reference_start[i]` to `reference_start[i + 1]`: the plain face crop, then its augmentations for people of whom there
is no other photo. Of the captions: the conditions (u, ...) of the u different ones, and `caption` (n,), which of them
is whose. A finished shard is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ..face_errors import UnreadableImageError
from ..face_files import save_tensors
from ..face_pictures import load_image
from ..files.atomic import write_text
from .augmentation import augmented
from .base_model import BaseModel
from .loop import digest, process_group
from .preparation import Row, data_key, has_partner, read_rows
from .sources import DataError


SHARD = 512  # examples
BATCH = 8  # images encoded at a time
PIXELS = 2**22  # of all images that a GPU encodes at a time
IN_MEMORY = 8 * 2**30  # bytes
CONDITION = "condition/"
COMPLETE = "complete.json"
AUGMENTATIONS = 4


@dataclass(frozen=True)
class Cache:
    """The folders of the shards: `latents` of a VAE, `conditions` of text encoders."""

    latents: Path
    conditions: Path


def cache_folders(folder: Path, base: BaseModel, augmentations: int = AUGMENTATIONS) -> Cache:
    """Where the shards of a prepared folder lie for this base: another part of it or other data is another place."""
    data = data_key(folder)
    vae = [digest(base.vae.state_dict()), base.vae.config.scaling_factor, data, augmentations]
    if mean := getattr(base.vae.config, "latents_mean", None):
        vae += [list(mean), list(base.vae.config.latents_std)]
    text = [
        [digest(encoder.state_dict()) for encoder in base.text_encoders],
        base.is_xl,
        data,
    ]  # XL takes an earlier layer
    return Cache(folder / "latents" / digest_of(vae), folder / "conditions" / digest_of(text))


def digest_of(described: list[Any]) -> str:
    """The name of a folder of shards, by what they were computed from."""
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def is_encoded(folder: Path, base: BaseModel, augmentations: int = AUGMENTATIONS) -> bool:
    """Whether pictures and captions of a prepared folder are all encoded for this base."""
    cache = cache_folders(folder, base, augmentations)
    return all((part / COMPLETE).is_file() for part in (cache.latents, cache.conditions))


def encode(folder: Path, base: BaseModel, augmentations: int = AUGMENTATIONS, progress: bool = True) -> Cache:
    """Compute what is missing of the latents and conditions of a prepared folder; returns the folders of the shards.

    Args:
        augmentations: pictures made of the face crop of a person of whom there is no other photo.

    Raises:
        DataError: not a prepared folder, or a picture of it cannot be read.
    """
    rows = read_rows(folder)
    cache = cache_folders(folder, base, augmentations)
    copies = [0 if partnered else augmentations for partnered in has_partner(rows)]

    def pictures(members: range) -> dict[str, Tensor]:
        return picture_shard(folder, base, rows, members, copies)

    def captions(members: range) -> dict[str, Tensor]:
        return caption_shard(base, [rows[index]["text"] for index in members])

    described = {"examples": len(rows), "base": Path(base.name).name}
    write_shards(cache.latents, pictures, {**described, "augmentations": augmentations}, "pictures", progress)
    write_shards(cache.conditions, captions, described, "captions", progress)
    return cache


def write_shards(
    target: Path, shard: Callable[[range], dict[str, Tensor]], described: dict[str, Any], what: str, progress: bool
) -> None:
    """Write what is missing of the shards of `described["examples"]` examples; `shard` makes one of its members."""
    count = described["examples"]
    for start in tqdm(range(0, count, SHARD), desc=f"encoding {what}", unit="shard", disable=not progress):
        path = shard_path(target, start // SHARD)
        if not is_stored(path, first=str(start)):
            tensors = shard(range(start, min(start + SHARD, count)))
            save_tensors(path, tensors, {"first": str(start), "base": described["base"]})
    write_text(target / COMPLETE, json.dumps(described) + "\n")


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"


def is_stored(path: Path, **metadata: str) -> bool:
    """Whether a safetensors file with these metadata is there; one that was cut off is not, and is made again."""
    try:
        with safe_open(path, "pt") as file:
            return metadata.items() <= (file.metadata() or {}).items()
    except (SafetensorError, OSError):
        return False


def cached(path: Path, key: str, make: Callable[[], Tensor]) -> Tensor:
    """The tensor in the file `path` if it was stored under the same `key`; else make and store it.

    Of several processes the first one makes it while the others wait.
    """
    with process_group().main_process_first():
        if is_stored(path, key=key):
            return load_file(path)["tensor"]
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or threads)  # nobody else works meanwhile
        tensor = make().cpu().contiguous()
        torch.set_num_threads(threads)
        save_tensors(path, {"tensor": tensor}, {"key": key})
    return tensor


def picture_shard(
    folder: Path, base: BaseModel, rows: list[Row], members: range, augmentations: list[int]
) -> dict[str, Tensor]:
    """The tensors of the pictures of `members`; `augmentations` of each of all rows."""

    def pictures(index: int) -> list[Image.Image]:
        picture = read_picture(folder / rows[index]["file_name"])
        return [picture, *reference_pictures(folder, rows[index], index, augmentations[index])]

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(pictures, members))
    return {
        "latents": encode_pictures(base, [item[0] for item in found]),
        "references": encode_pictures(base, [picture for item in found for picture in item[1:]]),
        "reference_start": torch.tensor([0, *(len(item) - 1 for item in found)]).cumsum(0),
    }


def reference_pictures(folder: Path, row: Row, index: int, augmentations: int) -> list[Image.Image]:
    """The plain face crop of example `index`, then its augmentations."""
    crop = read_picture(folder / row["face_file_name"])
    return [crop, *(augmented(crop, random.Random(f"{index} {k}")) for k in range(augmentations))]


def caption_shard(base: BaseModel, captions: list[str]) -> dict[str, Tensor]:
    """The tensors of n captions, each different one encoded once."""
    different = list(dict.fromkeys(captions))
    at_once = SHARD if base.unet.device.type == "cuda" else BATCH
    parts = [base.conditions(different[start : start + at_once]) for start in range(0, len(different), at_once)]
    return {
        "caption": torch.tensor([different.index(caption) for caption in captions]),
        **{CONDITION + key: torch.cat([part[key].half().cpu() for part in parts]) for key in parts[0]},
    }


def encode_pictures(base: BaseModel, pictures: list[Image.Image]) -> Tensor:
    """float16 latents (n, c, h, w) of n pictures of one size."""
    parts, at_once = [], BATCH
    if base.vae.device.type == "cuda":  # more of small pictures: a large GPU has time for them
        at_once = max(BATCH, PIXELS // pictures[0].width ** 2)
    for start in range(0, len(pictures), at_once):
        arrays = [np.asarray(picture) for picture in pictures[start : start + at_once]]
        pixels = torch.from_numpy(np.stack(arrays)).to(base.vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(base.latents(pixels).half().cpu())
    return torch.cat(parts)


def read_picture(path: Path) -> Image.Image:
    try:
        return load_image(path)
    except UnreadableImageError as error:
        raise DataError(f"cannot read {path}: {error}; run `face-fusion prepare` again") from error


class Column:
    """Rows of one tensor in all shards: read into memory, or left in the files, which are mapped."""

    def __init__(self, files: list[Any], name: str, in_memory: bool) -> None:
        self.slices = [file.get_slice(name) for file in files]
        self.starts = [0, *accumulate(part.get_shape()[0] for part in self.slices)]
        self.whole = torch.cat([file.get_tensor(name) for file in files]) if in_memory else None

    def take(self, rows: Sequence[int]) -> Tensor:
        """(B, ...) of B rows, counted through all shards."""
        if self.whole is not None:
            return self.whole[torch.as_tensor(rows)]
        shards = [bisect_right(self.starts, row) - 1 for row in rows]
        return torch.stack(
            [self.slices[shard][row - self.starts[shard]] for shard, row in zip(shards, rows, strict=True)]
        )


class Captions:
    """Random access to the shards `files` of captions; `key` is the name of their folder."""

    def __init__(self, files: list[Any], in_memory: bool, key: str = "") -> None:
        self.key = key
        keys = [key for key in files[0].keys() if key.startswith(CONDITION)]  # noqa: SIM118, no dict
        self._columns = {key.removeprefix(CONDITION): Column(files, key, in_memory) for key in keys}
        starts = next(iter(self._columns.values())).starts
        numbers = [file.get_tensor("caption") + start for file, start in zip(files, starts, strict=False)]
        self._numbers: list[int] = torch.cat(numbers).tolist()

    def take(self, examples: Sequence[int]) -> dict[str, Tensor]:
        """The conditions (B, ...) of the captions of these examples, see `BaseModel.conditions`."""
        rows = [self._numbers[example] for example in examples]
        return {key: column.take(rows) for key, column in self._columns.items()}


class Shards:
    """Random access to the shards of pictures and captions; together up to `in_memory` bytes are read at once."""

    def __init__(self, cache: Cache, count: int, in_memory: int = IN_MEMORY) -> None:
        pictures, texts = (open_shards(folder, count) for folder in (cache.latents, cache.conditions))
        paths = [
            shard_path(folder, number) for folder in (cache.latents, cache.conditions) for number in range(len(texts))
        ]
        small = sum(path.stat().st_size for path in paths) <= in_memory
        self._latents, self._references = (Column(pictures, name, small) for name in ("latents", "references"))
        self._captions = Captions(texts, small, cache.conditions.name)
        counts = [count for file in pictures for count in file.get_tensor("reference_start").diff().tolist()]
        self.reference_starts = [0, *accumulate(counts)]

    def latents(self, examples: Sequence[int]) -> Tensor:
        """(B, c, h, w)."""
        return self._latents.take(examples)

    def reference_count(self, example: int) -> int:
        return self.reference_starts[example + 1] - self.reference_starts[example]

    def references(self, chosen: Sequence[tuple[int, int]]) -> Tensor:
        """(B, c, r, r) of pairs of an example and the number of one of its references: 0 is the plain crop."""
        return self._references.take([self.reference_starts[example] + number for example, number in chosen])

    def conditions(self, examples: Sequence[int]) -> dict[str, Tensor]:
        """The conditions (B, ...) of the captions of these examples, see `BaseModel.conditions`."""
        return self._captions.take(examples)


def open_shards(folder: Path, count: int) -> list[Any]:
    """The files of `count` examples. Raises [`DataError`] if one cannot be read."""
    try:
        return [safe_open(shard_path(folder, number), "pt") for number in range(-(-count // SHARD))]
    except (SafetensorError, OSError) as error:
        raise DataError(f"a shard of {folder} cannot be read ({error}): run `face-fusion prepare` again") from error
