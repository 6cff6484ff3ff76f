"""Where people go: face boxes drawn over a picture in the browser. Boxes are XYXY in [0, 1] of width and height.

The value of the drawing area is JSON: `{"picture": data URL or None, "ratio": width / height, "boxes": [box or None
for each of three people], "person": index of who is drawn next}`.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..face_errors import FaceFusionError
from ..face_layout import Box, check_box, scale_boxes
from ..face_pictures import load_image
from .form import MAX_PEOPLE, FieldError


KEPT = 1024  # longest side in pixels of a layout or style picture: more than the pictures that follow it
SHOWN = 640  # longest side in pixels of the picture that is shown behind the boxes


def canvas_value(picture: Image.Image | None = None, boxes: Sequence[Box] = (), ratio: float = 1.0) -> dict[str, Any]:
    """The value of the drawing area: a picture (or an empty area of this ratio) with boxes of person 1, 2, 3."""
    if picture is not None:
        ratio = picture.width / picture.height
    drawn: list[list[float] | None] = [[round(value, 4) for value in box] for box in boxes[:MAX_PEOPLE]]
    return {
        "picture": None if picture is None else data_url(picture),
        "ratio": ratio,
        "boxes": drawn + [None] * (MAX_PEOPLE - len(drawn)),
        "person": min(len(drawn), MAX_PEOPLE - 1),
    }


def data_url(picture: Image.Image, side: int = SHOWN) -> str:
    """A small JPEG of the picture, `side` pixels at most, inside an address: no file has to be kept for it."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def drawn_boxes(value: Any) -> dict[int, Box]:
    """Person's number -> box, from what the browser sends. Raises [`FieldError`] where that is no box."""
    boxes = value.get("boxes") if isinstance(value, dict) else None
    if not isinstance(boxes, list) or len(boxes) > MAX_PEOPLE:
        raise FieldError("places", "the drawing cannot be read: clear the boxes and draw them again")
    try:
        return {number: check_box(box, 1, 1) for number, box in enumerate(boxes, 1) if box is not None}
    except FaceFusionError as error:
        raise FieldError("places", f"person's box cannot be used, draw it again: {error}") from error


def read_picture(file: str | Path, field: str = "places") -> Image.Image:
    """An uploaded layout, depth map or style picture, at most 1024 pixels a side: it is kept while the page is open.

    Raises [`FieldError`] of `field` with the file's name, never its path.
    """
    try:
        picture = load_image(Path(file), "the image")
        picture.thumbnail((KEPT, KEPT), reducing_gap=2.0)
        return picture
    except FaceFusionError as error:
        raise FieldError(field, f"{Path(file).name}: {error}") from error


def boxes_of_people(boxes: Sequence[Box], size: tuple[int, int]) -> list[Box]:
    """The largest faces found in a picture of `size` (width, height), one for each person, from left to right."""
    largest = sorted(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))[-MAX_PEOPLE:]
    inside = [(max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])) for x0, y0, x1, y1 in largest]
    return scale_boxes(sorted(inside, key=lambda box: box[0] + box[2]), size, (1, 1))
