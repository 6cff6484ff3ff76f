"""Painted backgrounds: six places and plain colours, drawn for a whole batch from a row of random numbers each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from .scene import PLAIN_COLOURS


_NUMBERS = 64  # random numbers that a background may use


def _rgb(like: Tensor, *colour: float) -> Tensor:
    return torch.tensor(colour, device=like.device).view(1, 3, 1, 1)


def _over(image: Tensor, colour: Tensor, mask: Tensor) -> Tensor:
    return image + (colour - image) * mask.clamp(0, 1).unsqueeze(1)


def _ramp(value: Tensor, soft: float = 0.02) -> Tensor:
    return (value / soft + 0.5).clamp(0, 1)


def _sky(x: Tensor, y: Tensor, top: Tensor, bottom: Tensor) -> Tensor:
    return bottom + (top - bottom) * ((y + 1) / 2).unsqueeze(1)


def _n(r: Tensor, k: int) -> Tensor:
    return r[:, k, None, None]


def _garden(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    image = _sky(x, y, _rgb(x, 0.45, 0.70, 0.95), _rgb(x, 0.80, 0.90, 0.98))
    bump = 0.06 * torch.sin(9 * x + 6 * _n(r, 0)) + 0.04 * torch.sin(21 * x + 9 * _n(r, 1))
    hedge = 0.25 + 0.3 * _n(r, 2) + bump
    image = _over(image, _rgb(x, 0.13, 0.42, 0.16), _ramp(hedge - y))
    leaves = (torch.sin(15 * x + 4 * y) * torch.sin(13 * y - 5 * x)) * _ramp(hedge - y)
    image = image + 0.05 * leaves.unsqueeze(1)
    lawn = -0.35 + 0.2 * _n(r, 3)
    image = _over(image, _rgb(x, 0.38, 0.68, 0.22), _ramp(lawn - y))
    for k in range(5):
        fx, fy = 2 * _n(r, 4 + 2 * k) - 1, lawn - 0.05 + 0.5 * (_n(r, 5 + 2 * k) - 0.35)
        colour = ((0.95, 0.25, 0.30), (0.98, 0.85, 0.25), (0.92, 0.45, 0.80), (0.98, 0.98, 0.98))[k % 4]
        image = _over(image, _rgb(x, *colour), _ramp(0.11 - ((x - fx).square() + (y - fy).square()).sqrt()))
    return image


def _beach(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    image = _sky(x, y, _rgb(x, 0.35, 0.65, 0.95), _rgb(x, 0.90, 0.92, 0.90))
    sx, sy = 1.6 * _n(r, 0) - 0.8, 0.55 + 0.3 * _n(r, 1)
    image = _over(image, _rgb(x, 1.0, 0.95, 0.60), _ramp(0.16 - ((x - sx).square() + (y - sy).square()).sqrt(), 0.03))
    horizon = 0.05 + 0.25 * _n(r, 2)
    image = _over(image, _rgb(x, 0.08, 0.42, 0.62), _ramp(horizon - y + 0 * x))
    image = image + 0.05 * (torch.sin(28 * y + 3 * torch.sin(4 * x)) * _ramp(horizon - y)).unsqueeze(1)
    shore = horizon - 0.45 - 0.15 * _n(r, 3) + 0.04 * torch.sin(4 * x + 6 * _n(r, 4))
    image = _over(image, _rgb(x, 0.96, 0.97, 0.97), _ramp(shore + 0.05 - y))
    return _over(image, _rgb(x, 0.93, 0.83, 0.60), _ramp(shore - y))


def _city(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    image = _sky(x, y, _rgb(x, 0.50, 0.58, 0.72), _rgb(x, 0.92, 0.78, 0.70))
    count = 5
    column = ((x + 1) / 2 * count + _n(r, 0)).floor().long()
    pick = r.gather(1, (column.flatten(1) + 2).clamp(0, _NUMBERS - 1)).view_as(x)
    top = -0.05 + 0.95 * pick
    shade = (0.28 + 0.28 * r.gather(1, (column.flatten(1) + 20).clamp(0, _NUMBERS - 1)).view_as(x)).unsqueeze(1)
    image = _over(image, shade * _rgb(x, 0.85, 0.92, 1.10), _ramp(top - y))
    inside_x = (((x + 1) / 2 * count + _n(r, 0)) * 2).remainder(1)
    inside_y = (y * 4).remainder(1)
    window = (inside_x > 0.25) * (inside_x < 0.75) * (inside_y > 0.25) * (inside_y < 0.75) * (y < top - 0.06)
    image = _over(image, _rgb(x, 0.98, 0.88, 0.50), window.float() * 0.85)
    return _over(image, _rgb(x, 0.30, 0.30, 0.33), _ramp(-0.62 - y))


def _forest(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    image = _sky(x, y, _rgb(x, 0.30, 0.50, 0.28), _rgb(x, 0.10, 0.24, 0.12))
    for k in range(4):
        cx = -1 + 2 * (k + 0.15 + 0.7 * _n(r, k)) / 4
        half = 0.08 + 0.06 * _n(r, 10 + k)
        trunk = _ramp(half - (x - cx + 0.03 * y).abs())
        image = _over(image, _rgb(x, 0.33, 0.21, 0.12) * (0.7 + 0.5 * r[:, 20 + k, None, None, None]), trunk)
    for k in range(5):
        cx, cy = 2 * _n(r, 30 + k) - 1, 0.62 + 0.35 * _n(r, 40 + k)
        blob = _ramp(0.36 - ((x - cx).square() + (y - cy).square()).sqrt(), 0.08)
        image = _over(image, _rgb(x, 0.10, 0.40 + 0.03 * k, 0.14), blob)
    return _over(image, _rgb(x, 0.16, 0.30, 0.10), _ramp(-0.60 - y))


def _space(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    image = _sky(x, y, _rgb(x, 0.02, 0.02, 0.08), _rgb(x, 0.08, 0.04, 0.20))
    for k in range(14):
        sx, sy = 2 * _n(r, k) - 1, 2 * _n(r, k + 26) - 1
        image = _over(
            image, _rgb(x, 1.0, 1.0, 0.95), _ramp(0.04 - ((x - sx).square() + (y - sy).square()).sqrt(), 0.02)
        )
    px, py, size = 1.5 * _n(r, 55) - 0.75, 0.45 + 0.4 * _n(r, 56), 0.18 + 0.12 * _n(r, 57)
    away = ((x - px).square() + (y - py).square()).sqrt()
    stripes = (0.85 + 0.15 * torch.sin(18 * (y - py))).unsqueeze(1)
    return _over(image, _rgb(x, 0.90, 0.55, 0.30) * stripes, _ramp(size - away))


def _library(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    shelves = 3
    level = ((y + 1) / 2 * shelves + _n(r, 0)).floor().long()
    inside = ((y + 1) / 2 * shelves + _n(r, 0)).remainder(1)
    book = ((x + 1) / 2 * 7 + 3 * _n(r, 1)).floor().long()
    pick = r.gather(1, ((book * 7 + level * 11) % _NUMBERS).flatten(1)).view_as(x)
    hue = torch.stack(
        (
            0.45 + 0.3 * torch.cos(2 * math.pi * pick),
            0.30 + 0.18 * torch.cos(2 * math.pi * pick + 2.1),
            0.26 + 0.18 * torch.cos(2 * math.pi * pick + 4.2),
        ),
        1,
    )
    spine = ((x + 1) / 2 * 7 + 3 * _n(r, 1)).remainder(1)
    image = hue * (0.75 + 0.25 * (spine > 0.12).float()).unsqueeze(1)
    image = _over(image, _rgb(x, 0.12, 0.07, 0.04), (inside > 0.72 + 0.16 * pick).float())
    return _over(image, _rgb(x, 0.45, 0.28, 0.14), (inside < 0.13).float())


_PLACES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "garden": _garden,
    "beach": _beach,
    "city": _city,
    "forest": _forest,
    "space": _space,
    "library": _library,
}


def draw(names: list[str], seeds: list[int], size: int, device: torch.device | str = "cpu") -> Tensor:
    """Backgrounds (B, 3, size, size) in [0, 1] by name; the seed moves what is in them."""
    numbers = [[rng.random() for _ in range(_NUMBERS)] for rng in (random.Random(f"background {s}") for s in seeds)]
    r = torch.tensor(numbers, device=device)
    line = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    out = torch.empty(len(names), 3, size, size, device=device)
    for name in set(names):
        rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=device)
        x = line.view(1, 1, -1).expand(len(rows), size, size)
        y = -line.view(1, -1, 1).expand(len(rows), size, size)
        if name in _PLACES:
            out[rows] = _PLACES[name](x, y, r[rows])
        else:
            colour = _rgb(x, *PLAIN_COLOURS[name.removeprefix("plain ")])
            slope = (_n(r[rows], 0) - 0.5) * 0.25 * x + 0.12 * y * (_n(r[rows], 1) - 0.3)
            out[rows] = colour * (1 + slope).unsqueeze(1)
    return out.clamp(0, 1)
