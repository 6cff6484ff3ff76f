"""From scenes to pictures with ground truth: images, depth, instance masks, face boxes, landmarks."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backgrounds, head, points, raycast, shade, styles
from .first_world import head as first_head
from .first_world import shade as first_shade
from .identity import traits
from .scene import MAX_PEOPLE, Scene


FAR = -2.0  # depth of the background
_WORLDS: dict[int, tuple[ModuleType, ModuleType]] = {1: (first_head, first_shade), 2: (head, shade)}
_SUPERSAMPLE = 2


class Rendered(NamedTuple):
    """A batch of B rendered scenes of size² pixels; lists have one tensor a scene, people from left to right."""

    images: Tensor  # (B, 3, size, size) in [0, 1]
    depth: Tensor  # (B, size, size), image units, towards the viewer; FAR where there is only background
    masks: Tensor  # (B, MAX_PEOPLE, size, size) bool: visible pixels of each person
    boxes: list[Tensor]  # (people, 4) face boxes XYXY in pixels
    landmarks5: list[
        Tensor
    ]  # (people, 5, 2) pixels: left eye, right eye, nose, left and right mouth corner (image sides)
    landmarks68: list[Tensor]  # (people, 68, 2) pixels, 300-W order
    landmarks72: list[Tensor]  # (people, 72, 3) pixels and, in the same unit, towards the viewer: `points.points72`


def rotations(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Rotation matrices (P, 3, 3) from degrees (P,): yaw to the image's right, pitch up, roll clockwise."""
    (cy, sy), (cp, sp), (cr, sr) = ((a.cos(), a.sin()) for a in map(torch.deg2rad, (yaw, pitch, -roll)))
    zero, one = torch.zeros_like(cy), torch.ones_like(cy)

    def matrix(*rows: Tensor) -> Tensor:
        return torch.stack(rows, 1).view(-1, 3, 3)

    turn = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    lift = matrix(one, zero, zero, zero, cp, sp, zero, -sp, cp)
    lean = matrix(cr, -sr, zero, sr, cr, zero, zero, zero, one)
    return lean @ lift @ turn


def _face_box_points(genes: dict[str, Tensor], face: head.Face) -> Tensor:
    """Head-frame points (P, 4, 3) whose projection spans the face box: temples, chin, hair line."""
    zero = torch.zeros_like(face.width)
    side = torch.maximum(face.width * 0.93, face.width * face.jaw * 0.9)
    return torch.stack(
        (
            torch.stack((-side, face.eye_y - 0.1, zero + 0.15), 1),
            torch.stack((side, face.eye_y - 0.1, zero + 0.15), 1),
            torch.stack((zero, face.chin_y - 0.02, zero + 0.45), 1),
            torch.stack((zero, zero + 0.76, zero + 0.55), 1),
        ),
        1,
    )


