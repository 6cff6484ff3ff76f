"""Encoders that know nothing of the UNet: an image encoder and a face recogniser, frozen. Photos in, tokens out."""

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
from ...evaluation.recognisers import Recogniser, load_recognisers
from ...face_errors import FaceFusionError
from ..evaluation.judges import SHIPPED, load_judges
from ..training.recogniser import load_training_recogniser


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


class RecogniserEncoder:
    """The embedding, of unit length, of a face recogniser on the aligned face: what IP-Adapter FaceID starts from."""

    def __init__(self, recogniser: Recogniser) -> None:
        self.recogniser = recogniser
        self.width: int = probe(recogniser).shape[-1]

    def __call__(self, photos: list[Photo]) -> Tensor:
        found = [
            self.recogniser.embed(from_pil(photo.picture)[None], photo.landmarks5[None]) for photo in photos
        ]  # one by one: pictures may differ in size
        return F.normalize(torch.from_numpy(np.concatenate(found)).float(), dim=-1)[:, None]


def load_judging_recogniser(spec: str | None) -> Recogniser:
    """A folder of judges (see `avatars-evaluate train-judges`), `NAME=FILE.onnx[:PREPROCESSING]`, or None: ours.

    Raises:
        FaceFusionError: nothing of the kind is there.
    """
    if spec is not None and "=" in spec:
        return load_recognisers([spec])[0]
    judges = load_judges(spec or SHIPPED)
    if spec is not None:
        judges.name = f"avatar recogniser {Path(spec).name}"
    return judges


class TrainingEmbedder:
    """The recogniser of trainings, which measures nothing, as a [`Recogniser`]."""

    name = "recogniser of trainings"

    def __init__(self) -> None:
        self.network = load_training_recogniser()

    @torch.no_grad()
    def embed(self, images: Tensor, landmarks: Tensor) -> np.ndarray:
        return self.network(images, landmarks).numpy()


def load_conditioner(spec: str | None) -> Recogniser:
    """Who says what `ip-adapter-faceid` is given: the recogniser of trainings, or see [`load_judging_recogniser`]."""
    return TrainingEmbedder() if spec is None else load_judging_recogniser(spec)


def probe(recogniser: Recogniser) -> np.ndarray:
    """The embedding (D,) of one fixed picture of noise: equal for equal networks only."""
    image = torch.rand((1, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    landmarks = torch.tensor([[[44.0, 52.0], [84.0, 52.0], [64.0, 74.0], [48.0, 98.0], [80.0, 98.0]]])
    return recogniser.embed(image, landmarks)[0]


def check_independent(condition: Recogniser, judge: Recogniser) -> None:
    """Raise [`FaceFusionError`] if who conditions is who judges: such a table would measure itself."""
    a, b = probe(condition), probe(judge)
    if a.shape == b.shape and np.allclose(a, b, rtol=1e-3, atol=1e-4):
        raise FaceFusionError(
            f"{judge.name} cannot judge pictures that were conditioned on its own embeddings: give another "
            "--judge-recogniser, a folder of `face-fusion avatars-evaluate train-judges --seed 1` or NAME=FILE.onnx"
        )
