"""Pictures made coarser: as a small generator blurs them, as an evaluator of depth sees them."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
