"""Makes the judge of `face_familiarity`: from pictures that a model knows, and pictures that it does not.

Each picture is shown several times as users might bring it: framed more or less tightly, turned, recoloured, blurred,
before a plain background, small, compressed. The judge is a logistic regression on what the UNet makes of that; where
it begins to call pictures unfamiliar is set by pictures of both kinds that were held out.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..face_errors import FaceFusionError
from ..face_familiarity import Familiarity, cell_statistics
from ..face_images import crop_face
from ..face_self_attention import SelfAttentionReference
from ..reference_pass import capture_hidden_states, face_tensors, noise_latents
from ..unet_family import (
    encode_latents,
    text_conditions,
    training_alphas,
    unet_arguments,
    unet_fingerprint,
    unet_input,
)
from .augmentation import augmented


FaceIn = tuple[Image.Image, tuple[float, float, float, float]]  # a picture, and the box XYXY of the face in it
CLOSEST, WIDEST = 1.3, 2.1  # sides of a crop in face heights
LEAST_SIDE = 64  # pixels of the smallest pictures
LEAST_QUALITY = 40  # of JPEG
BATCH = 16
HELD_OUT = 5  # every fifth picture


@dataclass(frozen=True)
class Judged:
    """What a judge is fitted to.

    Attributes:
        repeats: how often each picture is shown.
        l2: weight of the squared weights in the loss.
        right: part of the held-out familiar pictures, as varied as those that were learned from, that are to be found
            familiar; of pictures as they are it is more.
        seed: of the variations.
        timestep: noise of the reference that is looked at; 0 is clean.
        half_axes: of the ellipse whose cells count.
    """

    repeats: int = 2
    l2: float = 0.001
    right: float = 0.95
    seed: int = 0
    timestep: int = 150
    half_axes: tuple[float, float] = (0.5, 0.5)


def as_users_bring_it(face: FaceIn, rng: random.Random) -> Image.Image:
    """A face crop drawn from `rng` alone: equal seeds give equal pictures."""
    crop = augmented(crop_face(*face, rng.uniform(CLOSEST, WIDEST), 256), rng)
    if rng.random() < 0.5:
        side = rng.randrange(LEAST_SIDE, crop.width)
        crop = crop.resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=rng.randrange(LEAST_QUALITY, 96))
        crop = Image.open(file).convert("RGB")
    return crop


@torch.no_grad()
def statistics(
    pipe: Any, crops: Iterable[Image.Image], timestep: int, half_axes: tuple[float, float]
) -> dict[str, Tensor]:
    """Cross-attention layer -> `(n, 2, C)` of face crops, see `face_familiarity.cell_statistics`."""
    conditions, side = text_conditions(pipe, [""], pipe._execution_device, None), pipe._default_resolution()
    arguments, alphas = unet_arguments(conditions, side, side), training_alphas(pipe.scheduler)
    found: dict[str, list[Tensor]] = {}
    crops = iter(crops)
    while some := list(islice(crops, BATCH)):
        pixels = torch.cat([face_tensors(crop, side)[0] for crop in some]).to(pipe._execution_device)
        latents = noise_latents(encode_latents(pipe.vae, pixels).to(pipe.unet.dtype), alphas, timestep)
        sample = unet_input(latents, pipe.unet.config.in_channels)
        for name, states in capture_hidden_states(pipe.unet, sample, timestep, **arguments).items():
            found.setdefault(name, []).append(cell_statistics(states, half_axes).cpu())
    if not found:
        raise FaceFusionError("no pictures to learn from")
    return {name: torch.cat(parts) for name, parts in found.items()}


def fit_familiarity(
    pipe: Any, familiar: Iterable[FaceIn], unfamiliar: Iterable[FaceIn], fallback: SelfAttentionReference, how: Judged
) -> tuple[Familiarity, dict[str, Any]]:
    """A judge for the model of a pipeline, and what it makes of the pictures that were held out.

    Args:
        familiar, unfamiliar: faces; every fifth of each is held out.
        fallback: what the self-attention is to see of unfamiliar references.

    Raises:
        FaceFusionError: fewer than [`HELD_OUT`] pictures of a kind.
    """
    known, unknown = (
        statistics(pipe, variations(faces, how), how.timestep, how.half_axes) for faces in (familiar, unfamiliar)
    )
    weights, bias, figures = told_apart(known, unknown, how)
    widths = [(name, tensor.shape[-1]) for name, tensor in known.items()]
    parts = weights.float().split([2 * width for _, width in widths])
    by_layer = {name: part.view(2, width) for (name, width), part in zip(widths, parts, strict=True)}
    how_seen = (how.timestep, 0, how.half_axes)
    return Familiarity(by_layer, bias, *how_seen, fallback, unet_fingerprint(pipe.unet)), figures


def told_apart(
    familiar: dict[str, Tensor], unfamiliar: dict[str, Tensor], how: Judged
) -> tuple[Tensor, float, dict[str, Any]]:
    """Weights `(D,)` and bias by which the [`statistics`] of two kinds are told apart, and the figures of both.

    Raises:
        FaceFusionError: fewer than [`HELD_OUT`] pictures of a kind.
    """
    seen: list[dict[str, Tensor]] = []
    held: list[dict[str, Tensor]] = []
    for kind, found in (("familiar", familiar), ("unfamiliar", unfamiliar)):
        kept = torch.arange(len(next(iter(found.values())))) // how.repeats % HELD_OUT < HELD_OUT - 1
        if kept.all():
            raise FaceFusionError(f"{kept.sum() // how.repeats} {kind} pictures are too few: give hundreds")
        for part, chosen in ((seen, kept), (held, ~kept)):
            part.append({name: tensor[chosen] for name, tensor in found.items()})
    weights, bias = logistic(flat(seen[0]), flat(seen[1]), how.l2)
    known, unknown = (flat(part) @ weights + bias for part in held)
    edge = float(known.quantile(1 - how.right))
    figures = {
        "pictures": {"familiar": len(flat(seen[0])), "unfamiliar": len(flat(seen[1]))},
        "held out": {"familiar": len(known), "unfamiliar": len(unknown)},
        "right": {
            "familiar": float((known >= edge).double().mean()),
            "unfamiliar": float((unknown < edge).double().mean()),
        },
    }
    return weights, bias - edge, figures


def judged_unfamiliar(pipe: Any, judge: Familiarity, faces: Iterable[FaceIn]) -> list[bool]:
    """Of each face, cropped as commands crop it, whether a judge finds it unfamiliar."""
    found = statistics(pipe, (crop_face(*face) for face in faces), judge.timestep, judge.half_axes)
    return (judge.of_statistics(found) < 0).tolist()


def variations(faces: Iterable[FaceIn], how: Judged, first: int = 0) -> Iterator[Image.Image]:
    """Each face `how.repeats` times, as users bring it; how does not depend on the faces before.

    Args:
        first: number of the first one.
    """
    for index, face in enumerate(faces, first):
        rng = random.Random(f"{how.seed} {index}")
        for _ in range(how.repeats):
            yield as_users_bring_it(face, rng)


def flat(found: dict[str, Tensor]) -> Tensor:
    """All statistics of each picture in one row, float64."""
    return torch.cat([tensor.flatten(1) for tensor in found.values()], 1).double()


def logistic(positive: Tensor, negative: Tensor, l2: float) -> tuple[Tensor, float]:
    """Weights `(D,)` and bias of a logistic regression on rows `(n, D)`, in which both kinds count the same."""
    rows = torch.cat([positive, negative])
    mean, deviation = rows.mean(0), rows.std(0).clamp_min(1e-6)
    signs = torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))]).double()
    shares = torch.cat([torch.full((len(part),), 0.5 / len(part)) for part in (positive, negative)]).double()
    rows = (rows - mean) / deviation
    weights = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = rows @ weights[:-1] + weights[-1]
        value = (torch.nn.functional.softplus(-signs * logits) * shares).sum() + l2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    scaled = weights.detach()[:-1] / deviation
    return scaled, float(weights.detach()[-1] - scaled @ mean)
