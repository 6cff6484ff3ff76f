"""The main table: is it the same person, and does the picture still show what the prompt asks for?

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
from ...evaluation.metrics import bootstrap_mean, closed_share
from ...evaluation.reports import circumstances, contact_sheet, markdown_table, write_report
from ...files.atomic import write_text
from .judges import IMAGE_SIZE
from .scoring import Panel
from .trial_pictures import generate, image_path
from .trials import Trial, detected_face, portraits, reference_face, true_renders


ASKED = ("expression", "clothing", "background", "people")
CEILING, FLOOR = "true render", "somebody else"
SHEET_ROWS = 8


def compare(
    pipe: Any, trials: list[Trial], methods: list[str], panel: Panel, settings: Settings, out: Path
) -> dict[str, Any]:
    """Generate, score, write `rows.jsonl`, `table.json`, `table.md` and `sheet.png` to `out`; returns the result."""
    generate(pipe, trials, methods, settings, out)
    rows = _score(trials, methods, panel, settings, out)
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
        **circumstances(),
        "methods": summarise(rows, [*methods, CEILING, FLOOR], panel.names, seed=settings.seed),
    }
    write_report(out, "table", result, as_markdown(result, panel.names))
    write_image(out / "sheet.png", _sheet(trials, methods, settings, out))
    return result


def summarise(rows: list[dict], methods: list[str], recognisers: list[str], *, seed: int = 0) -> dict[str, Any]:
    """Per method: similarity (mean and interval) and closed share by recogniser, accuracy by trait, missing faces."""
    by_method = {method: [row for row in rows if row["method"] == method] for method in methods}

    def mean(method: str, name: str) -> float:
        return float(np.mean([row["similarity"][name] for row in by_method[method]]))

    summary = {}
    for method, mine in by_method.items():
        people = np.array([row["person"] for row in mine])
        likeness = {}
        for name in recognisers:
            estimate = bootstrap_mean(np.array([row["similarity"][name] for row in mine]), people, seed=seed)
            closed = closed_share(estimate.mean, mean(FLOOR, name), mean(CEILING, name))
            likeness[name] = {**asdict(estimate), "closed": closed}
        accuracy = {t: float(np.mean([row["said"][t] == row["wanted"][t] for row in mine])) for t in ASKED}
        found = [row["face_found"] for row in mine if row["face_found"] is not None]
        summary[method] = {
            "similarity": likeness,
            "accuracy": {**accuracy, "mean": float(np.mean(list(accuracy.values())))},
            "no_face": 1 - float(np.mean(found)) if found else None,
        }
    return summary


def as_markdown(result: dict[str, Any], recognisers: list[str]) -> str:
    """The table with its legend."""
    header = ["method"]
    for name in recognisers:
        header += [f"{name} ↑", "closed ↑"]
    header += [*ASKED, "mean accuracy ↑", "no face ↓"]
    rows = []
    for method, figures in result["methods"].items():
        row: list[Any] = [method]
        for name in recognisers:
            s = figures["similarity"][name]
            row += [f"{s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}]", f"{100 * s['closed']:.0f} %"]
        row += [f"{100 * figures['accuracy'][trait]:.1f} %" for trait in (*ASKED, "mean")]
        rows.append([*row, None if figures["no_face"] is None else f"{100 * figures['no_face']:.1f} %"])
    s = result["settings"]
    cut_out = ""
    if s["cut_out"] != "true":
        cut_out = (
            f"References: cut out by {s['cut_out']}, {result['faces_not_detected']} faces that it did not find by the "
            "true box. "
        )
    return (
        markdown_table(header, rows)
        + f"\n{result['images_per_method']} portraits a method, {result['identities']} people that no training saw, "
        f"{denoising(s)}, face scale {s['face_scale']} "
        f"(training-free {s['training_free_scale']}), seed {s['seed']}; {result['machine']}, {result['date']}.\n"
        f"{cut_out}Similarity: cosine to another render of the person, with a 95 % bootstrap interval over people; "
        f"closed: share of the way from “{FLOOR}” to “{CEILING}”. Accuracy: judges trained on renders.\n"
    )


def _score(trials: list[Trial], methods: list[str], panel: Panel, settings: Settings, out: Path) -> list[dict]:
    rows = []
    truth, strangers = true_renders(trials), true_renders(trials, person_shift=1)
    for i, trial in enumerate(tqdm(trials, desc="scores", unit="trial")):
        images = [read_image(image_path(out, trial, method), IMAGE_SIZE) for method in methods]
        person = portraits(trial.person, seed=settings.seed)
        rows += panel.score(trial, torch.stack([*images, truth[i], strangers[i]]), [*methods, CEILING, FLOOR], person)
    return rows


def _sheet(trials: list[Trial], methods: list[str], settings: Settings, out: Path) -> Any:
    """One row for each of the first people, a different prompt number in every row."""
    people = list(dict.fromkeys(trial.person for trial in trials))[:SHEET_ROWS]
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
