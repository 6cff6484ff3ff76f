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
from .face_errors import FaceAxesError, FaceFusionError
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


def control_inputs(
    control_image: Any, control_kind: Any, people: list[ControlFaces], nets: int | None, prompts: int
) -> tuple[Any, list[Image.Image] | None, list[list[Box]] | None]:
    """The control images as diffusers takes them, and where people can be looked for or are.

    Args:
        control_image, control_kind: see `pipeline_controlnet.call_with_control`.
        people: in the pictures of all prompts, or of each.
        nets: number of ControlNets in a `MultiControlNetModel`; None for one that stands alone.
        prompts: number of prompts in the call.

    Returns:
        Images nested as `control_image` is, or one for each prompt where each has its own people; the photos of the
        first ControlNet that gets nothing else, or None; the boxes of the faces that are drawn, or None.
    """
    images = list(control_image) if isinstance(control_image, (list, tuple)) else [control_image]
    nested = any(isinstance(row, (list, tuple)) for row in images)
    rows = control_rows(images, nested, nets, prompts)
    kinds = list(control_kind) if isinstance(control_kind, (list, tuple)) else [control_kind] * (nets or 1)
    if len(kinds) != (nets or 1):
        raise FaceAxesError(f"{len(kinds)} values of control_kind for {nets or 1} ControlNets: give one, or one each")
    draw = [control_picture(kind) for kind in kinds]
    if len(kinds) > 1 and any(photo_of(row[i]) for row in rows for i, kind in enumerate(kinds) if kind == "auto"):
        raise FaceFusionError(
            "among several ControlNets a control image with colour may be a photo or a map: say what each of them "
            f"takes, such as control_kind={['photo', *['map'] * (len(kinds) - 1)]}"
        )
    own_people = "landmarks" in kinds and len(people) > len(rows)
    rows = rows * len(people) if own_people else rows
    drawn = [
        [kind(image, people[i % len(people)]) for kind, image in zip(draw, row, strict=True)]
        for i, row in enumerate(rows)
    ]
    columns = list(zip(*drawn, strict=True))
    layout = next((list(photos) for column in columns if None not in (photos := [x.photo for x in column])), None)
    boxes = next((list(places) for column in columns if None not in (places := [x.boxes for x in column])), None)
    ready = [[each.picture for each in row] for row in drawn]
    if nets is None:
        listed = own_people or isinstance(control_image, (list, tuple))
        return ([row[0] for row in ready] if listed else ready[0][0]), layout, boxes
    return (ready if nested or own_people else ready[0]), layout, boxes


def control_rows(images: list[Any], nested: bool, nets: int | None, prompts: int) -> list[list[Any]]:
    """Control images as prompts (one row for all, or one each) × ControlNets.

    Args:
        images: one for each prompt, or of several ControlNets for each of these; `nested`, such lists for each prompt.
        nets, prompts: see [`control_inputs`].

    Raises:
        FaceAxesError: not one image for each ControlNet, or neither one nor one for each prompt.
    """
    if nested:
        rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
    else:
        rows = [[image] for image in images] if nets is None else [images]
    if wrong := [len(row) for row in rows if len(row) != (nets or 1)]:
        raise FaceAxesError(
            f"{wrong[0]} control images for {nets or 1} ControlNets: give a list with one for each ControlNet, or one "
            "such list for each prompt"
        )
    if len(rows) not in (1, prompts):
        raise FaceAxesError(f"control images for {len(rows)} prompts, but there are {prompts}: give one, or one each")
    return rows
