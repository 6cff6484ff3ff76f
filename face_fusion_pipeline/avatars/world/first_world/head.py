"""The geometry of heads and bodies: identity and expression become lists of ellipsoids and facial landmarks.

Head frame: origin at the head's centre, x to the image's right, y up, z forward; a head reaches about from -1 (chin)
to +1 (crown) in y. Everything is batched over people: columns of shape (P,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..head import (
    _BODY_SLOTS,
    _CAP,
    _HAT_SLOTS,
    CLOTH,
    EAR,
    EYE,
    HAIR,
    NECK,
    SKIN,
    Face,
    Parts,
    _outfit_rows,
    skin_volumes,
    surface_z,
)
from ..identity import HAIR_STYLES
from ..scene import EXPRESSIONS


#                curve  open  widen  brow_up  brow_slope  lid_top lid_low tears teeth flush
_EXPRESSION_TABLE = {
    "neutral": (0.00, 0.000, 1.00, 0.00, 0.00, 1.00, 1.00, 0.0, 0.0, 0.0),
    "smiling": (0.15, 0.000, 1.18, 0.02, -0.03, 0.97, 0.80, 0.0, 0.0, 0.0),
    "laughing": (0.12, 0.105, 1.20, 0.03, -0.05, 0.75, 0.62, 0.0, 1.0, 0.0),
    "sad": (-0.15, 0.000, 0.95, 0.02, -0.30, 0.81, 1.00, 0.0, 0.0, 0.0),
    "crying": (-0.14, 0.042, 1.00, 0.01, -0.30, 0.64, 0.74, 1.0, 0.0, 0.0),
    "angry": (-0.08, 0.038, 1.02, -0.05, 0.36, 0.80, 0.90, 0.0, 1.0, 1.0),
    "surprised": (0.00, 0.125, 0.71, 0.09, -0.03, 1.23, 1.16, 0.0, 0.0, 0.0),
}


def measure(genes: dict[str, Tensor], expressions: list[str]) -> Face:
    """Face measures of P people from identity columns (`identity.traits`) and one expression name each."""
    device = genes["age"].device
    table = torch.tensor([_EXPRESSION_TABLE[name] for name in EXPRESSIONS], device=device)
    curve, opening, widen, brow_up, slope, lid_top, lid_low, tears, teeth, flush = table[
        torch.tensor([EXPRESSIONS.index(name) for name in expressions], device=device)
    ].unbind(1)

    def span(name: str, low: float, high: float) -> Tensor:
        return low + (high - low) * genes[name]

    child = genes["kind=child"]
    woman = genes["kind=woman"]
    eye_r = span("eye_size", 0.115, 0.185) * (1 + 0.22 * child)
    eye_y = span("eye_height", -0.07, 0.14) - 0.08 * child
    # Corners and middle share the curve, as in real faces: the mouth stays where it is.
    mouth_y = span("mouth_height", -0.60, -0.41) + 0.05 * child - 0.4 * curve
    return Face(
        width=span("head_width", 0.58, 0.92) + 0.05 * child,
        height=span("head_height", 0.90, 1.06),
        jaw=span("jaw_width", 0.70, 1.05) - 0.06 * woman,
        chin_y=-span("chin_length", 0.71, 0.96) + 0.10 * child,
        eye_x=span("eye_spacing", 0.22, 0.41) + 0.02 * child,
        eye_y=eye_y,
        eye_r=eye_r,
        lid_top=lid_top * span("eye_open", 0.55, 0.95),
        lid_low=lid_low * span("eye_open", 0.45, 0.80),
        brow_y=eye_y + eye_r + span("brow_height", 0.04, 0.21) + brow_up,
        brow_slope=slope + span("brow_angle", -0.28, 0.28),
        brow_thick=span("brow_thick", 0.015, 0.080) * (1 - 0.25 * woman - 0.2 * child),
        brow_half=span("brow_length", 0.12, 0.23),
        nose_y=-span("nose_length", 0.085, 0.365) + 0.07 * child,
        mouth_y=mouth_y,
        mouth_half=span("mouth_width", 0.18, 0.37) * widen,
        mouth_curve=curve,
        mouth_open=opening,
        lip=span("lip_thick", 0.025, 0.090),
        tears=tears,
        teeth=teeth,
        flush=flush,
    )


_HAIR_TABLE: dict[str, tuple[tuple[float, ...], ...]] = {
    "bald": (),
    "buzz": (),
    "short": (_CAP,),
    "side part": (_CAP, (-0.30, 0.80, 0.36, 0.75, 0.24, 0.42, 14), (0.75, 0.60, 0.15, 0.32, 0.38, 0.5, -25)),
    "long": (
        _CAP,
        (-0.98, -0.35, -0.15, 0.26, 0.98, 0.42, 4),
        (0.98, -0.35, -0.15, 0.26, 0.98, 0.42, -4),
        (0, -0.40, -0.55, 1.0, 1.0, 0.35, 0),
        (-0.4, 0.74, 0.34, 0.62, 0.20, 0.40, 24),
    ),
    "bob": (
        (0, 0.40, -0.14, 1.16, 0.76, 0.92, 0),
        (-0.95, -0.06, -0.02, 0.30, 0.58, 0.48, -6),
        (0.95, -0.06, -0.02, 0.30, 0.58, 0.48, 6),
        (0, 0.62, 0.42, 0.85, 0.20, 0.40, 0),
    ),
    "bun": (_CAP, (0, 1.26, -0.20, 0.42, 0.29, 0.30, 0)),
    "afro": ((0, 0.52, -0.22, 1.50, 0.98, 1.0, 0),),
    "mohawk": ((0, 0.82, -0.10, 0.20, 0.55, 0.85, 0), (0, 0.95, 0.25, 0.18, 0.38, 0.40, 0)),
    "ponytail": (_CAP, (1.05, 0.70, -0.55, 0.36, 0.30, 0.30, 30), (1.28, 0.10, -0.50, 0.26, 0.70, 0.26, 10)),
    "curly": (
        (0, 0.42, -0.14, 1.12, 0.78, 0.90, 0),
        (-0.85, 0.62, 0.12, 0.38, 0.30, 0.36, 0),
        (0.85, 0.62, 0.12, 0.38, 0.30, 0.36, 0),
        (-0.45, 0.92, 0.28, 0.42, 0.28, 0.36, 0),
        (0.45, 0.92, 0.28, 0.42, 0.28, 0.36, 0),
        (0, 1.08, 0.10, 0.45, 0.26, 0.40, 0),
        (-1.02, 0.22, -0.10, 0.30, 0.34, 0.36, 0),
        (1.02, 0.22, -0.10, 0.30, 0.34, 0.36, 0),
    ),
    "spiky": (
        (0, 0.38, -0.12, 1.06, 0.72, 0.88, 0),
        (-0.75, 0.88, 0.05, 0.17, 0.42, 0.22, 42),
        (-0.38, 1.04, 0.15, 0.17, 0.44, 0.22, 20),
        (0, 1.10, 0.18, 0.17, 0.46, 0.22, 0),
        (0.38, 1.04, 0.15, 0.17, 0.44, 0.22, -20),
        (0.75, 0.88, 0.05, 0.17, 0.42, 0.22, -42),
    ),
}
_HAIR_SLOTS = max(map(len, _HAIR_TABLE.values()))


def build(genes: dict[str, Tensor], face: Face, clothings: list[str]) -> Parts:
    """All ellipsoids of P people: face, ears, neck, eyes, hair, body, hat."""
    device = face.width.device
    people = len(clothings)
    w = face.width
    one = torch.ones_like(w)
    rows: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...], int, bool]] = []
    for side in (-1, 1):
        ear = 0.75 + 0.6 * genes["ear_size"]
        rows.append(((side * (w + 0.02), -0.02 * one, -0.08 * one), (0.10 * ear, 0.20 * ear, 0.13 * ear), EAR, True))
    for side in (-1, 1):
        eye = face.eye_r
        rows.append(
            ((side * face.eye_x, face.eye_y, 0.86 - 0.95 * eye - 0.30 * face.eye_x), (eye, eye, eye), EYE, True)
        )
    rows.append(
        ((0 * one, -0.95 * one, -0.14 * one), (0.34 + 0.05 * genes["kind=man"], 0.7 * one, 0.36 * one), NECK, False)
    )
    body = 1.02 + 0.16 * genes["kind=man"] - 0.10 * genes["kind=child"]
    rows.append(((0 * one, -1.94 * one, -0.12 * one), (body, 0.92 * one, 0.66 * one), CLOTH, False))
    for side in (-1, 1):
        rows.append(
            ((side * 0.80 * body, -1.72 * one, -0.12 * one), (0.42 * one, 0.46 * one, 0.44 * one), CLOTH, False)
        )
    skin_centre, skin_radii = skin_volumes(genes, face)
    centre = torch.cat((skin_centre, torch.stack([torch.stack(c, 1) for c, *_ in rows], 1)), 1)
    radii = torch.cat((skin_radii, torch.stack([torch.stack(r, 1) for _, r, *_ in rows], 1)), 1)
    material = torch.tensor([SKIN] * skin_centre.shape[1] + [m for *_, m, _ in rows], device=device).expand(people, -1)
    in_head = torch.tensor([True] * skin_centre.shape[1] + [h for *_, h in rows], device=device)
    active = torch.ones_like(material, dtype=torch.bool)
    tilt = torch.zeros_like(material, dtype=centre.dtype)

    filler = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0)
    table = torch.tensor(
        [[*_HAIR_TABLE[name], *[filler] * (_HAIR_SLOTS - len(_HAIR_TABLE[name]))] for name in HAIR_STYLES],
        device=device,
    )
    used = torch.tensor(
        [[k < len(_HAIR_TABLE[name]) for k in range(_HAIR_SLOTS)] for name in HAIR_STYLES], device=device
    )
    style = torch.stack([genes[f"hair={name}"] for name in HAIR_STYLES], 1).argmax(1)
    hats = torch.tensor([_outfit_rows(name, True, _HAT_SLOTS) for name in clothings], device=device)
    outfits = torch.tensor([_outfit_rows(name, False, _BODY_SLOTS) for name in clothings], device=device)
    # Tall hair would stick out of a hat: below one, only what lies lower than the rim stays.
    hatted = (hats[:, :, 0] >= 0).any(1)
    hair = table[style]
    hair_active = used[style] & ~(hatted[:, None] & (hair[:, :, 1] > 0.5))
    stretch = torch.stack((w, one, one), 1).unsqueeze(1)
    groups = [
        # centre, radii, tilt, material, active, in head frame
        (hair[..., :3] * stretch, hair[..., 3:6] * stretch, hair[..., 6],
         torch.full_like(hair[..., 0], HAIR), hair_active, True),
        (hats[..., 1:4] * stretch, hats[..., 4:7] * stretch, hats[..., 7], hats[..., 0], hats[..., 0] >= 0, True),
        (outfits[..., 1:4], outfits[..., 4:7], outfits[..., 7], outfits[..., 0], outfits[..., 0] >= 0, False),
    ]  # fmt: skip
    return Parts(
        centre=torch.cat((centre, *(g[0] for g in groups)), 1),
        radii=torch.cat((radii, *(g[1] for g in groups)), 1),
        tilt=torch.deg2rad(torch.cat((tilt, *(g[2] for g in groups)), 1)),
        material=torch.cat((material, *(g[3].long() for g in groups)), 1),
        active=torch.cat((active, *(g[4] for g in groups)), 1),
        in_head=torch.cat((in_head, *(torch.full((g[0].shape[1],), g[5], device=device) for g in groups))),
    )


def eyes_shown(genes: dict[str, Tensor], face: Face) -> Tensor:
    """How much of the discs of the eyes lies before the skin (P,), from 0 to 1: of some people next to nothing."""
    steps = torch.linspace(-0.8, 0.8, 13, device=face.eye_r.device)
    disc = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).flatten(0, 1)
    disc = disc[disc.norm(dim=-1) < 0.8]
    points = torch.stack((face.eye_x, face.eye_y), -1)[:, None] + disc * face.eye_r[:, None, None]
    centre = 0.86 - 0.95 * face.eye_r - 0.30 * face.eye_x
    front = centre[:, None] + face.eye_r[:, None] * (1 - disc.square().sum(-1)).sqrt()
    return (front > surface_z(points, *skin_volumes(genes, face))).float().mean(1)


def landmarks(genes: dict[str, Tensor], face: Face) -> tuple[Tensor, Tensor]:
    """Five and 68 facial landmarks (P, 5, 3), (P, 68, 3) in the head frame.

    Five: left eye, right eye, nose tip, left and right mouth corner, left and right as seen in the image. 68: the
    order of the 300-W (iBUG) annotation: jaw 17, brows 5 + 5, nose 4 + 5, eyes 6 + 6, outer mouth 12, inner mouth 8.
    """
    zero = torch.zeros_like(face.width)

    def at(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack((x, y), -1)

    corner_y = face.mouth_y + face.mouth_curve
    five = torch.stack(
        (
            at(-face.eye_x, face.eye_y),
            at(face.eye_x, face.eye_y),
            at(zero, face.nose_y),
            at(-face.mouth_half, corner_y),
            at(face.mouth_half, corner_y),
        ),
        1,
    )
    points: list[Tensor] = []
    for angle in torch.linspace(-1.45, 1.45, 17).tolist():
        s, c = torch.sin(torch.tensor(angle)).item(), torch.cos(torch.tensor(angle)).item()
        points.append(at(face.width * face.jaw.clamp(max=1) * s * 0.99, (face.chin_y + 0.05) * c + 0.05 * (1 - c)))
    for side in (-1, 1):
        for t in (-1.0, -0.5, 0.0, 0.5, 1.0):  # from the image's left to its right
            inner = -side * t  # +1 at the end next to the nose
            points.append(
                at(side * face.eye_x + t * face.brow_half, face.brow_y - face.brow_slope * inner * face.brow_half)
            )
    for t in (0.0, 1 / 3, 2 / 3, 1.0):
        points.append(at(zero, face.eye_y + t * (face.nose_y - face.eye_y)))
    for x in (-0.12, -0.06, 0.0, 0.06, 0.12):
        points.append(at(zero + x, face.nose_y - 0.09))
    for side in (-1, 1):
        for dx, dy in ((-1, 0), (-0.4, 1), (0.4, 1), (1, 0), (0.4, -1), (-0.4, -1)):
            lid = face.lid_top if dy >= 0 else face.lid_low
            points.append(at(side * face.eye_x + dx * face.eye_r * 0.95, face.eye_y + dy * lid * face.eye_r))
    for scale, extra in ((1.0, face.lip), (0.8, zero)):
        steps = 7 if scale == 1.0 else 5
        xs = torch.linspace(-1, 1, steps).tolist()
        for upper, row in ((1, xs), (-1, xs[-2:0:-1])):
            for x in row:
                arch = (1 - x * x) * (face.mouth_open + extra) * upper
                points.append(at(scale * x * face.mouth_half, face.mouth_y + face.mouth_curve * x * x + arch))
    flat68 = torch.stack(points, 1)
    centre, radii = skin_volumes(genes, face)
    both = torch.cat((five, flat68), 1)
    lifted = torch.cat((both, surface_z(both, centre, radii).unsqueeze(2)), 2)
    return lifted[:, :5], lifted[:, 5:]
