"""Colour of visible surface points: skin with painted features, eyes, hair and clothes under one soft light."""

from __future__ import annotations

import torch
from torch import Tensor

from .head import (
    CLOTH,
    EAR,
    EYE,
    GOLD,
    GREY,
    HAIR,
    NECK,
    SKIN,
    SUIT_GLASS,
    TIE,
    WHITE_CLOTH,
    Face,
    eye_slant,
    lid_arch,
)
from .identity import SKIN_TONES
from .scene import SHIRT_COLOURS


_OUTFIT_COLOURS = {
    **{f"{name} shirt": colour for name, colour in SHIRT_COLOURS.items()},
    "suit": (0.13, 0.15, 0.24),
    "astronaut suit": (0.86, 0.87, 0.90),
    "chef's hat": (0.94, 0.94, 0.92),
    "crown": (0.55, 0.06, 0.16),
}
_FIXED = {
    GOLD: (0.98, 0.78, 0.15),
    SUIT_GLASS: (0.10, 0.35, 0.75),
    TIE: (0.75, 0.08, 0.10),
    WHITE_CLOTH: (0.95, 0.95, 0.95),
    GREY: (0.55, 0.57, 0.62),
}

# Strength and power of highlights.
_GLOSS = {SKIN: (0.10, 18.0), EYE: (0.10, 18.0), HAIR: (0.22, 14.0), GOLD: (0.7, 20.0), SUIT_GLASS: (0.7, 30.0)}


def skin_tone(genes: dict[str, Tensor]) -> Tensor:
    """Skin colour (P, 3) from the genes `skin_light` and `skin_hue`."""
    tones = torch.tensor(list(SKIN_TONES.values()), device=genes["age"].device)
    place = genes["skin_light"] * (len(SKIN_TONES) - 1)
    low = place.floor().clamp(max=len(SKIN_TONES) - 2).long()
    part = (place - low).unsqueeze(1)
    colour = tones[low] * (1 - part) + tones[low + 1] * part
    hue = genes["skin_hue"] - 0.5
    return (colour + torch.stack((0.06 * hue, -0.05 * hue, -0.10 * hue), 1)).clamp(0, 1)


def columns(genes: dict[str, Tensor], face: Face, clothings: list[str]) -> tuple[Tensor, list[str]]:
    """All that painting needs to know of a person, as one table (P, C) with column names: one gather a pixel."""
    device = face.width.device
    outfit = torch.tensor([_OUTFIT_COLOURS[name] for name in clothings], device=device)
    names = list(genes) + list(face._fields)
    values = list(genes.values()) + list(face)
    for prefix, colour in (("skin", skin_tone(genes)), ("cloth", outfit)):
        names += [f"{prefix}_{channel}" for channel in "rgb"]
        values += list(colour.unbind(1))
    return torch.stack(values, 1), names


class _Row:
    """Named columns of gathered rows; a column is gathered when it is first asked for."""

    def __init__(self, table: Tensor, names: list[str], index: Tensor) -> None:
        self._columns = table.t().contiguous()
        self._index = index
        self._at = {name: i for i, name in enumerate(names)}
        self._seen: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._seen:
            self._seen[name] = self._columns[self._at[name]].index_select(0, self._index)
        return self._seen[name]

    def colour(self, prefix: str) -> Tensor:
        return torch.stack([self[f"{prefix}_{channel}"] for channel in "rgb"], 1)


def _mix(base: Tensor, colour: Tensor, amount: Tensor) -> Tensor:
    return base + (colour - base) * amount.clamp(0, 1).unsqueeze(1)


def _band(distance: Tensor, half: Tensor | float, soft: float = 0.012) -> Tensor:
    """1 inside |distance| < half, 0 outside, with a soft rim: paint that does not flicker between pixels."""
    return ((half - distance.abs()) / soft + 0.5).clamp(0, 1)


