"""Landmarks as a control picture: the shape of one face with the expression and the pose of another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from .conditioner import is_identity
from .face_detectors import load_detector
from .face_errors import FaceFusionError, InvalidLayoutError, LandmarksError, NoFaceError
from .face_images import detect_faces
from .face_landmarks import POINTS, Pose, check_points, draw_landmarks, points_box
from .face_layout import Box, assign_boxes, check_box, scale_boxes
from .face_models import FaceFit, FaceModel, fit_of, load_face_model, recombined
from .face_pictures import ImageSource, load_image


FOREHEAD = 0.35  # how far a face box reaches above the brows, as a share of the height from brows to chin


@dataclass(frozen=True)
class DrivenFaces:
    """Faces of a picture of `size` (width, height) in pixels: points (n, 72, 2 or 3), and the XYXY box of each."""

    points: np.ndarray
    boxes: list[Box]
    size: tuple[int, int]

    def draw(self) -> Image.Image:
        """The control picture."""
        return draw_landmarks(self.points, self.size)


def landmark_control(
    source: Any = None,
    driver: Any = None,
    *,
    face_model: Any = None,
    yaw: float | None = None,
    pitch: float | None = None,
    roll: float | None = None,
    expression: Any = None,
    face_boxes: Sequence[Box] | None = None,
    size: tuple[int, int] | None = None,
    face_detector: Any = "auto",
) -> Image.Image:
    """The dots of a face with the source's shape and the driver's expression and pose, for a landmark ControlNet.

    Args:
        source: photo of a person or `FaceFit`; of several people a list with one each. None: the driver's own shape.
        driver: photo, `FaceFit` or [`Pose`], or a list with one for each person; of a photo as many faces are taken as
            there are sources, from left to right. A pose leaves the expression as the source has it. None: the
            source's own photo.
        face_model: see `face_models.load_face_model`.
        yaw, pitch, roll: degrees that replace the driver's, see `face_landmarks.Pose`.
        expression: replaces the driver's, see `FaceModel.expression_of`.
        face_boxes: XYXY in pixels of the result, one for each person: where the faces go, in the driver's place else.
        size: (width, height) of the result in pixels; default: the driver's photo, else the source's.
        face_detector: see `face_detectors.load_detector`.

    Raises:
        NoFaceError: no face in a photo, or fewer than people. LandmarksError: a face that cannot be fitted, a face
            wholly outside the picture, an angle or expression that is none. ModelNotFoundError: no face model.
    """
    if source is None and driver is None:
        raise FaceFusionError("landmark_control needs a source, a driver or both")
    model = load_face_model(face_model)
    sources = [] if source is None else list(source) if isinstance(source, (list, tuple)) else [source]
    fits = [fit_of(model, each) for each in sources]

    def detect(photo: Image.Image) -> list[Box]:
        return [face.box for face in detect_faces(photo, load_detector(face_detector))]

    return driven_faces(model, fits, driver, detect, face_boxes, size, (yaw, pitch, roll), expression).draw()


def driven_faces(
    model: FaceModel,
    sources: Sequence[FaceFit],
    driver: Any,
    detect: Callable[[Image.Image], list[Box]],
    boxes: Sequence[Box] | None = None,
    size: tuple[int, int] | None = None,
    turned: tuple[float | None, float | None, float | None] = (None, None, None),
    expression: Any = None,
    assign: Sequence[int] | None = None,
    default_size: tuple[int, int] | None = None,
) -> DrivenFaces:
    """Points of the sources' shapes with the drivers' expressions and poses; see [`landmark_control`].

    Args:
        sources: none: the drivers' own shapes.
        detect: the boxes of all faces of a photo.
        turned, expression: what replaces the drivers' yaw, pitch and roll, and their expressions.
        assign: which faces of a driving photo are taken, see `face_layout.assign_boxes`.
        default_size: what the result's size stays within where `size` does not say it; of the photo's shape, if there
            is one.
    """
    people = len(sources) or (None if boxes is None else len(boxes))
    drivers, drawn_in = driving_fits(model, driver, sources, people, detect, assign, boxes is not None)
    sources = sources or drivers
    if size is None:
        size = drawn_in if default_size is None else within(drawn_in or default_size, default_size)
    if size is None:
        raise LandmarksError("a pose alone does not say how large the picture is: give size=(width, height)")
    if boxes is not None and len(boxes) != len(sources):
        raise InvalidLayoutError(f"{len(boxes)} boxes for {len(sources)} faces: give one for each")
    points, places = [], []
    for i, (source, fit) in enumerate(zip(sources, drivers, strict=True)):
        fit = fit.turned(*turned)
        if expression is not None:
            fit = replace(fit, expression=model.expression_of(expression))
        own = face_box(model, fit)
        place = in_picture(own, fit.size, size) if boxes is None else check_box(boxes[i], size[1], size[0])
        points.append(recombined(model, source, replace(fit, pose=moved_to(fit.pose, own, place))))
        places.append(place)
    return DrivenFaces(check_points(np.stack(points), size), places, size)


def driving_fits(
    model: FaceModel,
    driver: Any,
    sources: Sequence[FaceFit],
    people: int | None,
    detect: Callable[[Image.Image], list[Box]],
    assign: Sequence[int] | None,
    placed: bool,
) -> tuple[list[FaceFit], tuple[int, int] | None]:
    """A fit for each person, and the size of the picture that they are in, if there is one."""
    if driver is None:
        return list(sources), sources[0].size
    if isinstance(driver, Pose):
        driver = [driver] * (people or 1)
    if isinstance(driver, FaceFit):
        driver = [driver]
    if isinstance(driver, (list, tuple)):
        if people not in (None, len(driver)) and not (placed and len(driver) == 1):
            raise InvalidLayoutError(f"{len(driver)} drivers for {people} people: give one for each")
        fits = [one_fit(model, each, sources, i) for i, each in enumerate(driver)]
        return fits * ((people or len(fits)) // len(fits)), fits[0].size
    photo = load_image(driver)
    found = detect(photo)
    if not found or (people is not None and len(found) < people and not (placed and len(found) == 1)):
        raise NoFaceError(
            f"{len(found) or 'no'} face{'s' * (len(found) > 1)} found in the {photo.width}x{photo.height} driver for "
            f"{people or 'any'} people: take a photo that shows {'them' if found else 'a face'} larger and more "
            "frontal, or give face_boxes"
        )
    count = len(found) if people is None else min(people, len(found))
    fits = [model.fit(photo, box) for box in assign_boxes(found, count, assign)]
    return fits * ((people or len(fits)) // len(fits)), photo.size


def one_fit(model: FaceModel, driver: Any, sources: Sequence[FaceFit], index: int) -> FaceFit:
    """The fit of a driver that stands for one person."""
    if not isinstance(driver, Pose):
        return fit_of(model, driver)
    if sources:
        source = sources[index]
        return FaceFit(source.shape, source.expression, driver)
    raise LandmarksError("a pose has no face of its own: give a source, the photo of somebody")


def face_box(model: FaceModel, fit: FaceFit) -> Box:
    """The fit's own box, or where there is none about what a detector would draw around its points."""
    if fit.box is not None:
        return fit.box
    x0, y0, x1, y1 = points_box(model.points(fit.shape, fit.expression, fit.pose))
    return x0, y0 - FOREHEAD * (y1 - y0), x1, y1


