"""What is asked of a model: people nobody trained on, scenes for them, and true renders of both.

The only module here that knows how avatars are made.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from PIL import Image

from ...evaluation.generation import TRUE_BOX, CutOut
from ...evaluation.image_files import to_pil
from ...face_detectors import DetectorName
from ...face_errors import FaceTooSmallError, NoFaceError
from ...face_images import crop_face
from ...generation.photos import prepare_face
from .. import SPLITS, Scene, caption, render, sample_identity, sample_scene
from .evaluators import IMAGE_SIZE, decidable


FIRST_TEST_IDENTITY = SPLITS["test"].start
NEAR_FRONTAL = 20.0  # degrees of yaw
_SCENE_SEEDS = 1 << 40  # far from the scene seeds of any dataset


@dataclass(frozen=True)
class Trial:
    """One prompt for one person: the scene that the caption describes, and what the evaluators should see in it."""

    person: int
    number: int
    text: str
    scene: Scene
    seed: int

    @property
    def key(self) -> str:
        """Name of the trial in file names and rows."""
        return f"{self.person}_{self.number:03d}"

    @property
    def wanted(self) -> dict[str, str]:
        """The words that the prompt asks for, by trait, as far as a picture can show them."""
        scene, first = self.scene, self.scene.people[0]
        words = {
            "expression": first.expression,
            "clothing": first.clothing,
            "background": scene.background,
            "style": scene.style,
            "people": str(len(scene.people)),
        }
        return {t: w for t, w in words.items() if decidable(t, w, style=scene.style, people=len(scene.people))}


@dataclass(frozen=True)
class Portraits:
    """Two true renders of one person: `face` is the crop of `reference`; the model never sees `other`."""

    person: int
    face: Image.Image
    reference: torch.Tensor
    other: torch.Tensor


def plan_trials(
    identities: int, prompts: int, *, seed: int = 0, people: int = 1, exclude: Collection[str] = (), **fixed: Any
) -> list[Trial]:
    """`prompts` scenes for each of `identities` test people; further people of a scene are the next ones.

    Nobody is in the scenes of two of them, so that an interval that resamples trials by `person` holds.

    Captions in `exclude` (those seen in training) are passed over. `fixed` is handed to `sample_scene`. With one
    person a caption says "a person", so that the prompt gives no hint about who is meant.
    """
    trials = []
    for index in range(identities):
        person = FIRST_TEST_IDENTITY + index * people
        candidates = count(_SCENE_SEEDS + seed * 10**9 + index * 10**4)
        for number in range(prompts):
            for scene_seed in candidates:
                scene = sample_scene(scene_seed, [person + i for i in range(people)], **fixed)
                text = caption(scene, plain=people == 1)
                if text not in exclude:
                    break
            trials.append(Trial(person, number, text, scene, seed=seed * 10**6 + index * 10**3 + number))
    return trials


@lru_cache(maxsize=512)
def portraits(person: int, *, seed: int = 0) -> Portraits:
    """Reference and other portrait of a test person: near-frontal photographs, every other trait of the scene free."""
    rng = random.Random(f"portraits {seed} {person}")
    draws = [(rng.randrange(_SCENE_SEEDS), rng.uniform(-NEAR_FRONTAL, NEAR_FRONTAL)) for _ in range(2)]
    scenes = [sample_scene(scene_seed, [person], style="photo", yaw=yaw) for scene_seed, yaw in draws]
    rendered = render(scenes)
    images = rendered.images.cpu()
    x0, y0, x1, y1 = rendered.boxes[0][0].tolist()
    return Portraits(
        person, crop_face(to_pil(images[0]), (x0, y0, x1, y1), resolution=images.shape[-1]), images[0], images[1]
    )


@lru_cache(maxsize=512)
def detected_face(person: int, detector: DetectorName, *, seed: int = 0) -> Image.Image | None:
    """The crop of the person's reference by the face that a detector finds, as of a photo; None if it finds none."""
    reference = portraits(person, seed=seed).reference
    try:
        return prepare_face(to_pil(reference), detector, face_index=0, resolution=reference.shape[-1])
    except (NoFaceError, FaceTooSmallError):
        return None


def reference_face(person: int, *, seed: int = 0, cut_out: CutOut = TRUE_BOX) -> Image.Image:
    """What the model is given: cut out by the true box, or by a detector, if it finds the face."""
    found = None if cut_out == "true" else detected_face(person, cut_out, seed=seed)
    return portraits(person, seed=seed).face if found is None else found


def true_renders(
    trials: list[Trial], *, person_shift: int = 0, batch: int = 16, size: int = IMAGE_SIZE
) -> torch.Tensor:
    """The scenes of the trials as the renderer draws them (N, 3, size, size); `person_shift` puts other people in."""
    scenes = [with_others(trial.scene, person_shift) for trial in trials]
    parts = [render(scenes[start : start + batch], size).images.cpu() for start in range(0, len(scenes), batch)]
    return torch.cat(parts)


def with_others(scene: Scene, shift: int) -> Scene:
    people = tuple(
        replace(p, identity=sample_identity(p.identity.seed + shift, p.identity.world)) for p in scene.people
    )
    return replace(scene, people=people)
