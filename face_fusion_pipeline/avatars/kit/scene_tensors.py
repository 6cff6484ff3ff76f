"""All that trainings need to know of many scenes, as tensors on the device where they were drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...face_images import CROP_ENLARGE
from ..training.data import FEATURES, stretched
from ..world.render import render
from ..world.scene import MAX_PEOPLE
from .plans import Planned


@dataclass
class SceneTensors:
    """N scenes of `size`² pixels; boxes and landmarks are in pixels, NaN where nobody stands.

    Attributes:
        latents: float16 (N, c, h, w), scaled.
        crops: float16 (N, c, h, w), latents of the target's face crop at the size of the picture.
        tokens: int32 (N, 2, T), of the plain and the full caption.
        boxes: (N, MAX_PEOPLE, 4) XYXY. landmarks5: (N, MAX_PEOPLE, 5, 2).
        emphasis: uint8 (N, 1, h, w), see `AvatarImages.face_emphasis`.
        identities: int64 (N, MAX_PEOPLE), -1 for nobody.
        target: int64 (N,), whose face is learned, by place.
        photo: bool (N,), rendered as a photo; a drawing tells no colours.
        depth: uint8 (N, 1, size, size), 255 is the nearest.
    """

    latents: Tensor
    crops: Tensor
    tokens: Tensor
    boxes: Tensor
    landmarks5: Tensor
    emphasis: Tensor
    identities: Tensor
    target: Tensor
    photo: Tensor
    depth: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def of_target(self, values: Tensor) -> Tensor:
        """The rows (N, ...) of `values` (N, MAX_PEOPLE, ...) that belong to the targets."""
        return values[torch.arange(len(values), device=values.device), self.target.to(values.device)]


Encode = Callable[[Tensor], Tensor]  # images (B, 3, S, S) in [-1, 1] -> scaled latents


@torch.no_grad()
def draw_scenes(
    windows: Iterable[Planned],
    encode: Encode,
    size: int,
    device: torch.device,
    limit: int,
    deadline: float | None = None,
    at_once: int = 32,
) -> SceneTensors:
    """Render and encode scenes until there are `limit`, or until `time.monotonic()` has passed the `deadline`.

    At least one window is drawn. `at_once` scenes are on the device as pictures at a time.
    """
    parts: list[SceneTensors] = []
    drawn = 0
    with tqdm(total=limit, desc="drawing", unit="scene") as bar:
        for window in windows:
            for start in range(0, min(len(window.scenes), limit - drawn), at_once):
                chosen = slice(start, min(start + at_once, limit - drawn + start))
                part = _encoded(Planned(window.scenes[chosen], window.tokens[chosen]), encode, size, device)
                parts.append(part)
                drawn += len(part)
                bar.update(len(part))
            if drawn >= limit or (deadline is not None and time.monotonic() > deadline):
                break
    return SceneTensors(
        **{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(SceneTensors)}
    )


def _encoded(window: Planned, encode: Encode, size: int, device: torch.device) -> SceneTensors:
    rendered = render(window.scenes, size, device)
    images = rendered.images * 2 - 1
    boxes, landmarks5, landmarks68 = map(_padded, (rendered.boxes, rendered.landmarks5, rendered.landmarks68))
    seeds = torch.tensor([scene.seed for scene in window.scenes])
    people = torch.tensor([len(scene.people) for scene in window.scenes])
    generator = torch.Generator().manual_seed(int(seeds[0]))
    target = (torch.rand(len(seeds), generator=generator) * people).long().to(device)
    draws = torch.rand(len(seeds), 3, generator=generator).to(device)
    rows = torch.arange(len(seeds), device=device)
    crops = face_crops(images, detected(boxes[rows, target], draws))
    latents, references = encode(images), encode(crops)
    identities = torch.full((len(seeds), MAX_PEOPLE), -1)
    for row, scene in enumerate(window.scenes):
        identities[row, : len(scene.people)] = torch.tensor([person.identity.seed for person in scene.people])
    return SceneTensors(
        # In the usual memory format: what is compiled ahead on made-up scenes is of use only for the same strides.
        latents=latents.half().contiguous(),
        crops=references.half().contiguous(),
        tokens=window.tokens.to(device),
        boxes=boxes,
        landmarks5=landmarks5,
        emphasis=emphasis(boxes, landmarks68, latents.shape[-1], size // latents.shape[-1]),
        identities=identities.to(device),
        target=target,
        photo=torch.tensor([scene.style == "photo" for scene in window.scenes], device=device),
        depth=stretched(rendered.depth)[:, None],
    )


def _padded(found: list[Tensor]) -> Tensor:
    """(B, MAX_PEOPLE, ...) of one tensor a scene, NaN where nobody stands."""
    counts = [len(part) for part in found]
    whole = torch.cat(found)
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(whole.device)
    slots = torch.cat([torch.arange(count) for count in counts]).to(whole.device)
    padded = whole.new_full((len(counts), MAX_PEOPLE, *whole.shape[1:]), torch.nan)
    padded[rows, slots] = whole
    return padded


def detected(boxes: Tensor, draws: Tensor) -> Tensor:
    """Boxes (B, 4) as a detector might have drawn them, by `draws` (B, 3) in [0, 1].

    A fifth larger or smaller and a twelfth of the height aside, as in `avatars.training.rendered.detected`.
    """
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    aside = (2 * draws[:, 1:] - 1) * half[:, 1:] * 2 / 12
    half = half * 1.2 ** (2 * draws[:, :1] - 1)
    return torch.cat((middle + aside - half, middle + aside + half), 1)


def face_crops(images: Tensor, boxes: Tensor, enlarge: float = CROP_ENLARGE) -> Tensor:
    """The square around each face (B, 3, S, S) of images (B, 3, S, S), as `face_images.crop_face` cuts it."""
    size = images.shape[-1]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 / size * 2 - 1
    half = enlarge * (boxes[:, 2:] - boxes[:, :2]).amax(1) / size
    line = ((torch.arange(size, device=images.device) + 0.5) / size * 2 - 1) * half[:, None]
    x, y = middle[:, :1] + line, middle[:, 1:] + line
    grid = torch.stack((x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)), -1)
    found = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return found.clamp(-1, 1)


def emphasis(boxes: Tensor, landmarks68: Tensor, size: int, stride: int) -> Tensor:
    """Cells (B, 1, size, size) uint8: 2 where brows, eyes or mouth are, 1 elsewhere in a face, 0.

    The same as `AvatarImages.face_emphasis`, for boxes (B, MAX_PEOPLE, 4) and landmarks (B, MAX_PEOPLE, 68, 2).
    """
    cells = torch.arange(size, device=boxes.device)

    def touched(corners: Tensor) -> Tensor:
        x0, y0, x1, y1 = (corners / stride).floor()[..., None].unbind(-2)
        columns, rows = (cells >= x0) & (cells <= x1), (cells >= y0) & (cells <= y1)
        return (rows[..., :, None] & columns[..., None, :]).any(1, keepdim=True)

    strong = torch.zeros(len(boxes), 1, size, size, dtype=torch.bool, device=boxes.device)
    for part in FEATURES:
        points = landmarks68[:, :, part]
        strong |= touched(torch.cat((points.amin(2), points.amax(2)), -1))
    return torch.where(strong, 2, touched(boxes).int()).byte()
