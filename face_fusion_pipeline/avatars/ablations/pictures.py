"""Pictures of test people by a trained variant, as files: what exists is not made again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

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
    paths = [image_path(out, trial, condition.slug) for trial in trials]
    missing = [(trial, path) for trial, path in zip(trials, paths, strict=True) if not path.is_file()]
    make = _several_people if condition.people > 1 else _one_person
    for images, targets in make(base, conditioning, missing, condition, sampling):
        for image, path in zip(images, targets, strict=True):
            write_image(path, image)
    return paths


def plain_pipeline(base: BaseModel) -> StableDiffusionPipeline:
    """diffusers' own pipeline of the base's parts: whatever a variant is, it lies in the UNet."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    parts = {name: base.pipeline.components[name] for name in names}
    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(**parts, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


Drawn = Iterator[tuple[torch.Tensor, list[Path]]]


def _one_person(
    base: BaseModel, conditioning: Conditioning | None, missing: list[tuple[Trial, Path]], c: Condition, s: Sampling
) -> Drawn:
    pipe = plain_pipeline(base)
    for person, group in groupby(missing, key=lambda item: item[0].person):
        mine = list(group)
        faces: AbstractContextManager[None] = nullcontext()
        for start in range(0, len(mine), s.batch):
            batch = mine[start : start + s.batch]
            if conditioning is not None:
                photos = list(reference_photos(person, c.references, s.seed))
                states = conditioning.states(conditioning.from_photos(photos))
                states = {name: state[None] for name, state in states.items()}
                faces = conditioning.applied(states, scale=c.scale, guided=s.guidance_scale > 1)
            with faces:
                yield _images(pipe, [trial for trial, _ in batch], s), [path for _, path in batch]


def _several_people(
    base: BaseModel, conditioning: Conditioning | None, missing: list[tuple[Trial, Path]], c: Condition, s: Sampling
) -> Drawn:
    """The package's pipeline, which places people, with the weights of the method itself."""
    pipe, shrink = base.pipeline, base.resolution / IMAGE_SIZE
    if conditioning is not None:
        pipe.set_face_fusion_adapter(conditioning.adapter)
    for trial, path in missing:
        face: dict[str, Any] = {}
        if conditioning is not None:
            photos = [reference_photos(person, c.references, s.seed) for person in members(trial)]
            people = [pipe.encode_face([photo.face for photo in mine]) for mine in photos]
            boxes = [[side * shrink for side in box] for box in true_boxes(trial)]
            face = {"face_image": people, "face_scale": c.scale, "face_boxes": boxes}
        yield _images(pipe, [trial], s, **face), [path]


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
