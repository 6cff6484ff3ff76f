"""Face recognisers trained on photographs, from ONNX files and insightface: embeddings that cosines compare.

They take crops that are aligned by five landmarks: left eye, right eye, nose, left and right mouth corner, as seen in
the image. Coordinates are (x, y) in pixels with integer values at pixel centres, as in OpenCV.
"""

import hashlib
import importlib
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from .face_errors import FaceFusionError, ModelNotFoundError, short


logger = logging.getLogger(__name__)

CROP_SIZE = 112


class Recogniser(Protocol):
    """Anything that turns images and five landmarks into embeddings that cosine similarity compares."""

    name: str

    def embed(self, images: torch.Tensor, landmarks: torch.Tensor) -> np.ndarray:
        """Images (B, 3, H, W) in [0, 1] and landmarks (B, 5, 2) in pixels to embeddings (B, D)."""
        ...


def _imagenet(crops: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (crops - mean[:, None, None]) / std[:, None, None]


# What a network expects of RGB crops in [0, 1].
PREPROCESSING = {"imagenet": _imagenet, "raw": lambda crops: crops * 255, "arcface": lambda crops: crops * 2 - 1}
_KNOWN_FILES = {"mobilefacenet_foamliu": "imagenet", "mobileface_v2": "raw"}


class OnnxRecogniser:
    """A face recogniser of 112 x 112 aligned RGB crops in an ONNX file.

    `preprocessing` is a key of `PREPROCESSING`; by default that of a known file name, else "arcface".
    Raises FaceFusionError for a file that is no network or takes other inputs, ModelNotFoundError for none.
    """

    def __init__(self, path: str | Path, *, name: str | None = None, preprocessing: str | None = None) -> None:
        self.path = path = Path(path)
        if not path.is_file():
            raise ModelNotFoundError(f"no recogniser file {path}")
        self.name = name or path.stem
        preprocessing = preprocessing or _KNOWN_FILES.get(path.stem, "arcface")
        if preprocessing not in PREPROCESSING:
            raise FaceFusionError(f"unknown preprocessing {preprocessing!r}: choose from {', '.join(PREPROCESSING)}")
        self._prepare = PREPROCESSING[preprocessing]
        self._session = _open_session(path)
        self._input = self._session.get_inputs()[0]
        if list(self._input.shape)[1:] != [3, CROP_SIZE, CROP_SIZE]:
            raise FaceFusionError(f"{path} takes {self._input.shape}, not N x 3 x {CROP_SIZE} x {CROP_SIZE} crops")

    def embed(self, images: torch.Tensor, landmarks: torch.Tensor) -> np.ndarray:
        crops = self._prepare(align_faces(images.float(), landmarks.float(), CROP_SIZE)).numpy()
        # One at a time: many published files fix the batch size to 1.
        rows = [self._session.run(None, {self._input.name: crop[None]})[0][0] for crop in crops]
        return np.stack(rows) if rows else np.zeros((0, 1), np.float32)


def _open_session(path: Path) -> Any:
    try:  # by name: a written import would make diffusers demand the package of everybody
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise FaceFusionError("recognisers in ONNX files need onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own types, which have no common base
        raise FaceFusionError(f"{path} is no network that onnxruntime can read: {short(error, 120)}") from error


def insightface_recogniser(pack: str = "buffalo_l") -> OnnxRecogniser:
    """The ArcFace network of an insightface model pack. Its models are for non-commercial research only.

    Raises ModelNotFoundError where the package is not installed, or the pack is neither there nor can be fetched.
    """
    try:
        analysis: Any = importlib.import_module("insightface.app").FaceAnalysis
        path = analysis(pack, allowed_modules=["detection", "recognition"]).models["recognition"].model_file
    except ImportError as error:
        raise ModelNotFoundError(
            "insightface is not installed: pip install 'face-fusion-pipeline[insightface]'"
        ) from error
    except Exception as error:  # offline it raises anything from ConnectionError to a bare AssertionError
        raise ModelNotFoundError(
            f"insightface could not load {pack} ({type(error).__name__}: {error}): go online once"
        ) from error
    logger.warning("insightface's models are licensed for non-commercial research only")
    return OnnxRecogniser(path, name="ArcFace", preprocessing="arcface")


def name_with_digest(path: Path) -> str:
    """The file's name without its ending, and the first eight digits of its sha256: another content, another name."""
    return f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


# --- Aligned crops -------------------------------------------------------------------------------------------------


# Where ArcFace recognisers expect the five landmarks in a 112 x 112 crop.
ARCFACE_TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity_transform(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least-squares rotation, scale and shift (no reflection) taking `source` to `target`.

    Points (..., K, 2) in, matrices (..., 2, 3) out: target ≈ matrix[:, :2] @ source + matrix[:, 2]. With points as
    complex numbers the map is w = a z + b, and a = Σ conj(z - mean z)(w - mean w) / Σ |z - mean z|².
    """
    z = torch.view_as_complex(source.double().contiguous())
    w = torch.view_as_complex(target.double().contiguous())
    z, w = torch.broadcast_tensors(z, w)
    z_mean, w_mean = z.mean(-1, keepdim=True), w.mean(-1, keepdim=True)
    a = ((z - z_mean).conj() * (w - w_mean)).sum(-1) / (z - z_mean).abs().square().sum(-1).clamp_min(1e-12)
    b = w_mean[..., 0] - a * z_mean[..., 0]
    rows = [torch.stack([a.real, -a.imag, b.real], -1), torch.stack([a.imag, a.real, b.imag], -1)]
    return torch.stack(rows, -2).to(source.dtype)


def face_template(size: int, zoom: float = 1.0) -> torch.Tensor:
    """The ArcFace template in a crop of `size` pixels; `zoom` < 1 shrinks the face, so that hair and chin come in."""
    centre = 55.5
    return ((ARCFACE_TEMPLATE - centre) * zoom + centre) * (size - 1) / 111


def align_faces(images: torch.Tensor, landmarks: torch.Tensor, size: int = 112, *, zoom: float = 1.0) -> torch.Tensor:
    """Crops (B, 3, size, size) of images (B, 3, H, W), landmarks (B, 5, 2) on the template; edges are replicated."""
    height, width = images.shape[-2:]
    to_crop = similarity_transform(landmarks, face_template(size, zoom).to(landmarks))
    turn = to_crop[..., :2]
    turn = turn.mT / torch.linalg.det(turn).clamp_min(1e-6)[..., None, None]  # the inverse; of coinciding points too
    matrix = torch.cat([turn, -turn @ to_crop[..., 2:]], -1)  # crop pixel -> image pixel
    rows, columns = torch.meshgrid(*[torch.arange(size, device=images.device)] * 2, indexing="ij")
    pixels = torch.stack([columns, rows, torch.ones_like(rows)], -1).to(images)  # (size, size, 3)
    points = torch.einsum("bij,yxj->byxi", matrix.to(images), pixels)
    span = torch.tensor([width - 1, height - 1]).to(images)
    return F.grid_sample(images, points / span * 2 - 1, padding_mode="border", align_corners=True)