def within(shape: tuple[int, int], most: tuple[int, int]) -> tuple[int, int]:
    """The largest size (width, height) of this shape, in steps of 8 pixels, whose longer side is that of `most`."""
    scale = max(most) / max(shape)
    width, height = (max(8, round(side * scale / 8) * 8) for side in shape)
    return width, height


def in_picture(box: Box, drawn_in: tuple[int, int] | None, size: tuple[int, int]) -> Box:
    """A box of one picture in another of `size`, which shows the whole of it without stretching; None: the same."""
    if drawn_in is None or drawn_in == size:
        return box
    scale = min(size[0] / drawn_in[0], size[1] / drawn_in[1])
    dx, dy = ((to - scale * was) / 2 for to, was in zip(size, drawn_in, strict=True))
    x0, y0, x1, y1 = scale_boxes([box], (1, 1), (scale, scale))[0]  # type: ignore[arg-type]
    return x0 + dx, y0 + dy, x1 + dx, y1 + dy


def moved_to(pose: Pose, box: Box, place: Box) -> Pose:
    """The pose of a face in `box` when the box is moved to `place`: centre to centre, as high as it."""
    scale = (place[3] - place[1]) / (box[3] - box[1])
    dx = (place[0] + place[2]) / 2 - scale * (box[0] + box[2]) / 2
    dy = (place[1] + place[3]) / 2 - scale * (box[1] + box[3]) / 2
    return pose.moved(scale, dx, dy)


def shape_of(model: FaceModel, references: Any) -> FaceFit:
    """The fit of a person's references, whose shape is the mean of those that can be fitted.

    Raises:
        FaceFusionError: an identity, which holds no picture. NoFaceError, LandmarksError: no reference can be fitted.
    """
    if is_identity(references):
        raise FaceFusionError("an identity holds no picture of its person: give the photo as control_source=")
    if isinstance(references, FaceFit):
        return references
    photos: list[ImageSource] = list(references) if isinstance(references, (list, tuple)) else [references]
    fits, errors = [], []
    for photo in photos:
        try:
            fits.append(fit_of(model, photo))
        except (NoFaceError, LandmarksError) as error:
            errors.append(error)
    if not fits:
        raise errors[0]
    return replace(fits[0], shape=np.mean([fit.shape for fit in fits], axis=0))


def are_points(image: Any) -> bool:
    """Whether a driver is points already: an array or tensor of (72, 2 or 3), or several such."""
    shape = tuple(getattr(image, "shape", ()))
    return len(shape) in (2, 3) and shape[-2] == POINTS and shape[-1] in (2, 3)
