"""The geometry of heads and bodies: identity and expression become lists of ellipsoids and facial landmarks.

Head frame: origin at the head's centre, x to the image's right, y up, z forward; a head reaches about from -1 (chin)
to +1 (crown) in y. Everything is batched over people: columns of shape (P,).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .identity import HAIR_STYLES
from .scene import EXPRESSIONS


class Face(NamedTuple):
    """The measures of people's faces in head units, shape (P,): identity with expression applied."""

    width: Tensor
    height: Tensor
    jaw: Tensor
    chin_y: Tensor
    eye_x: Tensor
    eye_y: Tensor
    eye_r: Tensor
    lid_top: Tensor  # fraction of the eye radius that is open above its centre
    lid_low: Tensor
    brow_y: Tensor
    brow_slope: Tensor  # > 0: inner ends down
    brow_thick: Tensor
    brow_half: Tensor  # half length
    nose_y: Tensor
    mouth_y: Tensor
    mouth_half: Tensor
    mouth_curve: Tensor  # corners' height above the middle
    mouth_open: Tensor  # half height of the opening
    lip: Tensor  # lip thickness
    tears: Tensor
    teeth: Tensor
    flush: Tensor  # how red anger makes the cheeks


#                curve  open  widen  brow_up  brow_slope  lid_top lid_low tears teeth flush
_EXPRESSION_TABLE = {
    "neutral": (0.00, 0.000, 1.00, 0.00, 0.00, 1.00, 1.00, 0.0, 0.0, 0.0),
    "smiling": (0.15, 0.000, 1.18, 0.02, -0.03, 0.97, 0.80, 0.0, 0.0, 0.0),
    "laughing": (0.12, 0.105, 1.20, 0.03, -0.05, 0.78, 0.66, 0.0, 1.0, 0.0),
    "sad": (-0.15, 0.000, 0.95, 0.02, -0.30, 0.81, 1.00, 0.0, 0.0, 0.0),
    "crying": (-0.14, 0.042, 1.00, 0.01, -0.30, 0.72, 0.76, 1.0, 0.0, 0.0),
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
    width = span("head_width", 0.58, 0.92) + 0.05 * child
    eye_r = span("eye_size", 0.12, 0.185) * (1 + 0.22 * child)
    # Eyes stay on the front of the face and beside the nose.
    eye_x = torch.minimum(span("eye_spacing", 0.22, 0.41) + 0.02 * child, 0.86 * width - 0.8 * eye_r)
    eye_r = torch.minimum(eye_r, eye_x - 0.075)
    eye_y = span("eye_height", -0.07, 0.14) - 0.08 * child
    # Corners and middle share the curve, as in real faces: the mouth stays where it is.
    mouth_y = span("mouth_height", -0.60, -0.41) + 0.05 * child - 0.4 * curve
    return Face(
        width=width,
        height=span("head_height", 0.90, 1.06),
        jaw=span("jaw_width", 0.70, 1.05) - 0.06 * woman,
        chin_y=-span("chin_length", 0.71, 0.96) + 0.10 * child,
        eye_x=eye_x,
        eye_y=eye_y,
        eye_r=eye_r,
        lid_top=lid_top * span("eye_open", 0.62, 0.95),
        lid_low=lid_low * span("eye_open", 0.50, 0.80),
        brow_y=eye_y + eye_r + span("brow_height", 0.04, 0.21) + brow_up,
        brow_slope=slope + span("brow_angle", -0.28, 0.28),
        brow_thick=span("brow_thick", 0.015, 0.080) * (1 - 0.25 * woman - 0.2 * child),
        brow_half=span("brow_length", 0.12, 0.23),
        nose_y=-span("nose_length", 0.085, 0.365) + 0.07 * child,
        mouth_y=mouth_y,
        mouth_half=span("mouth_width", 0.18, 0.37) * widen,
        mouth_curve=curve,
        mouth_open=opening,
        lip=span("lip_thick", 0.032, 0.095),
        tears=tears,
        teeth=teeth,
        flush=flush,
    )


def relative_size(genes: dict[str, Tensor]) -> Tensor:
    """How large a head is (P,), as a share of the `scale` of its place in a scene."""
    return (0.94 + 0.12 * genes["size"]) * (1 - 0.08 * genes["kind=child"])


# Materials that the shader tells apart.
SKIN, EAR, NECK, EYE, HAIR, CLOTH, GOLD, SUIT_GLASS, TIE, WHITE_CLOTH, GREY = range(11)


@dataclass
class Parts:
    """K ellipsoids for each of P people, in the frame of the head or of the body."""

    centre: Tensor  # (P, K, 3)
    radii: Tensor  # (P, K, 3)
    tilt: Tensor  # (P, K) radians about z
    material: Tensor  # (P, K) int64
    active: Tensor  # (P, K) bool
    in_head: Tensor  # (K,) bool: moves with the head, else with the body


# Hair volumes, one row an ellipsoid: centre x, y, z, radii x, y, z, tilt in degrees; x in units of head width.
_CAP = (0, 0.36, -0.12, 1.09, 0.76, 0.90, 0)
_HAIR_TABLE: dict[str, tuple[tuple[float, ...], ...]] = {
    "bald": (),
    "buzz": (),
    "short": (_CAP,),
    "side part": (_CAP, (-0.30, 0.80, 0.36, 0.75, 0.24, 0.42, 14), (0.62, 0.68, 0.16, 0.46, 0.24, 0.5, -34)),
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
_OVER_EARS = ("long", "bob", "afro", "curly")
_HAIR_SLOTS = max(map(len, _HAIR_TABLE.values()))

# Clothes and hats: (head frame?, material, centre, radii, tilt). Hats move with the head and hide nothing of the face.
_OUTFITS: dict[str, tuple[tuple[bool, int, tuple[float, ...]], ...]] = {
    "suit": (
        (False, WHITE_CLOTH, (0, -1.36, 0.36, 0.24, 0.42, 0.20, 0)),
        (False, TIE, (0, -1.46, 0.50, 0.085, 0.42, 0.12, 0)),
    ),
    "astronaut suit": (
        (False, GREY, (0, -1.02, 0.02, 0.86, 0.16, 0.70, 0)),
        (False, SUIT_GLASS, (0.42, -1.48, 0.50, 0.15, 0.11, 0.12, 0)),
        (False, TIE, (-0.42, -1.48, 0.50, 0.15, 0.11, 0.12, 0)),
        (True, GREY, (-0.98, 0.02, -0.10, 0.16, 0.26, 0.24, 0)),
        (True, GREY, (0.98, 0.02, -0.10, 0.16, 0.26, 0.24, 0)),
        (True, WHITE_CLOTH, (0, 0.62, -0.22, 1.24, 0.76, 0.92, 0)),
    ),
    "chef's hat": (
        (True, WHITE_CLOTH, (0, 0.98, 0.0, 0.98, 0.30, 0.82, 0)),
        (True, WHITE_CLOTH, (0, 1.42, 0.0, 0.95, 0.36, 0.70, 0)),
        (True, WHITE_CLOTH, (-0.62, 1.36, 0.1, 0.55, 0.34, 0.5, 0)),
        (True, WHITE_CLOTH, (0.62, 1.36, 0.1, 0.55, 0.34, 0.5, 0)),
    ),
    "crown": (
        (True, GOLD, (0, 0.90, 0.0, 1.02, 0.20, 0.80, 0)),
        (True, GOLD, (-0.72, 1.14, 0.38, 0.11, 0.27, 0.10, 10)),
        (True, GOLD, (-0.36, 1.18, 0.60, 0.12, 0.31, 0.10, 5)),
        (True, GOLD, (0, 1.20, 0.68, 0.12, 0.34, 0.10, 0)),
        (True, GOLD, (0.36, 1.18, 0.60, 0.12, 0.31, 0.10, -5)),
        (True, GOLD, (0.72, 1.14, 0.38, 0.11, 0.27, 0.10, -10)),
    ),
}
_HAT_SLOTS = max(sum(row[0] for row in rows) for rows in _OUTFITS.values())
_BODY_SLOTS = max(sum(not row[0] for row in rows) for rows in _OUTFITS.values())


def _outfit_rows(clothing: str, head: bool, slots: int) -> list[tuple[float, ...]]:
    rows = [
        (float(material), *numbers) for in_head, material, numbers in _OUTFITS.get(clothing, ()) if in_head == head
    ]
    return rows + [(-1.0, 0, 0, 0, 1, 1, 1, 0)] * (slots - len(rows))


def skin_volumes(genes: dict[str, Tensor], face: Face) -> tuple[Tensor, Tensor]:
    """Centres and radii (P, 10, 3) of the ellipsoids that together are the face; the shader blends their normals."""
    w, h = face.width, face.height
    one = torch.ones_like(w)
    cheek = 0.85 + 0.35 * genes["cheek"]
    nose_w = (0.040 + 0.095 * genes["nose_width"]) * (1 - 0.15 * genes["kind=child"])
    tip = 0.065 + 0.095 * genes["nose_tip"]
    bridge = 0.10 + 0.12 * genes["nose_bridge"]
    chin_w = 0.20 + 0.20 * genes["chin_width"]
    rows = [
        ((0 * one, 0.18 * one, -0.05 * one), (w, 0.85 * h, 0.90 * one)),
        ((0 * one, -0.25 * one, 0.06 * one), (w * face.jaw, -face.chin_y - 0.14, 0.74 * one)),
        ((0 * one, face.chin_y + 0.17, 0.36 * one), (chin_w, 0.19 * one, 0.27 * one)),
        ((-0.46 * w, -0.20 * one, 0.48 * one), (0.27 * cheek, 0.24 * cheek, 0.26 * cheek)),
        ((0.46 * w, -0.20 * one, 0.48 * one), (0.27 * cheek, 0.24 * cheek, 0.26 * cheek)),
        (
            (0 * one, 0.5 * (face.nose_y + face.eye_y), 0.76 * one),
            (nose_w, 0.5 * (face.eye_y - face.nose_y) + 0.1, bridge),
        ),
        ((0 * one, face.nose_y, 0.80 + 0.6 * bridge), (tip, 0.85 * tip, tip)),
        ((-nose_w * 1.15, face.nose_y - 0.02, 0.80 * one), (0.75 * tip, 0.6 * tip, 0.10 * one)),
        ((nose_w * 1.15, face.nose_y - 0.02, 0.80 * one), (0.75 * tip, 0.6 * tip, 0.10 * one)),
        ((0 * one, face.mouth_y, 0.60 * one), (0.30 * one, 0.20 * one, 0.19 * one)),
    ]
    centre = torch.stack([torch.stack(c, 1) for c, _ in rows], 1)
    radii = torch.stack([torch.stack(r, 1) for _, r in rows], 1)
    return centre, radii


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
    skin_centre, skin_radii = skin_volumes(genes, face)
    # Eyeballs are flat and stand out from the skin by a little, wherever on the face they lie.
    where = torch.stack((face.eye_x, face.eye_y), 1).unsqueeze(1)
    eye_z = surface_z(where, skin_centre, skin_radii).squeeze(1) + 0.02 - 0.5 * face.eye_r
    eye_radii = (0.8 * face.eye_r, 0.8 * face.eye_r, 0.5 * face.eye_r)
    rows += [((side * face.eye_x, face.eye_y, eye_z), eye_radii, EYE, True) for side in (-1, 1)]
    rows.append(
        ((0 * one, -0.95 * one, -0.14 * one), (0.34 + 0.05 * genes["kind=man"], 0.7 * one, 0.36 * one), NECK, False)
    )
    body = 1.02 + 0.16 * genes["kind=man"] - 0.10 * genes["kind=child"]
    rows.append(((0 * one, -1.94 * one, -0.12 * one), (body, 0.92 * one, 0.66 * one), CLOTH, False))
    for side in (-1, 1):
        rows.append(
            ((side * 0.80 * body, -1.72 * one, -0.12 * one), (0.42 * one, 0.46 * one, 0.44 * one), CLOTH, False)
        )
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
    # Hair that falls over the ears hides them whole, instead of growing through them.
    over_ears = torch.tensor([name in _OVER_EARS for name in HAIR_STYLES], device=device)[style]
    afro = style == HAIR_STYLES.index("afro")
    active &= (material != EAR) | ~(over_ears & ~(afro & hatted)).unsqueeze(1)
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


def lid_arch(along: Tensor) -> Tensor:
    """How far the lids stand apart (1 in the middle) at `along` the eye, -1 to 1 from corner to corner: an almond."""
    rest = (1 - along.square()).clamp(min=0)
    return 0.5 * (rest + rest.sqrt())


def eye_slant(tilt: Tensor) -> Tensor:
    """The slope of the line through an eye's corners, > 0 where the outer one is higher, from the gene in [0, 1]."""
    return 0.5 * (tilt - 0.5)


def surface_z(points: Tensor, centre: Tensor, radii: Tensor) -> Tensor:
    """Front z of the union of ellipsoids (P, K, 3) at head-frame points (P, L, 2); 0 beside all of them."""
    d = (points.unsqueeze(2) - centre[:, None, :, :2]) / radii[:, None, :, :2]
    inside = 1 - d.square().sum(3)
    z = centre[:, None, :, 2] + radii[:, None, :, 2] * inside.clamp(min=0).sqrt()
    return torch.where(inside > 0, z, torch.zeros_like(z)).amax(2)


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
                at(
                    side * face.eye_x + t * face.brow_half,
                    face.brow_y - face.brow_slope * inner * face.brow_half - 0.03 * t * t,
                )
            )
    for t in (0.0, 1 / 3, 2 / 3, 1.0):
        points.append(at(zero, face.eye_y + t * (face.nose_y - face.eye_y)))
    for x in (-0.12, -0.06, 0.0, 0.06, 0.12):
        points.append(at(zero + x, face.nose_y - 0.09))
    for side in (-1, 1):
        for dx, dy in ((-1, 0), (-0.4, 1), (0.4, 1), (1, 0), (0.4, -1), (-0.4, -1)):
            lid = face.lid_top if dy >= 0 else face.lid_low
            along = torch.full_like(lid, 0.95 * dx)
            height = dy * lid * lid_arch(along) + eye_slant(genes["eye_tilt"]) * along * side
            points.append(at(side * face.eye_x + along * face.eye_r, face.eye_y + height * face.eye_r))
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