@torch.no_grad()
def render(scenes: list[Scene], size: int = 128, device: torch.device | str = "cpu") -> Rendered:
    """Render scenes to `size`² pixels on any device; the same scene gives the same picture.

    Raises ValueError unless `size` is a multiple of 8, at least 32.
    """
    if size < 32 or size % 8:
        raise ValueError(f"size is {size}: choose a multiple of 8, at least 32")
    people = [(b, person) for b, scene in enumerate(scenes) for person in scene.people]
    worlds = {person.identity.world for _, person in people}
    if len(worlds) != 1:
        raise ValueError(f"people of the worlds {sorted(worlds)} cannot be rendered together: one world at a time")
    number = worlds.pop()
    forms, paints = _WORLDS[number]
    batch, fine = len(scenes), size * _SUPERSAMPLE

    def column(*values: float) -> Tensor:
        return torch.tensor(values, device=device)

    genes = traits(torch.stack([p.identity.vector for _, p in people]).to(device))
    face = forms.measure(genes, [p.expression for _, p in people])
    clothings = [p.clothing for _, p in people]
    parts = forms.build(genes, face, clothings)
    yaw, pitch, roll, x, y, half = (
        column(*(v for _, p in people for v in (p.yaw, p.pitch, p.roll, p.x, p.y, p.scale))).view(-1, 6).unbind(1)
    )
    half = half * head.relative_size(genes)
    # People stand one behind the other, so that shoulders overlap instead of growing into each other.
    order = column(*(float(i % 2) for scene in scenes for i in range(len(scene.people))))
    origin = torch.stack((x, y, order), 1)
    turned = rotations(yaw, pitch, roll)
    upright = rotations(0.4 * yaw, 0 * pitch, 0.15 * roll)

    frames = torch.where(parts.in_head[None, :, None, None], turned.unsqueeze(1), upright.unsqueeze(1))
    cos, sin = parts.tilt.cos(), parts.tilt.sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    tilt = torch.stack((cos, -sin, zero, sin, cos, zero, zero, zero, one), -1).view(*cos.shape, 3, 3)
    scale = half.view(-1, 1, 1)
    centre = origin.unsqueeze(1) + scale * (frames @ parts.centre.unsqueeze(3)).squeeze(3)
    keep = parts.active.flatten().nonzero().squeeze(1)
    owner = keep // parts.active.shape[1]
    image = torch.tensor([b for b, _ in people], device=device)
    hits = raycast.cast(
        centre.flatten(0, 1)[keep],
        (frames @ tilt).flatten(0, 1)[keep],
        (parts.radii * scale).flatten(0, 1)[keep],
        image[owner],
        batch,
        fine,
    )
    person = owner.index_select(0, hits.part)
    material = parts.material.flatten()[keep].index_select(0, hits.part)
    in_head = parts.in_head.repeat(len(people))[keep].index_select(0, hits.part)
    # Rows of both frames in one table: a person's head frame, and behind all of them the body frames.
    both = torch.cat((turned, upright))
    frame = both.index_select(0, torch.where(in_head, person, person + len(people)))
    offset = (hits.position - origin.index_select(0, person)) / half.index_select(0, person).unsqueeze(1)
    local = (offset.unsqueeze(2) * frame).sum(1)

    normal = hits.normal.clone()
    smoothed = material == head.SKIN
    if forms is head:  # eyeballs share the face's smooth normals: light must not show where the two meet
        smoothed |= material == head.EYE
    skin = smoothed.nonzero().squeeze(1)
    owner_of_skin = person.index_select(0, skin)
    smooth = paints.skin_normals(local.index_select(0, skin), *forms.skin_volumes(genes, face), owner_of_skin)
    normal[skin] = (turned.index_select(0, owner_of_skin) * smooth.unsqueeze(1)).sum(2)

    lights = [scene.light for scene in scenes]
    azimuth, elevation, ambient, warmth = (
        column(*(v for light in lights for v in (light.azimuth, light.elevation, light.ambient, light.warmth)))
        .view(-1, 4)
        .unbind(1)
    )
    azimuth, elevation = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    direction = torch.stack((azimuth.sin() * elevation.cos(), elevation.sin(), azimuth.cos() * elevation.cos()), 1)
    where = image.index_select(0, person)
    towards = direction.index_select(0, where)
    # The head's soft shadow on neck and body: how near a ray towards the light passes to the head's centre.
    along = -(offset * towards).sum(1)
    nearest = (offset + along.unsqueeze(1) * towards).norm(dim=1)
    shadow = ((1.02 - nearest) / 0.35).clamp(0, 1) * (along > 0.2) * ~in_head * 0.75
    table, names = paints.columns(genes, face, clothings)
    colour = paints.paint(material, local, person, table, names)
    colour = paints.light_up(colour, normal, material, towards, ambient[where], warmth[where], shadow)

    canvas = torch.zeros(batch * fine * fine, 4, device=device)
    canvas[hits.pixel] = torch.cat((colour, torch.ones_like(colour[:, :1])), 1)
    pooled = F.avg_pool2d(canvas.view(batch, fine, fine, 4).permute(0, 3, 1, 2), _SUPERSAMPLE)
    backdrop = backgrounds.draw([s.background for s in scenes], [s.seed for s in scenes], size, device)
    images = (pooled[:, :3] + (1 - pooled[:, 3:]) * backdrop).clamp(0, 1)
    images = styles.apply_styles(images, [s.style for s in scenes])

    depth = F.max_pool2d(hits.depth.unsqueeze(1), _SUPERSAMPLE).squeeze(1)
    depth = torch.where(depth.isinf(), torch.full_like(depth, FAR), depth)
    starts = torch.tensor([0, *torch.tensor([len(s.people) for s in scenes]).cumsum(0)[:-1].tolist()], device=device)
    slot = person - starts[where]
    instance = torch.zeros(batch * fine * fine, MAX_PEOPLE, device=device)
    instance[hits.pixel, slot] = 1.0
    covered = F.avg_pool2d(instance.view(batch, fine, fine, MAX_PEOPLE).permute(0, 3, 1, 2), _SUPERSAMPLE)
    masks = covered > 0.5  # a pixel shared half and half belongs to nobody

    five, all68 = forms.landmarks(genes, face)
    all72 = points.points72(genes, face, parts, number)
    of_face = torch.cat((five, all68, all72, _face_box_points(genes, face)), 1)
    world = scale * (of_face @ turned.transpose(1, 2))
    depths, world = world[:, 73:145, 2:] * size / 2, world + origin.unsqueeze(1)
    pixels = torch.stack(((world[..., 0] + 1) * size / 2, (1 - world[..., 1]) * size / 2), 2)
    corners = pixels[:, 145:]
    boxes = torch.cat((corners.amin(1), corners.amax(1)), 1)
    counts = [len(s.people) for s in scenes]
    return Rendered(
        images,
        depth,
        masks,
        list(boxes.split(counts)),
        list(pixels[:, :5].split(counts)),
        list(pixels[:, 5:73].split(counts)),
        list(torch.cat((pixels[:, 73:145], depths), 2).split(counts)),
    )
