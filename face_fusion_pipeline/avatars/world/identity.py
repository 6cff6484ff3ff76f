"""Who an avatar is: a vector of genes in [0, 1], strictly apart from pose, expression, light and clothes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor


KINDS = ("man", "woman", "child")
HAIR_STYLES = (
    "bald",
    "buzz",
    "short",
    "side part",
    "long",
    "bob",
    "bun",
    "afro",
    "mohawk",
    "ponytail",
    "curly",
    "spiky",
)
BEARDS = ("none", "stubble", "moustache", "goatee", "full")
GLASSES = ("none", "round", "square", "tinted")

CONTINUOUS = tuple(
    " ".join(
        (
            "skin_light skin_hue age size head_width head_height jaw_width chin_length chin_width cheek hairline",
            "eye_size eye_spacing eye_height eye_tilt eye_open brow_thick brow_length brow_angle brow_height",
            "nose_length nose_width nose_tip nose_bridge mouth_width lip_thick lip_red mouth_height ear_size",
            "freckles mole_x mole_y beard_length hair_r hair_g hair_b eye_r eye_g eye_b rim_r rim_g rim_b",
        )
    ).split()
)
CATEGORICAL = {"kind": KINDS, "hair": HAIR_STYLES, "beard": BEARDS, "glasses": GLASSES}
GENES = CONTINUOUS + tuple(f"{name}={value}" for name, values in CATEGORICAL.items() for value in values)

# Identity seeds are split once and for all, so that no person of one split is ever seen in another.
SPLITS = {
    "train": range(0, 1_000_000),
    "validation": range(1_000_000, 1_100_000),
    "test": range(1_100_000, 1_200_000),
}

# Colours as (red, green, blue) in [0, 1], by the words that a caption may use for them.
NATURAL_HAIR = {
    "black": (0.06, 0.05, 0.05),
    "dark brown": (0.16, 0.10, 0.07),
    "brown": (0.32, 0.19, 0.10),
    "auburn": (0.48, 0.22, 0.10),
    "ginger": (0.72, 0.30, 0.10),
    "blond": (0.85, 0.68, 0.36),
    "light blond": (0.93, 0.86, 0.62),
    "gray": (0.60, 0.60, 0.62),
}
DYED_HAIR = {
    "purple": (0.32, 0.16, 0.45),
    "blue": (0.16, 0.28, 0.60),
    "pink": (0.80, 0.32, 0.52),
    "teal": (0.12, 0.45, 0.38),
}
# The worlds: of the first are the weights in `embedded/`, and what is drawn unless something else is asked for; the
# second is made for 256 pixels, has more natural hair, and eyes that are whole.
WORLDS = (1, 2)
WORLD = 1

_DYED_SHARE = 0.28  # of people before age turns hair white: about three quarters keep a natural colour
HAIR_COLOURS = {**NATURAL_HAIR, **DYED_HAIR, "white": (0.78, 0.78, 0.80)}
EYE_COLOURS = {
    "brown": (0.25, 0.13, 0.06),
    "hazel": (0.45, 0.27, 0.10),
    "blue": (0.20, 0.45, 0.75),
    "green": (0.22, 0.52, 0.30),
    "gray": (0.45, 0.50, 0.55),
    "black": (0.10, 0.08, 0.08),
}
RIM_COLOURS = {
    "black": (0.05, 0.05, 0.06),
    "red": (0.45, 0.08, 0.08),
    "gold": (0.75, 0.60, 0.20),
    "blue": (0.10, 0.20, 0.55),
    "brown": (0.35, 0.22, 0.12),
}
# From the gene `skin_light` = 0 to 1 in equal steps.
SKIN_TONES = {
    "dark brown": (0.40, 0.25, 0.18),
    "brown": (0.56, 0.37, 0.26),
    "tan": (0.74, 0.53, 0.40),
    "light": (0.88, 0.68, 0.54),
    "pale": (0.98, 0.84, 0.75),
}


@dataclass(frozen=True)
class Identity:
    """One person of a world. `vector` has shape (len(GENES),), values in [0, 1]; categories are one-hot."""

    seed: int
    vector: Tensor
    world: int = 1

    @property
    def kind(self) -> str:
        """ "man", "woman" or "child": the only trait that a plain caption may name."""
        start = GENES.index("kind=man")
        return KINDS[int(self.vector[start : start + len(KINDS)].argmax())]


def split_of(seed: int) -> str:
    """The split ("train", "validation" or "test") that an identity seed belongs to; ValueError outside all ranges."""
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise ValueError(f"identity seed {seed} is outside every split: use 0 to {SPLITS['test'].stop - 1}")


def sample_identity(seed: int, world: int | None = None) -> Identity:
    """The identity of a seed in a world (default: `WORLD`): always the same vector, on every machine.

    Raises ValueError for a seed outside every split or an unknown world.
    """
    split_of(seed)
    world = WORLD if world is None else world
    if world not in WORLDS:
        raise ValueError(f"world is {world}: choose one of {', '.join(map(str, WORLDS))}")
    rng = random.Random(f"identity {seed}")
    genes = {name: rng.random() for name in CONTINUOUS}
    kind = rng.choices(KINDS, (0.45, 0.40, 0.15))[0]
    # Hair styles, beards and glasses are commoner in some groups; every group has several of each.
    hair_weights = {
        "man": (3, 2, 4, 3, 1, 0.3, 0.7, 1.5, 1, 0.5, 2, 2),
        "woman": (0.3, 0.4, 1, 1, 4, 3, 3, 2, 0.4, 3, 2, 0.4),
        "child": (0.2, 1, 3, 2, 2, 2, 1, 1, 0.6, 2, 2, 2),
    }[kind]
    choice = {
        "kind": kind,
        "hair": rng.choices(HAIR_STYLES, hair_weights)[0],
        "beard": rng.choices(BEARDS, (4, 2, 2, 2, 3))[0] if kind == "man" else "none",
        "glasses": rng.choices(GLASSES, (8.6, 0.6, 0.5, 0.3))[0],
    }
    if kind == "child":
        genes["age"] = 0.0
    grey = genes["age"] > 0.8 and rng.random() < 0.7
    names = [*NATURAL_HAIR, *DYED_HAIR]
    if world != 1:
        names = list(DYED_HAIR if rng.random() < _DYED_SHARE else NATURAL_HAIR)
    hair = HAIR_COLOURS["white" if grey else rng.choice(names)]
    eye, rim = (rng.choice(list(colours.values())) for colours in (EYE_COLOURS, RIM_COLOURS))
    for prefix, colour in (("hair", hair), ("eye", eye), ("rim", rim)):
        for channel, value in zip("rgb", colour, strict=True):
            genes[f"{prefix}_{channel}"] = min(max(value + rng.uniform(-0.05, 0.05), 0.0), 1.0)
    if rng.random() < 0.7:
        genes["freckles"] = 0.0
    if rng.random() < 0.7:
        genes["mole_x"] = genes["mole_y"] = 0.0
    one_hot = [float(choice[name] == value) for name, values in CATEGORICAL.items() for value in values]
    return Identity(seed, torch.tensor([genes[name] for name in CONTINUOUS] + one_hot), world)


def traits(vectors: Tensor) -> dict[str, Tensor]:
    """Identity vectors (P, len(GENES)) as a dict of columns (P,), by gene name."""
    if vectors.ndim != 2 or vectors.shape[1] != len(GENES):
        raise ValueError(f"identity vectors have shape {tuple(vectors.shape)}, expected (people, {len(GENES)})")
    return dict(zip(GENES, vectors.unbind(1), strict=True))
