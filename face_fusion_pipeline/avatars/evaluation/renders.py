"""A dataset of renders (ImageFolder form: PNG files and `metadata.jsonl`) held in memory, and image files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...face_images import load_image


@dataclass
class Renders:
    """Images (N, 3, H, W) uint8 with one metadata record each; `read_depth` gives their depth maps (N, 1, H, W)."""

    images: torch.Tensor
    records: list[dict[str, Any]]
    read_depth: Callable[[], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.records)

    def floats(self, rows: Any) -> torch.Tensor:
        """Those images as floats in [0, 1]."""
        return self.images[rows].float() / 255

    def where(self, **wanted: Any) -> Renders:
        """The images whose records hold these values, e.g. `where(people=1, style="photo")`."""
        kept = [i for i, r in enumerate(self.records) if all(r[key] == value for key, value in wanted.items())]
        return Renders(self.images[kept], [self.records[i] for i in kept])

    @cached_property
    def landmarks(self) -> torch.Tensor:
        """Five landmarks (N, 5, 2) of the first person of each image."""
        return torch.tensor([r["landmarks5"][0] for r in self.records], dtype=torch.float32).reshape(-1, 5, 2)

    @property
    def has_depth(self) -> bool:
        return all("depth_file_name" in record for record in self.records)

    @cached_property
    def depth(self) -> torch.Tensor:
        """Nearness (N, 32, 32) in [0, 1]; `TrainingError` where the dataset was written without `--depth`."""
        assert self.read_depth is not None, "a selection of renders has no depth"
        return torch.cat([depth_cells(part.float() / 255) for part in self.read_depth().split(256)])

    @cached_property
    def identities(self) -> np.ndarray:
        """Identity seed (N,) of the first person of each image."""
        return np.array([r["identities"][0] for r in self.records])


def load_renders(data: str | Path, split: str, limit: int | None = None) -> Renders:
    """The first `limit` images of a split ("train" or "validation") of a dataset folder."""
    from ..training.controlnet import load_depth
    from ..training.data import load_avatars

    avatars = load_avatars(Path(data), split, limit)
    return Renders(avatars.pixels, avatars.records, lambda: load_depth(avatars))


def depth_cells(depth: torch.Tensor) -> torch.Tensor:
    """Depth control images (N, 1, H, W) in [0, 1] as means over 32 x 32 cells (N, 32, 32)."""
    return F.adaptive_avg_pool2d(depth, 32)[:, 0]


def coarse(images: torch.Tensor, size: int) -> torch.Tensor:
    """Pictures (N, C, H, W) in which `size` x `size` pixels became one, at the size they had."""
    return F.interpolate(F.avg_pool2d(images, size), scale_factor=size, mode="bilinear", align_corners=False)


def at_size(images: torch.Tensor, size: int) -> torch.Tensor:
    """Square pictures (N, C, S, S) at another size; those that have it are given back as they are."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def read_image(path: str | Path, size: int | None = None) -> torch.Tensor:
    """An image file as floats (3, H, W) in [0, 1]; with `size` it is resized to a square where it differs."""
    image = load_image(path)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return from_pil(image)


def to_pil(image: torch.Tensor) -> Image.Image:
    """An image (3, H, W) in [0, 1] as PIL; values outside are clamped."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    """A PIL image as floats (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def write_image(path: Path, image: torch.Tensor | Image.Image) -> None:
    """Save as PNG, written aside and moved into place, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    (image if isinstance(image, Image.Image) else to_pil(image)).save(aside, format="PNG")
    aside.replace(path)
