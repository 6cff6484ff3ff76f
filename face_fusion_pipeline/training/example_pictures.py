"""The pictures of a prepared folder, for networks that look at pictures: read, or decoded from their latents where the
folder does not hold them (rendered data)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .base_model import BaseModel
from .latent_cache import BATCH, Shards, read_picture
from .preparation import Row


def read_target(folder: Path, base: BaseModel, shards: Shards, rows: list[Row], index: int) -> Image.Image:
    """The picture of an example: its file, or what its latents decode to."""
    if name := rows[index].get("file_name"):
        return read_picture(folder / name)
    return decoded(base, shards.latents([index]).float())[0]


@torch.no_grad()
def decoded(base: BaseModel, latents: Tensor) -> list[Image.Image]:
    """Pictures of scaled latents (n, c, h, w)."""
    found: list[Image.Image] = []
    for part in latents.split(BATCH):
        pixels = (base.decode(part.to(base.vae.device)).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()
        found += [Image.fromarray(np.asarray(picture)) for picture in pixels]
    return found


def in_batches(images: Sequence[Image.Image], embed: Callable[[Sequence[Image.Image]], Tensor]) -> Tensor:
    """(n, width) of n pictures, a few at a time."""
    return torch.cat([embed(images[start : start + 4 * BATCH]) for start in range(0, len(images), 4 * BATCH)])
