"""From one photo to one training example, or the reason why it is none: decode, find the face, filter, crop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image

from ..face_detectors import Face, FaceDetector, faces_on_picture
from ..face_errors import (
    FaceFusionError,
    FaceTooSmallError,
    NoFaceError,
    SeveralFacesError,
    UnreadableImageError,
    also_named,
)
from ..face_images import CROP_ENLARGE, crop_box, crop_face
from ..face_pictures import load_image
from ..generation.photos import find_upright
from .photos import Box, Fault, Photo


SHARPNESS_SIZE = 112  # pixels of face height at which sharpness is measured
THUMBNAIL = 8  # pixels a side of what tells copies of a photo
# Where eyes, nose and mouth corners lie in a face box (x, y), if the detector does not tell: medians on photographs.
LANDMARKS_IN_BOX = ((0.27, 0.38), (0.73, 0.38), (0.5, 0.58), (0.3, 0.73), (0.7, 0.73))


EARLIER_NAMES = {"min_face_share": "min_face_fraction"}


@dataclass(frozen=True)
class SelectionOptions:
    """What a photo must be like, and what is made of it.

    Attributes:
        resolution: side of the training image in pixels.
        reference_resolution: side of the face crop in pixels.
        min_side: least width and height of a photo in pixels.
        min_face: least height of the face in the photo, pixels.
        min_sharpness: least [`sharpness`] of the face; 0 takes blurred ones too.
        min_face_fraction: least height of the face over the side of the training image: far faces are cropped closer.
        caption: caption of a photo that has none.
    """

    resolution: int = 512
    reference_resolution: int = 512
    min_side: int = 256
    min_face: float = 64
    min_sharpness: float = 10.0
    min_face_fraction: float = 0.15
    caption: str = "a photo of a person"


SelectionOptions.__init__ = also_named(**EARLIER_NAMES)(SelectionOptions.__init__)  # type: ignore[method-assign]


class RefusedPhotoError(FaceFusionError):
    """A photo that is not good enough; `reason` is what the report counts it under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


REASONS: dict[type[FaceFusionError], str] = {
    UnreadableImageError: "unreadable",
    NoFaceError: "no face",
    SeveralFacesError: "several faces",
    FaceTooSmallError: "face too small",
}


@dataclass(frozen=True)
class Example:
    """A training example: a square image with one face, and the crop of that face that serves as reference.

    `box` (XYXY) and `landmarks5` are in pixels of `image`; `thumbnail` is of the whole photo, see [`thumbnail`];
    `faults` are what the source says of the photo and cannot be.
    """

    image: Image.Image
    crop: Image.Image
    text: str
    box: Box
    landmarks5: list[list[float]]
    thumbnail: str
    faults: tuple[Fault, ...] = ()


def select(photo: Photo, options: SelectionOptions, detector: Callable[[], FaceDetector]) -> Example:
    """The example that a photo gives.

    Args:
        detector: called for the detector if one is needed: a source may say where the face is.

    Raises:
        UnreadableImageError, NoFaceError, SeveralFacesError, FaceTooSmallError, RefusedPhotoError.
    """
    if photo.refused is not None:
        raise RefusedPhotoError(*photo.refused)
    if photo.people is not None and photo.people != 1:
        raise (SeveralFacesError if photo.people else NoFaceError)(f"{photo.people} people are in the picture")
    image = load_image(photo.content)
    photo = possible(photo, image.size)
    image, face = find(photo, image, options, detector)
    left, top, side = training_square(face, image.size, options.min_face_fraction)
    scale = options.resolution / side
    placed = face.moved(scale, -left * scale, -top * scale)
    if photo.reference is None:
        crop = crop_face(image, face.box, CROP_ENLARGE, options.reference_resolution)
    else:
        crop = reference_crop(photo.reference, options, detector)
    return Example(
        image=resized(crop_box(image, (left, top, left + side, top + side)), options.resolution),
        crop=crop,
        text=photo.text.encode(errors="replace").decode().strip() or options.caption,
        box=tuple(round(value, 2) for value in placed.box),  # type: ignore[arg-type]
        landmarks5=landmarks(placed).round(2).tolist(),
        thumbnail=thumbnail(image),
        faults=photo.faults,
    )


