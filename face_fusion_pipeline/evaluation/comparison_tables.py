"""Tables of an evaluation: means of rows by method, with a confidence interval over people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .distribution import cmmd
from .generation import denoising
from .metrics import bootstrap_mean
from .picture_rows import Row
from .pictures import ANOTHER_PHOTO, SOMEBODY_ELSE
from .reports import markdown_table


@dataclass(frozen=True)
class Measure:
    """How a column is shown: `better` is ↑ or ↓, values are multiplied by `factor`."""

    title: str
    better: str
    decimals: int = 3
    factor: float = 1
    unit: str = ""

    def cell(self, estimate: dict[str, Any]) -> str:
        mean, low, high = (f"{self.factor * estimate[key]:.{self.decimals}f}" for key in ("mean", "low", "high"))
        return f"{mean}{self.unit} [{low}, {high}]" if estimate["low"] == estimate["low"] else f"{mean}{self.unit}"


PHOTOS = (ANOTHER_PHOTO, SOMEBODY_ELSE)
MEASURES = {
    "distance": Measure("distance", "↓"),
    "clip_score": Measure("CLIP", "↑", 2),
    "psnr": Measure("PSNR, dB", "↑", 2),
    "ssim": Measure("SSIM", "↑"),
    "quality": Measure("quality (CLIP-IQA)", "↑"),
    "cmmd": Measure("CMMD to the photos", "↓", 2),
    "face_found": Measure("face found", "↑", 1, 100, " %"),
    "similarity_other": Measure("Sim(GT)", "↑"),
    "copy_paste": Measure("copy-paste", "↓"),
    "pose_difference": Measure("pose, °", "↑", 1),
    "expression_difference": Measure("expression", "↑"),
    "landmark_difference": Measure("landmarks", "↑"),
    "similarity_own": Measure("own person", "↑"),
    "similarity_neighbour": Measure("neighbour", "↓"),
    "all_present": Measure("all present", "↑", 1, 100, " %"),
    "missing_faces": Measure("missing faces", "↓", 2),
    "extra_faces": Measure("extra faces", "↓", 2),
}
TABLES = {
    "Likeness to the reference photo, prompt and picture": (
        *("distance", "clip_score", "psnr", "ssim", "quality", "cmmd", "face_found"),
    ),
    "Likeness or copying": (
        *("similarity_other", "copy_paste", "pose_difference", "expression_difference", "landmark_difference"),
    ),
    "Several people": ("similarity_own", "similarity_neighbour", "all_present", "missing_faces", "extra_faces"),
}
LEGEND = (
    "Means with 95 % bootstrap intervals over people, where there are several. Distance: cosine distance of the face "
    "to the reference photo. CLIP: 100 × cosine of picture and prompt. PSNR and SSIM: aligned face crop against that "
    "of the reference, in float. CMMD: distance of the pictures' CLIP embeddings to those of the photos (at most two "
    "of a person), 0 where they look alike as a whole. Face found: a picture without a face counts in no other figure "
    "of faces.\n\n"
    "Sim(GT): cosine similarity to other photos of the person. Copy-paste: 1 is the reference photo itself, -1 "
    "another photo. Pose, expression, landmarks: difference from the reference photo; a larger one is less copying. "
    "Neighbour: similarity to the other people of the picture.\n"
)


def measure_of(column: str) -> str:
    """`distance` of `distance[ArcFace]`."""
    return column.partition("[")[0]


def summarise(rows: Sequence[Row], *, seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """By method and column: mean, ends of its interval (`low`, `high`) and `count` of values."""
    present = {name for row in rows for name in row if measure_of(name) in MEASURES}
    photos = [row["clip_embedding"] for row in rows if row["method"] in PHOTOS and "clip_embedding" in row]
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        groups = np.array([row["group"] for row in mine])
        estimates = {}
        for column in present:
            values = np.array([row.get(column, np.nan) for row in mine], np.float64)
            estimates[column] = bootstrap_mean(values, groups, seed=seed)
        if photos and method not in PHOTOS:
            pictures = np.array([row["clip_embedding"] for row in mine])
            estimates["cmmd"] = cmmd(pictures, groups, np.array(photos), seed=seed)
        summary[method] = {column: asdict(estimate) for column, estimate in estimates.items() if estimate.count}
    return summary


def columns(summary: dict[str, dict[str, Any]]) -> list[str]:
    """The columns that some method has a figure of, in the order of the tables."""
    order = list(MEASURES)
    present = {column for figures in summary.values() for column in figures}
    return sorted(present, key=lambda column: (order.index(measure_of(column)), column))


def as_markdown(result: dict[str, Any]) -> str:
    """All tables that have figures, a legend, what was left out, and the circumstances."""
    methods = result["methods"]
    several = result["people_in_a_picture"] > 1
    parts = [f"# Evaluation of {result['model']}\n"]
    for title, measures in TABLES.items():
        present = [c for c in result["columns"] if measure_of(c) in measures]
        if present and (title != "Several people" or several):
            header = ["method", *(_title(column) for column in present)]
            body = [[name, *(_cell(figures, c) for c in present)] for name, figures in methods.items()]
            parts.append(f"## {title}\n\n{markdown_table(header, body)}")
    parts.append(LEGEND)
    counts = ", ".join(f"{name} {number}" for name, number in result["pictures"].items())
    parts.append(f"{result['people']} people; pictures: {counts}; {result['machine']}, {result['date']}.\n")
    if settings := result["settings"]:
        parts.append(
            f"{denoising(settings)}, face scale {settings['face_scale']} "
            f"(training-free {settings['training_free_scale']}), seed {settings['seed']}.\n"
        )
    if result["doubts"]:
        lines = [f"* **{what}**: {why}" for what, why in result["doubts"].items()]
        parts.append("## To be read with care\n\n" + "\n".join(lines) + "\n")
    if result["left_out"]:
        lines = [f"* **{what}**: {why}" for what, why in result["left_out"].items()]
        parts.append("## Left out\n\n" + "\n".join(lines) + "\n")
    if result["unusable"]:
        lines = [f"* {name}: {why}" for name, why in result["unusable"].items()]
        parts.append("## Not used\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _title(column: str) -> str:
    measure = MEASURES[measure_of(column)]
    name = re.search(r"\[(.*)\]", column)
    return f"{f'{name[1]} ' if name else ''}{measure.title} {measure.better}"


def _cell(figures: dict[str, dict[str, Any]], column: str) -> str | None:
    estimate = figures.get(column)
    return None if estimate is None else MEASURES[measure_of(column)].cell(estimate)
