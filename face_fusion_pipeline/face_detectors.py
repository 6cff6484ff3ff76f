"""Face detectors behind one small protocol: YuNet (fetched at first use), OpenCV's Haar cascades, insightface.

YuNet finds the faces of photographs and of avatars. The cascades, which need no file, are as good on frontal
photographs and find 72 of 100 near-frontal avatars where YuNet finds 99: docs/detectors.md.

Box convention, whatever the detector: XYXY in float pixels of the image given to `detect`, upright, as YuNet draws it:
from the hair line to the chin, about 0.72 as wide as high. Haar windows are squares; on photographs YuNet's box
around the same face is 0.84 as wide, 1.16 as high and 0.03 lower (medians in units of the window), and so Haar boxes
are converted. A box may reach beyond the image.
"""

import functools
import hashlib
import importlib
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import cv2
import numpy as np
from huggingface_hub import constants, get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
from PIL import Image

from .face_errors import FaceFusionError, ModelNotFoundError


logger = logging.getLogger(__name__)

YUNET_REPO, YUNET_FILE = "opencv/face_detection_yunet", "face_detection_yunet_2023mar.onnx"
YUNET_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
YUNET_WAYS = (
    f"run `hf download {YUNET_REPO} {YUNET_FILE}` where there is a network, or set FACE_FUSION_YUNET to the file"
)
DetectorName = Literal["auto", "yunet", "haar", "insightface"]


