"""Encoders that know nothing of the UNet: an image encoder and a face embedder, frozen. Photos in, tokens out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...evaluation.image_files import from_pil
from ...evaluation.recognisers import load_recognisers
from ...face_errors import FaceFusionError
from ...face_recognisers import Recogniser
from ..evaluation.evaluators import SHIPPED, load_evaluators
from ..training.face_embedder import load_training_embedder


@dataclass(frozen=True)
class Photo:
    """A reference: the face crop, the photo it is from, and the five landmarks (5, 2) of the face in its pixels."""

    face: Image.Image
    picture: Image.Image
    landmarks5: Tensor


class TokenEncoder(Protocol):
    """A frozen encoder of references."""

    width: int

    def __call__(self, photos: list[Photo]) -> Tensor:
        """Tokens (B, N, width), float32 on the CPU; N is 1 for an embedding of the whole."""
        ...


class ImageEncoder:
    """A `CLIPVisionModelWithProjection` on face crops: its embedding, or the states before its last layer.

    Args:
        processor: the pipeline's feature extractor, whose mean and deviation count; without one images are [-1, 1].

    Raises:
        FaceFusionError: `model` is None.
    """

    def __init__(self, model: Any, processor: Any = None, *, patches: bool = False) -> None:
        if model is None:
            raise FaceFusionError(
                "the model has no image_encoder: take one that has, or leave the variants ip-adapter and "
                "ip-adapter-plus out"
            )
        self.model, self.patches = model.requires_grad_(False).eval(), patches
        self.side: int = model.config.image_size
        self.width: int = model.config.hidden_size if patches else model.config.projection_dim
        self.mean = torch.tensor(getattr(processor, "image_mean", [0.5] * 3))[:, None, None]
        self.deviation = torch.tensor(getattr(processor, "image_std", [0.5] * 3))[:, None, None]

    @torch.no_grad()
    def __call__(self, photos: list[Photo]) -> Tensor:
        size = (self.side, self.side)
        crops = torch.stack([from_pil(photo.face.resize(size, Image.Resampling.BICUBIC)) for photo in photos])
        pixels = ((crops - self.mean) / self.deviation).to(self.model.device, self.model.dtype)
        output = self.model(pixels, output_hidden_states=self.patches)
        tokens = output.hidden_states[-2] if self.patches else output.image_embeds[:, None]
        return tokens.float().cpu()


class FaceEmbedderEncoder:
    """The embedding, of unit length, of a face embedder on the aligned face: what IP-Adapter FaceID starts from."""

    def __init__(self, embedder: Recogniser) -> None:
        self.embedder = embedder
        self.width: int = probe(embedder).shape[-1]

    def __call__(self, photos: list[Photo]) -> Tensor:
        found = [
            self.embedder.embed(from_pil(photo.picture)[None], photo.landmarks5[None]) for photo in photos
        ]  # one by one: pictures may differ in size
        return F.normalize(torch.from_numpy(np.concatenate(found)).float(), dim=-1)[:, None]


def load_evaluator(spec: str | None) -> Recogniser:
    """From a folder of `avatars-evaluate train-evaluators`, from `NAME=FILE.onnx[:PREPROCESSING]`, or None: ours.

    Raises:
        FaceFusionError: nothing of the kind is there.
    """
    if spec is not None and "=" in spec:
        return load_recognisers([spec])[0]
    evaluators = load_evaluators(spec or SHIPPED)
    if spec is not None:
        evaluators.name = f"avatar recogniser {Path(spec).name}"
    return evaluators


class OfTrainings:
    """The face embedder of trainings, which measures nothing, as a [`Recogniser`]."""

    name = "recogniser of trainings"  # as the settings of earlier runs have it

    def __init__(self) -> None:
        self.network = load_training_embedder()

    @torch.no_grad()
    def embed(self, images: Tensor, landmarks: Tensor) -> np.ndarray:
        return self.network(images, landmarks).numpy()


def load_conditioner(spec: str | None) -> Recogniser:
    """Who says what `ip-adapter-faceid` is given: the face embedder of trainings, or see [`load_evaluator`]."""
    return OfTrainings() if spec is None else load_evaluator(spec)


def probe(recogniser: Recogniser) -> np.ndarray:
    """The embedding (D,) of one fixed picture of noise: equal for equal networks only."""
    image = torch.rand((1, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    landmarks = torch.tensor([[[44.0, 52.0], [84.0, 52.0], [64.0, 74.0], [48.0, 98.0], [80.0, 98.0]]])
    return recogniser.embed(image, landmarks)[0]


def check_independent(condition: Recogniser, evaluator: Recogniser) -> None:
    """Raise [`FaceFusionError`] if who conditions is who evaluates: such a table would measure itself."""
    a, b = probe(condition), probe(evaluator)
    if a.shape == b.shape and np.allclose(a, b, rtol=1e-3, atol=1e-4):
        raise FaceFusionError(
            f"{evaluator.name} cannot evaluate pictures that were conditioned on its own embeddings: give another "
            "--evaluator, a folder of `face-fusion avatars-evaluate train-evaluators --seed 1` or NAME=FILE.onnx"
        )
