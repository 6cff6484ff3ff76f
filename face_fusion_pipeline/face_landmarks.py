"""72 facial points: what they are, where they go when a face turns, and the coloured dots that a ControlNet sees.

The order is iBUG's of 68 points with eyes of 8: left and right are the image's.

| points | part | colour |
|---|---|---|
| 0-16 | jaw, from the left ear round the chin | white |
| 17-21, 22-26 | left and right brow, from left to right | cyan, blue |
| 27-35 | nose: four down the bridge, five along the nostrils | green |
| 36-43 | left eye: outer corner, upper lid, inner corner, lower lid | magenta |
| 44-51 | right eye: inner corner, upper lid, outer corner, lower lid | yellow |
| 52-71 | mouth: twelve round the lips, eight round the opening, clockwise from the left corner | red |

Points are pixels of a picture, x to the right, y down, and z towards the viewer. A head's own frame has x to the
image's right, y up, z towards the viewer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .face_errors import LandmarksError, shown


POINTS = 72
PARTS = {
    "jaw": (slice(0, 17), (255, 255, 255)),
    "left brow": (slice(17, 22), (0, 255, 255)),
    "right brow": (slice(22, 27), (0, 0, 255)),
    "nose": (slice(27, 36), (0, 255, 0)),
    "left eye": (slice(36, 44), (255, 0, 255)),
    "right eye": (slice(44, 52), (255, 255, 0)),
    "mouth": (slice(52, 72), (255, 0, 0)),
}
COLOURS = torch.tensor([colour for part, colour in PARTS.values() for _ in range(part.stop - part.start)])
RADIUS = 3 / 512  # of a dot, as a share of the picture's longer side
LEAST_RADIUS = 1.0  # pixels
ANGLES = ("yaw", "pitch", "roll")


@dataclass(frozen=True)
class Pose:
    """Where a head is in a picture, and how it is turned.

    Attributes:
        yaw, pitch, roll: degrees; yaw > 0 turns the face to the image's right, pitch > 0 lifts it, roll > 0 tilts it
            clockwise.
        x, y: pixels of the origin of the head's frame.
        scale: pixels to a unit of the head's frame.

    Raises:
        LandmarksError: what is no finite number, an angle beyond ±180 degrees, or a scale that is not positive.
    """

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ANGLES:
            check_angle(name, getattr(self, name))
        for name in ("x", "y", "scale"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not np.isfinite(float(value)) or (name == "scale" and value <= 0):
                wanted = "a positive number" if name == "scale" else "a finite number"
                raise LandmarksError(f"{name} of a pose must be {wanted}, got {shown(value)}")

    def moved(self, scale: float, dx: float = 0.0, dy: float = 0.0) -> "Pose":
        """The same in a picture where (x, y) lies at (scale * x + dx, scale * y + dy)."""
        return replace(self, x=self.x * scale + dx, y=self.y * scale + dy, scale=self.scale * scale)


def check_angle(name: str, value: Any) -> float:
    """`value` as degrees from -180 to 180; raises [`LandmarksError`] otherwise."""
    if not isinstance(value, Real) or isinstance(value, bool) or not abs(float(value)) <= 180:  # NaN is not
        raise LandmarksError(f"{name} must be degrees from -180 to 180, got {shown(value)}")
    return float(value)


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """The rotation (3, 3) of a head's frame: first by the yaw, then the pitch, then the roll, see [`Pose`]."""
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in np.deg2rad([yaw, pitch, -roll]))
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    lift = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    lean = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return lean @ lift @ turn


def angles(matrix: np.ndarray) -> tuple[float, float, float]:
    """Yaw, pitch and roll in degrees of a rotation; the inverse of [`rotation`] for pitches below 90 degrees."""
    pitch = np.arcsin(np.clip(-np.asarray(matrix)[2] @ [0, 1, 0], -1, 1))
    # the last row is (-cos p sin y, -sin p, cos p cos y); the middle column (-sin r cos p, cos r cos p, -sin p)
    yaw = np.arctan2(-matrix[2][0], matrix[2][2])
    roll = -np.arctan2(-matrix[0][1], matrix[1][1])
    yaw, pitch, roll = np.rad2deg([yaw, pitch, roll]).tolist()
    return yaw, pitch, roll


def posed(points: np.ndarray, pose: Pose) -> np.ndarray:
    """Points (72, 3) of a head's frame in pixels of a picture, under orthographic projection."""
    turned = pose.scale * points @ rotation(pose.yaw, pose.pitch, pose.roll).T
    return turned * [1, -1, 1] + [pose.x, pose.y, 0]


