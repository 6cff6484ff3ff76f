"""What is minimised: noising, the three kinds of prediction, loss weights, and likeness of the predicted picture.

With a noise level ᾱ, z = √ᾱ x + √(1−ᾱ) ε. A UNet predicts ε ("epsilon"), v = √ᾱ ε − √(1−ᾱ) x ("v_prediction") or x
("sample"). SNR = ᾱ / (1−ᾱ).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..face_layout import BOX_ENLARGE
from .loop import TrainingError


EMBEDDERS = {"avatars": "face_fusion_pipeline.avatars.training.face_embedder:load_training_embedder"}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Images (B, 3, H, W) in [0, 1] and landmarks5 (B, 5, 2) in their pixels -> embeddings (B, D), differentiable.
FaceEmbedder = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NoiseSchedule:
    """`alphas` is ᾱ (T,) from little to much noise, `prediction` what the UNet predicts."""

    alphas: Tensor
    prediction: str

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise TrainingError(f"the base predicts {self.prediction!r}: only {', '.join(PREDICTIONS)} can be trained")

    def __len__(self) -> int:
        return len(self.alphas)

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same on `device`, where looking up a level waits for nothing."""
        return replace(self, alphas=self.alphas.to(device))

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1−ᾱ), each (B, 1, 1, 1)."""
        alphas = self.alphas.to(timesteps.device)[timesteps][:, None, None, None]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z at `timesteps` (B,)."""
        signal, strength = self._levels(timesteps)
        return signal * latents + strength * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should predict."""
        signal, strength = self._levels(timesteps)
        if self.prediction == "v_prediction":
            return signal * noise - strength * latents
        return noise if self.prediction == "epsilon" else latents

    def one_step(self, noisy: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
        """The latents x that a prediction stands for."""
        signal, strength = self._levels(timesteps)
        if self.prediction == "v_prediction":
            return signal * noisy - strength * predicted
        return (noisy - strength * predicted) / signal if self.prediction == "epsilon" else predicted

    def weight(self, timesteps: Tensor, snr_gamma: float | None, keep_noisy: bool = False) -> Tensor:
        """min-SNR weights (B,) of the squared error of each prediction; ones without `snr_gamma`.

        min(SNR, γ) over SNR for ε, over SNR + 1 for v, over 1 for x. With `keep_noisy` v takes
        min(SNR + 1, γ + 1) over SNR + 1, which leaves noisy steps, where colours are decided, at full weight.
        """
        alphas = self.alphas.to(timesteps.device)[timesteps]
        if snr_gamma is None:
            return torch.ones_like(alphas)
        snr = alphas / (1 - alphas).clamp_min(1e-8)
        if self.prediction == "epsilon":
            return (snr_gamma / snr.clamp_min(1e-8)).clamp(max=1)
        if self.prediction == "sample":
            return snr.clamp(max=snr_gamma)
        offset = 1.0 if keep_noisy else 0.0
        return (snr + offset).clamp(max=snr_gamma + offset) / (snr + 1)


def spread_timesteps(count: int, length: int, generator: torch.Generator, power: float = 1.0) -> Tensor:
    """Timesteps (count,) on the generator's device, length * u^power, u from each of `count` equal ranges at random.

    So they vary less than independent ones. With a power below 1 noisy steps come more often.
    """
    ranges = torch.randperm(count, generator=generator, device=generator.device)
    within = torch.rand(count, generator=generator, device=generator.device)
    return (((ranges + within) / count) ** power * length).long().clamp(max=length - 1)


def face_mask(boxes: Tensor, side: int, size: int) -> Tensor:
    """Latent cells that a face touches: bool (B, 1, size, size) for boxes (B, 4), XYXY pixels of images of `side`."""
    edges = torch.arange(size, device=boxes.device) * (side / size)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    columns = (edges + side / size > x0) & (edges < x1)  # (B, size)
    rows = (edges + side / size > y0) & (edges < y1)
    return rows[:, None, :, None] & columns[:, None, None, :]


def face_places(boxes: Tensor, others: Tensor, side: int, size: int) -> Tensor:
    """Queries that see the face, bool (B, size²): all where nobody else is there, else those of the person's place.

    That is the enlarged face box less what is nearer to somebody else, as `face_layout.visible_people` has it with
    "nearest" and "none".

    Args:
        boxes: (B, 4) of the person. others: (B, n, 4) of everybody else, NaN for nobody.
    """
    everybody = torch.cat([boxes[:, None], others], 1)
    centres, halves = (everybody[..., :2] + everybody[..., 2:]) / 2, (everybody[..., 2:] - everybody[..., :2]) / 2
    enlarged = torch.cat([centres - BOX_ENLARGE * halves, centres + BOX_ENLARGE * halves], -1)
    masks = face_mask(enlarged.flatten(0, 1), side, size)[:, 0].unflatten(0, everybody.shape[:2])  # none for NaN
    cells = torch.stack(torch.meshgrid(*[torch.arange(size, device=boxes.device)] * 2, indexing="ij"), -1).float()
    count = masks.sum((2, 3)).clamp_min(1)  # (B, 1 + n)
    middles = (masks[..., None] * cells).sum((2, 3)) / count[..., None]
    distances = (cells - middles[:, :, None, None]).norm(dim=-1) / count[..., None, None].sqrt()
    nearest = distances.masked_fill(~masks, torch.inf).argmin(1) == 0
    alone = others.isnan().all(-1).all(-1)[:, None, None]
    return (alone | masks[:, 0] & nearest).flatten(1)


def weighted_error(predicted: Tensor, target: Tensor, faces: Tensor, face_weight: float) -> Tensor:
    """Squared error (B,), where cells of a face count `face_weight` times; the mean weight of an image is one."""
    mask = 1 + (face_weight - 1) * faces.float()
    mask = mask / mask.mean(dim=(1, 2, 3), keepdim=True)
    return (mask * (predicted.float() - target.float()).square()).mean(dim=(1, 2, 3))


def identity_distance(embedder: FaceEmbedder, pictures: Tensor, truth: Tensor, landmarks5: Tensor) -> Tensor:
    """1 − cosine (B,) between the embeddings of `pictures` and of `truth`, both (B, 3, H, W) about [0, 1]."""
    with torch.no_grad():
        goal = embedder(truth.clamp(0, 1), landmarks5)
    return 1 - F.cosine_similarity(embedder(pictures, landmarks5).float(), goal.float(), dim=-1)


def jittered(landmarks5: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Landmarks (B, 5, 2) turned, enlarged and moved about their middle, by `draws` (B, 4) in [0, 1].

    At strength 1 by up to 12 degrees, a fourth, and a tenth of their extent. An embedder that looks at faces a little
    differently each time is harder to please with a pattern that is no face.
    """
    turn, zoom, *aside = (strength * (2 * draws - 1)).to(landmarks5).unbind(1)
    middle = landmarks5.mean(1, keepdim=True)
    extent = (landmarks5 - middle).abs().amax((1, 2))
    angle, scale = turn * math.radians(12), 1.25**zoom
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rotation = torch.stack([cosine, -sine, sine, cosine], -1).view(-1, 2, 2)
    return middle + (landmarks5 - middle) @ rotation.mT + (0.1 * extent[:, None] * torch.stack(aside, -1))[:, None]


def load_face_embedder(name: str) -> Any:
    """That of an identity loss: `avatars`, or `MODULE:FUNCTION`, a function that returns a [`FaceEmbedder`].

    An nn.Module is frozen and moves with the training. Raises [`TrainingError`] if there is none.
    """
    module, colon, function = EMBEDDERS.get(name, name).partition(":")
    try:
        if not colon:
            raise ValueError("it has no colon")
        embedder = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever another module does
        raise TrainingError(
            f"no face embedder {name!r} ({error}): give 'avatars', or MODULE:FUNCTION, a function without arguments "
            "that returns a callable of images and landmarks"
        ) from error
    if isinstance(embedder, torch.nn.Module):
        embedder.requires_grad_(False).eval()
    return embedder
