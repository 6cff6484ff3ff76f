"""Picture styles as filters on finished renders, (N, 3, H, W) in [0, 1] to the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _grey(image: Tensor) -> Tensor:
    weights = torch.tensor((0.299, 0.587, 0.114), device=image.device).view(1, 3, 1, 1)
    return (image * weights).sum(1, keepdim=True)


def _blur(image: Tensor, radius: int) -> Tensor:
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    return F.avg_pool2d(padded, 2 * radius + 1, stride=1)


def _edges(image: Tensor) -> Tensor:
    """Gradient magnitude (N, 1, H, W), the largest over the colour channels."""
    padded = F.pad(image, (0, 1, 0, 1), mode="replicate")
    dx = padded[..., :-1, 1:] - image
    dy = padded[..., 1:, :-1] - image
    return (dx.square() + dy.square()).sqrt().amax(1, keepdim=True)


def _pencil(image: Tensor) -> Tensor:
    grey = _grey(image)
    lines = (grey / (_blur(grey, 3) + 0.02)).clamp(0, 1)
    sketch = (0.40 + 0.60 * grey.sqrt()) * lines.pow(1.6)
    return (sketch * torch.tensor((1.0, 0.99, 0.96), device=image.device).view(1, 3, 1, 1)).clamp(0, 1)


def _watercolor(image: Tensor) -> Tensor:
    soft = _blur(_blur(image, 1), 1)
    grey = _grey(soft)
    vivid = grey + (soft - grey) * 1.35
    washed = 0.18 + 0.86 * vivid
    return (washed - 0.5 * _edges(_blur(image, 1))).clamp(0, 1)


def _faded_film(image: Tensor) -> Tensor:
    grey = _grey(image)
    pale = 0.24 + 0.58 * (0.55 * image + 0.45 * grey)
    tint = torch.tensor((1.10, 1.00, 0.80), device=image.device).view(1, 3, 1, 1)
    size = image.shape[-1]
    line = torch.linspace(-1, 1, size, device=image.device)
    vignette = 1 - 0.18 * (line.view(1, -1).square() + line.view(-1, 1).square())
    return (pale * tint * vignette).clamp(0, 1)


def _line_art(image: Tensor) -> Tensor:
    ink = ((_edges(_blur(image, 1)) - 0.03) / 0.10).clamp(0, 1)
    dark = ((0.22 - _grey(image)) / 0.12).clamp(0, 1)
    return (1 - torch.maximum(ink, 0.75 * dark)).clamp(0, 1).expand(-1, 3, -1, -1)


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "pencil sketch": _pencil,
    "watercolor": _watercolor,
    "faded film": _faded_film,
    "line art": _line_art,
}


def apply_styles(images: Tensor, styles: list[str]) -> Tensor:
    """Each picture in its own style; "photo" stays as rendered."""
    out = images.clone()
    for name, paint in FILTERS.items():
        rows = [i for i, style in enumerate(styles) if style == name]
        if rows:
            out[rows] = paint(images[rows])
    return out
