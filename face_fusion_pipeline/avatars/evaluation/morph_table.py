"""From one person to another by the weights of two references: how likeness moves from the first to the second.

A useful morph is gradual: the likeness to the first person falls and that to the second rises with every step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...evaluation.generation import Settings, denoising, keep_settings
from ...evaluation.image_files import read_image, to_pil, write_image
from ...evaluation.metrics import Estimate, bootstrap_mean, cosine_similarity
from ...evaluation.reports import circumstances, contact_sheet, markdown_table, write_report
from ...face_errors import FaceFusionError
from ...files.atomic import write_text
from .evaluators import IMAGE_SIZE, Evaluators
from .trial_pictures import image_path, trial_image
from .trials import Trial, portraits


FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the second person
SHEET_ROWS = 6


def compare_morphs(
    pipe: Any,
    trials: list[Trial],
    evaluators: Evaluators,
    settings: Settings,
    out: Path,
    fractions: Sequence[float] = FRACTIONS,
) -> dict[str, Any]:
    """Generate, score, write `rows.jsonl`, `morph.json`, `morph.md` and `sheet.png` to `out`; returns the result.

    The first person of a trial is its own, the second the one of the next trial.
    """
    keep_settings(out, settings)
    pairs = [(trial, _next(trials, i)) for i, trial in enumerate(trials)]
    for trial, second in tqdm(pairs, desc="images", unit="trial"):
        missing = [fraction for fraction in fractions if not image_path(out, trial, slug(fraction)).is_file()]
        faces = [portraits(person, seed=settings.seed).face for person in (trial.person, second)]
        both = pipe.encode_face(faces) if missing else None
        for fraction in missing:
            write_image(image_path(out, trial, slug(fraction)), _image(pipe, trial, both, fraction, settings))
    rows = []
    for trial, second in tqdm(pairs, desc="scores", unit="trial"):
        others = torch.stack([portraits(person, seed=settings.seed).other for person in (trial.person, second)])
        known = evaluators.embed(others, evaluators.locate(others))
        images = torch.stack(
            [read_image(image_path(out, trial, slug(fraction)), IMAGE_SIZE) for fraction in fractions]
        )
        similarity = cosine_similarity(evaluators.embed(images, evaluators.locate(images))[:, None], known[None])
        for fraction, (first_like, second_like) in zip(fractions, similarity.tolist(), strict=True):
            row = {"trial": trial.key, "person": trial.person, "second": second, "fraction": fraction}
            rows.append({**row, "to_first": first_like, "to_second": second_like})
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    result = {
        "settings": asdict(settings),
        "pairs": len(trials),
        **circumstances(),
        "fractions": {
            str(fraction): summarise([r for r in rows if r["fraction"] == fraction], settings.seed)
            for fraction in fractions
        },
    }
    write_report(out, "morph", result, as_markdown(result))
    write_image(out / "sheet.png", _sheet(pairs, fractions, settings, out))
    return result


def slug(fraction: float) -> str:
    """A fraction in file names."""
    return f"share{round(100 * fraction):03d}"


def summarise(rows: list[dict], seed: int) -> dict[str, Any]:
    """Likeness to both people: mean and interval over pairs."""
    groups = np.array([row["person"] for row in rows])
    return {
        key: asdict(bootstrap_mean(np.array([row[key] for row in rows]), groups, seed=seed))
        for key in ("to_first", "to_second")
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table with its legend."""
    rows = [
        [f"{float(fraction):.0%}", str(Estimate(**found["to_first"])), str(Estimate(**found["to_second"]))]
        for fraction, found in result["fractions"].items()
    ]
    s = result["settings"]
    return (
        markdown_table(["weight of the second", "likeness to the first", "likeness to the second"], rows)
        + f"\n{result['pairs']} pairs of people that no training saw, {denoising(s)}, "
        f"face scale {s['face_scale']}, seed {s['seed']}; {result['machine']}, "
        f"{result['date']}.\nAvatar recogniser, cosine to another portrait, with a 95 % bootstrap interval over "
        "pairs; the noise is the same along a morph.\n"
    )


def _next(trials: list[Trial], index: int) -> int:
    """The person of the next trial that is of somebody else."""
    person = trials[index].person
    others = [trial.person for trial in trials[index:] + trials[:index] if trial.person != person]
    if not others:
        raise FaceFusionError("a morph needs two people: ask for at least two identities")
    return others[0]


def _image(pipe: Any, trial: Trial, both: Any, fraction: float, settings: Settings) -> torch.Tensor:
    weights = [1 - fraction, fraction]
    return trial_image(pipe, trial, settings, face_image=both, face_weights=weights, face_scale=settings.face_scale)


def _sheet(pairs: list[tuple[Trial, int]], fractions: Sequence[float], settings: Settings, out: Path) -> Image.Image:
    rows = []
    for trial, second in pairs[:: max(1, len(pairs) // SHEET_ROWS)][:SHEET_ROWS]:
        first_face, second_face = (portraits(person, seed=settings.seed).face for person in (trial.person, second))
        pictures = [to_pil(read_image(image_path(out, trial, slug(fraction)))) for fraction in fractions]
        rows.append((trial.text, [first_face, *pictures, second_face]))
    return contact_sheet(["first", *(f"{fraction:.0%} second" for fraction in fractions), "second"], rows)
