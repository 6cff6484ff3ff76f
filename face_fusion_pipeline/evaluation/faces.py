"""Faces with five landmarks in any picture: those of a detector, or where it gives none, of the avatar judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from ..avatars.evaluation.judges import IMAGE_SIZE, Judges
from ..avatars.evaluation.renders import from_pil, to_pil
from ..face_detectors import Face, FaceDetector
from ..face_images import crop_box, detect_faces, find_upright, load_image
from ..training.sources import Photo


FACE_HEIGHT = 52.0  # pixels of a face box in an avatar portrait of 128, the median of the dataset


def portrait_square(box: Sequence[float]) -> tuple[float, float, float, float]:
    """The square around a face box (XYXY) that frames it as avatar portraits are framed."""
    x0, y0, x1, y1 = box
    half = (y1 - y0) * IMAGE_SIZE / FACE_HEIGHT / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - half, y - half, x + half, y + half


def portrait_crops(image: torch.Tensor, boxes: Sequence[Sequence[float]]) -> torch.Tensor:
    """The people of an image (3, H, W), each framed as a portrait by its face box: (n, 3, 128, 128)."""
    picture, crops = to_pil(image), []
    for box in boxes:
        square = crop_box(picture, portrait_square(box))
        crops.append(from_pil(square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)))
    return torch.stack(crops)


@dataclass
class FaceFinder:
    """A detector, and judges whose locator adds the landmarks that the detector does not give (of avatars only)."""

    detector: FaceDetector
    judges: Judges | None = None

    def find(self, image: Image.Image) -> list[Face]:
        """All faces of an RGB image, from left to right; some detectors give no landmarks."""
        faces = detect_faces(image, self.detector)
        if self.judges is not None and any(face.landmarks5 is None for face in faces):
            crops = portrait_crops(from_pil(image), [face.box for face in faces])
            points = self.judges.locate(crops).numpy()
            faces = [_with_landmarks(face, own) for face, own in zip(faces, points, strict=True)]
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


def _with_landmarks(face: Face, points: np.ndarray) -> Face:
    """`points` (5, 2) are pixels of the face's portrait crop."""
    x0, y0, x1, _ = portrait_square(face.box)
    scale = (x1 - x0) / IMAGE_SIZE
    return replace(face, landmarks5=(points + 0.5) * scale - 0.5 + np.array([x0, y0]))
