"""The parts of a picture that measures look at, all cut out along the five landmarks of the face."""

from __future__ import annotations

from torch import Tensor

from ...face_recognisers import align_faces, face_template
from ..evaluation.evaluators import IMAGE_SIZE, Evaluators
from ..evaluation.renders import at_size


EYE_ZOOM, EYE_CROP = 1.2, 7 / 8  # of the aligned face; pixels of a crop's side to one of the picture's side
HEAD_ZOOM, HEAD_CROP = 0.62, 3 / 4  # hair, ears and chin are in the crop, a little smaller than in the picture
FACE_ZOOM, FACE_CROP = 1.15, 3 / 4  # from the brows to the mouth, a little larger than in the picture
BAND = 3 / 7  # height of the band of the eyes, as a fraction of its width


def locate(evaluators: Evaluators, images: Tensor) -> Tensor:
    """Five landmarks (B, 5, 2), in pixels, of the main person of images (B, 3, S, S) in [0, 1], of any size S."""
    found = evaluators.locate(at_size(images, IMAGE_SIZE))
    return (found + 0.5) * (images.shape[-1] / IMAGE_SIZE) - 0.5


def heads(images: Tensor, landmarks: Tensor) -> Tensor:
    """Whole heads (B, 3, C, C) of images (B, 3, S, S) with landmarks (B, 5, 2) in their pixels."""
    return align_faces(images, landmarks, round(HEAD_CROP * images.shape[-1]), zoom=HEAD_ZOOM)


def features(images: Tensor, landmarks: Tensor) -> Tensor:
    """Brows, eyes, nose and mouth (B, 3, C, C); as `heads`, and of the same size."""
    return align_faces(images, landmarks, round(FACE_CROP * images.shape[-1]), zoom=FACE_ZOOM)


def eye_bands(images: Tensor, landmarks: Tensor) -> Tensor:
    """Both eyes with their brows (B, 3, 48, 112) of images of 128 pixels, of others in proportion; as `heads`."""
    side = round(EYE_CROP * images.shape[-1])
    height = round(BAND * side)
    top = _top(side, height)
    return align_faces(images, landmarks, side, zoom=EYE_ZOOM)[..., top : top + height, :]


def band_eyes(width: int, height: int) -> Tensor:
    """Where the eyes lie in a band of eyes, about: (2, 2), left and right, x and y in pixels."""
    eyes = face_template(width, EYE_ZOOM)[:2].clone()
    eyes[:, 1] -= _top(width, height)
    return eyes


def _top(side: int, height: int) -> int:
    """The first row of the band in the whole crop: the eyes lie in its middle."""
    level = face_template(side, EYE_ZOOM)[:2, 1].mean().item()
    return round(level + 0.5 - height / 2)
