"""Generated images as files: what exists is not made again, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..face_errors import FaceFusionError
from .renders import write_image
from .trials import Trial, portraits


METHODS = ("none", "training-free", "adapter")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what an image looks like, apart from its trial."""

    model: str
    adapter: str | None = None
    steps: int = 25
    guidance_scale: float = 4.0
    face_scale: float = 1.0
    training_free_scale: float = 1.0
    seed: int = 0
    batch: int = 4


def load_pipeline(settings: Settings, *, device: str = "cpu") -> Any:
    """The model folder or Hub id as Face Fusion pipeline, with its adapter if one is named."""
    from ..pipeline import StableDiffusionFaceFusionPipeline

    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(settings.model, safety_checker=None)
    if settings.adapter is not None:
        pipe.load_face_fusion_adapter(settings.adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def keep_settings(out: Path, settings: Settings) -> None:
    """Note the settings in `out`; FaceFusionError if images made with others lie there already."""
    path = out / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != asdict(settings):
        raise FaceFusionError(f"{out} holds images made with other settings ({path}): choose an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(settings), indent=1) + "\n")


def image_path(out: Path, trial: Trial, method: str) -> Path:
    """Where the image of a trial lies. The prompt is part of the name: another prompt is another image."""
    mark = hashlib.sha256(trial.text.encode()).hexdigest()[:8]
    return out / "images" / f"{trial.key}_{method}_{mark}.png"


def generate(pipe: Any, trials: list[Trial], methods: list[str], settings: Settings, out: Path) -> None:
    """Make the missing images of all trials by all methods: the same seed, hence the same noise, for every method.

    One person is encoded once; `settings.batch` prompts are denoised together.
    """
    keep_settings(out, settings)
    total = len(trials) * len(methods)
    with tqdm(total=total, desc="images", unit="image") as progress:
        for method, person, group in _groups(trials, methods):
            missing = [trial for trial in group if not image_path(out, trial, method).is_file()]
            progress.update(len(group) - len(missing))
            face = {} if method == "none" or not missing else _face_arguments(pipe, person, method, settings)
            for start in range(0, len(missing), settings.batch):
                batch = missing[start : start + settings.batch]
                images = _images(pipe, batch, face, settings)
                for trial, image in zip(batch, images, strict=True):
                    write_image(image_path(out, trial, method), image)
                progress.update(len(batch))


def _groups(trials: list[Trial], methods: list[str]) -> Iterator[tuple[str, int, list[Trial]]]:
    for person, group in groupby(trials, key=lambda trial: trial.person):
        members = list(group)
        for method in methods:
            yield method, person, members


def _face_arguments(pipe: Any, person: int, method: str, settings: Settings) -> dict[str, Any]:
    face = portraits(person, seed=settings.seed).face
    scale = settings.face_scale if method == "adapter" else settings.training_free_scale
    return {"face_image": pipe.encode_face(face, face_mode=method), "face_scale": scale}


@torch.inference_mode()
def _images(pipe: Any, trials: list[Trial], face: dict[str, Any], settings: Settings) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] on the CPU. Noise comes from CPU generators: the same on every device."""
    output = pipe(
        [trial.text for trial in trials],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(trial.seed) for trial in trials],
        output_type="pt",
        **face,
    )
    return output.images.float().cpu()
