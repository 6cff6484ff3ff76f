"""Pictures of test people by a trained variant, as files: what exists is not made again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ...conditioner import register_conditioner
from ...evaluation.image_files import to_pil, write_image
from ...face_images import crop_face
from ...training.base_model import BaseModel
from .. import render, sample_scene
from ..evaluation.evaluators import IMAGE_SIZE
from ..evaluation.people_table import members, true_boxes
from ..evaluation.trial_pictures import image_path
from ..evaluation.trials import NEAR_FRONTAL, Trial, plan_trials
from .conditioning import Conditioning
from .encoders import Photo
from .questions import Condition


@dataclass(frozen=True)
class Sampling:
    """How pictures are made and how many: `identities` test people, `prompts` for each of them."""

    identities: int = 50
    prompts: int = 4
    steps: int = 20
    guidance_scale: float = 4.0
    batch: int = 4
    seed: int = 0

    def trials(self, people: int, exclude: set[str]) -> list[Trial]:
        """Prompts that nobody trained on, for people whom nobody trained on. With several people a trial has more."""
        return plan_trials(
            self.identities, self.prompts, seed=self.seed, people=people, exclude=exclude, style="photo"
        )


@lru_cache(maxsize=256)
def reference_photos(person: int, count: int, seed: int = 0) -> tuple[Photo, ...]:
    """The first `count` photos of a test person: near-frontal, every other trait free. More of them begin alike."""
    rng = random.Random(f"references {seed} {person}")
    draws = [(rng.randrange(1 << 40), rng.uniform(-NEAR_FRONTAL, NEAR_FRONTAL)) for _ in range(count)]
    rendered = render([sample_scene(scene_seed, [person], style="photo", yaw=yaw) for scene_seed, yaw in draws])
    photos = []
    for image, box, landmarks in zip(rendered.images.cpu(), rendered.boxes, rendered.landmarks5, strict=True):
        x0, y0, x1, y1 = box[0].tolist()
        picture = to_pil(image)
        face = crop_face(picture, (x0, y0, x1, y1), resolution=image.shape[-1])
        photos.append(Photo(face, picture, landmarks[0].cpu()))
    return tuple(photos)


def make_pictures(
    base: BaseModel,
    conditioning: Conditioning | None,
    trials: list[Trial],
    condition: Condition,
    sampling: Sampling,
    out: Path,
) -> list[Path]:
    """Make the pictures that are missing in `out` and return all of them, in the order of the trials.

    The noise of a trial is the same for every variant. Several people are placed where the renderer puts them.
    """
    base.pipeline.to(base.unet.device)
    if conditioning is not None:
        register_conditioner(conditioning)
    paths = [image_path(out, trial, condition.slug) for trial in trials]
    missing = [(trial, path) for trial, path in zip(trials, paths, strict=True) if not path.is_file()]
    for batch, face in _batches(base, conditioning, missing, condition, sampling):
        images = _images(base.pipeline, [trial for trial, _ in batch], sampling, **face)
        for image, (_, path) in zip(images, batch, strict=True):
            write_image(path, image)
    return paths


Planned = list[tuple[Trial, Path]]


def _batches(
    base: BaseModel, conditioning: Conditioning | None, missing: Planned, c: Condition, s: Sampling
) -> Iterator[tuple[Planned, dict[str, Any]]]:
    """Trials that are drawn together, all of the same people, and what their call says of faces."""
    shrink = base.resolution / IMAGE_SIZE
    for people, group in groupby(missing, key=lambda item: members(item[0])):
        mine, face = list(group), {}
        if conditioning is not None:
            photos = [list(reference_photos(person, c.references, s.seed)) for person in people]
            identities = [base.pipeline.encode_face(faces, face_mode=conditioning.mode) for faces in photos]
            face = {"face_image": identities, "face_scale": c.scale}
        size = s.batch if c.people == 1 else 1  # places are those of one picture
        for start in range(0, len(mine), size):
            batch = mine[start : start + size]
            if face and c.people > 1:
                face["face_boxes"] = [[side * shrink for side in box] for box in true_boxes(batch[0][0])]
            yield batch, face


@torch.inference_mode()
def _images(pipe: Any, trials: list[Trial], s: Sampling, **face: Any) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1] on the CPU. Noise comes from CPU generators: the same on every device."""
    output = pipe(
        [trial.text for trial in trials] if len(trials) > 1 else trials[0].text,
        num_inference_steps=s.steps,
        guidance_scale=s.guidance_scale,
        generator=[torch.Generator().manual_seed(trial.seed) for trial in trials],
        output_type="pt",
        **face,
    )
    return output.images.float().cpu()
