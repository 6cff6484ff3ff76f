"""Faces with five landmarks in any picture: those of a detector, or where it gives none, of a locator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from ..face_detectors import Face, FaceDetector
from ..face_images import detect_faces
from ..face_pictures import load_image
from ..generation.photos import find_upright
from ..training.sources import Photo


class Locator(Protocol):
    """Anything that finds the five landmarks of known faces."""

    def landmarks(self, image: Image.Image, boxes: Sequence[Sequence[float]]) -> list[np.ndarray]:
        """Landmarks (5, 2) of each of the face boxes (XYXY), all in pixels of the RGB image."""
        ...


@dataclass
class FaceFinder:
    """A detector, and a locator that adds the landmarks which the detector does not give."""

    detector: FaceDetector
    locator: Locator | None = None

    def find(self, image: Image.Image) -> list[Face]:
        """All faces of an RGB image, from left to right; some detectors give no landmarks."""
        faces = detect_faces(image, self.detector)
        if self.locator is not None and any(face.landmarks5 is None for face in faces):
            points = self.locator.landmarks(image, [face.box for face in faces])
            faces = [replace(face, landmarks5=own) for face, own in zip(faces, points, strict=True)]
        return faces

    def photo(self, photo: Photo) -> tuple[Image.Image, Face]:
        """A photo of one person and the face that is meant: where its metadata say, else the one that is found.

        Raises UnreadableImageError, NoFaceError, SeveralFacesError, FaceTooSmallError.
        """
        image = load_image(photo.content)
        if photo.box is None:
            return find_upright(image, self.detector)
        points = None if photo.landmarks5 is None else np.asarray(photo.landmarks5, np.float64)
        return image, Face(photo.box, 1.0, points)
