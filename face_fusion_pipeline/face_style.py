"""Pictures as FaceStudio sees them: one CLIP embedding each, of a style picture with its faces covered."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from .face_layout import Box


GREY = (128, 128, 128)
HALF = [0.5, 0.5, 0.5]  # mean and deviation of the pixels where an encoder comes without a processor


def unit_length(embeddings: Tensor) -> Tensor:
    """Embeddings `(..., width)` of length 1, float32; zeros, which stand for nothing, stay zeros."""
    return F.normalize(embeddings.float(), dim=-1)


def without_faces(image: Image.Image, boxes: Sequence[Box], enlarge: float) -> Image.Image:
    """The picture with a grey square over each face, `enlarge` times as large as its box (XYXY, pixels)."""
    if not boxes or enlarge <= 0:
        return image
    covered = image.copy()
    draw = ImageDraw.Draw(covered)
    for x0, y0, x1, y1 in boxes:
        half = enlarge * max(x1 - x0, y1 - y0) / 2
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        draw.rectangle((x - half, y - half, x + half, y + half), fill=GREY)
    return covered


@torch.no_grad()
def picture_embeddings(encoder: Any, images: Sequence[Image.Image], processor: Any = None) -> Tensor:
    """Embeddings `(n, width)` of pictures in CLIP's common space, float32, see [`unit_length`].

    Args:
        encoder: a `CLIPVisionModelWithProjection`.
        processor: its image processor; None: pixels from -1 to 1, the middle square of the picture.
    """
    if processor is None:
        pixels = torch.stack([centred(image, encoder.config.image_size) for image in images])
    else:
        pixels = processor(images=list(images), return_tensors="pt").pixel_values
    weight = next(encoder.parameters())
    return unit_length(encoder(pixels.to(weight.device, weight.dtype)).image_embeds).cpu()


def centred(image: Image.Image, side: int) -> Tensor:
    """The middle square of a picture as `(3, side, side)` from -1 to 1."""
    cut = min(image.size)
    x, y = (image.width - cut) // 2, (image.height - cut) // 2
    square = image.convert("RGB").crop((x, y, x + cut, y + cut))
    if cut != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float()
    return (pixels / 255 - torch.tensor(HALF).view(3, 1, 1)) / torch.tensor(HALF).view(3, 1, 1)
