"""Face models: what of a face is its shape, its expression and its pose, and where its points are for any of them.

A model is anything with the members of [`FaceModel`]. [`LinearFaceModel`] is one for photographs: points are the
neutral face plus a sum of shape modes and a sum of expressions. `avatars.face_model` has those of avatars.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from .face_detectors import load_detector
from .face_errors import FaceFusionError, LandmarksError, ModelNotFoundError, shown
from .face_files import read_tensors, save_tensors
from .face_images import find_face
from .face_landmarkers import Landmarker, load_landmarker
from .face_landmarks import (
    ANGLES,
    PARTS,
    POINTS,
    Pose,
    angles,
    check_angle,
    check_points,
    inter_eye_distance,
    posed,
    rotation,
)
from .face_pictures import ImageSource, load_image


FACE_MODEL_VARIABLE = "FACE_FUSION_FACE_MODEL"
FORMAT = "face-fusion-face-model"
WAYS = "make one of a clone of ICT-FaceKit with `face-fusion face-model` (docs/facesnap.md)"
NOISE = 0.25  # deviation of detected points from the model's, in its unit (cm)
EXPRESSED = 0.35  # deviation of how strongly an expression is there
NOT_SEEN = ("PupilDilate", "eyeLook")  # beginnings of expressions that 72 points cannot tell
JAW_WEIGHT = 0.3  # of points that lie somewhere on an outline, beside 1 of those that are a place
ROUNDS, SWEEPS = 25, 4  # of pose and form in turn; of the latter's coordinates
WORST_FIT, MOST_TURNED = 0.08, 75.0  # of the inter-eye distance; degrees

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class FaceFit:
    """A face in the terms of a model.

    Attributes:
        shape, expression: vectors of the model's own kind.
        pose: in pixels of the picture.
        box: XYXY of the face in that picture, as a detector draws it; None if unknown.
        size: (width, height) of that picture; None if there is none.
    """

    shape: np.ndarray
    expression: np.ndarray
    pose: Pose
    box: Box | None = None
    size: tuple[int, int] | None = None

    def turned(self, yaw: float | None = None, pitch: float | None = None, roll: float | None = None) -> "FaceFit":
        """The same with those angles of the pose that are given, in degrees."""
        given = {name: check_angle(name, value) for name, value in zip(ANGLES, (yaw, pitch, roll), strict=True)
                 if value is not None}  # fmt: skip
        return replace(self, pose=replace(self.pose, **given)) if given else self


@runtime_checkable
class FaceModel(Protocol):
    """What turns a photo into shape, expression and pose, and these into points.

    Attributes:
        name: what errors call it.
        expressions: names that [`expression_of`] knows beside `"neutral"`.
    """

    name: str

    @property
    def expressions(self) -> Sequence[str]: ...

    def fit(self, photo: Image.Image, box: Box | None = None) -> FaceFit:
        """The face in an XYXY box of an RGB photo, or the only one of the photo.

        Raises:
            NoFaceError, SeveralFacesError: not one face. LandmarksError: a face that cannot be fitted.
        """
        ...

    def points(self, shape: np.ndarray, expression: np.ndarray, pose: Pose) -> np.ndarray:
        """The 72 points (72, 3) in pixels, see `face_landmarks`."""
        ...

    def expression_of(self, given: Any) -> np.ndarray:
        """The vector of an expression: by name, by names with strengths, or a vector as it is."""
        ...


def expression_vector(names: Sequence[str], given: Any, neutral: np.ndarray) -> np.ndarray:
    """What `FaceModel.expression_of` gives for models whose vectors hold a strength for each of `names`.

    Args:
        given: `"neutral"` or another name, a mapping of names to strengths from 0 to 1, or a vector.

    Raises:
        LandmarksError: an unknown name, a strength out of range, or a vector of another length.
    """
    if isinstance(given, str):
        given = {} if given == "neutral" else {given: 1.0}
    if isinstance(given, Mapping):
        vector = neutral.copy() if not given else np.zeros_like(neutral)
        for name, strength in given.items():
            if name not in names:
                raise LandmarksError(f"unknown expression {shown(name)}: choose from {', '.join(['neutral', *names])}")
            if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
                raise LandmarksError(f"strength of {name} must be from 0 to 1, got {shown(strength)}")
            vector[list(names).index(name)] = strength
        return vector
    vector = np.asarray(given, dtype=np.float64)
    if vector.shape != neutral.shape or not np.isfinite(vector).all():
        raise LandmarksError(f"an expression is a name or {len(neutral)} finite numbers, got {shown(given)}")
    return vector


def recombined(model: FaceModel, source: FaceFit, driver: FaceFit) -> np.ndarray:
    """The points (72, 3) of the source's shape with the driver's expression and pose."""
    return model.points(source.shape, driver.expression, driver.pose)


class LinearFaceModel:
    """points = neutral + Σ aᵢ identityᵢ + Σ bⱼ expressionⱼ in the head's frame, turned and seen from afar.

    Args:
        neutral: (72, 3), see `face_landmarks` for order and frame.
        identity: (K, 72, 3); a face's aᵢ are distributed as standard normal numbers.
        expression: (E, 72, 3) with `names`; bⱼ in [0, 1].
        landmarker: finds the points of photos, see `face_landmarkers.load_landmarker`; loaded when first needed.
        detector: finds faces, see `face_detectors.load_detector`.

    Raises:
        LandmarksError: arrays of other shapes, or not finite.
    """

    name = "linear face model"

    def __init__(
        self,
        neutral: Any,
        identity: Any,
        expression: Any,
        names: Sequence[str],
        landmarker: str | os.PathLike[str] | Landmarker | None = None,
        detector: Any = "auto",
    ) -> None:
        neutral, identity, expression = (np.asarray(x, dtype=np.float64) for x in (neutral, identity, expression))
        wanted = {
            "neutral": (POINTS, 3),
            "identity": (len(identity), POINTS, 3),
            "expression": (len(names), POINTS, 3),
        }
        for (what, shape), array in zip(wanted.items(), (neutral, identity, expression), strict=True):
            if array.shape != shape or not np.isfinite(array).all():
                raise LandmarksError(f"{what} of a face model must be finite numbers {shape}, got {array.shape}")
        middle = neutral[PARTS["nose"][0]][:4].mean(0)  # the origin, about which heads turn and are placed
        self.neutral, self.expressions = neutral - middle, tuple(names)
        self._modes = np.concatenate([identity, expression])
        self._shapes = len(identity)
        self._landmarker, self._detector = landmarker, detector

    @property
    def landmarker(self) -> Landmarker:
        """Loaded when first asked for. ModelNotFoundError where none was named."""
        if self._landmarker is None or isinstance(self._landmarker, (str, os.PathLike)):
            self._landmarker = load_landmarker(self._landmarker)
        return self._landmarker

    def expression_of(self, given: Any) -> np.ndarray:
        return expression_vector(self.expressions, given, np.zeros(len(self.expressions)))

    def points(self, shape: np.ndarray, expression: np.ndarray, pose: Pose) -> np.ndarray:
        return posed(self.head(np.concatenate([shape, expression])), pose)

    def head(self, form: np.ndarray) -> np.ndarray:
        """Points (72, 3) in the head's frame of all coefficients (K + E,)."""
        return self.neutral + np.tensordot(form, self._modes, 1)

    def fit(self, photo: Image.Image, box: Box | None = None) -> FaceFit:
        if box is None:
            self._detector = load_detector(self._detector)
            box = find_face(photo, self._detector).box
        return replace(self.fit_points(self.landmarker.find(photo, box)), box=box, size=photo.size)

    def fit_points(self, points: Any, weights: Any = None) -> FaceFit:
        """Shape, expression and pose of detected points, the most likely ones for normal errors.

        Args:
            points: (72, 2 or 3) in pixels; the third number is not used.
            weights: (72,) how much each point counts; 0 for one that is unknown.

        Raises:
            LandmarksError: points that no face of the model has, such as a profile's whose far side was guessed.
        """
        seen = check_points(points)[0][:, :2]
        weights = default_weights() if weights is None else np.asarray(weights, dtype=np.float64)
        form, pose = np.zeros(len(self._modes)), start_pose(self.neutral, seen, weights)
        for _ in range(ROUNDS):
            pose = closest_pose(self.head(form), seen, weights, pose)
            form = self._closest_form(seen, weights, pose, form)
        pose = closest_pose(self.head(form), seen, weights, pose)
        fit = FaceFit(form[: self._shapes], form[self._shapes :], pose)
        self._check(fit, seen, weights)
        return fit

    def calibrated(self, faces: Sequence[Any]) -> "LinearFaceModel":
        """The same model with its neutral points where a landmarker finds them on average.

        A landmarker's points are not quite the model's. Of every face the errors of its fit are turned to the front,
        and the points of the neutral face are moved by their mean; how deep they lie stays.

        Args:
            faces: detected points (72, 2), of many people; those that cannot be fitted are left out.

        Raises:
            LandmarksError: no face can be fitted.
        """
        errors = []
        for seen in faces:
            try:
                fit = self.fit_points(seen)
            except LandmarksError:
                continue
            found = self.points(fit.shape, fit.expression, fit.pose)[:, :2]
            across = (check_points(seen)[0][:, :2] - found) / fit.pose.scale * [1, -1]
            errors.append(across @ rotation(fit.pose.yaw, fit.pose.pitch, fit.pose.roll)[:2])
        if not errors:
            raise LandmarksError(
                f"none of {len(faces)} faces can be fitted: take photos of single faces from the front"
            )
        moved = np.mean(errors, 0) * [1, 1, 0]
        split = self._modes[: self._shapes], self._modes[self._shapes :]
        return LinearFaceModel(self.neutral + moved, *split, self.expressions, self._landmarker, self._detector)

    def _closest_form(self, seen: np.ndarray, weights: np.ndarray, pose: Pose, form: np.ndarray) -> np.ndarray:
        """Coefficients of the least squared error and their own prior, by coordinates: shapes free, expressions in
        [0, 1]."""
        front = rotation(pose.yaw, pose.pitch, pose.roll)[:2]
        target = (seen - [pose.x, pose.y]) / pose.scale * [1, -1] - self.neutral @ front.T
        root = np.sqrt(weights)[:, None]
        design = ((self._modes @ front.T) * root).reshape(len(self._modes), -1)
        variance = np.full(len(form), 1.0)
        variance[self._shapes :] = [1e-6 if name.startswith(NOT_SEEN) else EXPRESSED**2 for name in self.expressions]
        normal = design @ design.T / NOISE**2 + np.diag(1 / variance)
        right = design @ (target * root).ravel() / NOISE**2
        form = form.copy()
        slope = right - normal @ form
        for _ in range(SWEEPS):
            for i in range(len(form)):
                value = form[i] + slope[i] / normal[i, i]
                value = min(max(value, 0.0), 1.0) if i >= self._shapes else value
                slope -= normal[i] * (value - form[i])
                form[i] = value
        return form

    def _check(self, fit: FaceFit, seen: np.ndarray, weights: np.ndarray) -> None:
        errors = np.linalg.norm(self.points(fit.shape, fit.expression, fit.pose)[:, :2] - seen, axis=1)
        error = float(np.average(errors, weights=weights)) / (inter_eye_distance(self.neutral) * fit.pose.scale)
        if error > WORST_FIT or abs(fit.pose.yaw) > MOST_TURNED:
            raise LandmarksError(
                f"the face is turned by {fit.pose.yaw:.0f} degrees and its points lie {error:.0%} of the distance "
                "of its eyes from any that the model can make: take a photo that shows it more from the front"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a .safetensors file that [`load_face_model`] reads."""
        split = self._modes[: self._shapes], self._modes[self._shapes :]
        arrays = {"neutral": self.neutral, "identity": split[0], "expression": split[1]}
        tensors = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
        save_tensors(path, tensors, {"format": FORMAT, "expression_names": json.dumps(list(self.expressions))})


def default_weights() -> np.ndarray:
    """How much each of the 72 points counts in a fit (72,)."""
    weights = np.ones(POINTS)
    weights[PARTS["jaw"][0]] = JAW_WEIGHT
    return weights


def start_pose(head: np.ndarray, seen: np.ndarray, weights: np.ndarray) -> Pose:
    """Upright or leaning, seen from the front: the similarity that brings `head` (72, 3) nearest to `seen` (72, 2)."""
    share = weights / weights.sum()
    at, to = share @ head[:, :2], share @ seen
    a, b = (head[:, :2] - at) * [1, -1], seen - to
    along, across = float((share @ (a * b)).sum()), float(share @ (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]))
    size = float((share @ (a * a)).sum())
    scale = max(np.hypot(along, across) / size, 1e-6)
    pose = Pose(roll=float(np.rad2deg(np.arctan2(across, along))), scale=scale)
    x, y = (share @ (seen - posed(head, pose)[:, :2])).tolist()
    return replace(pose, x=x, y=y)


def closest_pose(head: np.ndarray, seen: np.ndarray, weights: np.ndarray, pose: Pose, steps: int = 3) -> Pose:
    """The pose of `head` (72, 3) of the least squared error to `seen` (72, 2), by Gauss-Newton from `pose` on."""
    root = np.repeat(np.sqrt(weights), 2)
    matrix, scale, place = rotation(pose.yaw, pose.pitch, pose.roll), pose.scale, np.array([pose.x, pose.y])
    for _ in range(steps):
        turned = head @ matrix.T
        x, y, z = turned.T
        zero, one = np.zeros(POINTS), np.ones(POINTS)
        # by small turns about the three axes, by the logarithm of the scale, and by the place
        across = np.stack([zero, scale * z, -scale * y, scale * x, one, zero], 1)
        down = np.stack([scale * z, zero, -scale * x, -scale * y, zero, one], 1)
        errors = seen - (scale * turned[:, :2] * [1, -1] + place)
        design = np.stack([across, down], 1).reshape(-1, 6) * root[:, None]
        step = np.linalg.lstsq(design, errors.ravel() * root, rcond=None)[0]
        matrix = small_turn(step[:3]) @ matrix
        scale, place = scale * float(np.exp(np.clip(step[3], -0.5, 0.5))), place + step[4:]
    yaw, pitch, roll = angles(matrix)
    return Pose(yaw, pitch, roll, float(place[0]), float(place[1]), scale)


def small_turn(vector: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) about a vector by its length in radians, at most a quarter of one (Rodrigues)."""
    length = float(np.linalg.norm(vector))
    if length < 1e-12:
        return np.eye(3)
    x, y, z = vector / length
    length = min(length, 0.25)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(length) * cross + (1 - np.cos(length)) * cross @ cross


# --- Files ---------------------------------------------------------------------------------------------------------


def read_face_model(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Arrays `neutral`, `identity` and `expression`, and the names of the expressions, of a .safetensors file.

    Raises:
        ModelNotFoundError: no such file. LandmarksError: a file of another kind.
    """
    tensors, metadata = read_tensors(path, LandmarksError)
    wanted = ("neutral", "identity", "expression")
    try:
        names = json.loads(metadata.get("expression_names", ""))
    except ValueError:
        names = None
    if missing := [name for name in wanted if name not in tensors]:
        raise LandmarksError(f"{path} is no face model: it has no {missing[0]!r}; {WAYS}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LandmarksError(f"{path} is no face model: it does not name its expressions; {WAYS}")
    return {name: tensors[name].double().numpy() for name in wanted}, names


def load_face_model(
    model: str | os.PathLike[str] | FaceModel | None = None,
    landmarker: str | os.PathLike[str] | Landmarker | None = None,
    detector: Any = "auto",
) -> FaceModel:
    """A face model; one that is given is returned as it is.

    Args:
        model: path of a linear face model, a .safetensors file. None: the path in $FACE_FUSION_FACE_MODEL.
        landmarker: see `face_landmarkers.load_landmarker`; asked for when a photo has to be fitted.
        detector: see `face_detectors.load_detector`.

    Raises:
        ModelNotFoundError: none is named, or there is no such file. LandmarksError: a file of another kind.
        FaceFusionError: no face model.
    """
    if model is None:
        model = os.environ.get(FACE_MODEL_VARIABLE) or None
        if model is None:
            raise ModelNotFoundError(
                f"facial points of another pose need a face model: {WAYS}, then name its file with `face_model=` or "
                f"in ${FACE_MODEL_VARIABLE}"
            )
    if isinstance(model, (str, os.PathLike)):
        if not Path(model).is_file():
            raise ModelNotFoundError(f"there is no face model {model}: {WAYS}")
        arrays, names = read_face_model(model)
        return LinearFaceModel(**arrays, names=names, landmarker=landmarker, detector=detector)
    if not isinstance(model, FaceModel):
        raise FaceFusionError(f"a face model has `fit`, `points` and `expression_of`, got {shown(model)}")
    return model


def fit_of(model: FaceModel, face: "ImageSource | FaceFit") -> FaceFit:
    """A photo of one person fitted by the model; a fit is returned as it is."""
    return face if isinstance(face, FaceFit) else model.fit(load_image(face))
