"""A face in any picture, framed as avatar portraits are framed: as the evaluators know faces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ...evaluation.image_files import from_pil, to_pil
from ...face_images import crop_box


IMAGE_SIZE = 128  # pixels a side of what the evaluators see
FACE_HEIGHT = 52.0  # pixels of a face box in an avatar portrait, the median of the dataset


def portrait_square(box: Sequence[float]) -> tuple[float, float, float, float]:
    """The square around a face box (XYXY) that frames it as avatar portraits are framed."""
    x0, y0, x1, y1 = box
    half = (y1 - y0) * IMAGE_SIZE / FACE_HEIGHT / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - half, y - half, x + half, y + half


def portrait_crops(image: torch.Tensor, boxes: Sequence[Sequence[float]]) -> torch.Tensor:
    """The people of an image (3, H, W), each framed as a portrait by its face box: (n, 3, 128, 128)."""
    picture, crops = to_pil(image), []
    for box in boxes:
        square = crop_box(picture, portrait_square(box))
        crops.append(from_pil(square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)))
    return torch.stack(crops)


def in_picture(points: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Pixels (5, 2) of the portrait crop of a face box as pixels of the picture."""
    x0, y0, x1, _ = portrait_square(box)
    scale = (x1 - x0) / IMAGE_SIZE
    return (points + 0.5) * scale - 0.5 + np.array([x0, y0])
