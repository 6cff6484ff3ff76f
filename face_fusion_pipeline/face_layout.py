"""Who belongs where (Eq. 7): from face boxes or masks to the queries of each layer, grouped by the faces they may see.

The dense mask of Eq. 7 has one row for each query, but queries inside the same masks have the same row. So they are
grouped into regions; each region attends to the text and to the keys of its own people only, without any mask. That
is the same sum with the zero terms left out, in less memory and time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .face_errors import InvalidLayoutError
from .face_pictures import open_picture


Overlap = Literal["nearest", "shared", "literal"]
Background = Literal["none", "all"]
Box = tuple[float, float, float, float]

OVERLAPS: tuple[Overlap, ...] = ("nearest", "shared", "literal")
BACKGROUNDS: tuple[Background, ...] = ("none", "all")
BOX_ENLARGE = 1.6  # as reference crops: hair and chin belong to the person


@dataclass(frozen=True)
class Region:
    """The queries `(Q,)` of a layer that see the faces of exactly these people (indices, ascending)."""

    queries: Tensor
    people: tuple[int, ...]


@dataclass(frozen=True)
class Regions:
    """A partition of a layer's queries, and how to bring the regions' outputs back into order."""

    parts: tuple[Region, ...]
    order: Tensor  # (N_h,): position of query q in the concatenated parts

    def to(self, device: torch.device | str) -> "Regions":
        """The same on a device."""
        parts = tuple(Region(part.queries.to(device), part.people) for part in self.parts)
        return Regions(parts, self.order.to(device))


@dataclass(frozen=True)
class Layout:
    """Where the people of one picture are.

    Attributes:
        masks: bool `(n, H, W)`, in pixels of the picture.
        boxes: the face boxes XYXY that the masks come from; None for masks that were given.
        source: `"given"`, `"layout"` (detected in a layout image), `"draft"` or `"even"`.
    """

    masks: Tensor
    boxes: list[Box] | None
    source: str


def layout_from_boxes(boxes: Sequence[Box], height: int, width: int, source: str) -> Layout:
    """A layout of face boxes, one for each person."""
    checked = [check_box(box, height, width) for box in boxes]
    return Layout(box_masks(checked, height, width), checked, source)


def box_masks(boxes: Sequence[Box], height: int, width: int, enlarge: float = BOX_ENLARGE) -> Tensor:
    """Bool `(n, height, width)`: the pixels in each XYXY box, `enlarge` times as large; at least one pixel each.

    Raises:
        InvalidLayoutError: not four finite numbers, empty, or wholly outside the image.
    """
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, box in zip(masks, boxes, strict=True):
        x0, y0, x1, y1 = check_box(box, height, width)
        x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * enlarge / 2, (y1 - y0) * enlarge / 2
        top, bottom = np.clip([np.floor(y - h), np.ceil(y + h)], 0, height).astype(int)
        left, right = np.clip([np.floor(x - w), np.ceil(x + w)], 0, width).astype(int)
        mask[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return masks


def check_box(box: Any, height: int, width: int) -> Box:
    """`box` as four floats XYXY that meet an image of this size; raises [`InvalidLayoutError`] otherwise."""
    try:
        x0, y0, x1, y1 = (float(value) for value in box)
    except (TypeError, ValueError) as error:
        raise InvalidLayoutError(f"a face box is four numbers (x0, y0, x1, y1) in pixels, got {box!r}") from error
    if not (np.isfinite([x0, y0, x1, y1]).all() and x0 < x1 and y0 < y1):
        raise InvalidLayoutError(f"the face box {(x0, y0, x1, y1)} is empty: need x0 < x1 and y0 < y1, finite")
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise InvalidLayoutError(f"the face box {(x0, y0, x1, y1)} lies outside the {width}x{height} image")
    return x0, y0, x1, y1


def given_masks(masks: Sequence[Any], height: int, width: int) -> Tensor:
    """Bool `(n, height, width)` from one mask for each person, see [`read_mask`]; above half is inside.

    Raises:
        InvalidLayoutError: what is no mask, or nothing inside. UnreadableImageError: a file that cannot be read.
    """
    result = []
    for index, mask in enumerate(masks):
        inside = read_mask(mask, f"mask {index}") > 0.5
        if not inside.any():
            raise InvalidLayoutError(f"mask {index} is empty: nothing in it is above one half")
        result.append(pool(inside[None], height, width)[0])
    return torch.stack(result)


def read_mask(mask: Any, name: str = "the mask") -> Tensor:
    """How far each pixel is inside, float `(H, W)` in [0, 1].

    Args:
        mask: path, PIL image, array or tensor `(H, W)`. What values mean follows from their type, and what resizing
            left beyond its range is clipped: bool and float, also of a PIL image, are in [0, 1], unsigned integers in
            [0, their largest value], other integers as uint8 or, with values above 255, uint16. Integers of 0 and 1
            alone are yes and no; floats above 2, which no resizing makes of [0, 1], are in [0, 255]. Of a picture
            with transparency the brightness is multiplied with alpha: what is transparent is outside.
        name: what errors call it.

    Raises:
        InvalidLayoutError: another shape or type, or values that are not finite.
        UnreadableImageError: a file or PIL image that cannot be read.
    """
    if isinstance(mask, (str, os.PathLike, bytes, Image.Image)):
        mask = _mask_values(open_picture(mask, None if isinstance(mask, (str, os.PathLike)) else name), name)
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu()
        mask = (mask.float() if mask.is_floating_point() else mask).numpy()  # numpy has no bfloat16
    array = np.asarray(mask)
    if array.dtype.kind not in "buif":
        raise InvalidLayoutError(f"{name} must have numbers, got {type(mask).__name__} of {array.dtype}")
    if array.ndim != 2 or not array.size:
        raise InvalidLayoutError(f"{name} must have the shape (H, W), got {tuple(array.shape)}")
    high = array.max()
    if not np.isfinite(array).all():
        raise InvalidLayoutError(f"{name} has values that are not finite")
    if array.dtype.kind == "f":
        full = 1 if high <= 2 else 255
    elif high <= 1:  # bool too
        full = 1
    elif array.dtype.kind == "u":
        full = np.iinfo(array.dtype).max
    else:
        full = 255 if high <= 255 else 65535
    return torch.from_numpy((array.astype(np.float64) / full).clip(0, 1).astype(np.float32))


def _mask_values(image: Image.Image, name: str) -> np.ndarray:
    """Brightness times alpha of a picture; of the modes that hold one number a pixel these, in their own type."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)
    try:
        image = image.convert("LA") if image.mode == "La" else image
        if not image.has_transparency_data:
            return np.asarray(image.convert("RGB").convert("L"))  # LAB knows no other way
        grey, alpha = image.convert("RGBA").convert("LA").split()
    except ValueError as error:  # such as "conversion from LAB to L not supported"
        raise InvalidLayoutError(f"{name} cannot be read as grey: {error}") from error
    return np.asarray(grey) / 255 * (np.asarray(alpha) / 255)


