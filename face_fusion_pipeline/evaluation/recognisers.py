"""Further face recognisers: those of the package deepface, and several at once from names and folders."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..face_errors import FaceFusionError, ModelNotFoundError
from ..face_recognisers import OnnxRecogniser, align_faces


logger = logging.getLogger(__name__)


class DeepFaceRecogniser:
    """A recogniser of the package deepface, such as Facenet512 or VGG-Face, on aligned crops.

    Raises ModelNotFoundError where the package is not installed, or the weights are neither there nor can be fetched.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self._model: Any = importlib.import_module("deepface").DeepFace.build_model(name)
        except ImportError as error:
            raise ModelNotFoundError(
                "deepface is not installed: pip install 'face-fusion-pipeline[deepface]' (it brings TensorFlow)"
            ) from error
        except Exception as error:  # unknown names, no network, TensorFlow's own troubles: many types
            raise ModelNotFoundError(f"deepface could not load {name} ({type(error).__name__}: {error})") from error
        if self._model.input_shape[0] != self._model.input_shape[1]:
            raise FaceFusionError(f"{name} takes crops of {self._model.input_shape} pixels: only square ones are made")

    def embed(self, images: torch.Tensor, landmarks: torch.Tensor) -> np.ndarray:
        crops = align_faces(images.float(), landmarks.float(), self._model.input_shape[0]).clamp(0, 1)
        pixels = crops.flip(1).permute(0, 2, 3, 1).numpy()  # its networks take BGR in [0, 1], channels last
        rows = [np.asarray(self._model.forward(pixels[i : i + 1]), np.float32).ravel() for i in range(len(pixels))]
        return np.stack(rows) if rows else np.zeros((0, 1), np.float32)


def load_recognisers(specs: list[str], folder: str | Path | None = None) -> list[OnnxRecogniser]:
    """Recognisers from `NAME=FILE.onnx[:PREPROCESSING]` texts and from every fitting .onnx file of a folder."""
    found = []
    for spec in specs:
        name, equals, rest = spec.partition("=")
        if not equals:
            raise FaceFusionError(f"recogniser {spec!r}: write NAME=FILE.onnx or NAME=FILE.onnx:PREPROCESSING")
        stem, _, preprocessing = rest.partition(".onnx:")
        file = f"{stem}.onnx" if preprocessing else rest
        found.append(OnnxRecogniser(file, name=name, preprocessing=preprocessing or None))
    if folder is not None:
        if not Path(folder).is_dir():
            raise ModelNotFoundError(f"no folder of recognisers {folder}")
        for path in sorted(Path(folder).glob("*.onnx")):
            try:
                found.append(OnnxRecogniser(path))
            except FaceFusionError as error:  # a detector or another network lies in the same folder
                logger.info("left out: %s", error)
    return found
