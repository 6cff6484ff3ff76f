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
from ..evaluation.judges import Judges
from ..evaluation.renders import at_size
from .crops import eye_bands, features, heads, locate
from .drawing import EyeJudge, load_eye_judge
from .looks import Look
from .traits import SHIPPED, TraitEstimators, load_traits


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """Of one picture: which traits of a person it shows, whether both eyes are well drawn, and features for KID."""

    shown: dict[str, bool]  # of the traits that the picture of the scene can show
    eyes: bool
    head_features: np.ndarray
    eye_features: np.ndarray


@dataclass
class Measures:
    """Trait estimators and the judge of drawing, made for pictures of `size` pixels; `judges` find the faces."""

    judges: Judges
    traits: TraitEstimators
    drawing: EyeJudge

    @property
    def size(self) -> int:
        return int(self.traits.about["size"])

    @torch.inference_mode()
    def look(self, images: Tensor, people: Sequence[Look]) -> list[Seen]:
        """Images (B, 3, S, S) in [0, 1] of any size, each compared with a person (`people` has one, or one each)."""
        images = at_size(images, self.size)
        points = locate(self.judges, images)
        estimates, eyes = self.traits.estimate(images, points), self.drawing.well_drawn(images, points)
        head_features = self.traits.network.look(heads(images, points), features(images, points)).numpy()
        eye_features = self.drawing.network.features(eye_bands(images, points)).numpy()
        people = [people[0]] * len(images) if len(people) == 1 else people
        return [
            Seen({t: look.shows(t, seen) for t, seen in found.items() if look.visible(t)}, good, *found_features)
            for look, found, good, *found_features in zip(
                people, estimates, eyes, head_features, eye_features, strict=True
            )
        ]


def load_measures(judges: Judges, folder: Path = SHIPPED) -> Measures | None:
    """The measures in a folder, by default those of the package; None, and a line in the log, where there are none."""
    try:
        return Measures(judges, load_traits(folder), load_eye_judge(folder))
    except ModelNotFoundError as error:
        logger.warning("neither traits nor drawing are measured: %s", error)
        return None
