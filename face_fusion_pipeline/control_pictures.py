"""Kinds of control pictures, each under the name that `control_kind` asks for it by.

A kind draws what its ControlNet takes of what the caller gives, knowing who is in the picture: depth of a photo,
coloured dots of a face's points, or a map as it is. A new one is registered by [`register_control`].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image

from .control_landmarks import DrivenFaces, are_points, driven_faces, shape_of
from .face_depth import control_depth, photo_of
from .face_errors import FaceFusionError
from .face_landmarks import check_points, points_box
from .face_layout import Box


ControlKind = Literal["auto", "depth", "photo", "map", "landmarks"]


@dataclass(frozen=True)
class ControlFaces:
    """The people of one picture, and the tools that a kind may ask for.

    Attributes:
        people: of each the references, or a `FaceFit`; none: nobody in particular.
        boxes: XYXY of each in pixels of the result, where they are given.
        size: (width, height) of the result, where it is given.
        default_size: what it is where neither it nor a picture is given.
        assign: see `face_layout.assign_boxes`.
        detect: the boxes of all faces of a photo.
        face_model, depth_estimator: called where they are needed.
    """

    people: Sequence[Any] = ()
    boxes: Sequence[Box] | None = None
    size: tuple[int, int] | None = None
    default_size: tuple[int, int] = (512, 512)
    assign: Sequence[int] | None = None
    detect: Callable[[Image.Image], list[Box]] = lambda photo: []
    face_model: Callable[[], Any] = lambda: None
    depth_estimator: Callable[[], Any] = lambda: "auto"


@dataclass(frozen=True)
class Drawn:
    """A control picture as diffusers takes it, the photo that people are looked for in, and boxes that they have."""

    picture: Any
    photo: Image.Image | None = None
    boxes: list[Box] | None = None


class ControlPicture(Protocol):
    """How one kind of control picture is drawn."""

    def __call__(self, image: Any, faces: ControlFaces) -> Drawn: ...


def drawn_depth(kind: Any) -> ControlPicture:
    """Depth maps, given or estimated, and maps as they are: see `face_depth.control_depth`."""

    def draw(image: Any, faces: ControlFaces) -> Drawn:
        photo = photo_of(image, kind)
        return Drawn(control_depth(image, kind, "auto" if photo is None else faces.depth_estimator()), photo)

    return draw


def drawn_landmarks(image: Any, faces: ControlFaces) -> Drawn:
    """The dots of the people's shapes with the expressions and poses of `image`, see `control_landmarks`.

    Points (72, 2) or (n, 72, 2), in pixels of the result, are drawn as they are.
    """
    if are_points(image):
        size = faces.size or faces.default_size
        points = check_points(image, size)
        driven = DrivenFaces(points, [points_box(face) for face in points], size)
    else:
        model = faces.face_model()
        sources = [shape_of(model, person) for person in faces.people]
        driven = driven_faces(
            *(model, sources, image, faces.detect, faces.boxes, faces.size),
            assign=faces.assign,
            default_size=faces.default_size,
        )
    return Drawn(driven.draw(), None, driven.boxes)


_kinds: dict[str, ControlPicture] = {}


def register_control(kind: str, draw: ControlPicture) -> None:
    """Let `control_kind=kind` mean what `draw` draws."""
    _kinds[kind] = draw


def control_picture(kind: Any) -> ControlPicture:
    """The kind of this name. Raises FaceFusionError that lists those that there are."""
    if not isinstance(kind, str) or kind not in _kinds:
        raise FaceFusionError(f"control_kind must be one of {', '.join(_kinds)}, got {kind!r}")
    return _kinds[kind]


for _name in ("auto", "depth", "photo", "map"):
    register_control(_name, drawn_depth(_name))
register_control("landmarks", drawn_landmarks)