def paint_glasses(colour: Tensor, p: Tensor, r: _Row) -> Tensor:
    """`colour` (M, 3) of faces at head-frame points `p` (M, 3) with rims and tinted lenses on top."""
    side = p[:, 0].abs() - r["eye_x"]
    up = p[:, 1] - r["eye_y"]
    size = torch.minimum(1.75 * r["eye_r"] + 0.03, r["eye_x"] - 0.02)
    round_lens = (side.square() + up.square()).sqrt()
    square_lens = torch.maximum(side.abs(), 1.25 * up.abs())
    distance = torch.where(r["glasses=round"] > 0, round_lens, square_lens) - size
    worn = 1 - r["glasses=none"]
    front = worn * (p[:, 2] > 0.1)
    colour = _mix(
        colour, torch.full_like(colour, 0.07), 0.35 * r["glasses=tinted"] * front * _band(distance + 0.5, 0.5)
    )
    rim = _band(distance, 0.013)
    bridge = _band(up - 0.03, 0.013) * (p[:, 0].abs() < r["eye_x"] - size)
    arms = _band(up - 0.02, 0.02) * (side > size)
    rim = torch.maximum(rim, torch.maximum(bridge, arms) * (p[:, 2] > -0.15))
    return _mix(colour, r.colour("rim"), rim * worn)


