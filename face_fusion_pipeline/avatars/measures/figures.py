"""What the measures say about the pictures of a method: columns of the table of avatars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ...evaluation.distribution import kid
from ...evaluation.metrics import bootstrap_closed, bootstrap_mean
from .panel import Seen


Rows = Sequence[Mapping[str, Any]]


def row_of(seen: Seen) -> dict[str, Any]:
    """What a row of the table keeps."""
    return {"traits": seen.shown, "eyes": seen.eyes}


def trait_share(row: Mapping[str, Any]) -> float:
    """Share of the traits that a picture shows, of those that it could show."""
    return float(np.mean(list(row["traits"].values())))


def summarise_measures(mine: Rows, floor: Rows, ceiling: Rows, *, seed: int = 0) -> dict[str, Any]:
    """Of the rows of one method: eyes well drawn and traits shown, each with its interval over people.

    Traits as a share of all (`share`), and as the share of the way from a stranger to a true render (`closed`): a
    stranger shares many. `by_trait` is the share of pictures that show each.
    """

    def shares(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        return np.array([trait_share(row) for row in rows]), np.array([row["person"] for row in rows])

    values, people = shares(mine)
    eyes = bootstrap_mean(np.array([float(row["eyes"]) for row in mine]), people, seed=seed)
    names = dict.fromkeys(trait for row in mine for trait in row["traits"])
    return {
        "eyes": asdict(eyes),
        "traits": {
            "share": asdict(bootstrap_mean(values, people, seed=seed)),
            "closed": asdict(bootstrap_closed((values, people), shares(floor), shares(ceiling), seed=seed)),
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
