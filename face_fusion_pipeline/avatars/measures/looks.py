"""What a person looks like, trait by trait, as far as a picture of a scene can show it; read from the genes.

Some traits are one of several words, others a gene in [0, 1]. Nothing here looks at pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..world.identity import BEARDS, CATEGORICAL, EYE_COLOURS, GENES, GLASSES, HAIR_COLOURS, HAIR_STYLES
from ..world.scene import Scene


WORDS: dict[str, tuple[str, ...]] = {
    "hair style": HAIR_STYLES,
    "hair colour": tuple(HAIR_COLOURS),
    "eye colour": tuple(EYE_COLOURS),
    "beard": BEARDS,
    "glasses": GLASSES,
    "freckles": ("no", "yes"),
    "mole": ("no", "yes"),
}
MEASURES: dict[str, str] = {  # the gene of each
    "skin tone": "skin_light",
    "lines of age": "age",
    "face width": "head_width",
    "face height": "head_height",
    "jaw width": "jaw_width",
    "chin length": "chin_length",
    "cheeks": "cheek",
    "eye size": "eye_size",
    "eye spacing": "eye_spacing",
    "eye height": "eye_height",
    "brow thickness": "brow_thick",
    "brow length": "brow_length",
    "brow angle": "brow_angle",
    "brow height": "brow_height",
    "nose length": "nose_length",
    "nose width": "nose_width",
    "nose tip": "nose_tip",
    "mouth width": "mouth_width",
    "mouth height": "mouth_height",
    "lip thickness": "lip_thick",
    "lip colour": "lip_red",
    "ear size": "ear_size",
}
TRAITS = (*WORDS, *MEASURES)
TOLERANCE = 0.15  # of a gene's range: by as much may a picture miss a measure that it is said to show
AGELESS = 0.45  # up to this gene a face has no lines

_HATS = ("astronaut suit", "chef's hat", "crown")
_OVER_EARS = ("long", "bob", "afro", "curly")
_AT = {name: index for index, name in enumerate(GENES)}


class Look:
    """One person in one scene. `vector` is that of an `Identity`, or the list of numbers in a dataset's record."""

    def __init__(self, vector: Sequence[float], clothing: str, yaw: float) -> None:
        self.genes = {name: float(vector[index]) for name, index in _AT.items()}
        self.clothing, self.yaw = clothing, yaw
        self.choice = {
            name: max(values, key=lambda value: self.genes[f"{name}={value}"])  # noqa: B023 (used at once)
            for name, values in CATEGORICAL.items()
        }

    @classmethod
    def of_scene(cls, scene: Scene) -> Look:
        """The first person of a scene."""
        person = scene.people[0]
        return cls(person.identity.vector.tolist(), person.clothing, person.yaw)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Look:
        """The first person of a record of `dataset.scene_records`."""
        return cls(record["identity_vectors"][0], record["clothing"], record["yaw"])

    def word(self, trait: str) -> str:
        """Which of `WORDS[trait]` it is."""
        if trait in ("freckles", "mole"):
            return WORDS[trait][self.genes["freckles" if trait == "freckles" else "mole_x"] > 0]
        if trait.endswith("colour"):
            part, colours = ("hair", HAIR_COLOURS) if trait.startswith("hair") else ("eye", EYE_COLOURS)
            mine = np.array([self.genes[f"{part}_{channel}"] for channel in "rgb"])
            return min(colours, key=lambda name: float(np.square(mine - colours[name]).sum()))
        return self.choice["hair" if trait == "hair style" else trait]

    def measure(self, trait: str) -> float:
        """A number in [0, 1]."""
        value = self.genes[MEASURES[trait]]
        return max(value - AGELESS, 0.0) / (1 - AGELESS) if trait == "lines of age" else value

    def visible(self, trait: str) -> bool:
        """Whether hats, hair, beard and pose let the trait be seen at all."""
        hair, beard = self.choice["hair"], self.choice["beard"]
        if trait == "hair style":
            return self.clothing not in _HATS
        if trait == "hair colour":
            return hair != "bald" and self.clothing not in _HATS
        if trait == "eye colour":
            return self.choice["glasses"] != "tinted"
        if trait == "ear size":
            return hair not in _OVER_EARS and self.clothing != "astronaut suit"
        if trait in ("jaw width", "chin length"):
            return beard != "full"
        if trait == "face height":
            return self.clothing not in _HATS
        if trait == "mole":
            side = self.genes["mole_x"] - 0.5
            return beard not in ("full", "stubble") and not (side * self.yaw > 0 and abs(self.yaw) > 10)
        return True

    def shows(self, trait: str, seen: str | float) -> bool:
        """Whether an estimate, a word or a measure, is what this person has."""
        if isinstance(seen, str):
            return seen == self.word(trait)
        return abs(seen - self.measure(trait)) <= TOLERANCE
