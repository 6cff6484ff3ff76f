"""From a photograph to the square face crop that Face Fusion takes as reference: load, turn upright, choose, crop."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from ..face_detectors import DetectorName, Face, FaceDetector, load_detector
from ..face_errors import FaceTooSmallError, NoFaceError, SeveralFacesError
from ..face_images import CROP_ENLARGE, MIN_FACE, chosen_face, crop_face, detect_faces, views
from ..face_pictures import ImageSource, centre_square, load_image


logger = logging.getLogger(__name__)

TURNED_MARGIN = 0.03  # of the mean score: so much surer a turned picture has to be than as it is
TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)  # anticlockwise


def upright_faces(image: Image.Image, detector: FaceDetector) -> tuple[Image.Image, list[Face]]:
    """The picture, turned by quarters where its faces are surer so, and all faces of it from left to right.

    Detectors find faces that lie or hang, too, as those of other people. Their scores tell, but not alone: so the
    mean over four views counts, which has to be high in the turned picture and above that of the picture as it is. A
    picture with a face of the score `detector.clear` is not looked at again, nor is any by a detector without it.
    """
    faces = detect_faces(image, detector)
    clear, least = getattr(detector, "clear", None), getattr(detector, "turned", 1.0)
    if clear is None or max((face.score for face in faces), default=0.0) >= clear:
        return image, faces
    small = image.copy()
    small.thumbnail((2 * max(detector.sizes[:2]),) * 2, Image.Resampling.BICUBIC)
    as_it_is, *sureness = (_sureness(small if turn is None else small.transpose(turn), detector) for turn in TURNS)
    best = max(range(len(sureness)), key=sureness.__getitem__)
    if sureness[best] < max(least, as_it_is + TURNED_MARGIN):
        return image, faces
    logger.info(
        "the face lies or hangs: the picture is turned by %d degrees (sureness %.2f, as it was %.2f)",
        *(90 * (best + 1), sureness[best], as_it_is),
    )
    image = image.transpose(TURNS[best + 1])  # type: ignore[arg-type]
    return image, detect_faces(image, detector)


def _sureness(image: Image.Image, detector: FaceDetector) -> float:
    """Mean over views, of two sizes with and without a margin, of the score of the surest face."""
    seen = [view for view, _, _ in views(image, detector.sizes[:2])]
    return sum(max((face.score for face in detector.detect(view)), default=0.0) for view in seen) / len(seen)


def with_mirrored(crops: Sequence[Image.Image]) -> list[Image.Image]:
    """The face crops of a person, then each of them mirrored: so many more references of somebody nearly symmetric."""
    return [*crops, *(ImageOps.mirror(crop) for crop in crops)]


@dataclass(frozen=True)
class FacePhoto:
    """A picture with the face that is meant; `face` is None if the picture as a whole already is a face crop."""

    image: Image.Image
    face: Face | None

    def crop(self, enlarge: float = CROP_ENLARGE, resolution: int | None = None) -> Image.Image:
        """The reference for `face_image=`: RGB, square, `resolution` pixels a side.

        None keeps the pixels of the photo; what encodes the reference resizes it to what its model takes.
        """
        if self.face is None:
            return centre_square(self.image, resolution or min(self.image.size))
        return crop_face(self.image, self.face.box, enlarge, resolution)


def find_upright(
    image: Image.Image, detector: FaceDetector, face_index: int | None = None, min_size: float = MIN_FACE
) -> tuple[Image.Image, Face]:
    """A picture, turned where its faces are surer so (see [`upright_faces`]), and the face that is meant in it."""
    image, faces = upright_faces(image, detector)
    return image, chosen_face(faces, image, detector, face_index, min_size)


def locate_face(
    source: ImageSource,
    detector: DetectorName | FaceDetector | None = "auto",
    face_index: int | None = None,
    min_size: float = MIN_FACE,
    name: str | None = None,
) -> FacePhoto:
    """Load a picture, turn it upright and find the face that is meant.

    Args:
        source, name: as for `load_image`.
        detector: as for `load_detector`. None: the picture already is a face crop.
        face_index, min_size: as for `chosen_face`, in the picture turned upright.

    Raises:
        UnreadableImageError, NoFaceError, SeveralFacesError, FaceTooSmallError, ModelNotFoundError.
    """
    image = load_image(source, name)
    if detector is None:
        return FacePhoto(image, None)
    try:
        image, face = find_upright(image, load_detector(detector), face_index, min_size)
    except (NoFaceError, SeveralFacesError, FaceTooSmallError) as error:
        if name is None and isinstance(source, (str, os.PathLike)):
            raise type(error)(f"{source}: {error}") from error
        raise
    logger.info("face at (%s), score %.2f", ", ".join(f"{value:.0f}" for value in face.box), face.score)
    return FacePhoto(image, face)


def prepare_face(
    source: ImageSource,
    detector: DetectorName | FaceDetector | None = "auto",
    face_index: int | None = None,
    enlarge: float = CROP_ENLARGE,
    resolution: int | None = None,
    min_size: float = MIN_FACE,
) -> Image.Image:
    """`locate_face` and `FacePhoto.crop` in one: from a photo to the reference for `face_image=`."""
    return locate_face(source, detector, face_index, min_size).crop(enlarge, resolution)
