"""What is seen in a picture: its faces, each with embeddings, head pose, expression and an aligned crop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from ..face_detectors import Face
from ..face_recognisers import CROP_SIZE, Recogniser, align_faces
from .copying import head_rotation
from .faces import FaceFinder
from .image_files import from_pil


class Classifier(Protocol):
    """Anything that gives a score for each expression from images and landmarks, as a recogniser gives embeddings."""

    name: str

    def embed(self, images: torch.Tensor, landmarks: torch.Tensor) -> np.ndarray:
        """Images (B, 3, H, W) in [0, 1] and landmarks (B, 5, 2) in pixels to logits (B, C)."""
        ...


@dataclass
class Observation:
    """One face; where no landmarks of it are known, there is nothing but its place.

    Attributes:
        face: box, score and landmarks in pixels of the picture.
        embeddings: a vector (D,) by recogniser.
        expression: a distribution (C,), or None without a classifier.
        crop: aligned, (3, 112, 112) in [0, 1].
    """

    face: Face
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    expression: np.ndarray | None = None
    crop: torch.Tensor | None = None

    @property
    def landmarks(self) -> np.ndarray:
        """(5, 2), pixels. Raises ValueError where there are none."""
        if self.face.landmarks5 is None:
            raise ValueError("a face without landmarks")
        return self.face.landmarks5

    @cached_property
    def rotation(self) -> np.ndarray:
        """Of the head, (3, 3)."""
        return head_rotation(self.landmarks)


@dataclass
class Observer:
    """Finds the faces of a picture and asks every recogniser, and the expression classifier, about each."""

    finder: FaceFinder
    recognisers: Sequence[Recogniser] = field(default_factory=tuple)
    expression: Classifier | None = None

    def observe(self, image: Image.Image) -> list[Observation]:
        """The faces of an RGB image, from left to right."""
        return [self.look_at(image, face) for face in self.finder.find(image)]

    def look_at(self, image: Image.Image, face: Face) -> Observation:
        """One face of an RGB image."""
        if face.landmarks5 is None:
            return Observation(face)
        pixels, landmarks = from_pil(image)[None], torch.from_numpy(face.landmarks5).float()[None]
        return Observation(
            face,
            {recogniser.name: recogniser.embed(pixels, landmarks)[0] for recogniser in self.recognisers},
            None if self.expression is None else distribution(self.expression.embed(pixels, landmarks)[0]),
            align_faces(pixels, landmarks, CROP_SIZE)[0],
        )


def distribution(scores: np.ndarray) -> np.ndarray:
    """Softmax of logits (C,); what already is a distribution is left as it is."""
    scores = np.asarray(scores, np.float64)
    if (scores >= 0).all() and np.isclose(scores.sum(), 1, atol=1e-3):
        return scores
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()
