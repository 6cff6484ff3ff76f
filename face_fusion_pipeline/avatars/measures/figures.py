"""What the measures say about the pictures of a method: columns of the table of avatars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ...evaluation.distribution import kid
from ...evaluation.metrics import bootstrap_mean, bootstrap_normalised
from .panel import Seen


Rows = Sequence[Mapping[str, Any]]


def row_of(seen: Seen) -> dict[str, Any]:
    """What a row of the table keeps."""
    return {"traits": seen.shown, "eyes": seen.eyes}


def trait_fraction(row: Mapping[str, Any]) -> float:
    """Fraction of the traits that a picture shows, of those that it could show."""
    return float(np.mean(list(row["traits"].values())))


def summarise_measures(mine: Rows, floor: Rows, ceiling: Rows, *, seed: int = 0) -> dict[str, Any]:
    """Of the rows of one method: eyes well drawn and traits shown, each with its interval over people.

    Traits as a fraction of all (`fraction`), and normalised (`normalised`: 0 is a stranger, 1 a true render), for a
    stranger has many of them too. `by_trait` is the fraction of pictures that show each.
    """

    def fractions(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        return np.array([trait_fraction(row) for row in rows]), np.array([row["person"] for row in rows])

    values, people = fractions(mine)
    eyes = bootstrap_mean(np.array([float(row["eyes"]) for row in mine]), people, seed=seed)
    names = dict.fromkeys(trait for row in mine for trait in row["traits"])
    return {
        "eyes": asdict(eyes),
        "traits": {
            "fraction": asdict(bootstrap_mean(values, people, seed=seed)),
            "normalised": asdict(
                bootstrap_normalised((values, people), fractions(floor), fractions(ceiling), seed=seed)
            ),
            "by_trait": {t: float(np.mean([r["traits"][t] for r in mine if t in r["traits"]])) for t in names},
        },
    }


def distances(mine: Sequence[Seen], truth: Sequence[Seen], people: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """KID of heads and of eyes of pictures to true renders of the same scenes; `people` (N,) are those of both."""
    figures = {}
    for name in ("head", "eye"):
        pictures, renders = (np.stack([getattr(seen, f"{name}_features") for seen in all]) for all in (mine, truth))
        figures[f"kid_{name}"] = asdict(kid(pictures, people, renders, people, seed=seed))
    return figures
