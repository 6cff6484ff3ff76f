"""The 72 facial points of heads, on their surface: iBUG's 68 with eyes of 8, in the order of `face_landmarks`.

The points of a face are those that its paint and its volumes draw: lids and lips by the formulas of `shade`, the jaw
on the outline of the skin as it is seen from the front, the nose on its volumes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import EYE, SKIN, Face, Parts, eye_slant, lid_arch, skin_volumes, surface_z


JAW, EAR = 17, 0.09  # points, and the angle of the first below the level of the eyes
RIM = 0.97  # of the way from the middle of the head to the outline: beyond it the surface turns away
NOSE_WING, NOSE_TIP = 8, 6  # rows of `skin_volumes`
EYE_STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0, 0.5, 0.0, -0.5)  # along the upper lid from the image's left, and back
EYE_SIDES = (0, 1, 1, 1, 0, -1, -1, -1)  # of the lids
EMERGING_STEPS = 25
INNER_LIPS = 0.88  # of the mouth's width


def points72(genes: dict[str, Tensor], face: Face, parts: Parts, world: int) -> Tensor:
    """The 72 points (P, 72, 3) of P heads, in the head frame (see `head`), from the image's left to its right."""
    flat = torch.cat(
        (jaw(genes, face), brows(face), nose(genes, face), eyes(genes, face, parts, world), mouth(face)), 1
    )  # (P, 72, 2)
    seen = (parts.material[0] == SKIN) | (parts.material[0] == EYE)
    return torch.cat((flat, surface_z(flat, parts.centre[:, seen], parts.radii[:, seen])[..., None]), 2)


def jaw(genes: dict[str, Tensor], face: Face) -> Tensor:
    """From the ear on the image's left round the chin (P, 17, 2), on the outline of the face from the front."""
    centre, radii = (rows[:, None, :3, :2] for rows in skin_volumes(genes, face))  # skull, jaw, chin
    middle = torch.stack((torch.zeros_like(face.eye_y), face.eye_y - 0.05), -1)[:, None]
    angle = torch.linspace(EAR, torch.pi - EAR, JAW).to(middle)
    towards = torch.stack((-angle.cos(), -angle.sin()), -1)
    # A ray meets a volume where |offset + t ray| = 1, both in units of its radii; the farthest one is the outline.
    ray, offset = towards[None, :, None] / radii, (middle[:, :, None] - centre) / radii
    a, b, c = ray.square().sum(-1), (ray * offset).sum(-1), offset.square().sum(-1) - 1
    root = b.square() - a * c
    far = torch.where(root > 0, (root.clamp(min=0).sqrt() - b) / a, torch.zeros_like(b)).amax(-1)
    return middle + RIM * far[..., None] * towards


def brows(face: Face) -> Tensor:
    """The middle line of each brow (P, 10, 2)."""
    points = []
    for side in (-1, 1):
        for step in (-1.0, -0.5, 0.0, 0.5, 1.0):
            out = side * step  # > 0 away from the nose
            height = face.brow_y + face.brow_slope * out * face.brow_half - 0.03 * out * out
            points.append(torch.stack((side * face.eye_x + step * face.brow_half, height), -1))
    return torch.stack(points, 1)


def nose(genes: dict[str, Tensor], face: Face) -> Tensor:
    """Four points down the bridge to the tip, then five along the nostrils (P, 9, 2)."""
    centre, radii = skin_volumes(genes, face)
    tip, wing = radii[:, NOSE_TIP, 1], centre[:, NOSE_WING, 0] + 0.6 * radii[:, NOSE_WING, 0]
    zero = torch.zeros_like(tip)
    points = [
        torch.stack((zero, face.eye_y + step * (face.nose_y - face.eye_y)), -1) for step in (0.0, 1 / 3, 2 / 3, 1.0)
    ]
    for across, down in ((-1.0, 0.45), (-0.5, 0.75), (0.0, 0.85), (0.5, 0.75), (1.0, 0.45)):
        points.append(torch.stack((across * wing, face.nose_y - 0.02 - down * tip), -1))
    return torch.stack(points, 1)


def eyes(genes: dict[str, Tensor], face: Face, parts: Parts, world: int) -> Tensor:
    """Corners and lids of the left and the right eye of the image (P, 16, 2)."""
    centres, edges = [], []
    for side in (-1, 1):
        for step, lid in zip(EYE_STEPS, EYE_SIDES, strict=True):
            along = torch.full_like(face.eye_r, 0.95 * step)
            opening = {0: torch.zeros_like(along), 1: face.lid_top, -1: -face.lid_low}[lid]
            up = opening * (lid_arch(along) if world != 1 else (1 - along.square()).sqrt())
            up = up + eye_slant(genes["eye_tilt"]) * along * side
            edges.append(torch.stack((along, up), -1) * face.eye_r[:, None])
            centres.append(torch.stack((side * face.eye_x, face.eye_y), -1))
    centre, edge = torch.stack(centres, 1), torch.stack(edges, 1)
    return centre + edge * (1 if world != 1 else emerging(centre, edge, parts)[..., None])


def emerging(centre: Tensor, edge: Tensor, parts: Parts) -> Tensor:
    """How far (P, L), from 0 to 1, an eyeball of the first world lies before the skin from (P, L, 2) on, along `edge`.

    1 where nothing of it is seen: then the lids are where they would be.
    """
    steps = torch.linspace(0, 1, EMERGING_STEPS, device=edge.device)
    points = (centre[:, :, None] + steps[:, None] * edge[:, :, None]).flatten(1, 2)
    skin, ball = (
        surface_z(points, parts.centre[:, kind], parts.radii[:, kind]).unflatten(1, (-1, EMERGING_STEPS))
        for kind in (parts.material[0] == SKIN, parts.material[0] == EYE)
    )
    seen = (ball > skin).long().cumprod(-1).sum(-1)
    return torch.where(seen > 0, steps[(seen - 1).clamp(min=0)], torch.ones_like(steps[0]))


def mouth(face: Face) -> Tensor:
    """Twelve points round the lips, then eight round the opening (P, 20, 2), clockwise from the image's left."""

    def edge(across: float, side: int, lips: float) -> Tensor:
        arch = 1 - across * across
        half = face.mouth_open * arch**0.5 + lips * face.lip * (0.35 + 0.65 * arch)
        middle = face.mouth_y + face.mouth_curve * across * across
        return torch.stack((across * face.mouth_half, middle + side * half), -1)

    points = []
    for steps, reach, lips in ((7, 1.0, 1.0), (5, INNER_LIPS, 0.0)):
        row = torch.linspace(-reach, reach, steps).tolist()
        points += [edge(x, 0 if abs(x) == reach else 1, lips) for x in row]
        points += [edge(x, -1, lips) for x in row[-2:0:-1]]
    return torch.stack(points, 1)
