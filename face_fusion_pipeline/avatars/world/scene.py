"""Everything about a picture that is not who is in it: pose, expression, light, clothing, background, style."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .identity import Identity, sample_identity


EXPRESSIONS = ("neutral", "smiling", "laughing", "sad", "crying", "angry", "surprised")
SHIRT_COLOURS = {
    "red": (0.80, 0.12, 0.12),
    "blue": (0.13, 0.25, 0.78),
    "green": (0.12, 0.55, 0.20),
    "yellow": (0.92, 0.80, 0.15),
    "white": (0.93, 0.93, 0.93),
    "black": (0.10, 0.10, 0.11),
    "purple": (0.50, 0.18, 0.65),
    "orange": (0.95, 0.50, 0.10),
}
CLOTHINGS = tuple(f"{colour} shirt" for colour in SHIRT_COLOURS) + ("suit", "astronaut suit", "chef's hat", "crown")
PLACES = ("garden", "beach", "city", "forest", "space", "library")
PLAIN_COLOURS = {
    "red": (0.78, 0.30, 0.28),
    "blue": (0.35, 0.52, 0.82),
    "green": (0.42, 0.68, 0.42),
    "yellow": (0.93, 0.85, 0.48),
    "gray": (0.60, 0.60, 0.60),
    "white": (0.92, 0.92, 0.92),
}
BACKGROUNDS = PLACES + tuple(f"plain {colour}" for colour in PLAIN_COLOURS)
STYLES = ("photo", "pencil sketch", "watercolor", "faded film", "line art")

MAX_PEOPLE = 3


@dataclass(frozen=True)
class Person:
    """One person's place in a scene.

    Angles in degrees: yaw > 0 turns the face to the image's right, pitch > 0 lifts it, roll > 0 tilts it clockwise.
    `x`, `y` place the head's centre in image units ([-1, 1], y up); `scale` is half the head's height in those units.
    """

    identity: Identity
    yaw: float
    pitch: float
    roll: float
    x: float
    y: float
    scale: float
    expression: str
    clothing: str


@dataclass(frozen=True)
class Light:
    """One soft directional light. Angles in degrees (azimuth > 0: from the right); `warmth` in [-1, 1]."""

    azimuth: float
    elevation: float
    ambient: float
    warmth: float


@dataclass(frozen=True)
class Scene:
    """A whole picture: one to three people from left to right, light, background, style."""

    seed: int
    people: tuple[Person, ...]
    background: str
    style: str
    light: Light


def _checked(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")
    return value


def sample_scene(seed: int, identities: Sequence[int | Identity], world: int | None = None, **fixed: Any) -> Scene:
    """A random scene for one to three identities (seeds or `Identity`), left to right.

    `fixed` holds any of expression, clothing (one word, or one per person), background, style, yaw, pitch, roll,
    scale: what is not fixed is drawn from `seed`. `world` is that of people given by their seeds, see
    `sample_identity`. Raises ValueError for an unknown name or value.
    """
    if not 1 <= len(identities) <= MAX_PEOPLE:
        raise ValueError(f"a scene holds 1 to {MAX_PEOPLE} people, not {len(identities)}")
    known = {"expression", "clothing", "background", "style", "yaw", "pitch", "roll", "scale"}
    if unknown := set(fixed) - known:
        raise ValueError(f"unknown scene options {sorted(unknown)}: choose from {sorted(known)}")
    rng = random.Random(f"scene {seed}")
    count = len(identities)
    expression = rng.choice(EXPRESSIONS)
    clothings = rng.sample(CLOTHINGS, count)
    background = rng.choice(PLACES) if rng.random() < 0.65 else f"plain {rng.choice(list(PLAIN_COLOURS))}"
    style = rng.choices(STYLES, (0.76, 0.06, 0.06, 0.06, 0.06))[0]
    light = Light(rng.uniform(-45, 45), rng.uniform(10, 55), rng.uniform(0.45, 0.65), rng.uniform(-1, 1))
    expression = _checked("expression", fixed.get("expression", expression), EXPRESSIONS)
    given = fixed.get("clothing", clothings)
    clothings = [given] * count if isinstance(given, str) else list(given)
    if len(clothings) != count:
        raise ValueError(f"{len(clothings)} clothings for {count} people: give one, or one per person")
    low, high = {1: (0.70, 0.76), 2: (0.48, 0.52), 3: (0.34, 0.36)}[count]
    people = []
    for index, identity in enumerate(identities):
        person = identity if isinstance(identity, Identity) else sample_identity(identity, world)
        slot = (2 * index + 1) / count - 1  # centres of `count` equal columns
        drawn = {
            "yaw": max(-25.0, min(25.0, rng.gauss(0, 10))),
            "pitch": rng.uniform(-5, 5),
            "roll": rng.uniform(-5, 5),
            "scale": rng.uniform(low, high),
        }
        jitter = 0.04 if count == 1 else 0.02
        x = slot + rng.uniform(-jitter, jitter)
        y = rng.uniform(-0.02, 0.03) if count == 1 else rng.uniform(-0.03, 0.06)
        drawn.update({name: float(fixed[name]) for name in drawn if name in fixed})
        clothing = _checked("clothing", clothings[index], CLOTHINGS)
        people.append(Person(person, x=x, y=y, expression=expression, clothing=clothing, **drawn))
    return Scene(
        seed,
        tuple(people),
        _checked("background", fixed.get("background", background), BACKGROUNDS),
        _checked("style", fixed.get("style", style), STYLES),
        light,
    )
