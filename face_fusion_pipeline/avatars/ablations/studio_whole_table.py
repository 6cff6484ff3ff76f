"""What FaceStudio's whole UNet and its LoRA make of the same people and prompts, by the measures of its table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...evaluation.generation import Settings, keep_settings
from ...evaluation.metrics import Estimate, bootstrap_mean
from ...evaluation.reports import circumstances, markdown_table, write_report
from ...files.atomic import write_text
from ...files.texts import read_log
from ..evaluation.avatar_table import ASKED, CEILING, FLOOR, summarise
from ..evaluation.avatar_table import as_markdown as main_table
from ..evaluation.scoring import Panel
from ..evaluation.studio_pictures import Studio
from ..evaluation.studio_table import main_rows
from ..evaluation.trials import Trial
from ..measures.figures import distances
from .laboratory import keep_common
from .studio_whole import LORA, VARIANTS, WHOLE, StudioTrainer


METHODS = ("FaceStudio by text", "FaceStudio by text, appended", "FaceStudio by picture")
Row = dict[str, Any]


def compare_whole(
    trainer: StudioTrainer, seeds: Sequence[int], trials: list[Trial], panel: Panel, settings: Settings, device: str
) -> dict[str, Any]:
    """Train, draw, score; writes `rows.jsonl`, `studio_whole.json` and `.md` to `trainer.out`; returns the result.

    Finished trainings and pictures are not made again, and a training that was stopped goes on.

    Args:
        panel: with its measures.

    Raises:
        FaceFusionError: the folder holds trainings or pictures made with other settings.
    """
    out, common = trainer.out, trainer.settings()
    keep_common(out, common)
    rows: list[Row] = []
    seen: dict[str, list[Any]] = {}
    trainings: list[dict[str, Any]] = []
    for seed in seeds:
        for variant in VARIANTS:
            folder, record = trainer.trained(variant, seed)
            found, looks = scored(trainer, folder, trials, panel, settings, device)
            rows += [row | {"training": seed, "method": name_of(variant, row["method"])} for row in found]
            for method, those in looks.items():
                seen.setdefault(name_of(variant, method), []).extend(those)
            trainings.append({"variant": variant, "seed": seed, **figures_of(record, folder)})
    names = [name_of(variant, method) for method in METHODS for variant in VARIANTS]
    result: dict[str, Any] = {
        **common,
        "settings": asdict(settings) | {"cut_out": "true"},
        "seeds": list(seeds),
        "identities": len({trial.person for trial in trials}),
        "images_per_method": len(trials) * len(seeds),
        "faces_not_detected": 0,
        **circumstances(),
        "methods": summarise(rows, [*names, CEILING, FLOOR], panel.names, seed=settings.seed),
        "differences": {method: differences(rows, method, panel, settings.seed) for method in METHODS},
        "trainings": trainings,
    }
    whose = np.array([trial.person for trial in trials] * len(seeds))
    truth = seen[CEILING][: len(whose)]  # the same ones for both
    for name in names:
        result["methods"][name]["drawing"] |= distances(seen[name], truth, whose, seed=settings.seed)
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_report(out, "studio_whole", result, as_markdown(result, panel.names))
    return result


def name_of(variant: str, method: str) -> str:
    """What rows call a method; true renders have no variant."""
    return method if method in (CEILING, FLOOR) else f"{variant}: {method}"


def scored(
    trainer: StudioTrainer, folder: Path, trials: list[Trial], panel: Panel, settings: Settings, device: str
) -> tuple[list[Row], dict[str, list[Any]]]:
    """See `studio_table.main_rows`: of the pictures of one training, drawn now or before."""
    pipe, own = trainer.pipeline(folder, settings, device)
    pictures = folder / "pictures"
    keep_settings(pictures, own)
    return main_rows(Studio(pipe, trials, own, pictures), panel, METHODS)


def figures_of(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the report says of a training; `held_out` is its loss at people set aside, None if there are none."""
    lines = read_log(folder / "logs" / record["task"] / "metrics.jsonl")
    losses = [line["validation_loss_right_face"] for line in lines if "validation_loss_right_face" in line]
    kept = ("steps", "samples", "seconds", "trained_parameters", "machine", "date")
    return {key: record[key] for key in kept} | {
        "learning_rate": record["options"]["lr"],
        "held_out": losses[-1] if losses else None,
    }


def differences(rows: list[Row], method: str, panel: Panel, seed: int) -> dict[str, Any]:
    """The whole UNet's figure less the LoRA's, picture by picture: over all, and the mean of each training."""
    measures: dict[str, Callable[[Row], float]] = {
        "likeness": lambda row: row["similarity"][panel.evaluators.name],
        "obedience": lambda row: float(np.mean([row["said"][t] == row["wanted"][t] for t in ASKED])),
        "eyes": lambda row: float(row["eyes"]),
    }
    whole, lora = ([row for row in rows if row["method"] == name_of(variant, method)] for variant in (WHOLE, LORA))
    people, trained = (np.array([row[key] for row in whole]) for key in ("person", "training"))
    found = {}
    for name, measure in measures.items():
        values = np.array([measure(a) - measure(b) for a, b in zip(whole, lora, strict=True)])
        by_seed = {str(each): float(values[trained == each].mean()) for each in dict.fromkeys(trained.tolist())}
        found[name] = {**asdict(bootstrap_mean(values, people, seed=seed)), "by_seed": by_seed}
    return found


def as_markdown(result: dict[str, Any], recognisers: list[str]) -> str:
    """The tables with their legend."""
    rows = []
    for method, found in result["differences"].items():
        cells = []
        for figures in found.values():
            by_seed = figures["by_seed"].values()
            mean = Estimate(*(figures[key] for key in ("mean", "low", "high", "count")))
            cells += [str(mean), f"{min(by_seed):+.3f} to {max(by_seed):+.3f}"]
        rows.append([method, *cells])
    measured = [f"{name}{end}" for name in ("likeness", "obedience", "eyes well drawn") for end in ("", ", by seed")]
    parts = [main_table(result, recognisers)]
    parts += [f"The {WHOLE} less the {LORA}; likeness is the cosine of the avatar recogniser.\n"]
    parts += [markdown_table(["method", *measured], rows)]
    rows = [
        [t["variant"], t["seed"], t["steps"], t["samples"], f"{t['seconds'] / 60:.1f}"]
        + [f"{t['trained_parameters']:,}", f"{t['learning_rate']:g}"]
        + [None if t["held_out"] is None else f"{t['held_out']:.4f}", f"{t['machine']}, {t['date'][:10]}"]
        for t in result["trainings"]
    ]
    header = ["trained", "seed", "steps", "samples", "minutes", "parameters", "rate", "held-out loss", "machine"]
    taught = "Face Fusion's predictions" if result["teacher"] else "the noise itself"
    legend = f"Trainings: alike but for what learns and its rate; both learn {taught}. Loss: of people set aside.\n"
    return "\n".join([*parts, legend, markdown_table(header, rows)])
