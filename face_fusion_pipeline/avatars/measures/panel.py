"""All measures together, as a table of avatars asks them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...face_errors import ModelNotFoundError
from ..evaluation.evaluators import Evaluators
from ..evaluation.renders import at_size
from .crops import features, heads, locate
from .drawing import EyeEvaluator, load_eye_evaluator
from .looks import Look
from .traits import SHIPPED, TraitEstimators, load_traits


logger = logging.getLogger(__name__)

EYE_ROWS = slice(1, 4)  # of the planes of the features: from the brows to below the eyes


@dataclass(frozen=True)
class Seen:
    """Of one picture: which traits of a person it shows, whether both eyes are well drawn, and features for KID.

    Features are what the network of the traits sees in the head, and around the eyes.
    """

    shown: dict[str, bool]  # of the traits that the picture of the scene can show
    eyes: bool
    head_features: np.ndarray
    eye_features: np.ndarray


@dataclass
class Measures:
    """Trait estimators and the evaluator of drawing, for pictures of `size` pixels; `evaluators` find the faces."""

    evaluators: Evaluators
    traits: TraitEstimators
    drawing: EyeEvaluator

    @property
    def size(self) -> int:
        return int(self.traits.about["size"])

    @torch.inference_mode()
    def look(self, images: Tensor, people: Sequence[Look]) -> list[Seen]:
        """Images (B, 3, S, S) in [0, 1] of any size, each compared with a person (`people` has one, or one each)."""
        images = at_size(images, self.size)
        points = locate(self.evaluators, images)
        estimates, eyes = self.traits.estimate(images, points), self.drawing.well_drawn(images, points)
        head, face = self.traits.network.planes(heads(images, points), features(images, points))
        both = head.flatten(1).numpy(), face[:, :, EYE_ROWS].flatten(1).numpy()
        people = [people[0]] * len(images) if len(people) == 1 else people
        return [
            Seen({t: look.shows(t, seen) for t, seen in found.items() if look.visible(t)}, *rest)
            for look, found, *rest in zip(people, estimates, eyes, *both, strict=True)
        ]


def load_measures(evaluators: Evaluators, folder: Path = SHIPPED) -> Measures | None:
    """The measures in a folder, by default those of the package; None, and a line in the log, where there are none."""
    try:
        return Measures(evaluators, load_traits(folder), load_eye_evaluator(folder))
    except ModelNotFoundError as error:
        logger.warning("neither traits nor drawing are measured: %s", error)
        return None
