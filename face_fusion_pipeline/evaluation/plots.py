"""Plots of an evaluation as PNG files: every measure by method, and likeness against copying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .comparison_tables import MEASURES, measure_of


def draw_plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the figures of `evaluate` to `folder`; returns the files."""
    groups: dict[str, list[str]] = {}
    for column in result["columns"]:
        groups.setdefault(measure_of(column), []).append(column)
    drawn = [_intervals(result, columns, folder / f"{measure}.png") for measure, columns in groups.items()]
    for column in groups.get("similarity_other", []):
        other = column.replace("similarity_other", "copy_paste")
        slug = "".join(c if c.isalnum() else "_" for c in column.partition("[")[2][:-1])
        drawn.append(_plane(result, column, other, folder / f"likeness_or_copying_{slug}.png"))
    return drawn


def _intervals(result: dict[str, Any], columns: list[str], path: Path) -> Path:
    """One measure: a point with its interval for each method, a panel for each recogniser."""
    measure = MEASURES[measure_of(columns[0])]
    methods = list(result["methods"])
    figure = _figure(3.2 * len(columns) + 1.2, 0.4 * len(methods) + 1.2)
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
        for row, method in enumerate(methods):
            if estimate := _estimate(result, method, column):
                mean, low, high = (measure.factor * estimate[key] for key in ("mean", "low", "high"))
                axes.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3)
        name = column.partition("[")[2][:-1]
        axes.set_xlabel(f"{name} {measure.title} {measure.better}".strip(), fontsize=9)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.grid(alpha=0.3)
    return _save(figure, path)


def _plane(result: dict[str, Any], likeness: str, copying: str, path: Path) -> Path:
    """Methods in the plane of likeness to another photo and copy-paste score: to the right and low is good."""
    figure = _figure(5, 4)
    axes = figure.subplots()
    for method in result["methods"]:
        x, y = _estimate(result, method, likeness), _estimate(result, method, copying)
        if x and y:
            wide, high = ([[e["mean"] - e["low"]], [e["high"] - e["mean"]]] for e in (x, y))
            axes.errorbar(x["mean"], y["mean"], xerr=wide, yerr=high, fmt="o", capsize=3, label=method)
    axes.set_xlabel(f"{likeness.partition('[')[2][:-1]} similarity to another photo ↑")
    axes.set_ylabel("copy-paste score ↓")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return _save(figure, path)


def _estimate(result: dict[str, Any], method: str, column: str) -> dict[str, float] | None:
    return result["methods"][method].get(column)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
