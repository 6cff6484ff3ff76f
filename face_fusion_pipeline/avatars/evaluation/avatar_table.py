"""The main table: is it well drawn, is it the same person, and does the picture still show what the prompt asks for?

For test people and prompts, each method's image is compared with *another* render of the person, one that the model
never saw. The ceiling is a true render of the prompt's scene with that person, the floor one with somebody else.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...evaluation.generation import MIRRORED, Settings, denoising
from ...evaluation.image_files import read_image, to_pil, write_image
from ...evaluation.metrics import bootstrap_mean, bootstrap_normalised
from ...evaluation.reports import circumstances, contact_sheet, markdown_table, write_report
from ...files.atomic import write_text
from ..measures.figures import distances, row_of, summarise_measures
from ..measures.looks import Look
from ..measures.panel import Seen
from .evaluators import IMAGE_SIZE
from .renders import at_size
from .scoring import Panel
from .trial_pictures import generate, image_path
from .trials import Trial, detected_face, portraits, reference_face, true_renders


ASKED = ("expression", "clothing", "background", "people")
CEILING, FLOOR = "true render", "somebody else"
DRAWING = ("eyes well drawn ↑", "head KID ↓", "eye KID ↓", "traits ↑")
LEGEND = (
    "Eyes well drawn: both, by an evaluator that passes 99 % of true renders whose eyes show. KID: 1000 × that of "
    "heads and of eyes to true renders of the same scenes. Traits: the fraction shown of a person's, "
    f"normalised: 0 % is “{FLOOR}”, 100 % “{CEILING}”. "
)
SHEET_ROWS = 8


def compare(
    pipe: Any, trials: list[Trial], methods: list[str], panel: Panel, settings: Settings, out: Path
) -> dict[str, Any]:
    """Generate, score, write `rows.jsonl`, `table.json`, `table.md` and `sheet.png` to `out`; returns the result."""
    generate(pipe, trials, methods, settings, out)
    rows, seen = _score(trials, methods, panel, settings, out)
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    people = {trial.person for trial in trials}
    missed = 0
    if settings.cut_out != "true":
        missed = sum(detected_face(person, settings.cut_out, seed=settings.seed) is None for person in people)
    result = {
        "settings": asdict(settings),
        "identities": len(people),
        "faces_not_detected": missed,
        "images_per_method": len(trials),
        "published": [recogniser.name for recogniser in panel.recognisers],
        **circumstances(),
        "methods": summarise(rows, [*methods, CEILING, FLOOR], panel.names, seed=settings.seed),
    }
    whose = np.array([trial.person for trial in trials])
    for method in methods if seen else ():
        result["methods"][method]["drawing"] |= distances(seen[method], seen[CEILING], whose, seed=settings.seed)
    write_report(out, "table", result, as_markdown(result, panel.names))
    write_image(out / "sheet.png", _sheet(trials, methods, settings, out))
    return result


def summarise(rows: list[dict], methods: list[str], recognisers: list[str], *, seed: int = 0) -> dict[str, Any]:
    """Per method: similarity, raw and normalised, by recogniser, accuracy by trait, missing faces; with intervals.

    Where the rows have them also how well eyes are drawn, and traits shown (`measures.figures`).
    """
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}
    floor, ceiling = by_method[FLOOR], by_method[CEILING]

    def similarities(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
        return np.array([row["similarity"][name] for row in rows]), np.array([row["person"] for row in rows])

    summary: dict[str, Any] = {}
    for method, mine in by_method.items():
        people = np.array([row["person"] for row in mine])
        likeness = {}
        for name in recognisers:
            three = (similarities(those, name) for those in (mine, floor, ceiling))
            between = bootstrap_normalised(*three, seed=seed)
            estimate = bootstrap_mean(*similarities(mine, name), seed=seed)
            ends = {"normalised": between.mean, "normalised_low": between.low, "normalised_high": between.high}
            likeness[name] = {**asdict(estimate), **ends}
        accuracy = {t: float(np.mean([row["said"][t] == row["wanted"][t] for row in mine])) for t in ASKED}
        obeyed = np.array([np.mean([row["said"][t] == row["wanted"][t] for t in ASKED]) for row in mine])
        found = [row["face_found"] for row in mine if row["face_found"] is not None]
        summary[method] = {
            "similarity": likeness,
            "accuracy": {**accuracy, "mean": float(np.mean(list(accuracy.values())))},
            "obedience": asdict(bootstrap_mean(obeyed, people, seed=seed)),
            "no_face": 1 - float(np.mean(found)) if found else None,
        }
        if "eyes" in mine[0]:
            measured = summarise_measures(mine, floor, ceiling, seed=seed)
            summary[method] |= {"drawing": {"eyes": measured["eyes"]}, "traits": measured["traits"]}
    return summary


def as_markdown(result: dict[str, Any], recognisers: list[str]) -> str:
    """Two tables with their legend: what counts, and what it was made from."""
    methods = result["methods"]
    measured = "drawing" in methods[CEILING]
    header = ["method", *(DRAWING if measured else ()), *(f"{name} ↑" for name in recognisers)]
    rows = []
    for method, figures in methods.items():
        row: list[Any] = [method]
        if measured:
            drawing = figures["drawing"]
            row += [_percent(drawing["eyes"]), *(_distance(drawing.get(f"kid_{part}")) for part in ("head", "eye"))]
            row.append(_percent(figures["traits"]["normalised"]))
        row += [_percent(figures["similarity"][name], "normalised") for name in recognisers]
        row.append(_percent(figures["obedience"]))
        rows.append([*row, None if figures["no_face"] is None else f"{100 * figures['no_face']:.1f} %"])
    parts = [markdown_table([*header, "obedience ↑", "no face ↓"], rows)]
    details = []
    for method, figures in methods.items():
        similar = [f"{s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in figures["similarity"].values()]
        details.append([method, *similar, *(f"{100 * figures['accuracy'][trait]:.1f} %" for trait in ASKED)])
    parts.append(markdown_table(["method", *(f"{name}, cosine" for name in recognisers), *ASKED], details))
    s = result["settings"]
    cut_out = ""
    if s["cut_out"] != "true":
        cut_out = (
            f"References: cut out by {s['cut_out']}, {result['faces_not_detected']} faces that it did not find by the "
            "true box. "
        )
    parts.append(
        f"{result['images_per_method']} portraits a method, {result['identities']} people that no training saw, "
        f"{denoising(s)}, face scale {s['face_scale']} "
        f"(training-free {s['training_free_scale']}), seed {s['seed']}; {result['machine']}, {result['date']}.\n"
        f"{cut_out}In brackets: 95 % bootstrap intervals over people. {LEGEND if measured else ''}"
        f"Recognisers: normalised similarity to another render of the person, 0 % “{FLOOR}”, 100 % “{CEILING}”. "
        "Obedience: mean accuracy of what the prompt asks for, by evaluators trained on renders.\n"
    )
    return "\n".join(parts)


def _percent(estimate: dict[str, Any], key: str = "mean") -> str:
    low, high = ("low", "high") if key == "mean" else (f"{key}_low", f"{key}_high")
    mean, *ends = (f"{100 * estimate[end]:.0f}" for end in (key, low, high))
    return f"{mean} % [{', '.join(ends)}]" if estimate[low] == estimate[low] else f"{mean} %"


def _distance(estimate: dict[str, Any] | None) -> str | None:
    if estimate is None:  # of true renders to themselves
        return None
    mean, low, high = (f"{estimate[key]:.0f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if estimate["low"] == estimate["low"] else mean


def _score(
    trials: list[Trial], methods: list[str], panel: Panel, settings: Settings, out: Path
) -> tuple[list[dict], dict[str, list[Seen]]]:
    """The rows, and by method what the measures saw in the picture of each trial, if there are measures."""
    rows: list[dict] = []
    seen: dict[str, list[Seen]] = {}
    size = panel.measures.size if panel.measures else IMAGE_SIZE
    truth, strangers = true_renders(trials, size=size), true_renders(trials, person_shift=1, size=size)
    names = [*methods, CEILING, FLOOR]
    for i, trial in enumerate(tqdm(trials, desc="scores", unit="trial")):
        made = [read_image(image_path(out, trial, method), size) for method in methods]
        images = torch.stack([*made, truth[i], strangers[i]])
        person = portraits(trial.person, seed=settings.seed)
        mine = panel.score(trial, at_size(images, IMAGE_SIZE), names, person)
        if panel.measures:
            for row, found in zip(mine, panel.measures.look(images, [Look.of_scene(trial.scene)]), strict=True):
                row |= row_of(found)
                seen.setdefault(row["method"], []).append(found)
        rows += mine
    return rows, seen


def _sheet(trials: list[Trial], methods: list[str], settings: Settings, out: Path) -> Any:
    """One row for each of the first people, in the order of their seeds; a different prompt number in every row."""
    people = sorted({trial.person for trial in trials})[:SHEET_ROWS]
    rows = []
    for i, number in enumerate(people):
        mine = [trial for trial in trials if trial.person == number]
        trial = mine[i % len(mine)]
        person = portraits(number, seed=settings.seed)
        pictures = [to_pil(read_image(image_path(out, trial, method))) for method in methods]
        face = reference_face(number, seed=settings.seed, cut_out=settings.cut_out)
        rows.append((trial.text, [face, to_pil(person.other), *pictures]))
    titles = {
        "none": "without a face",
        "training-free": "training-free",
        "adapter": "Face Fusion",
        "both": "both attentions",
    }
    names = [titles[m.removesuffix(MIRRORED)] + (", mirrored" if m.endswith(MIRRORED) else "") for m in methods]
    return contact_sheet(["reference", "same person", *names], rows)
