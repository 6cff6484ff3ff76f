"""Ellipsoids under orthographic projection: closed-form ray hits, nearest hit by a z-buffer.

Only the pixels inside a part's bounding box are ever touched: all (part, pixel) pairs of a batch form one flat list,
so thousands of small parts cost what they cover and nothing more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Hits(NamedTuple):
    """The visible surface points of a batch, one row a covered pixel (M rows)."""

    pixel: Tensor  # (M,) int64 index into the flattened (B, S, S) pixel grid
    part: Tensor  # (M,) int64 index into the flattened parts
    position: Tensor  # (M, 3) world coordinates
    normal: Tensor  # (M, 3) unit surface normal, z towards the viewer
    depth: Tensor  # (B, S, S) world z of the nearest surface, -inf where nothing is hit


def quadrics(axes: Tensor, radii: Tensor) -> Tensor:
    """The matrices Q of ellipsoids (p - c)ᵀ Q (p - c) = 1, from axes (N, 3, 3; columns) and radii (N, 3)."""
    return (axes / radii.square().unsqueeze(1)) @ axes.transpose(1, 2)


def cast(centre: Tensor, axes: Tensor, radii: Tensor, image: Tensor, batch: int, size: int) -> Hits:
    """Nearest hits of rays along z with N ellipsoids.

    `centre` (N, 3), `axes` (N, 3, 3; columns are the ellipsoid's axes), `radii` (N, 3) in image units: x to the
    right and y up in [-1, 1], z towards the viewer. `image` (N,) says in which of `batch` pictures of size² pixels a
    part is.
    """
    device = centre.device
    q = quadrics(axes, radii)
    # Half extents of the silhouette: square roots of the diagonal of Q⁻¹.
    extent = (axes[:, :2] * radii.unsqueeze(1)).square().sum(2).sqrt()
    half = size / 2
    low = torch.stack((centre[:, 0] - extent[:, 0], -centre[:, 1] - extent[:, 1]), 1)
    high = torch.stack((centre[:, 0] + extent[:, 0], -centre[:, 1] + extent[:, 1]), 1)
    first = ((low + 1) * half - 0.5).ceil().clamp(0, size).long()
    last = ((high + 1) * half - 0.5).floor().clamp(-1, size - 1).long()
    width, height = (last - first + 1).clamp(min=0).unbind(1)
    area = width * height

    # With d = (x, y) - c the ray hits where D(d) = b² - a·c >= 0, a quadratic form in d.
    a = q[:, 2, 2]
    form = torch.stack(
        (
            centre[:, 0],
            centre[:, 1],
            q[:, 0, 2] ** 2 - a * q[:, 0, 0],
            2 * (q[:, 0, 2] * q[:, 1, 2] - a * q[:, 0, 1]),
            q[:, 1, 2] ** 2 - a * q[:, 1, 1],
            a,
        ),
        1,
    )
    part = torch.repeat_interleave(torch.arange(len(area), device=device), area)
    start = area.cumsum(0) - area
    offset = torch.arange(len(part), device=device) - start.index_select(0, part)
    span = width.index_select(0, part)
    row = offset // span
    column = offset - row * span + first[:, 0].index_select(0, part)
    row = row + first[:, 1].index_select(0, part)
    cx, cy, xx, xy, yy, constant = (v.index_select(0, part) for v in form.t().contiguous())
    dx = (column + 0.5) / half - 1 - cx
    dy = 1 - (row + 0.5) / half - cy
    discriminant = xx * dx * dx + xy * dx * dy + yy * dy * dy + constant
    hit = (discriminant > 0).nonzero().squeeze(1)
    part, dx, dy, discriminant, row, column = (
        v.index_select(0, hit) for v in (part, dx, dy, discriminant, row, column)
    )
    pixel = (image.index_select(0, part) * size + row) * size + column
    slope_x, slope_y, a, z0 = (v.contiguous().index_select(0, part) for v in (q[:, 0, 2], q[:, 1, 2], a, centre[:, 2]))
    dz = (discriminant.sqrt() - slope_x * dx - slope_y * dy) / a
    z = z0 + dz
    # One number orders depth first and part second, so that no pixel ever has two winners: the bits of a float, as an
    # integer that grows with it, above the index of the part.
    bits = z.view(torch.int32)
    key = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | part
    buffer = torch.full((batch * size * size,), torch.iinfo(torch.int64).min, device=device)
    buffer.scatter_reduce_(0, pixel, key, "amax")
    win = (key == buffer.index_select(0, pixel)).nonzero().squeeze(1)
    part, pixel = part.index_select(0, win), pixel.index_select(0, win)
    delta = torch.stack([v.index_select(0, win) for v in (dx, dy, dz)], 1)
    gradient = (q.index_select(0, part) * delta.unsqueeze(1)).sum(2)  # a GPU is slow at millions of small products
    normal = torch.nn.functional.normalize(gradient, dim=1)
    depth = torch.full((batch * size * size,), -torch.inf, device=device)
    depth[pixel] = z.index_select(0, win)
    return Hits(pixel, part, centre.index_select(0, part) + delta, normal, depth.view(batch, size, size))