@dataclass(frozen=True)
class Face:
    """One detected face, in pixels of the image that was searched.

    Attributes:
        box: XYXY, see the module's box convention.
        score: confidence in [0, 1]; comparable within one detector only.
        landmarks5: (5, 2) eye, eye, nose, mouth corner, mouth corner (image-left first), or None.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks5: np.ndarray | None = None

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]

    def moved(self, scale: float, dx: float = 0.0, dy: float = 0.0) -> "Face":
        """The same face in an image where (x, y) lies at (scale * x + dx, scale * y + dy)."""
        x0, y0, x1, y1 = (value * scale + offset for value, offset in zip(self.box, (dx, dy, dx, dy), strict=True))
        points = None if self.landmarks5 is None else self.landmarks5 * scale + np.array([dx, dy])
        return Face((x0, y0, x1, y1), self.score, points)


def faces_on_picture(faces: Iterable[Face], size: tuple[int, int]) -> list[Face]:
    """Those of the faces that can be faces of a picture of this (width, height): numbers, of which none is nonsense.

    The centre lies on the picture, and no side is above three times the longer side of the picture.
    """
    kept = []
    for face in faces:
        x0, y0, x1, y1 = face.box
        numbers = [*face.box, face.score, *([] if face.landmarks5 is None else face.landmarks5.flat)]
        if not all(map(math.isfinite, numbers)) or min(face.width, face.height) <= 0:
            continue
        on_it = 0 <= (x0 + x1) / 2 <= size[0] and 0 <= (y0 + y1) / 2 <= size[1]
        if on_it and max(face.width, face.height) <= 3 * max(size):
            kept.append(face)
    return kept


@runtime_checkable
class FaceDetector(Protocol):
    """Anything with these three members is a detector.

    One whose scores tell turned faces from upright ones may also have `clear`, the score from which a face surely
    stands upright, and `turned`, the sureness from which it does so in a turned picture: see
    `generation.photos.upright_faces`.

    Attributes:
        name: what log lines call it.
        sizes: longest image sides (pixels) at which it works well, best first; `detect_faces` tries them in turn.
    """

    name: str
    sizes: tuple[int, ...]

    def detect(self, image: Image.Image) -> list[Face]:
        """All faces of an RGB image, in any order."""
        ...


class YuNetDetector:
    """`cv2.FaceDetectorYN`: small, quick and accurate; its model file (230 kB) does not come with OpenCV."""

    name = "yunet"
    sizes: tuple[int, ...] = (640, 320, 1280)
    # Measured, see docs/detectors.md: upright photographs mostly score more, turned ones hardly ever (at most .913);
    # wherever a wrong turn is the surest one, its mean over four views is below .84.
    clear, turned = 0.905, 0.87
    smallest = 64  # pixels a side: of narrower pictures its boxes are no numbers, and not the same ones twice

    def __init__(self, model: str | Path, threshold: float = 0.6) -> None:
        if not Path(model).is_file():
            raise ModelNotFoundError(f"no YuNet model at {model}: {YUNET_WAYS}")
        try:
            self._net = cv2.FaceDetectorYN.create(str(model), "", (320, 320), threshold, 0.3, 5000)
        except cv2.error as error:
            raise ModelNotFoundError(f"{model} is not a YuNet model that OpenCV {cv2.__version__} can read") from error

    def detect(self, image: Image.Image) -> list[Face]:
        pixels = np.asarray(image)[:, :, ::-1]  # OpenCV wants BGR
        beyond = [(0, max(0, self.smallest - side)) for side in pixels.shape[:2]]
        pixels = np.ascontiguousarray(np.pad(pixels, [*beyond, (0, 0)], mode="edge"))
        self._net.setInputSize(pixels.shape[1::-1])
        _, rows = self._net.detect(pixels)
        # a row: x, y, w, h, five points (its left is the image's left), score
        faces = [
            Face((x, y, x + w, y + h), float(row[14]), row[4:14].reshape(5, 2).astype(np.float64))
            for row in ([] if rows is None else rows)
            for x, y, w, h in [map(float, row[:4])]
        ]
        return faces_on_picture(faces, image.size)


class HaarDetector:
    """OpenCV's own Haar cascades: nothing to download, works offline, finds photographs and drawn heads.

    One cascade alone is unsure of anything but a frontal photograph. So every cascade looks at several views (plain
    and equalised, upright and tilted, mirrored for the profile), all raw windows are pooled, and a face is where many
    windows agree.
    """

    name = "haar"
    sizes: tuple[int, ...] = (384, 768)
    tilts = (0, -20, 20)  # degrees
    smallest = (48, 48)  # pixels of a window
    min_votes, min_fraction = 12, 0.3  # windows a face needs; and their fraction of the windows of the surest face
    same_place, same_size = 0.35, 0.7  # windows agree: distance in widths of the larger, difference of log width

    def __init__(self) -> None:
        folder = Path(cv2.__file__).parent / "data"  # cv2.data is missing from opencv-python 5, as are the cascades
        names = ("frontalface_alt2", "profileface", "profileface")  # the profile one knows one side only: mirror it
        files = [folder / f"haarcascade_{name}.xml" for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelNotFoundError(
                f"OpenCV {cv2.__version__} has no {missing[0]}: pip install 'opencv-python>=4.10,<5', or use YuNet"
            )
        self._cascades = [
            (cv2.CascadeClassifier(str(file)), mirror) for file, mirror in zip(files, (0, 0, 1), strict=True)
        ]

    def detect(self, image: Image.Image) -> list[Face]:
        faces = []
        clusters = self._clusters(self._windows(np.asarray(image.convert("L"))))
        for votes, (x, y, width) in clusters:
            if votes >= max(self.min_votes, self.min_fraction * clusters[0][0]):
                half_w, half_h, y = 0.42 * width, 0.58 * width, y + 0.03 * width
                faces.append(Face((x - half_w, y - half_h, x + half_w, y + half_h), votes / (votes + 20)))
        return faces

    def _windows(self, gray: np.ndarray) -> np.ndarray:
        """(N, 3) raw windows (centre x, centre y, width) of all cascades in all views."""
        height, width = gray.shape
        found: list[np.ndarray] = []
        for tilt in self.tilts:
            turn = cv2.getRotationMatrix2D((width / 2, height / 2), tilt, 1.0)
            back = cv2.invertAffineTransform(turn)
            for view in (gray, cv2.equalizeHist(gray)):
                turned = cv2.warpAffine(view, turn, (width, height), borderMode=cv2.BORDER_REPLICATE)
                for cascade, mirror in self._cascades:
                    seen = cv2.flip(turned, 1) if mirror else turned
                    rows = np.asarray(
                        cascade.detectMultiScale(seen, scaleFactor=1.1, minNeighbors=0, minSize=self.smallest)
                    )
                    if len(rows) == 0:
                        continue
                    centre = rows[:, :2] + rows[:, 2:] / 2
                    if mirror:
                        centre[:, 0] = width - centre[:, 0]
                    found.append(np.column_stack([centre @ back[:, :2].T + back[:, 2], rows[:, 2]]))
        return np.concatenate(found) if found else np.empty((0, 3))

    def _clusters(self, windows: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(votes, mean window) of each place where windows agree, most votes first."""
        clusters = []
        while len(windows):
            x, y, width = windows.T
            distance = np.hypot(x[:, None] - x, y[:, None] - y) / np.maximum(width[:, None], width)
            agree = (distance < self.same_place) & (np.abs(np.log(width[:, None] / width)) < self.same_size)
            votes = agree.sum(1)
            members = agree[votes.argmax()]
            mean = windows[members].mean(0)
            clusters.append((int(votes.max()), mean))
            beyond = np.hypot(x - mean[0], y - mean[1]) > 0.5 * np.maximum(width, mean[2])
            windows = windows[beyond & ~members]
        return clusters