def paint_face(p: Tensor, r: _Row) -> Tensor:
    """Colour (M, 3) of face skin at head-frame points `p` (M, 3): mouth, brows, beard, freckles, hairline."""
    x, y, z = p.unbind(1)
    ax = x.abs()
    front = ((z - 0.05) / 0.2).clamp(0, 1)  # paint fades out towards the sides
    skin = r.colour("skin")
    colour = skin.clone()
    hair = r.colour("hair")
    dark_hair = hair * 0.75
    beard_colour = 0.8 * dark_hair + 0.2 * skin  # skin shines through, so that a mouth is seen against it

    # Complexion: cheeks, freckles, lines of age, a mole.
    blush = torch.exp(-((ax - 0.42).square() + (y + 0.22).square()) / 0.03)
    rosy = (0.35 + 0.5 * r["flush"]) * blush * front
    colour = _mix(colour, skin * torch.tensor((1.05, 0.72, 0.70), device=p.device), rosy)
    # Freckles: one round dot somewhere in each cell of a grid, by a hash of the cell.
    u, v = x / 0.062, y / 0.062
    mixed = 437.5 * torch.sin(12.99 * u.floor() + 78.23 * v.floor())
    right, high = 0.3 + 0.4 * (mixed - mixed.floor()), 0.3 + 0.4 * (3.7 * mixed - (3.7 * mixed).floor())
    dot = ((u - u.floor() - right).square() + (v - v.floor() - high).square()).sqrt()
    spots = _band(dot, 0.08 + 0.3 * high, 0.15)
    where = torch.exp(-((y + 0.10).square() / 0.03 + (ax - 0.25).square() / 0.09)) * front
    colour = _mix(colour, skin * 0.55, 0.9 * spots * where * (r["freckles"] > 0) * (0.5 + 0.5 * r["freckles"]))
    old = ((r["age"] - 0.45) / 0.55).clamp(0, 1) * front
    lines = _band((y - 0.40).remainder(0.10) - 0.05, 0.010) * (y > 0.38) * (y < 0.68) * (ax < 0.42)
    t = ((r["nose_y"] - y) / (r["nose_y"] - r["mouth_y"] + 0.05)).clamp(0, 1)
    fold = (
        _band(ax - (0.16 + t * (r["mouth_half"] - 0.08)), 0.012, 0.02) * (y < r["nose_y"]) * (y > r["mouth_y"] - 0.06)
    )
    aside, above = (ax - r["eye_x"]) / r["eye_r"], (y - r["eye_y"]) / r["eye_r"]
    bags = _band((aside.square() + (0.8 * above).square()).sqrt() - 1, 0.05, 0.1) * (above < -0.7)
    colour = _mix(colour, skin * 0.62, (torch.maximum(lines, fold) + 0.6 * bags) * old)
    mole_x, mole_y = 1.1 * r["mole_x"] - 0.55, 0.6 * r["mole_y"] - 0.6
    mole = _band(((x - mole_x).square() + (y - mole_y).square()).sqrt(), 0.035) * (r["mole_x"] > 0) * front
    colour = _mix(colour, torch.full_like(colour, 0.12), mole)

    # Beard: sideburns to chin, a moustache, a goatee; stubble is a thin full beard. One curve bounds a full beard: it
    # falls from the sideburns along the cheek and rises again to the moustache; the mouth is painted over it later.
    lip_top = r["mouth_y"] + r["mouth_open"] + r["lip"] + 0.005
    beside = ax / r["mouth_half"]
    top = torch.minimum(r["nose_y"] - 0.09, lip_top + 0.13)
    top = torch.maximum(top, lip_top + 0.05) - 0.07 * beside.square()
    edge = -0.36 + 0.42 * (ax / r["width"]).square() - 0.12 * (r["beard_length"] - 0.5)
    near = (1.45 - 0.5 * beside).clamp(0, 1)
    near = near * near * (3 - 2 * near)
    full = ((edge + (top - edge) * near - y) / 0.07 + 0.5).clamp(0, 1)
    moustache = torch.minimum((top - y) / 0.04 + 0.5, (y - lip_top + 0.03 + 0.05 * beside.square()) / 0.04 + 0.5)
    moustache = torch.minimum(moustache, (1.12 - beside) / 0.3).clamp(0, 1)
    chin_top = r["mouth_y"] - r["lip"] - 0.01
    goatee = ((chin_top - 0.25 * ax - y) / 0.05).clamp(0, 1) * _band(ax, 0.19, 0.08)
    goatee = torch.maximum(moustache, goatee)
    beard = (r["beard=full"] + 0.45 * r["beard=stubble"]) * full
    beard = beard + r["beard=moustache"] * moustache + r["beard=goatee"] * goatee
    colour = _mix(colour, beard_colour, beard * (z > -0.25))

    # Mouth: a parabola through the corners; lips around it, teeth and dark inside where it is open.
    u = (x / r["mouth_half"]).clamp(-1.2, 1.2)
    arch = (1 - u * u).clamp(min=0)
    e = y - (r["mouth_y"] + r["mouth_curve"] * u * u)
    opening = r["mouth_open"] * arch.sqrt()
    inside = (u.abs() < 1).float() * front
    red = torch.stack((0.80 + 0 * y, 0.28 + 0 * y, 0.30 + 0 * y), 1)
    lip_colour = _mix(skin * 0.85, red, 0.30 + 0.55 * r["lip_red"])
    colour = _mix(colour, lip_colour, _band(e, opening + r["lip"] * (0.35 + 0.65 * arch), 0.02) * inside)
    dark = torch.stack((0.25 + 0 * y, 0.05 + 0 * y, 0.06 + 0 * y), 1)
    colour = _mix(colour, dark, _band(e, opening.clamp(min=0.012)) * inside)
    teeth = _band(e, opening * 0.85) * (e > -opening * 0.1) * r["teeth"] * (opening > 0.01) * inside
    colour = _mix(colour, torch.full_like(colour, 0.95), teeth)

    # Eye sockets, brows, tears.
    socket = torch.exp(-(aside.square() + (above - 0.3).square()) / 1.6)
    colour = _mix(colour, skin * 0.72, 0.45 * socket * front)
    t = (ax - r["eye_x"]) / r["brow_half"]
    brow = _band(
        y - (r["brow_y"] + r["brow_slope"] * t * r["brow_half"] - 0.03 * t * t),
        r["brow_thick"] * (1 - 0.45 * t.clamp(min=0)),
    )
    colour = _mix(colour, dark_hair * 0.85, brow * (t.abs() < 1) * front * 0.95)
    streak = (
        _band(ax - r["eye_x"] - 0.02, 0.038, 0.02)
        * (y < r["eye_y"] - 0.5 * r["eye_r"])
        * (y > r["mouth_y"] - 0.05)
        * r["tears"]
    )
    colour = _mix(colour, torch.stack((0.50 + 0 * y, 0.78 + 0 * y, 1.0 + 0 * y), 1), 0.85 * streak * front)

    # Scalp: skin above the hairline is hair, whatever volume lies on it.
    front_line = 0.66 - 0.30 * (ax / r["width"]).square() + 0.24 * (r["hairline"] - 0.5)
    back_line = 0.12 + 0 * y
    blend = ((z - 0.10) / 0.35).clamp(0, 1)
    scalp = ((y - (back_line + (front_line - back_line) * blend)) / 0.03).clamp(0, 1) * (1 - r["hair=bald"])
    scalp = scalp * (1 - 0.45 * r["hair=buzz"] - 0.45 * r["hair=mohawk"])
    return _mix(colour, hair, scalp)