def pool(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks `(n, H, W)` at another size: a cell is inside where any of its pixels is, so no mask ever vanishes."""
    if masks.shape[-2:] == (height, width):
        return masks
    smaller = (min(masks.shape[-2], height), min(masks.shape[-1], width))
    pooled = F.adaptive_max_pool2d(masks[None].float(), smaller)  # first, in case only one side grows
    return F.interpolate(pooled, (height, width), mode="nearest")[0] > 0


def layer_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes of a UNet's feature maps for latents of this size: each level halves, rounding up (stride 2, pad 1)."""
    sizes = [(height, width)]
    while sizes[-1] != (1, 1):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


def visible_people(masks: Tensor, overlap: Overlap = "nearest", background: Background = "none") -> Tensor:
    """Which people each query sees: bool `(n, N)` from the masks `(n, h, w)`, N = h·w.

    Args:
        overlap: of queries in several masks. `"literal"`: nobody, as Eq. 7 says; `"shared"`: everybody whose mask it
            is in; `"nearest"`: the one of these whose mask's centre is nearest in units of the mask's size.
        background: of queries in no mask. `"all"`: everybody, as Eq. 7 says; `"none"`: nobody.
    """
    inside = masks.flatten(1)
    several, nowhere = inside.sum(0) > 1, ~inside.any(0)
    visible = inside.clone()
    if overlap == "literal":
        visible &= ~several
    elif overlap == "nearest":
        nearest = torch.zeros_like(inside).scatter(0, _distances(masks).argmin(0, keepdim=True), True)
        visible &= nearest | ~several
    if background == "all":
        visible |= nowhere
    return visible


def _distances(masks: Tensor) -> Tensor:
    """`(n, N)`: distance of each cell from the centre of each mask over the mask's root area; infinite outside."""
    height, width = masks.shape[-2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([rows, columns], -1).flatten(0, 1).float()
    distances = torch.full((len(masks), height * width), torch.inf)
    for row, mask in zip(distances, masks.flatten(1).cpu(), strict=True):
        members = cells[mask]
        row[mask] = (members - members.mean(0)).norm(dim=-1) / len(members) ** 0.5
    return distances


def group_queries(visible: Tensor) -> Regions:
    """The partition of the queries by what they see, from bool `(n, N)`."""
    patterns, of_query = torch.unique(visible.T, dim=0, return_inverse=True)
    parts = tuple(
        Region((of_query == index).nonzero()[:, 0], tuple(pattern.nonzero()[:, 0].tolist()))
        for index, pattern in enumerate(patterns)
    )
    order = torch.cat([part.queries for part in parts]).argsort()
    return Regions(parts, order)


def layer_regions(
    masks: Tensor, height: int, width: int, overlap: Overlap = "nearest", background: Background = "none"
) -> dict[int, Regions]:
    """Number of queries -> regions, for every level of a UNet whose latents are `height` x `width`.

    Args:
        masks: bool `(n, H, W)`, in pixels of the image.
    """
    return {
        h * w: group_queries(visible_people(pool(masks, h, w), overlap, background))
        for h, w in layer_sizes(height, width)
    }


def even_boxes(count: int, height: int, width: int) -> list[Box]:
    """Face boxes of `count` people side by side, for when nothing better is known."""
    column = width / count
    side = min(0.6 * column, 0.5 * height)
    top, half = 0.45 * height - side / 2, side / 2
    return [((i + 0.5) * column - half, top, (i + 0.5) * column + half, top + side) for i in range(count)]


def scale_boxes(boxes: Sequence[Box], from_size: tuple[int, int], to_size: tuple[int, int]) -> list[Box]:
    """XYXY boxes of an image of `from_size` (width, height) in pixels of one of `to_size`, stretched."""
    sx, sy = to_size[0] / from_size[0], to_size[1] / from_size[1]
    return [(x0 * sx, y0 * sy, x1 * sx, y1 * sy) for x0, y0, x1, y1 in boxes]


def assign_boxes(found: Sequence[Box], count: int, assign: Sequence[int] | None = None) -> list[Box]:
    """The box of each of `count` people among the boxes found, largest ones first where there are too many.

    Args:
        assign: for each person the number of the face it takes, counted from 0 and from left to right; by default
            the people stand in the order in which they were given.

    Raises:
        InvalidLayoutError: fewer faces than people, or `assign` does not name `count` different faces.
    """
    if len(found) < count:
        raise InvalidLayoutError(f"{len(found)} faces found for {count} people: give face_boxes, or another layout")
    order = sorted(found, key=lambda box: box[0] + box[2])
    if assign is None:
        areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in order]
        assign = sorted(sorted(range(len(order)), key=areas.__getitem__, reverse=True)[:count])
    if len(assign) != count or len(set(assign)) != count or not all(0 <= i < len(order) for i in assign):
        raise InvalidLayoutError(
            f"face_assign must name {count} different faces from 0 to {len(order) - 1}, left to right, got {assign!r}"
        )
    return [order[i] for i in assign]
