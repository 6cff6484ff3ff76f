"""Pictures of trials: made by all methods, with the same seed for each, as files that are not made again."""

from __future__ import annotations

import hashlib
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...evaluation.generation import Settings, keep_settings, make_pictures
from ...evaluation.pictures import Picture
from .trials import Trial, reference_face


def image_path(out: Path, trial: Trial, method: str) -> Path:
    """Where the image of a trial lies. The prompt is part of the name: another prompt is another image."""
    mark = hashlib.sha256(trial.text.encode()).hexdigest()[:8]
    return out / "images" / f"{trial.key}_{method}_{mark}.png"


def generate(pipe: Any, trials: list[Trial], methods: list[str], settings: Settings, out: Path) -> None:
    """Make the missing images of all trials by all methods, see `evaluation.generation.make_pictures`."""
    keep_settings(out, settings)
    pictures = [
        Picture(image_path(out, trial, method), method, (str(person),), trial.text, trial.seed)
        for person, group in groupby(trials, key=lambda trial: trial.person)
        for method, trial in product(methods, list(group))
    ]

    def face_of(name: str) -> Image.Image:
        return reference_face(int(name), seed=settings.seed, cut_out=settings.cut_out)

    make_pictures(pipe, pictures, face_of, settings)


@torch.inference_mode()
def trial_image(pipe: Any, trial: Trial, settings: Settings, **face: Any) -> torch.Tensor:
    """The picture (3, H, W) in [0, 1] of one trial on the CPU, with the arguments about faces that `pipe` takes."""
    output = pipe(
        trial.text,
        **settings.call,
        generator=torch.Generator().manual_seed(trial.seed),
        output_type="pt",
        **face,
    )
    return output.images[0].float().cpu()
