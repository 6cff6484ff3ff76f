"""Quality of an avatar Stable Diffusion by itself: reconstruction by its VAE, and obedience to unseen prompts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...evaluation.generation import Settings, denoising
from ...evaluation.image_files import read_image
from ...evaluation.metrics import psnr
from ...evaluation.reports import circumstances, markdown_table, write_report
from ...unet_family import encode_latents
from .evaluators import IMAGE_SIZE, TRAITS
from .scoring import Panel
from .trial_pictures import generate, image_path
from .trials import Trial, plan_trials, true_renders


GOALS = {"psnr": 30.0, "expression": 0.85, "clothing": 0.95, "background": 0.95, "people": 0.90, "no_face": 0.05}
FRACTIONS = {1: 0.6, 2: 0.2, 3: 0.2}  # of prompts, by number of people


def quality_trials(prompts: int, *, seed: int = 0, exclude: Collection[str] = ()) -> list[Trial]:
    """Unseen prompts in every style, with one to three people."""
    trials = []
    for people, fraction in FRACTIONS.items():
        count = max(1, round(prompts * fraction))
        trials += plan_trials(count, 1, seed=seed + people, people=people, exclude=exclude)
    return trials


@torch.inference_mode()
def reconstruction_psnr(vae: Any, images: torch.Tensor) -> float:
    """Mean PSNR in dB of images (N, 3, H, W) in [0, 1] after encoding and decoding, each image on its own."""
    values = []
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    for image in images:
        pixels = (image[None] * 2 - 1).to(next(vae.parameters()))
        latents = encode_latents(vae, pixels)
        decoded = vae.decode(latents / vae.config.scaling_factor + shift).sample
        values.append(psnr((decoded[0].float().cpu() / 2 + 0.5).clamp(0, 1).numpy(), image.numpy()))
    return float(np.mean(values))


def measure_model(
    pipe: Any, trials: list[Trial], panel: Panel, settings: Settings, out: Path, *, unseen: bool = False
) -> dict[str, Any]:
    """Generate the trials without a face, score them beside true renders of the same scenes, write `model.json|md`.

    `unseen` says that the captions of the training data were passed over.
    """
    generate(pipe, trials, ["none"], settings, out)
    truth = true_renders(trials)
    made = torch.stack([read_image(image_path(out, trial, "none"), IMAGE_SIZE) for trial in trials])
    rows = [
        row
        for trial, *images in zip(trials, made, truth, strict=True)
        for row in panel.score(trial, torch.stack(images), ["generated", "true render"], None)
    ]
    result = {
        "settings": asdict(settings),
        "prompts": len(trials),
        "unseen": unseen,
        **circumstances(),
        "psnr": reconstruction_psnr(pipe.vae, truth),
        **{kind: _obedience([row for row in rows if row["method"] == kind]) for kind in ("generated", "true render")},
    }
    write_report(out, "model", result, as_markdown(result))
    return result


def _obedience(rows: list[dict]) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for trait in TRAITS:
        hits = [row["said"][trait] == row["wanted"][trait] for row in rows if trait in row["wanted"]]
        figures[trait] = float(np.mean(hits)) if hits else None
    found = [row["face_found"] for row in rows if row["face_found"] is not None]
    figures["no_face"] = 1 - float(np.mean(found)) if found else None
    return figures


def as_markdown(result: dict[str, Any]) -> str:
    """One row a figure: generated, true renders (what the evaluators can see at best), goal."""
    rows: list[list[Any]] = [["VAE reconstruction, dB ↑", f"{result['psnr']:.1f}", None, f"{GOALS['psnr']:.0f}"]]
    for figure in (*TRAITS, "no_face"):
        values = [result[kind][figure] for kind in ("generated", "true render")] + [GOALS.get(figure)]
        shown = [None if value is None else f"{100 * value:.1f} %" for value in values]
        rows.append(["no face found ↓" if figure == "no_face" else f"{figure} right ↑", *shown])
    s = result["settings"]
    seen = "not seen in training" if result["unseen"] else "of which some may be captions that training saw"
    return markdown_table(["figure", "generated", "true renders", "goal"], rows) + (
        f"\n{result['prompts']} prompts {seen} (one to three people, all styles), {denoising(s)}, "
        f"seed {s['seed']}; {result['machine']}, {result['date']}.\n"
    )
