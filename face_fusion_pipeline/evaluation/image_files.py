"""Pictures as files and as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..face_pictures import load_image
from ..generation.contact_sheet import save_png


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
    """Save as PNG, see `generation.contact_sheet.save_png`."""
    save_png(image if isinstance(image, Image.Image) else to_pil(image), path)