def possible(photo: Photo, size: tuple[int, int]) -> Photo:
    """The photo without a box or landmarks that cannot be of a face in a picture of `size`: they become faults."""
    if photo.box is not None and not faces_on_picture([Face(photo.box, 1.0)], size):
        fault = ("box", f"box {list(photo.box)} is not on the picture of {size[0]}x{size[1]} pixels")
        photo = replace(photo, box=None, landmarks5=None, faults=(*photo.faults, fault))
    points = np.asarray(photo.landmarks5 or [], dtype=np.float64)
    if photo.landmarks5 is not None and np.abs(points).max() > 3 * max(size):
        fault = ("landmarks5", f"points {photo.landmarks5} are not on the picture of {size[0]}x{size[1]} pixels")
        photo = replace(photo, landmarks5=None, faults=(*photo.faults, fault))
    return photo


def find(
    photo: Photo, image: Image.Image, options: SelectionOptions, detector: Callable[[], FaceDetector]
) -> tuple[Image.Image, Face]:
    """A photo and its one face, where the source says, or where the detector sees it with the photo turned upright.

    Raises RefusedPhotoError where the face is small or blurred.
    """
    if min(image.size) < options.min_side:
        raise RefusedPhotoError(
            "photo too small", f"{image.width}x{image.height} pixels, below {options.min_side} a side"
        )
    if photo.box is None:
        image, face = find_upright(image, detector(), min_size=options.min_face)
    else:
        face = Face(photo.box, 1.0, None if photo.landmarks5 is None else np.asarray(photo.landmarks5))
        if face.height < options.min_face:
            raise FaceTooSmallError(f"the face is {face.height:.0f} pixels high, below {options.min_face:g}")
    if (found := sharpness(image, face.box)) < options.min_sharpness:
        raise RefusedPhotoError("blurred", f"sharpness {found:.1f}, below {options.min_sharpness:g}")
    return image, face


def reference_crop(path: object, options: SelectionOptions, detector: Callable[[], FaceDetector]) -> Image.Image:
    """The face crop of a photo that the source names as reference; its errors say that it is the reference."""
    try:
        image = load_image(path)  # type: ignore[arg-type]
        image, face = find_upright(image, detector(), min_size=options.min_face)
    except FaceFusionError as error:
        raise type(error)(f"reference {path}: {error}") from error
    return crop_face(image, face.box, CROP_ENLARGE, options.reference_resolution)


def training_square(face: Face, size: tuple[int, int], min_face_fraction: float) -> tuple[int, int, int]:
    """(left, top, side) of the largest square in an image of `size` (width, height) that has the face in its middle.

    As near to the middle as the image allows; closer where the face would be below `min_face_fraction` of the side.
    """
    side = min(size)
    if face.height < min_face_fraction * side:
        side = max(1, min(side, round(face.height / min_face_fraction)))
    x, y = (face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2
    left, top = (round(min(max(c - side / 2, 0), whole - side)) for c, whole in zip((x, y), size, strict=True))
    return left, top, side


def resized(image: Image.Image, side: int) -> Image.Image:
    return image if image.size == (side, side) else image.resize((side, side), Image.Resampling.LANCZOS)


def sharpness(image: Image.Image, box: Box) -> float:
    """Variance of the Laplacian of the face's luminance, the face at most 112 pixels high.

    Sharp photographs have 100 and more; blurred by a twenty-fifth of the face's height, they have less than 10.
    Larger faces are scaled down first, so that a large photo that is soft at its full size is not refused.
    """
    gray = np.asarray(crop_box(image, box).convert("L"))
    if gray.shape[0] > SHARPNESS_SIZE:
        width = max(1, round(gray.shape[1] * SHARPNESS_SIZE / gray.shape[0]))
        gray = cv2.resize(gray, (width, SHARPNESS_SIZE), interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(gray, cv2.CV_64F).var())


def landmarks(face: Face) -> np.ndarray:
    """(5, 2) points of the face: the detector's own, else where they are in most faces."""
    if face.landmarks5 is not None:
        return np.asarray(face.landmarks5, dtype=np.float64)
    corner, extent = np.array(face.box[:2]), np.array([face.width, face.height])
    return corner + extent * np.array(LANDMARKS_IN_BOX)


def thumbnail(image: Image.Image) -> str:
    """The picture in 8 x 8 grey cells as hexadecimal text, by which copies of a photo are recognised."""
    gray = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(gray).tobytes().hex()


def differences(own: str, others: Sequence[str]) -> np.ndarray:
    """Mean absolute difference (N,) in grey levels of one thumbnail to N others.

    Below 1 for the same photo in another size or quality; two portraits in one studio have 3 and more.
    """
    cells = np.frombuffer(bytes.fromhex("".join([own, *others])), dtype=np.uint8).astype(np.int16)
    cells = cells.reshape(-1, THUMBNAIL**2)
    return np.abs(cells[1:] - cells[0]).mean(axis=1)
