"""A face detector for portraits of avatars: the evaluators' landmarks say where the face is."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from PIL import Image

from ...face_detectors import Face
from .evaluators import IMAGE_SIZE, Evaluators, load_evaluators
from .renders import at_size


HEIGHT, ABOVE = 0.58, 0.07  # of a picture's side: a face box, and its middle over that of the landmarks (medians)


class AvatarDetector:
    """Finds the face of a portrait, so that evaluations need no other detector."""

    name, sizes = "avatars", (IMAGE_SIZE,)

    @cached_property
    def evaluators(self) -> Evaluators:
        return load_evaluators()

    def detect(self, image: Image.Image) -> list[Face]:
        """The one face, with its five landmarks."""
        pixels = at_size(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255, IMAGE_SIZE)
        points = self.evaluators.locate(pixels)[0] * (image.width / IMAGE_SIZE)
        return [Face(self.box(points, image.width), 1.0, points.numpy())]

    def box(self, points: torch.Tensor, side: float) -> tuple[float, float, float, float]:
        """XYXY about five landmarks, as the renderer draws boxes, which hardly differ in size."""
        x, y = points.mean(0).tolist()
        half, y = HEIGHT * side / 2, y - ABOVE * side
        return x - half, y - half, x + half, y + half
