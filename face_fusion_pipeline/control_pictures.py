"""Kinds of control pictures, each under the name that `control_kind` asks for it by.

A kind draws what its ControlNet takes of what the caller gives, knowing who is in the picture: a depth map, given or
estimated from a photo by a package that is there, coloured dots of a face's points, or a map as it is. A new one is
registered by [`register_control`].
"""

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from .control_landmarks import DrivenFaces, are_points, driven_faces, shape_of
from .face_errors import FaceAxesError, FaceFusionError, ModelNotFoundError, UnreadableImageError
from .face_landmarks import check_points, points_box
from .face_layout import Box
from .face_pictures import eight_bits, open_picture, upright_rgb


logger = logging.getLogger(__name__)

ControlKind = Literal["auto", "depth", "photo", "map", "landmarks"]
DEPTHS = ("auto", "depth", "photo", "map")  # kinds that are depth, or taken as they are
DepthEstimator = Callable[[Image.Image], Any]
MIDAS_REPO = "lllyasviel/Annotators"
DEPTH_REPO = "depth-anything/Depth-Anything-V2-Small-hf"
NUMBERS = ("1", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # modes whose values are stretched to their range
GREY = 2  # a decoded JPEG of a grey image has channels that differ by so much


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
    """Depth maps, given or estimated, and maps as they are: see [`control_depth`]."""

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


for _name in DEPTHS:
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


# --- Depth maps -----------------------------------------------------------------------------------------------------


def is_depth_map(image: Image.Image) -> bool:
    """Whether an image has no colour, as depth maps have none. A grey photo has to be announced as a photo."""
    if image.mode in ("L", *NUMBERS):
        return True
    pixels = np.asarray(_opaque(image)).astype(np.int16)
    return bool((pixels.max(-1) - pixels.min(-1)).max() <= GREY)


def depth_image(depth: Any) -> Image.Image:
    """Any depth map as the RGB picture that depth ControlNets take: near is white, far is black.

    Args:
        depth: grey image, or array `(H, W)` where larger means nearer (as MiDaS gives), stretched to its range; uint8
            is kept as it is.
    """
    if isinstance(depth, Image.Image):
        if depth.mode not in NUMBERS:
            return _opaque(depth)
        depth = np.asarray(depth)
    if hasattr(depth, "detach"):
        depth = depth.detach().cpu()
        depth = depth.float() if depth.is_floating_point() else depth  # numpy has no bfloat16
    array = np.asarray(depth).squeeze()
    if array.ndim == 3 and array.shape[-1] == 3 and array.dtype == np.uint8:
        return Image.fromarray(array)
    if array.ndim != 2 or array.dtype.kind not in "buif" or not np.isfinite(array).all():
        raise UnreadableImageError(
            f"a depth map must be finite numbers of shape (H, W), got {array.dtype} of shape {array.shape}"
        )
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        array = np.round((array - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    return Image.fromarray(array).convert("RGB")


def load_depth_estimator(estimator: str | DepthEstimator = "auto") -> DepthEstimator:
    """A function from an RGB image to a depth map, by name; a function is returned as it is.

    Args:
        estimator: `"midas"` is controlnet-aux' MiDaS, `"auto"` the same where it is installed and Depth Anything
            through transformers otherwise; any other text is a folder or Hub id for transformers.

    Raises:
        ModelNotFoundError: package or weights are missing.
    """
    if callable(estimator):
        return estimator
    if estimator in ("auto", "midas"):
        try:
            detector = importlib.import_module("controlnet_aux").MidasDetector.from_pretrained(MIDAS_REPO)
            logger.info("depth estimator: MiDaS of controlnet-aux")
            return lambda image: detector(image)
        except Exception as error:  # missing package, broken torchvision, no network: many types
            if estimator == "midas":
                raise ModelNotFoundError(
                    f"MiDaS is not at hand ({type(error).__name__}: {error}): "
                    "pip install 'face-fusion-pipeline[depth]', or give a depth map"
                ) from error
    name = DEPTH_REPO if estimator == "auto" else estimator
    try:
        transformers = importlib.import_module("transformers")
        model = transformers.AutoModelForDepthEstimation.from_pretrained(name, use_safetensors=True)
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        pipe = transformers.pipeline("depth-estimation", model=model, image_processor=processor)
    except Exception as error:
        raise ModelNotFoundError(
            f"no depth estimator {name!r} ({type(error).__name__}): give a folder with one, a function, or a depth map"
        ) from error
    logger.info("depth estimator: %s", name)
    return lambda image: pipe(image)["predicted_depth"]


def photo_of(image: Any, kind: str = "auto") -> Image.Image | None:
    """The upright RGB photo whose depth has to be estimated; None where `image` is a control image already.

    Args:
        image, kind: see [`control_depth`].

    Raises:
        FaceFusionError: unknown kind. UnreadableImageError: what is called a photo is no picture.
    """
    if kind not in DEPTHS:
        raise FaceFusionError(f"control_kind must be one of {', '.join(DEPTHS)}, got {kind!r}")
    picture = _picture(image)
    if kind == "photo" and picture is None:
        shape = tuple(getattr(image, "shape", ()))
        raise UnreadableImageError(
            f"a photo is a file, a PIL image or a uint8 array (H, W, 3), got {type(image).__name__} of shape {shape}"
        )
    if picture is None or kind in ("depth", "map") or (kind == "auto" and is_depth_map(picture)):
        return None
    return upright_rgb(picture)


def control_depth(image: Any, kind: str = "auto", estimator: str | DepthEstimator = "auto") -> Any:
    """A control image as diffusers takes it: an RGB depth map, from a depth map or a photo, or another map as it is.

    Args:
        image: path or PIL image, turned as its EXIF orientation says, or array. Arrays and tensors of three channels,
            one picture or a batch of them, are what diffusers takes and are given back, unless uint8 (H, W, 3).
        kind: what it is. `"depth"`: a depth map, near is white; `"photo"`: its depth is estimated; `"map"`: the map
            that another kind of ControlNet takes (edges, poses ...), as it is; `"auto"`: a picture without colour is
            a depth map, one with colour a photo.
        estimator: for photos, see [`load_depth_estimator`].

    Raises:
        FaceFusionError: unknown kind, no image (UnreadableImageError), or no estimator (ModelNotFoundError).
    """
    photo = photo_of(image, kind)
    if photo is not None:
        return depth_image(load_depth_estimator(estimator)(photo)).resize(photo.size, Image.Resampling.BICUBIC)
    picture = _picture(image)
    if kind == "map" or _has_channels(image):
        return image if picture is None else _opaque(eight_bits(picture))
    return depth_image(image if picture is None else picture)


def _picture(image: Any) -> Image.Image | None:
    """A path, encoded file or PIL image upright, a uint8 array `(H, W, 3 or 4)` as one; None for anything else."""
    bytes_of_one = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] in ((3,), (4,))
    if bytes_of_one or isinstance(image, (str, os.PathLike, bytes, Image.Image)):
        return open_picture(image, None if isinstance(image, (str, os.PathLike)) else "the control image")
    return None


def _opaque(image: Image.Image) -> Image.Image:
    """As RGB; transparency, which means nothing in a map, is left out."""
    try:
        return image.convert("RGB")
    except ValueError as error:  # such as "conversion from LAB to RGB not supported"
        raise UnreadableImageError(f"the control image cannot be shown as RGB: {error}") from error


def _has_channels(image: Any) -> bool:
    """Whether an array or tensor has an axis of three channels, where diffusers looks for it."""
    shape: tuple[int, ...] = tuple(getattr(image, "shape", ()))
    return len(shape) in (3, 4) and 3 in (shape[-3], shape[-1])
