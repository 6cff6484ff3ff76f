"""Finders of the 72 facial points of photographs: MediaPipe's face mesh, and insightface's 3D points.

Both are models of others and come by path or with their package: see docs/facesnap.md for where they are got.
"""

import importlib
import logging
import math
import os
import zipfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from .face_errors import FaceFusionError, LandmarksError, ModelNotFoundError, short
from .face_landmarks import PARTS, eyes_of_eight


logger = logging.getLogger(__name__)

Box = tuple[float, float, float, float]
LANDMARKER_VARIABLE = "FACE_FUSION_LANDMARKER"
WAYS = "give the path of MediaPipe's face_landmarker.task or face_landmark.tflite (docs/facesnap.md)"
IN_TASK = "face_landmarks_detector.tflite"  # a .task file is an archive of several models
ROI = 1.5  # side of the square that MediaPipe looks at, in sides of the box around its points
FROM_BOX = 1.25  # the same of a detector's box, which is taller
PASSES = 3  # each looks where the last one found the face
VERTICES = (468 * 3, 478 * 3)  # numbers of a mesh, without and with irises
SURE = 0.0  # logit of there being a face

# Vertices of MediaPipe's mesh at the points of `face_landmarks`.
MESH = (
    *(127, 234, 132, 58, 172, 150, 149, 148, 152, 377, 378, 379, 397, 288, 361, 454, 356),  # jaw
    *(70, 63, 105, 66, 107, 336, 296, 334, 293, 300),  # brows
    *(168, 197, 195, 4, 75, 97, 2, 326, 305),  # nose
    *(33, 160, 159, 158, 133, 153, 145, 144),  # left eye
    *(362, 385, 386, 387, 263, 373, 374, 380),  # right eye
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),  # round the lips
    *(78, 82, 13, 312, 308, 317, 14, 87),  # round the opening
)


@runtime_checkable
class Landmarker(Protocol):
    """Anything with these two members finds facial points.

    Attributes:
        name: what log lines and errors call it.
    """

    name: str

    def find(self, image: Image.Image, box: Box) -> np.ndarray:
        """The 72 points (72, 2) in pixels, see `face_landmarks`, of the face in an XYXY box of an RGB image.

        Raises:
            LandmarksError: there is no face that it can read.
        """
        ...


class MediaPipeLandmarker:
    """MediaPipe's face mesh (Apache-2.0), run by `ai-edge-litert`.

    Args:
        model: `face_landmarker.task` or `face_landmark.tflite`. `face_landmark_with_attention.tflite` has operations
            that MediaPipe alone knows.

    Raises:
        ModelNotFoundError: no such file, the package is not installed, or the file is another model.
    """

    name = "mediapipe"

    def __init__(self, model: str | os.PathLike[str]) -> None:
        content = model_content(Path(model))
        try:  # by name: a written import would make diffusers demand the package of everybody
            interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter
        except ImportError as error:
            raise ModelNotFoundError(
                "ai-edge-litert, which runs MediaPipe's models, is not installed: "
                "pip install 'face-fusion-pipeline[landmarks]'"
            ) from error
        try:
            self._model: Any = interpreter(model_content=content, num_threads=1)
            self._model.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelNotFoundError(f"{model} is no model that LiteRT can read ({short(error)}): {WAYS}") from error
        inputs, outputs = self._model.get_input_details(), self._model.get_output_details()
        mesh = [row for row in outputs if np.prod(row["shape"]) in VERTICES]
        flags = [row for row in outputs if np.prod(row["shape"]) == 1]
        if len(mesh) != 1 or not flags or len(inputs) != 1 or list(inputs[0]["shape"][[0, 3]]) != [1, 3]:
            raise ModelNotFoundError(f"{model} is not MediaPipe's face mesh: {WAYS}")
        (self._input,) = inputs
        self._mesh, self._flag = mesh[0]["index"], flags[0]["index"]

    def find(self, image: Image.Image, box: Box) -> np.ndarray:
        x0, y0, x1, y1 = box
        centre, side, lean = ((x0 + x1) / 2, (y0 + y1) / 2), FROM_BOX * max(x1 - x0, y1 - y0), 0.0
        points = np.empty(0)
        for _ in range(PASSES):
            points, sureness = self._look(image, centre, side, lean)
            low, high = points.min(0), points.max(0)
            side, centre = ROI * float(max(high - low)), tuple(((low + high) / 2).tolist())
            left, right = (points[PARTS[eye][0]].mean(0) for eye in ("left eye", "right eye"))
            lean = math.atan2(*(right - left)[::-1])
        if not sureness > SURE or not np.isfinite(points).all():
            raise LandmarksError(
                f"no facial points are found in the box ({', '.join(f'{v:.0f}' for v in box)}): take a photo that "
                "shows the face larger and more frontal"
            )
        return points

    def _look(
        self, image: Image.Image, centre: tuple[float, float], side: float, lean: float
    ) -> tuple[np.ndarray, float]:
        """Points and the logit of a face, in a square of `side` pixels around `centre`, turned by `lean` radians."""
        size = int(self._input["shape"][1])
        scale = max(side, 1.0) / size
        turn = scale * np.array([[math.cos(lean), -math.sin(lean)], [math.sin(lean), math.cos(lean)]])
        start = np.array(centre) - turn @ [size / 2, size / 2]
        matrix = (*turn[0], start[0], *turn[1], start[1])
        crop = image.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        self._model.set_tensor(self._input["index"], np.asarray(crop, dtype=np.float32)[None] / 255)
        self._model.invoke()
        seen = self._model.get_tensor(self._mesh).reshape(-1, 3)[list(MESH), :2].astype(np.float64)
        return seen @ turn.T + start, float(self._model.get_tensor(self._flag).flatten()[0])