def check_points(points: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """Points of faces as an array (faces, 72, 2 or 3).

    Args:
        points: of one face (72, 2 or 3) or several, as array, tensor or lists.
        size: (width, height) of the picture that they are to be seen in, if known.

    Raises:
        LandmarksError: another shape, values that are not finite, or a face of which no point is in the picture.
    """
    if hasattr(points, "detach"):
        points = points.detach().cpu().numpy()
    try:
        array = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise LandmarksError(f"facial points are numbers (72, 2), got {shown(points)}") from error
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[1] != POINTS or array.shape[2] not in (2, 3):
        raise LandmarksError(f"facial points are (72, 2) or (72, 3), or several such, got {array.shape}")
    if not np.isfinite(array).all():
        raise LandmarksError("facial points have values that are not finite")
    if size is not None:
        inside = ((array[..., :2] >= 0) & (array[..., :2] <= size)).all(-1).any(-1)
        if not inside.all():
            x, y = array[int(np.argmin(inside)), :, :2].mean(0)
            raise LandmarksError(
                f"no point of the face around ({x:.0f}, {y:.0f}) is in the {size[0]}x{size[1]} picture: give its "
                "place in pixels of the picture that is to be generated"
            )
    return array


def draw_landmarks(points: Any, size: int | tuple[int, int], radius: float | None = None) -> Image.Image:
    """The control picture of facial points: coloured dots on black, also of points that the head hides.

    Args:
        points: (72, 2) or (72, 3) of a face, or several such, in pixels; see the module. A face may reach beyond the
            picture.
        size: (width, height) of the picture, or one number for both.
        radius: of the dots in pixels, by default 3 in a picture of 512 and never below 1.

    Raises:
        LandmarksError: see [`check_points`].
    """
    width, height = (size, size) if isinstance(size, int) else size
    array = check_points(points, (width, height))
    pixels = landmark_maps(torch.from_numpy(array[None, ..., :2]).float(), (width, height), radius)[0]
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def landmark_maps(points: Tensor, size: tuple[int, int], radius: float | None = None) -> Tensor:
    """[`draw_landmarks`] of B pictures at once, on any device: uint8 (B, 3, height, width).

    Args:
        points: float (B, people, 72, 2) in pixels, not checked; what is not finite, or outside, is not drawn.
    """
    width, height = size
    radius = max(LEAST_RADIUS, RADIUS * max(size)) if radius is None else radius
    batch, reach = len(points), int(np.ceil(radius + 0.5))
    flat = points.flatten(1, 2).nan_to_num(-1e6, -1e6, -1e6)
    steps = torch.arange(-reach, reach + 1, device=points.device)
    window = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).flatten(0, 1)
    cells = flat[:, :, None].floor().long() + window  # (B, points, window, 2)
    distance = (cells + 0.5 - flat[:, :, None]).norm(dim=-1)
    covered = (radius + 0.5 - distance).clamp(0, 1)  # a soft rim of a pixel
    inside = (cells >= 0).all(-1) & (cells[..., 0] < width) & (cells[..., 1] < height)
    place = (cells[..., 1] * width + cells[..., 0]).where(inside, 0)
    colours = COLOURS.to(points.device).float().repeat(points.shape[1], 1)[None, :, None]
    values = (covered * inside)[..., None] * colours
    canvas = torch.zeros(batch, height * width, 3, device=points.device)
    # Where dots meet, the brighter one of each channel stays: the picture does not depend on their order.
    canvas.scatter_reduce_(1, place.flatten(1)[..., None].expand(-1, -1, 3), values.flatten(1, 2), "amax")
    return canvas.round().byte().unflatten(1, (height, width)).permute(0, 3, 1, 2)


def eyes_of_eight(points68: Any) -> np.ndarray:
    """Points of the iBUG order with eyes of 6 (68, D) as 72: each lid a smooth curve through its four points."""
    points = np.asarray(points68, dtype=np.float64)
    if points.ndim != 2 or len(points) != 68:
        raise LandmarksError(f"points of the iBUG order are (68, 2) or (68, 3), got {points.shape}")
    # the cubic through the values at 0, 1/3, 2/3, 1, taken at 1/4, 1/2, 3/4
    at, knots = np.array([0.25, 0.5, 0.75]), np.array([0, 1 / 3, 2 / 3, 1])
    weights = np.stack(
        [np.prod([(at - other) / (knot - other) for other in knots if other != knot], axis=0) for knot in knots], 1
    )
    eyes = []
    for start in (36, 42):
        outer, first, second, inner, third, fourth = points[start : start + 6]
        upper, lower = weights @ [outer, first, second, inner], weights @ [inner, third, fourth, outer]
        eyes += [outer[None], upper, inner[None], lower]
    return np.concatenate([points[:36], *eyes, points[48:]])


def inter_eye_distance(points: np.ndarray) -> float:
    """Distance of the middles of both eyes, in the unit of the points (72, D)."""
    left, right = (points[PARTS[name][0]].mean(0) for name in ("left eye", "right eye"))
    return float(np.linalg.norm(left - right))


def points_box(points: Sequence[Any] | np.ndarray) -> tuple[float, float, float, float]:
    """XYXY around points (72, 2 or 3) of a face."""
    array = np.asarray(points)[:, :2]
    (x0, y0), (x1, y1) = array.min(0).tolist(), array.max(0).tolist()
    return x0, y0, x1, y1
