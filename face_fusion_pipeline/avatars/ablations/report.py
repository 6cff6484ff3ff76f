"""The answer to a question as a table, a curve where it is one, and sentences that say no more than the figures do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...evaluation.metrics import Estimate
from ...evaluation.reports import circumstances, markdown_table
from ...face_errors import FaceFusionError
from ...files.atomic import replacing, write_text
from ..evaluation.avatar_table import CEILING, FLOOR
from .encoders import load_evaluator
from .laboratory import Laboratory, Run
from .questions import TOKENS, Condition, Question
from .summary import (
    EXPECTED_RATIO,
    LEVELS,
    Cell,
    Cells,
    as_json,
    difference,
    equal_accuracy,
    normalised,
    seed_noise,
    summarise,
)
from .training import Trainer
from .variants import METHOD, NO_FACE, VARIANTS


WORDS = {
    "likeness": ("less likeness", "more likeness"),
    "accuracy": ("less accuracy", "more accuracy"),
    "copied": ("fewer traits copied", "more traits copied"),
}


def write_answer(question: Question, runs: list[Run], laboratory: Laboratory, out: Path) -> str:
    """Write `NAME.json`, `NAME.md` and, for a curve, `NAME.png` to `out`; returns the Markdown."""
    cells = summarise(runs)
    evaluator, settings = load_evaluator(laboratory.evaluator).name, laboratory.settings()
    text = "\n".join(
        [
            table(question, cells),
            f"{foot(settings, evaluator, laboratory.seeds, laboratory.trainer)}\n",
            *(f"* {sentence}" for sentence in sentences(question, cells)),
        ]
    )
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"question": question.name, "evaluator": evaluator, **settings, **circumstances()}
    write_text(out / f"{question.name}.json", json.dumps(result | {"cells": as_json(cells)}, indent=1) + "\n")
    write_text(out / f"{question.name}.md", text + "\n")
    if question.axis is not None:
        draw(question, cells, out / f"{question.name}.png")
    return text


def baseline(question: Question, cells: Cells, cell: Cell) -> Cell:
    """What a cell is compared with: the method used alike, or along a curve of the method alone its first point."""
    alone = question.variants == (METHOD,)
    return cells[METHOD, question.conditions[0] if alone else cell.condition]


def table(question: Question, cells: Cells) -> str:
    axis = [question.axis] if question.axis else []
    header = ["method", *axis, "likeness ↑", "± seeds", "normalised ↑", f"− {METHOD}", "accuracy ↑", "± seeds",
              "to the reference", "traits copied ↓", "trained parameters", "rate", "s a step"]  # fmt: skip
    rows = []
    for cell in cells.values():
        place = [] if question.axis is None else [axis_value(question, cell)]
        # Equal scales of different methods are not alike: along the scale, accuracies have to be equal instead.
        alike = is_variant(cell) and question.axis != "scale"
        other = baseline(question, cells, cell) if alike else cell
        compared = None if other is cell else difference(cell, other)
        likeness, accuracy, reference, copied = cell.figures.values()
        rows.append(
            [
                cell.variant,
                *place,
                likeness,
                cell.spread["likeness"],
                f"{100 * normalised(cells, cell):.0f} %",
                compared,
            ]
            + [accuracy, cell.spread["accuracy"], reference, copied, cell.parameters or None]
            + [f"{cell.rate:g}" if cell.parameters else None, cell.seconds]
        )
    return markdown_table(header, [[text_of(value) for value in row] for row in rows])


def text_of(value: Any) -> Any:
    """An estimate as text; one of nothing is a dash."""
    if not isinstance(value, Estimate):
        return f"{value:,}" if isinstance(value, int) else value
    return str(value) if value.count else None


def axis_value(question: Question, cell: Cell) -> str:
    """Where a cell stands along the curve, as text; a dash for what does not depend on it."""
    if question.axis == "people":
        return f"{cell.condition.people} ({cell.face_height:.0f} px)"
    without = cell.variant in (NO_FACE, CEILING, FLOOR)
    return "–" if without else f"{getattr(cell.condition, question.axis or ''):g}"


def foot(settings: dict[str, Any], evaluator: str, seeds: tuple[int, ...], trainer: Trainer | None = None) -> str:
    """The circumstances, for the line under a table."""
    budget, sampling, now = settings["budget"], settings["sampling"], circumstances()
    weight = budget["identity_loss_weight"]
    training = f"{budget['steps']} steps of {budget['batch_size']} pairs for every trained variant"
    training += f" with an identity loss of weight {weight:g}" if weight else ""
    training += f", seeds {', '.join(map(str, seeds))}"
    if trainer is not None and trainer.teacher is not None:
        training += f", taught by the weights `{trainer.teacher.stem}`"
    if trainer is not None and trainer.start is not None:
        begun = f"all begun with the weights `{trainer.start.stem}`"
        training = f"{training}, {begun}" if budget["steps"] else f"No training: the weights `{trainer.start.stem}`"
    return (
        f"{training}; {sampling['identities']} people that no training saw, "
        f"{sampling['prompts']} prompts each, {sampling['steps']} steps, guidance {sampling['guidance_scale']:g}; "
        f"likeness by {evaluator}; model {settings['model']}; {now['machine']}, {now['date']}. Brackets: 95 % "
        "bootstrap interval over people."
    )


def sentences(question: Question, cells: Cells) -> list[str]:
    """What the figures say, and nothing where they say nothing."""
    if question.axis == "scale":
        tokens = any(name in TOKENS for name in question.variants)
        return [_equal_accuracy_sentence(cells, level) for level in LEVELS] if tokens else []
    # Fewer traits can be seen of several people, so their accuracy is another figure.
    measures = ["likeness"] if question.axis == "people" else list(WORDS)
    said = []
    for cell in cells.values():
        compared = baseline(question, cells, cell) if is_variant(cell) else cell
        if compared is not cell:
            names = [cell.variant, compared.variant]
            if question.axis is not None:
                names = [f"{axis_value(question, side)} {question.axis}" for side in (cell, compared)]
            found = [
                _comparison(measure, difference(cell, compared, measure), seed_noise(cell, compared, measure))
                for measure in measures
            ]
            said.append(f"{names[0]} against {names[1]}: {', '.join(found)}.")
    return said


def _comparison(measure: str, found: Estimate, noise: float) -> str:
    """A difference counts where it is one between people, and larger than what two trainings alike can differ by."""
    less, more = WORDS[measure]
    if not (found.low > 0 or found.high < 0) or abs(found.mean) <= noise:
        return f"no difference in {measure.replace('copied', 'traits copied')} found"
    doubt = ", one training a side: what seeds make of it is unknown" if noise != noise else ""
    return f"{less if found.mean < 0 else more} ({found}{doubt})"


def is_variant(cell: Cell) -> bool:
    """False for what is only measured beside the variants."""
    return cell.variant in VARIANTS and cell.variant != NO_FACE


def _equal_accuracy_sentence(cells: Cells, level: float) -> str:
    found, percent = equal_accuracy(cells, level), f"{100 * level:.0f} %"
    if found is None:
        return f"At {percent} of the accuracy without a face no comparison is possible: a side never reaches it."
    verdict = "holds" if found.high <= EXPECTED_RATIO else "does not hold" if found.low > EXPECTED_RATIO else "is open"
    return (
        f"At {percent} of the accuracy without a face, {METHOD} (scale {found.method.condition.scale:g}) is at "
        f"{found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}] times the distance of {found.tokens.variant} (scale "
        f"{found.tokens.condition.scale:g}): the expectation of at most {EXPECTED_RATIO} {verdict}."
    )


# --- Curve -------------------------------------------------------------------------------------------------------


def draw(question: Question, cells: Cells, path: Path) -> None:
    """Likeness against accuracy along the scale, against the number of references, or against the face's height.

    Raises [`FaceFusionError`] without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FaceFusionError(
            f'plots need matplotlib ({error}): pip install "face-fusion-pipeline[evaluate]"'
        ) from error
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    bounds = [CEILING, FLOOR] if question.axis == "people" else []
    for name in (*question.variants, *bounds):
        points = [cell for (variant, _), cell in cells.items() if variant == name]
        x = [position(question, cell) for cell in points]
        likeness = [cell.figures["likeness"] for cell in points]
        y = [estimate.mean for estimate in likeness]
        spread = [[e.mean - e.low for e in likeness], [e.high - e.mean for e in likeness]]
        crowded = question.axis == "scale"  # the intervals are in the table
        axes.errorbar(
            x, y, yerr=None if crowded else spread, marker="o", markersize=4, capsize=2, label=name, linewidth=1
        )
        if crowded:
            for cell, place in zip(points, zip(x, y, strict=True), strict=True):
                axes.annotate(f"{cell.condition.scale:g}", place, (3, 3), textcoords="offset points", fontsize=7)
    if question.axis == "scale":
        plain = cells[NO_FACE, Condition()]
        axes.plot(plain.figures["accuracy"].mean, plain.figures["likeness"].mean, "k*", label="without a face")
    labels = {"scale": "attribute accuracy (points: scale)", "references": "reference photos of the person"}
    axes.set_xlabel(labels.get(question.axis or "", "height of a face, pixels of 128"))
    if question.axis == "references":
        axes.set_xticks([cell.references for cell in question.conditions])
    axes.set_ylabel("likeness to another render")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def position(question: Question, cell: Cell) -> float:
    """Where a cell lies on the horizontal axis."""
    if question.axis == "scale":
        return cell.figures["accuracy"].mean
    return cell.face_height if question.axis == "people" else float(cell.condition.references)


# --- Page --------------------------------------------------------------------------------------------------------


def fill(page: Path, question: Question, text: str, plot: Path) -> None:
    """Put an answer between the markers `<!-- ablation: NAME -->` and `<!-- /ablation -->` of a Markdown page.

    The plot of a curve is copied to `images/ablation_NAME.png` beside the page. Raises [`FaceFusionError`] where the
    page or the markers are missing.
    """
    start, end = f"<!-- ablation: {question.name} -->", "<!-- /ablation -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    content = page.read_text() if page.is_file() else ""
    if not pattern.search(content):
        raise FaceFusionError(f"{page} has no place for the answer: write {start} and {end} where it should be")
    if question.axis is not None:
        image = page.parent / "images" / f"ablation_{question.name}.png"
        with replacing(image) as partial:
            partial.write_bytes(plot.read_bytes())
        text = f"{text}\n\n![{question.asks}](images/{image.name})"
    write_text(page, pattern.sub(lambda _: f"{start}\n\n{text}\n\n{end}", content))
