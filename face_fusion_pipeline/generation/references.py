"""Reference crops: the squares around faces that a pipeline encodes, as its adapter was trained with them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from PIL import Image

    from .photos import FacePhoto


def reference_crops(pipe: Any, faces: "Sequence[FacePhoto]") -> "list[Image.Image]":
    """The squares around the faces that `pipe.encode_face` takes, as its adapter was trained with them."""
    metadata = pipe._face_adapter.metadata if pipe._face_adapter is not None else None
    enlarge = metadata.face_crop if metadata else 1.6
    resolution = metadata.resolution if metadata else pipe._default_resolution()
    return [face.crop(enlarge, resolution) for face in faces]