def model_content(path: Path) -> bytes:
    """The bytes of a .tflite file, or of the face mesh in a .task archive. Raises [`ModelNotFoundError`]."""
    if not path.is_file():
        raise ModelNotFoundError(f"there is no landmark model {path}: {WAYS}")
    content = path.read_bytes()
    if not content.startswith(b"PK"):  # a .tflite file may end with an archive of labels
        return content
    with zipfile.ZipFile(path) as archive:
        if IN_TASK not in archive.namelist():
            raise ModelNotFoundError(f"{path} has no {IN_TASK} in it: {WAYS}")
        if archive.getinfo(IN_TASK).file_size > 100_000_000:
            raise ModelNotFoundError(f"{IN_TASK} in {path} is too large to be MediaPipe's face mesh: {WAYS}")
        return archive.read(IN_TASK)


class InsightFaceLandmarker:
    """insightface's 68 points in 3D, whose models are licensed for non-commercial research only.

    Args:
        model: model pack, its name or folder.

    Raises:
        ModelNotFoundError: the package or its models are missing.
    """

    name = "insightface"

    def __init__(self, model: str | os.PathLike[str] | None = None) -> None:
        logger.warning("insightface's models are licensed for non-commercial research only")
        if model is not None and Path(model).is_dir():
            model = Path(model).resolve()  # insightface looks for relative paths in its own folder
        try:
            analysis = importlib.import_module("insightface.app").FaceAnalysis
            self._app: Any = analysis(str(model or "buffalo_l"), allowed_modules=["detection", "landmark_3d_68"])
            self._app.prepare(ctx_id=-1, det_size=(640, 640))
        except ImportError as error:
            raise ModelNotFoundError(
                "landmarker 'insightface' is not installed: pip install 'face-fusion-pipeline[insightface]', "
                f"or {WAYS}"
            ) from error
        except Exception as error:  # offline it raises anything from ConnectionError to a bare AssertionError
            raise ModelNotFoundError(
                f"insightface could not load its models ({type(error).__name__}: {error}): go online once, or {WAYS}"
            ) from error

    def find(self, image: Image.Image, box: Box) -> np.ndarray:
        faces = self._app.get(np.asarray(image)[:, :, ::-1].copy())
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        around = [face for face in faces if face.bbox[0] <= x <= face.bbox[2] and face.bbox[1] <= y <= face.bbox[3]]
        if not around:
            raise LandmarksError(f"insightface finds no face around ({x:.0f}, {y:.0f})")
        points = eyes_of_eight(max(around, key=lambda face: face.det_score).landmark_3d_68[:, :2])
        return points


def load_landmarker(landmarker: str | os.PathLike[str] | Landmarker | None = None) -> Landmarker:
    """A finder of facial points; one that is given is returned as it is.

    Args:
        landmarker: the path of a model of MediaPipe, or `"insightface"`. None: the path in $FACE_FUSION_LANDMARKER.

    Raises:
        ModelNotFoundError: none is named, or its file or package is missing.
        FaceFusionError: no landmarker.
    """
    if landmarker is None:
        landmarker = os.environ.get(LANDMARKER_VARIABLE) or None
        if landmarker is None:
            raise ModelNotFoundError(f"facial points of photos need a landmark model: {WAYS}, or its path in "
                                     f"${LANDMARKER_VARIABLE}")  # fmt: skip
    if landmarker == "insightface":
        return InsightFaceLandmarker()
    if isinstance(landmarker, (str, os.PathLike)):
        return MediaPipeLandmarker(landmarker)
    if not isinstance(landmarker, Landmarker):
        raise FaceFusionError(f"a landmarker has `name` and `find`, got {landmarker!r}")
    return landmarker
