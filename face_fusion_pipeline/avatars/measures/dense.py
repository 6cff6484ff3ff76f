"""The network of both measures: densely connected convolutions, in which each layer sees all before it.

No training asks it: the embedder of the identity loss (`training/face_embedder.py`) adds up residual blocks and pools
by attention, the evaluators (`evaluation/evaluators.py`) are plain towers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


Norm = Callable[[int], nn.Module]  # for so many planes


def of_each_picture(planes: int) -> nn.Module:
    """All planes of a picture by their common mean and variance."""
    return nn.GroupNorm(1, planes)


class _Layer(nn.Module):
    """Adds `growth` planes to those that are there."""

    def __init__(self, width: int, growth: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.look = nn.Conv2d(width, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.look(self.norm(x).relu())], 1)


class DenseTrunk(nn.Module):
    """Planes (B, planes, H / s, W / s) from pictures (B, 3, H, W), with s = 4 times 2 for each stage after the first.

    `stages` are (layers, growth) of each; between two of them half the planes are kept, at half the size.
    """

    def __init__(
        self, stem: int, stages: Sequence[tuple[int, int]], planes: int, norm: Norm = of_each_picture
    ) -> None:
        super().__init__()
        width = 2 * stem
        modules: list[nn.Module] = [nn.Conv2d(3, stem, 4, 2, 1), nn.ReLU(), nn.Conv2d(stem, width, 3, 2, 1)]
        for number, (layers, growth) in enumerate(stages):
            if number:
                modules += [nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2)]
                width //= 2
            for _ in range(layers):
                modules.append(_Layer(width, growth, norm))
                width += growth
        modules += [norm(width), nn.ReLU(), nn.Conv2d(width, planes, 1), nn.ReLU()]
        self.layers = nn.Sequential(*modules)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
