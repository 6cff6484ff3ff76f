"""Avatar images from disk (ImageFolder with `metadata.jsonl`) as one uint8 tensor, and small image helpers."""

from __future__ import annotations

import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ...face_errors import UnreadableImageError
from ...face_pictures import load_image
from ...files.texts import read_json_lines
from ...training.latent_cache import cached
from ...training.loop import TrainingError
from ..world.dataset import PER_IDENTITY, draw, plan


FEATURES = (
    slice(17, 22),
    slice(22, 27),
    slice(36, 42),
    slice(42, 48),
    slice(48, 68),
)  # brows, eyes, mouth; 300-W order


@dataclass
class AvatarImages:
    """`pixels` uint8 (N, 3, S, S) and, in the same order, the records of `metadata.jsonl`."""

    pixels: Tensor
    records: list[dict[str, Any]]
    folder: Path  # where tensors computed from the images are cached
    key: str  # changes with the data
    depth: Tensor | None = None  # uint8 (N, 1, S, S) if rendered with it, see `stretched`

    def __len__(self) -> int:
        return len(self.records)

    @property
    def captions(self) -> list[str]:
        return [record["text"] for record in self.records]

    @property
    def first_boxes(self) -> Tensor:
        """Face box of the leftmost person, float (N, 4) XYXY in pixels."""
        return torch.tensor([record["boxes"][0] for record in self.records], dtype=torch.float32)

    def images(self, indices: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Float images (B, 3, S, S) in [-1, 1] on `device`."""
        return self.pixels[indices.to(self.pixels.device)].to(device).float().div_(127.5).sub_(1)

    def floats(self, indices: Any) -> Tensor:
        """Those images as floats in [0, 1]."""
        return self.pixels[indices].float() / 255

    def where(self, **wanted: Any) -> AvatarImages:
        """The images whose records hold these values, e.g. `where(people=1, style="photo")`, without their depth."""
        kept = [i for i, r in enumerate(self.records) if all(r[key] == value for key, value in wanted.items())]
        records, key = [self.records[i] for i in kept], f"{self.key} {wanted}"
        return replace(self, pixels=self.pixels[kept], records=records, key=key, depth=None)

    def face_emphasis(self, size: int, stride: int) -> Tensor:
        """How much of a face lies in cells (N, 1, size, size) of `stride` pixels, uint8.

        2 in cells that brows, eyes or mouth of any person touch; 1 elsewhere in a face box; 0.
        """
        emphasis = np.zeros((len(self), 1, size, size), dtype=np.uint8)

        def mark(row: int, box: tuple[float, ...] | list[float], value: int) -> None:
            x0, y0, x1, y1 = (math.floor(number / stride) for number in box)
            emphasis[row, 0, max(0, y0) : max(0, y1 + 1), max(0, x0) : max(0, x1 + 1)] = value

        for row, record in enumerate(self.records):
            for box in record["boxes"]:
                mark(row, box, 1)
            for points in record["landmarks68"]:
                for part in FEATURES:
                    xs, ys = zip(*points[part], strict=True)
                    mark(row, (min(xs), min(ys), max(xs), max(ys)), 2)
        return torch.from_numpy(emphasis)

    def to(self, device: torch.device | str) -> AvatarImages:
        return replace(self, pixels=self.pixels.to(device))


def portraits(images: AvatarImages) -> dict[int, list[int]]:
    """The single portraits of each person, by identity."""
    found: dict[int, list[int]] = {}
    for row, record in enumerate(images.records):
        if record["people"] == 1:
            found.setdefault(record["identities"][0], []).append(row)
    return found


def landmarks5(images: AvatarImages) -> Tensor:
    """Of the first person of each picture (N, 5, 2), pixels."""
    return torch.tensor([record["landmarks5"][0] for record in images.records], dtype=torch.float32)


def load_avatars(folder: Path, split: str, limit: int | None = None) -> AvatarImages:
    """Read `folder/split`, or the first `limit` images of it.

    Decoded pixels are kept beside the images as `pixels.safetensors`, so that the second start is quick; the file is
    made again when `metadata.jsonl` has changed. Raises `TrainingError` where there is no dataset or sizes differ,
    UnreadableImageError for a picture that is missing or broken.
    """
    folder = Path(folder) / split
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise TrainingError(f"{metadata} does not exist: make a dataset with `face-fusion avatars-dataset`")
    text = metadata.read_bytes()
    records = read_json_lines(metadata, "make the dataset again with `face-fusion avatars-dataset`")[:limit]
    if not records:
        raise TrainingError(f"{metadata} is empty")
    key = hashlib.sha256(text).hexdigest() + f"/{len(records)}"
    cache = folder / "pixels.safetensors"

    def decode() -> Tensor:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            arrays = list(pool.map(lambda record: np.asarray(load_image(folder / record["file_name"])), records))
        if len({array.shape for array in arrays}) != 1:
            raise TrainingError(f"images of {folder} differ in size: {sorted({array.shape for array in arrays})}")
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    return AvatarImages(cached(cache, key, decode), records, cache.parent, key)


def render_avatars(
    folder: Path,
    split: str,
    count: int,
    device: torch.device | str,
    size: int = 128,
    per_identity: int = PER_IDENTITY,
    depth: bool = False,
) -> AvatarImages:
    """The first `count` images of a split, rendered on `device` and kept in memory instead of read from disk.

    The same scenes as `avatars.world.dataset.write` draws. `folder/split` only takes caches of what is computed of
    them.
    """
    pixels = torch.empty(count, 3, size, size, dtype=torch.uint8)
    depths = torch.empty(count, 1, size, size, dtype=torch.uint8) if depth else None
    records: list[dict[str, Any]] = []
    planned = (
        plan(split, index, per_identity) for index in tqdm(range(count), desc=f"rendering {split}", unit="image")
    )
    for drawn in draw(planned, size, device):
        rows = slice(len(records), len(records) + len(drawn.records))
        pixels[rows] = drawn.pixels.cpu()
        if depths is not None:
            depths[rows] = stretched(drawn.rendered.depth)[:, None].cpu()
        records += drawn.records
    (folder / split).mkdir(parents=True, exist_ok=True)
    some = slice(None, None, max(1, count // 1000))  # another renderer makes other pictures of the same scenes
    key = hashlib.sha256(json.dumps([count, per_identity, records[some]]).encode() + pixels[some].numpy().tobytes())
    return AvatarImages(pixels, records, folder / split, f"rendered {key.hexdigest()}", depths)


def stretched(depth: Tensor) -> Tensor:
    """Depth maps (B, H, W), larger is nearer, each stretched to its own range as uint8: 255 is the nearest."""
    low, high = depth.amin((1, 2), keepdim=True), depth.amax((1, 2), keepdim=True)
    return ((depth - low) / (high - low).clamp_min(1e-4) * 255).round().byte()


def read_image(path: Path) -> np.ndarray:
    """HWC uint8 RGB."""
    try:
        return np.asarray(load_image(path))
    except UnreadableImageError as error:
        raise TrainingError(str(error)) from error


def save_grid(rows: list[Tensor], path: Path) -> None:
    """Write rows of images (n, 3, S, S) in [-1, 1] as one PNG, one below the other."""
    lines = [torch.cat(list(row.float().cpu()), dim=2) for row in rows]
    grid = torch.cat(lines, dim=1).clamp(-1, 1).add(1).mul(127.5).round().byte()
    Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(path)
