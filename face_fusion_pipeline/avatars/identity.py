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

_HAIR_COLOURS = (
    (0.06, 0.05, 0.05),
    (0.16, 0.10, 0.07),
    (0.32, 0.19, 0.10),
    (0.48, 0.22, 0.10),
    (0.72, 0.30, 0.10),
    (0.85, 0.68, 0.36),
    (0.93, 0.86, 0.62),
    (0.60, 0.60, 0.62),
    (0.32, 0.16, 0.45),
    (0.16, 0.28, 0.60),
    (0.80, 0.32, 0.52),
    (0.12, 0.45, 0.38),
)
_EYE_COLOURS = (
    (0.25, 0.13, 0.06),
    (0.45, 0.27, 0.10),
    (0.20, 0.45, 0.75),
    (0.22, 0.52, 0.30),
    (0.45, 0.50, 0.55),
    (0.10, 0.08, 0.08),
)
_RIM_COLOURS = ((0.05, 0.05, 0.06), (0.45, 0.08, 0.08), (0.75, 0.60, 0.20), (0.10, 0.20, 0.55), (0.35, 0.22, 0.12))


@dataclass(frozen=True)
class Identity:
    """One person. `vector` has shape (len(GENES),), values in [0, 1]; categories are one-hot."""

    seed: int
    vector: Tensor

    @property
    def kind(self) -> str:
        """ "man", "woman" or "child": the only trait that a caption may name."""
        start = GENES.index("kind=man")
        return KINDS[int(self.vector[start : start + len(KINDS)].argmax())]


def split_of(seed: int) -> str:
    """The split ("train", "validation" or "test") that an identity seed belongs to; ValueError outside all ranges."""
    for name, seeds in SPLITS.items():
        if seed in seeds:
            return name
    raise ValueError(f"identity seed {seed} is outside every split: use 0 to {SPLITS['test'].stop - 1}")


def sample_identity(seed: int) -> Identity:
    """The identity of a seed: always the same vector for the same seed, on every machine."""
    split_of(seed)
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
    hair = (0.78, 0.78, 0.80) if grey else rng.choice(_HAIR_COLOURS)
    for prefix, colour in (("hair", hair), ("eye", rng.choice(_EYE_COLOURS)), ("rim", rng.choice(_RIM_COLOURS))):
        for channel, value in zip("rgb", colour, strict=True):
            genes[f"{prefix}_{channel}"] = min(max(value + rng.uniform(-0.05, 0.05), 0.0), 1.0)
    if rng.random() < 0.7:
        genes["freckles"] = 0.0
    if rng.random() < 0.7:
        genes["mole_x"] = genes["mole_y"] = 0.0
    one_hot = [float(choice[name] == value) for name, values in CATEGORICAL.items() for value in values]
    return Identity(seed, torch.tensor([genes[name] for name in CONTINUOUS] + one_hot))


def traits(vectors: Tensor) -> dict[str, Tensor]:
    """Identity vectors (P, len(GENES)) as a dict of columns (P,), by gene name."""
    if vectors.ndim != 2 or vectors.shape[1] != len(GENES):
        raise ValueError(f"identity vectors have shape {tuple(vectors.shape)}, expected (people, {len(GENES)})")
    return dict(zip(GENES, vectors.unbind(1), strict=True))
