"""From rows to figures: means with intervals over people, spread over seeds, differences, and equal accuracy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...evaluation.metrics import Estimate, bootstrap_mean, normalised_similarity
from ..evaluation.avatar_table import CEILING, FLOOR
from .laboratory import Run
from .questions import TOKENS, Condition
from .scoring import Row
from .variants import METHOD, NO_FACE


LEVELS = (0.9, 0.95, 1.0)  # of the accuracy without a face
EXPECTED_RATIO = 0.7  # what the method's distance was expected to be of that of the best encoder of tokens
DRAWS = 2000


def mean_of(values: Iterable[float]) -> float:
    """The mean of the values that are not NaN, NaN of none."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else float("nan")


MEASURES = {
    "likeness": lambda row: row["likeness"],
    "accuracy": lambda row: mean_of(row["right"].values()),
    "to_reference": lambda row: row["to_reference"],
    "copied": lambda row: mean_of(row["copied"].values()),
}


@dataclass(frozen=True)
class Cell:
    """All seeds of one variant under one condition.

    Attributes:
        figures: by measure the mean, with a 95 % bootstrap interval over people.
        spread: by measure the standard deviation of the seeds' means, NaN with one seed.
        people: by measure and person the mean over prompts and seeds, NaN where there is nothing to measure.
        face_height: mean height of a face box in the true renders, pixels of 128.
        parameters: that were trained; 0 without training.
        rate: learning rate, NaN without training.
        seconds: of training a step, NaN without.
    """

    variant: str
    condition: Condition
    seeds: int
    figures: dict[str, Estimate]
    spread: dict[str, float]
    people: dict[str, dict[int, float]]
    face_height: float
    parameters: int
    rate: float
    seconds: float


Cells = dict[tuple[str, Condition], Cell]


def summarise(runs: list[Run]) -> Cells:
    """One [`Cell`] for each variant and condition, in the order of the runs."""
    groups: dict[tuple[str, Condition], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.variant, run.condition].append(run)
    return {key: _cell(members) for key, members in groups.items()}


def _cell(runs: list[Run]) -> Cell:
    rows: list[Row] = [row for run in runs for row in run.rows]
    people = np.array([row["person"] for row in rows])
    figures, spread, by_person = {}, {}, {}
    for name, measure in MEASURES.items():
        values = np.array([measure(row) for row in rows])
        figures[name] = bootstrap_mean(values, people)
        by_person[name] = {int(person): mean_of(values[people == person]) for person in np.unique(people)}
        means = [mean_of(measure(row) for row in run.rows) for run in runs]
        spread[name] = float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")
    training = runs[0].training
    return Cell(
        variant=runs[0].variant,
        condition=runs[0].condition,
        seeds=len(runs),
        figures=figures,
        spread=spread,
        people=by_person,
        face_height=float(np.mean([row["face_height"] for row in rows])),
        parameters=training.get("trained_parameters", 0),
        rate=training["options"]["lr"] if training else float("nan"),
        seconds=training["seconds"] / max(training["steps"], 1) if training else float("nan"),
    )


def normalised(cells: Cells, cell: Cell) -> float:
    """The likeness, normalised: 0 is somebody else's true render, 1 the person's own, at the same number of people."""
    at = Condition(people=cell.condition.people)
    floor, ceiling = (cells[name, at].figures["likeness"].mean for name in (FLOOR, CEILING))
    return normalised_similarity(cell.figures["likeness"].mean, floor, ceiling)


def difference(cell: Cell, baseline: Cell, measure: str = "likeness") -> Estimate:
    """A measure of `cell` less that of `baseline`, person by person, for the people of both."""
    ours, theirs = cell.people[measure], baseline.people[measure]
    shared = sorted(ours.keys() & theirs.keys())
    values = [ours[person] - theirs[person] for person in shared]
    return bootstrap_mean(np.array(values), np.array(shared))


def seed_noise(cell: Cell, baseline: Cell, measure: str = "likeness") -> float:
    """Twice the standard error of a difference that comes of the seeds of two trainings, NaN where one has one seed.

    0 where both are the same trainings under two conditions.
    """
    if cell.variant == baseline.variant:
        return 0.0
    variances = [
        side.spread[measure] ** 2 / side.seeds if side.seeds > 1 else float("nan")
        for side in (cell, baseline)
        if side.rate == side.rate  # it was trained at all
    ]
    return 2 * float(np.sqrt(sum(variances)))


@dataclass(frozen=True)
class EqualAccuracy:
    """Distance (1 − likeness) of the method and of the best encoder of tokens, where both are accurate enough."""

    accuracy: float
    method: Cell
    tokens: Cell
    ratio: float
    low: float
    high: float


def equal_accuracy(cells: Cells, level: float) -> EqualAccuracy | None:
    """The ratio of distances at an accuracy of at least `level` times that without a face.

    Of every variant the scale with the least distance that keeps this accuracy counts. None where one of the two
    never does. The interval is over people, at these scales.
    """
    wanted = level * cells[NO_FACE, Condition()].figures["accuracy"].mean
    best: dict[str, Cell] = {}
    for (name, _), cell in cells.items():
        if name in (METHOD, *TOKENS) and cell.figures["accuracy"].mean >= wanted:
            best[name] = max(best.get(name, cell), cell, key=lambda found: found.figures["likeness"].mean)
    others = [cell for name, cell in best.items() if name != METHOD]
    if METHOD not in best or not others:
        return None
    method, tokens = best[METHOD], max(others, key=lambda cell: cell.figures["likeness"].mean)
    likeness = [cell.people["likeness"] for cell in (method, tokens)]
    shared = sorted(likeness[0].keys() & likeness[1].keys())
    distances = np.array([[1 - values[person] for person in shared] for values in likeness])
    picks = np.random.default_rng(0).integers(len(shared), size=(DRAWS, len(shared)))
    ours, theirs = distances[:, picks].mean(-1)
    low, high = np.quantile(ours / theirs, [0.025, 0.975])
    ours, theirs = distances.mean(-1)
    return EqualAccuracy(wanted, method, tokens, float(ours / theirs), float(low), float(high))


def as_json(cells: Cells) -> list[dict[str, Any]]:
    """The figures of all cells, for `answer.json`."""
    return [
        {
            "variant": cell.variant,
            "condition": vars(cell.condition),
            "seeds": cell.seeds,
            **{name: vars(estimate) | {"spread": cell.spread[name]} for name, estimate in cell.figures.items()},
            "normalised": normalised(cells, cell),
            "face_height": cell.face_height,
            "trained_parameters": cell.parameters,
            "learning_rate": cell.rate,
            "seconds_a_step": cell.seconds,
        }
        for cell in cells.values()
    ]