def paint_eye(p: Tensor, r: _Row, colour: Tensor) -> Tensor:
    """`colour` (M, 3) of faces at head-frame points `p` (M, 3) with eyes on top, looking straight ahead.

    White, iris, pupil and a glint between the lids, the line of the lashes, the crease of the upper lid. An eye is
    painted on whatever lies there, eyeball or skin, so that it is whole for every shape of face.
    """
    skin = r.colour("skin")
    out = (p[:, 0].abs() - r["eye_x"]) / r["eye_r"]  # > 0 away from the nose
    up = (p[:, 1] - r["eye_y"]) / r["eye_r"] - eye_slant(r["eye_tilt"]) * out
    arch, between = lid_arch(out), _band(out, 1.0, 0.06)
    upper, lower = up - r["lid_top"] * arch, -up - r["lid_low"] * arch
    iris, away = r.colour("eye"), (out.square() + up.square()).sqrt()
    ball = _mix(torch.full_like(skin, 0.97), iris * (1 - 0.25 * up).unsqueeze(1), _band(away, 0.53, 0.08))
    ball = _mix(ball, iris * 0.4, _band(away - 0.50, 0.05, 0.08))
    ball = _mix(ball, torch.full_like(skin, 0.03), _band(away, 0.25, 0.08))
    glint = ((out * p[:, 0].sign() - 0.16).square() + (up - 0.18).square()).sqrt()
    ball = _mix(ball, torch.ones_like(skin), _band(glint, 0.12, 0.06))
    ball = ball * (1 - 0.25 * (1 + upper / 0.3).clamp(0, 1)).unsqueeze(1)  # the lid's shadow
    colour = _mix(colour, skin * 0.62, 0.6 * _band(upper - 0.26, 0.04, 0.07) * between)
    colour = _mix(colour, ball, (0.5 - torch.maximum(upper, lower) / 0.07).clamp(0, 1) * between)
    colour = _mix(colour, skin * 0.45, 0.8 * _band(lower, 0.04, 0.07) * between)
    return _mix(colour, torch.full_like(skin, 0.06), _band(upper, 0.09, 0.07) * _band(out, 0.97, 0.04))


def skin_normals(p: Tensor, centre: Tensor, radii: Tensor, person: Tensor) -> Tensor:
    """Normals (M, 3) of people's smooth unions of ellipsoids (P, K, 3) at points (M, 3) near them, head frame.

    Each ellipsoid's gradient counts by how near its surface is, so creases between volumes are softly rounded.
    """
    total = torch.zeros_like(p)
    inverse = 1 / radii
    round_scale = radii / (radii.square() + 0.012)
    for k in range(centre.shape[1]):
        scale = inverse[:, k].index_select(0, person)
        u = (p - centre[:, k].index_select(0, person)) * scale
        norm = u.square().sum(1).clamp(min=1e-6).sqrt()
        distance = (norm - 1) * norm / (u * scale).square().sum(1).clamp(min=1e-6).sqrt()  # to first order
        weight = torch.sigmoid(-18 * distance)
        gradient = u * round_scale[:, k].index_select(0, person)  # thin volumes turn as slowly as round ones
        total += gradient * (weight / gradient.square().sum(1).clamp(min=1e-12).sqrt()).unsqueeze(1)
    return torch.nn.functional.normalize(total, dim=1)


