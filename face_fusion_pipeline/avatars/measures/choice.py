"""Which of several weights ship, by their tables of avatars (`avatars-evaluate table`).

1. Drawing comes first: eyes well drawn in no smaller a fraction of pictures than by the base without a face, within
   two points.
2. Of those that pass, the most likeness: the mean of the traits shown and of what published recognisers see, both
   normalised: 0 is a stranger, 1 a true render.
3. Where none passes: the best drawing of those in which published recognisers see 30 % of the way or more.

The project's own recogniser chooses nothing: it is much like those that trainings are to please.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...face_errors import FaceFusionError, renamed


LOST = 0.02  # fraction of pictures by which drawing may be worse than without a face
PUBLISHED_LEAST = 0.30


@dataclass(frozen=True)
class Candidate:
    """The figures of one method in one table, all of them fractions."""

    name: str
    eyes: float
    eyes_without_face: float
    traits: float
    published: float

    @property
    def drawn_well(self) -> bool:
        """Whether drawing is no worse than without a face."""
        return self.eyes >= self.eyes_without_face - LOST

    @property
    def likeness(self) -> float:
        """By which those that are drawn well are ordered."""
        return (self.traits + self.published) / 2


def candidate(table: Mapping[str, Any], method: str, name: str) -> Candidate:
    """From the content of a `table.json`. FaceFusionError where it lacks the method, a column or a recogniser."""
    methods = table["methods"]
    for needed in ("none", method):
        if needed not in methods:
            raise FaceFusionError(f"{name} has no method {needed}, only {', '.join(methods)}: make its table with it")
    published = table.get("published", [])
    if not published or "drawing" not in methods[method]:
        what = "the columns of drawing and traits" if published else "a published recogniser"
        raise FaceFusionError(f"{name} lacks {what}: make it anew, with `avatars-evaluate table --recognisers DIR`")
    mine = methods[method]
    return Candidate(
        name,
        mine["drawing"]["eyes"]["mean"],
        methods["none"]["drawing"]["eyes"]["mean"],
        _normalised(mine["traits"], name)["mean"],
        float(np.mean([_normalised(mine["similarity"][recogniser], name) for recogniser in published])),
    )


def _normalised(figures: Mapping[str, Any], table: str) -> Any:
    return renamed(figures, {"closed": "normalised"}, table)["normalised"]


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The one that ships by the rule above; None where all draw worse and show too little of the person."""
    if passed := [c for c in candidates if c.drawn_well]:
        return max(passed, key=lambda c: c.likeness)
    return max((c for c in candidates if c.published >= PUBLISHED_LEAST), key=lambda c: c.eyes, default=None)


def read_table(place: Path) -> dict[str, Any]:
    """A `table.json`, or that of a folder. FaceFusionError where there is none."""
    path = place / "table.json" if place.is_dir() else place
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise FaceFusionError(f"{path} is no table of `avatars-evaluate table`: {error}") from error
