"""Pictures as FaceStudio and FaceSnap see them: a CLIP embedding of a style picture whose faces are covered, and the
patches of a face."""

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


def in_oval(image: Image.Image, size: float) -> Image.Image:
    """What an oval shows of a picture, `size` times as wide and high as it; the rest is grey. 0: all is shown."""
    if size <= 0:
        return image
    (width, height), shown = image.size, Image.new("L", image.size)
    box = [side * (1 + sign * size) / 2 for sign in (-1, 1) for side in (width, height)]
    ImageDraw.Draw(shown).ellipse(box, fill=255)
    return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, GREY), shown)


@torch.no_grad()
def picture_embeddings(encoder: Any, images: Sequence[Image.Image], processor: Any = None) -> Tensor:
    """Embeddings `(n, width)` of pictures in CLIP's common space, float32, see [`unit_length`].

    Args:
        encoder: a `CLIPVisionModelWithProjection`.
        processor: its image processor; None: pixels from -1 to 1, the middle square of the picture.
    """
    return unit_length(encoder(encoder_pixels(encoder, images, processor)).image_embeds).cpu()


@torch.no_grad()
def picture_patches(encoder: Any, images: Sequence[Image.Image], processor: Any = None) -> Tensor:
    """What the last layer but one knows of every patch, `(n, P, width)`, float32; see [`picture_embeddings`]."""
    found = encoder(encoder_pixels(encoder, images, processor), output_hidden_states=True)
    return found.hidden_states[-2].float().cpu().contiguous()


def encoder_pixels(encoder: Any, images: Sequence[Image.Image], processor: Any = None) -> Tensor:
    """Pictures as a vision tower takes them, where it is; see [`picture_embeddings`]."""
    if processor is None:
        pixels = torch.stack([centred(image, encoder.config.image_size) for image in images])
    else:
        pixels = processor(images=list(images), return_tensors="pt").pixel_values
    weight = next(encoder.parameters())
    return pixels.to(weight.device, weight.dtype)


def centred(image: Image.Image, side: int) -> Tensor:
    """The middle square of a picture as `(3, side, side)` from -1 to 1."""
    cut = min(image.size)
    x, y = (image.width - cut) // 2, (image.height - cut) // 2
    square = image.convert("RGB").crop((x, y, x + cut, y + cut))
    if cut != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float()
    return (pixels / 255 - torch.tensor(HALF).view(3, 1, 1)) / torch.tensor(HALF).view(3, 1, 1)