def paint(material: Tensor, local: Tensor, person: Tensor, table: Tensor, names: list[str]) -> Tensor:
    """Unlit colour (M, 3) of surface points by material (M,), local position (M, 3) and person (M,)."""
    colour = torch.zeros_like(local)
    lookup = torch.zeros(len(_FIXED) + 16, 3, device=local.device)
    for key, value in _FIXED.items():
        lookup[key] = torch.tensor(value, device=local.device)
    colour += lookup[material]

    def rows(*kinds: int) -> tuple[Tensor, _Row]:
        chosen = torch.stack([material == kind for kind in kinds]).any(0).nonzero().squeeze(1)
        return chosen, _Row(table, names, person.index_select(0, chosen))

    chosen, r = rows(SKIN, EYE)
    p = local[chosen]
    face = paint_face(p, r)
    beside, above = (p[:, 0].abs() - r["eye_x"]).abs(), (p[:, 1] - r["eye_y"]).abs()
    near = ((torch.maximum(beside, above) < 1.6 * r["eye_r"]) & (p[:, 2] > 0.1)).nonzero().squeeze(1)
    at_eyes = _Row(table, names, person.index_select(0, chosen.index_select(0, near)))
    face[near] = paint_eye(p[near], at_eyes, face[near])
    colour[chosen] = paint_glasses(face, p, r)
    skin = [names.index(f"skin_{c}") for c in "rgb"]
    cloth = [names.index(f"cloth_{c}") for c in "rgb"]
    hair = [names.index(f"hair_{c}") for c in "rgb"]
    for kinds, indices in (((EAR, NECK), skin), ((CLOTH,), cloth), ((HAIR,), hair)):
        chosen, _ = rows(*kinds)
        colour[chosen] = table[:, indices].index_select(0, person.index_select(0, chosen))
    chosen, _ = rows(HAIR)
    x, y, z = local[chosen].unbind(1)
    strands = torch.sin(20 * x + 6 * torch.sin(3 * y) + 8 * z) * 0.06
    colour[chosen] = (colour[chosen] * (1 + strands.unsqueeze(1))).clamp(0, 1)
    return colour


def light_up(
    colour: Tensor,
    normal: Tensor,
    material: Tensor,
    direction: Tensor,
    ambient: Tensor,
    warmth: Tensor,
    shadow: Tensor,
) -> Tensor:
    """Lit colour (M, 3): wrapped diffuse light, a highlight by material, warm or cool light, soft shadow in [0, 1]."""
    facing = (normal * direction).sum(1)
    diffuse = ((facing + 0.35) / 1.35).clamp(min=0) * (1 - shadow)
    sky = 0.5 + 0.5 * normal[:, 1]
    amount = ambient * (0.75 + 0.35 * sky) + (1.08 - ambient) * diffuse
    half = torch.nn.functional.normalize(direction + torch.tensor((0.0, 0.0, 1.0), device=colour.device), dim=1)
    shine = torch.zeros(16, 2, device=colour.device)
    for kind, gloss in _GLOSS.items():
        shine[kind] = torch.tensor(gloss, device=colour.device)
    strength, power = shine[material].unbind(1)
    highlight = strength * (normal * half).sum(1).clamp(min=1e-4) ** power.clamp(min=1) * (1 - shadow)
    tint = 1 + 0.07 * warmth.unsqueeze(1) * torch.tensor((1.0, 0.1, -1.0), device=colour.device)
    return (colour * amount.unsqueeze(1) * tint + highlight.unsqueeze(1)).clamp(0, 1)
