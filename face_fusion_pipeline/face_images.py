"""Faces in pictures: detect them, choose the one that is meant, cut out the square around it."""

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageFilter

from .face_detectors import YUNET_WAYS, Face, FaceDetector, faces_on_picture
from .face_errors import FaceTooSmallError, NoFaceError, SeveralFacesError, UnreadableImageError


MAX_CROP = 20_000  # pixels a side: 1.2 GB
MIN_FACE = 24  # pixels: the smallest face height worth encoding
SURE = 0.5  # a face of this score needs no other look at the picture
BYSTANDER = 1 / 3  # a face below this part of the largest face's height is taken for a passer-by
STREAKS = 0.05  # of the crop: the blur of what lies beyond the picture, and how soon it sets in
CROP_ENLARGE = 1.6  # side of the crop in face heights: hair and chin are in


def detect_faces(image: Image.Image, detector: FaceDetector) -> list[Face]:
    """All faces of an image, from left to right, in its pixels; an empty list if there is none.

    Each size that the detector works well at is tried, then the same with a margin (a face that fills the picture has
    no surroundings to be told from). The first view with a sure face ends the search; else the surest view counts.
    """
    best: list[Face] = []
    for view, scale, border in views(image, detector.sizes):
        moved = (face.moved(1 / scale, -border, -border) for face in detector.detect(view))
        found = faces_on_picture(moved, image.size)
        surest = max((face.score for face in found), default=0.0)
        if surest > max((face.score for face in best), default=0.0):
            best = found
        if surest >= SURE:
            break
    return sorted(best, key=lambda face: face.box[0] + face.box[2])


def views(image: Image.Image, sizes: tuple[int, ...]) -> Iterator[tuple[Image.Image, float, float]]:
    """The picture at every size, then with a margin: (view, its pixels for one of the picture, margin in those)."""
    for margin in (0.0, 0.4):
        for size in sizes:
            scale = size / (max(image.size) * (1 + 2 * margin))
            shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            view = image.resize(shape, Image.Resampling.BICUBIC)  # first, for a margin of a large photo is large
            border = round(margin * max(shape))
            if border:
                view = crop_box(view, (-border, -border, view.width + border, view.height + border))
            yield view, scale, border / scale


def find_face(
    image: Image.Image, detector: FaceDetector, face_index: int | None = None, min_size: float = MIN_FACE
) -> Face:
    """The one face that is meant, in a picture as it stands; see [`chosen_face`]."""
    return chosen_face(detect_faces(image, detector), image, detector, face_index, min_size)


def chosen_face(
    faces: Sequence[Face], image: Image.Image, detector: FaceDetector, face_index: int | None, min_size: float
) -> Face:
    """The one face that is meant.

    Args:
        faces: all of the image, from left to right.
        face_index: which face, counted from 0 and from left to right. None: the only one, where faces below a third
            of the largest one's height count as passers-by.
        min_size: smallest height in pixels.

    Raises:
        NoFaceError, SeveralFacesError (lists index and box of each), FaceTooSmallError.
    """
    if not faces:
        better = f". YuNet finds more faces than haar: {YUNET_WAYS}" if detector.name == "haar" else ""
        raise NoFaceError(
            f"no face found in the {image.width}x{image.height} picture (detector: {detector.name}): take a photo "
            "that shows the face larger, sharper and more frontal, or skip detection for a face crop (--no-detect)"
            f"{better}"
        )
    listing = ", ".join(f"{i}: ({', '.join(f'{v:.0f}' for v in face.box)})" for i, face in enumerate(faces))
    if face_index is not None:
        if not 0 <= face_index < len(faces):
            raise NoFaceError(f"there is no face {face_index}; faces found, left to right (x0, y0, x1, y1): {listing}")
        face = faces[face_index]
    else:
        face = max(faces, key=lambda face: face.height)
        rivals = [other for other in faces if other is not face and other.height >= BYSTANDER * face.height]
        if rivals:
            raise SeveralFacesError(
                f"{len(faces)} faces found where one is meant; choose one with --face-index (face_index=...), "
                f"left to right (x0, y0, x1, y1): {listing}"
            )
    if face.height < min_size:
        raise FaceTooSmallError(
            f"the face is {face.width:.0f}x{face.height:.0f} pixels, below {min_size:g}: take a larger picture of it"
        )
    return face


def crop_box(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The part of the image inside an XYXY pixel box; beyond the image, its edge pixels are repeated.

    Raises:
        UnreadableImageError: a box that is not finite, or a side above 20,000 pixels.
    """
    if not (np.isfinite(box).all() and max(box[2] - box[0], box[3] - box[1]) <= MAX_CROP):
        sides = ", ".join(f"{side:g}" for side in box)
        raise UnreadableImageError(f"the crop ({sides}) of the image is above {MAX_CROP} pixels a side, or no box")
    x0, y0, x1, y1 = (round(value) for value in box)
    columns = np.arange(x0, max(x1, x0 + 1)).clip(0, image.width - 1)
    rows = np.arange(y0, max(y1, y0 + 1)).clip(0, image.height - 1)
    # cut out first what lies inside: the rest of a large photo need not be copied
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    inside = np.asarray(image.crop((int(left), int(top), int(right), int(bottom))))
    return Image.fromarray(inside[np.ix_(rows - top, columns - left)])


def without_streaks(square: Image.Image, image: Image.Image, corner: tuple[float, float]) -> Image.Image:
    """A crop by [`crop_box`] whose upper left is at `corner` of the image, blurred where it lies beyond that."""
    left, top = (round(value) for value in corner)
    beyond_x, beyond_y = (
        np.maximum(-np.arange(start, start + size), np.arange(start, start + size) - end + 1).clip(0)
        for start, size, end in ((left, square.width, image.width), (top, square.height, image.height))
    )
    beyond = np.maximum(beyond_x[None], beyond_y[:, None])  # pixels from the image, 0 inside
    if not beyond.any():
        return square
    radius = STREAKS * max(square.size)
    blurred = square.filter(ImageFilter.GaussianBlur(radius))
    share = Image.fromarray((255 * (beyond / radius).clip(0, 1)).astype(np.uint8))
    return Image.composite(blurred, square, share)


def crop_face(
    image: Image.Image,
    box: tuple[float, float, float, float],
    enlarge: float = CROP_ENLARGE,
    resolution: int | None = None,
) -> Image.Image:
    """The square around a face, `enlarge` times the box's longer side, resized to `resolution` pixels if given.

    Beyond the image its edge goes on, ever more blurred: repeated alone it would be streaks, which a model draws.
    """
    if not enlarge > 0 or (resolution is not None and resolution < 1):
        raise ValueError(f"enlarge and resolution must be positive, got {enlarge} and {resolution}")
    x0, y0, x1, y1 = box
    x, y, half = (x0 + x1) / 2, (y0 + y1) / 2, enlarge * max(x1 - x0, y1 - y0) / 2
    square = without_streaks(crop_box(image, (x - half, y - half, x + half, y + half)), image, (x - half, y - half))
    if resolution is None:
        return square
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS)
