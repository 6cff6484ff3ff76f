"""Pictures that the model in training makes itself, for a loss that is to see what users will see.

A noised photo tells who is in it: from there a face is easily right. A user's picture begins as noise, and what is
wrong in it at first stays. So the identity loss can be taken along the model's own way from noise to picture (DDIM,
with guidance): without gradients to the states on it, then with gradients one step from each of them to a picture
(as in reward feedback learning, Xu et al. 2023, arXiv 2304.05977).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..face_detectors import Face, FaceDetector
from .objective import NoiseSchedule


SEARCHED = 320  # pixels a side at which faces are looked for
ASIDE = 0.5  # face heights that a face among others may be from its place


class OwnState(NamedTuple):
    """A state on the way: noisy latents, what the UNet predicts there without prompt and face, timesteps (B,)."""

    noisy: Tensor
    unconditional: Tensor
    timesteps: Tensor


# Noisy latents and timesteps (B,) to the UNet's predictions with prompt and face, and without both.
Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def own_timesteps(length: int, steps: int, least: float, generator: torch.Generator) -> Tensor:
    """Timesteps of a way in `steps` equal steps from the last of `length`, moved by up to half a step.

    It ends at `least` of all timesteps: the states below are not needed.
    """
    count = max(2, int(steps * (1 - least) + 0.5))
    moved = torch.arange(count) + torch.rand(count, generator=generator) - 0.5
    moved[0] = 0
    return ((1 - moved / steps) * length).long().clamp(1, length) - 1


@torch.no_grad()
def own_states(
    predict: Predict, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule, guidance: float
) -> tuple[list[OwnState], Tensor]:
    """The states at `timesteps` (S,) of the ways from `noise` (B, c, h, w), and the latents x at their end."""
    states, noisy = [], noise
    for number, timestep in enumerate(timesteps):
        here = timestep.expand(len(noise))
        conditional, unconditional = predict(noisy, here)
        states.append(OwnState(noisy, unconditional, here))
        latents = schedule.one_step(noisy, guided(conditional, unconditional, guidance), here)
        if number + 1 < len(timesteps):
            noisy = schedule.noised(
                latents, schedule.noise(noisy, latents, here), timesteps[number + 1].expand_as(here)
            )
    return states, latents


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance."""
    return unconditional + guidance * (conditional - unconditional)


def face_landmarks(pictures: Tensor, boxes: Tensor, others: Tensor, detector: FaceDetector) -> tuple[Tensor, Tensor]:
    """The face that belongs at a place: its landmarks (B, 5, 2) in pixels, and whether there is one (B,).

    Args:
        pictures: (B, 3, H, W) in [0, 1]. boxes, others: as in `Pairs.batch`; with others, a face elsewhere is theirs.
    """
    side = pictures.shape[-1]
    pixels = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    landmarks, found = torch.zeros(len(pictures), 5, 2), torch.zeros(len(pictures), dtype=torch.bool)
    for row, box in enumerate(boxes.cpu().tolist()):
        view = Image.fromarray(pixels[row]).resize((SEARCHED, SEARCHED), Image.Resampling.BICUBIC)
        faces = [face.moved(side / SEARCHED) for face in detector.detect(view)]
        faces = [face for face in faces if face.landmarks5 is not None]
        if not faces:
            continue
        nearest = min(faces, key=lambda face: _distance(face, box))  # noqa: B023  used at once
        if bool(others[row].isnan().all()) or _distance(nearest, box) < ASIDE * (box[3] - box[1]):
            landmarks[row], found[row] = torch.from_numpy(np.asarray(nearest.landmarks5)).float(), True
    return landmarks.to(pictures.device), found.to(pictures.device)


def _distance(face: Face, box: list[float]) -> float:
    """Between the middles, in pixels."""
    corners = np.array(face.box).reshape(2, 2).mean(0) - np.array(box).reshape(2, 2).mean(0)
    return float(np.hypot(*corners))