class InsightFaceDetector:
    """insightface's detector. Its models are licensed for non-commercial research only.

    Args:
        model: a folder with ONNX files, or the name of one of insightface's model packs.

    Raises:
        ModelNotFoundError: package or models are missing.
    """

    name = "insightface"
    sizes: tuple[int, ...] = (640, 1280)

    def __init__(self, model: str | Path | None = None) -> None:
        if model is not None and Path(model).is_dir():
            model = Path(model).resolve()  # insightface looks for relative paths in its own folder
        try:  # by name: a written import would make diffusers demand the package of everybody
            analysis = importlib.import_module("insightface.app").FaceAnalysis
            self._app: Any = analysis(str(model or "buffalo_l"), allowed_modules=["detection"])
            self._app.prepare(ctx_id=-1, det_size=(640, 640))
        except ImportError as error:
            raise ModelNotFoundError(
                "detector 'insightface' is not installed: pip install 'face-fusion-pipeline[insightface]', "
                "or take detector 'auto'"
            ) from error
        except Exception as error:  # offline it raises anything from ConnectionError to a bare AssertionError
            raise ModelNotFoundError(
                f"insightface could not load its models ({type(error).__name__}: {error}): "
                "go online once, or take detector 'auto'"
            ) from error

    def detect(self, image: Image.Image) -> list[Face]:
        rows = self._app.get(np.asarray(image)[:, :, ::-1].copy())
        faces = []
        for row in rows:
            x0, y0, x1, y1 = map(float, row.bbox)
            points = None if row.kps is None else np.asarray(row.kps, dtype=np.float64)
            faces.append(Face((x0, y0, x1, y1), float(row.det_score), points))
        return faces


def find_yunet(model: str | Path | None = None, download: bool = False) -> Path | None:
    """Path of YuNet's model: `model`, else $FACE_FUSION_YUNET, else the one in the Hugging Face cache, else None.

    Args:
        download: fetch it into the cache if it is nowhere. Nothing is fetched where HF_HUB_OFFLINE=1.

    Raises:
        ModelNotFoundError: it cannot be fetched, or the file in the cache is not the one that is known by its hash.
    """
    if given := model or os.environ.get("FACE_FUSION_YUNET"):
        return Path(given)
    cached = try_to_load_from_cache(YUNET_REPO, YUNET_FILE)
    if not isinstance(cached, str):
        if not download:
            return None
        cached, reason = _fetch_yunet()
        if reason:
            raise ModelNotFoundError(f"the YuNet model is not here and cannot be fetched ({reason}): {YUNET_WAYS}")
    if hashlib.sha256(Path(cached).read_bytes()).hexdigest() != YUNET_SHA256:
        raise ModelNotFoundError(
            f"{cached} is not the YuNet model that is known by its hash: delete it, then {YUNET_WAYS}"
        )
    return Path(cached)


@functools.cache  # one try for each process: every picture may ask
def _fetch_yunet() -> tuple[str, str]:
    """Path of the model in the cache, or "" and why it cannot be fetched."""
    if constants.HF_HUB_OFFLINE:
        return "", "HF_HUB_OFFLINE=1"
    try:
        # Without a network this fails within seconds, where a download would try for half a minute.
        get_session().head(hf_hub_url(YUNET_REPO, YUNET_FILE), timeout=3)
        return hf_hub_download(YUNET_REPO, YUNET_FILE), ""
    except Exception as error:  # offline, proxies, rate limits, a full disk: many types, one way out
        return "", type(error).__name__


def best_detector(model: str | Path | None = None) -> tuple[FaceDetector, str]:
    """What "auto" means here and now, and why: YuNet where its model is at hand or can be fetched, else the cascades.

    Raises:
        ModelNotFoundError: a model that is named (`model`, $FACE_FUSION_YUNET) is missing or broken.
    """
    try:
        path = find_yunet(model, download=True)
    except ModelNotFoundError as error:
        return HaarDetector(), f"{error}"
    assert path is not None
    return YuNetDetector(path), f"{path}"


def load_detector(detector: DetectorName | FaceDetector = "auto", model: str | Path | None = None) -> FaceDetector:
    """A detector by name; an instance is returned as it is.

    Args:
        detector: "auto" takes YuNet where its model is at hand or can be fetched and the Haar cascades otherwise, and
            logs why those.
        model: model file for "yunet" (and "auto"), model pack for "insightface".

    Raises:
        FaceFusionError: unknown name, or no detector. ModelNotFoundError: its package or model is missing.
    """
    if not isinstance(detector, str):
        if not isinstance(detector, FaceDetector):
            raise FaceFusionError(f"a face detector has `name`, `sizes` and `detect`, got {detector!r}")
        return detector
    chosen: FaceDetector
    why = "as asked"
    if detector == "auto":
        chosen, why = best_detector(model)
    elif detector == "yunet":
        try:
            path = find_yunet(model, download=True)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(f"{error}, or take detector 'haar', which needs no file") from error
        assert path is not None
        chosen, why = YuNetDetector(path), f"{path}"
    elif detector == "haar":
        chosen = HaarDetector()
    elif detector == "insightface":
        logger.warning("insightface's models are licensed for non-commercial research only")
        chosen = InsightFaceDetector(model)
    else:
        raise FaceFusionError(f"unknown face detector {detector!r}: take 'auto', 'yunet', 'haar' or 'insightface'")
    fallback = detector == "auto" and chosen.name == "haar"
    logger.log(logging.INFO if fallback else logging.DEBUG, "face detector: %s (%s)", chosen.name, why)
    return chosen
