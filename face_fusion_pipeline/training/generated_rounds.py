"""Rounds: the weights that one round of drawn people trains draw the pairs of the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from .generated_pairs import Plan
from .loop import process_group
from .preparation import METADATA, REPORT, is_prepared, read_report
from .run_records import RECORD


Draw = Callable[[Path, Plan, Path | None], dict[str, Any]]
Learn = Callable[[Path, Path], None]


def prepare_rounds(out: Path, plan: Plan, draw: Draw, learn: Learn) -> dict[str, Any]:
    """Draw with the weights of the round before, until people set aside come out no more alike; returns the report.

    `out/rounds/N` are the rounds, each a prepared folder with the weights trained on it. The best one becomes `out`.

    Args:
        draw: makes a folder by a plan, from the folder of the round before: [`prepare_generated`].
        learn: trains weights on a folder and writes them to another.
    """
    if is_prepared(out):
        return read_report(out)
    best: tuple[float, Path] | None = None
    earlier, adapter = None, plan.adapter
    for number in range(1, plan.rounds + 1):
        folder = out / "rounds" / str(number)
        report = draw(folder, replace(plan, round=number, adapter=adapter), earlier)
        figure = report["similarity"]["held_out"]
        figure = -1.0 if figure is None else figure
        if best is not None and figure <= best[0]:
            break
        best = (figure, folder)
        if number < plan.rounds:
            if not (folder / "weights" / RECORD).is_file():  # written last
                learn(folder, folder / "weights")
            earlier, adapter = folder, str(folder / "weights")
    assert best is not None
    if process_group().is_main_process:
        become(best[1], out)
    process_group().wait_for_everyone()
    return read_report(out)


def become(folder: Path, out: Path) -> None:
    """Move what a prepared folder holds to `out`; a stop in between is no harm, for what says so comes last."""
    last = ("settings.json", METADATA, REPORT)
    for child in sorted(folder.iterdir()):
        if child.name not in (*last, "parts", "weights"):
            child.rename(out / child.name)
    for name in last:
        write_text(out / name, (folder / name).read_text(encoding="utf-8"))
