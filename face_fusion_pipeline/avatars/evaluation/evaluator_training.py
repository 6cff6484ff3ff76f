"""Training of the evaluators on renders, and their own report on renders of other identities."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from ...evaluation.metrics import verification_auc
from ...evaluation.reports import circumstances
from ...face_errors import FaceFusionError
from ...files.atomic import write_text
from ..training.controlnet import load_depth
from ..training.data import AvatarImages, landmarks5, load_avatars, portraits
from .evaluators import (
    EVALUATOR_NAMES,
    IMAGE_SIZE,
    SCENE_TRAITS,
    TRAITS,
    Evaluators,
    decidable,
    heatmap_cells,
    load_evaluators,
)
from .renders import coarse, depth_cells


IMAGES, FACES = 32, 64  # a batch of whole images, of face crops
HEATMAP_SIGMA = 0.8  # cells
LANDMARK_JITTER = 1.0  # pixels
TEMPERATURE = 0.1

Loss = Callable[[torch.Tensor], torch.Tensor]  # of the rows of a batch


def train_evaluators(
    data: str | Path,
    out: str | Path,
    *,
    steps: int = 1200,
    limit: int = 20000,
    seed: int = 0,
    only: Sequence[str] = EVALUATOR_NAMES,
    start: str | Path | None = None,
) -> dict:
    """Train all evaluators on DATA/train, write them to `out` and return their figures on DATA/validation.

    `steps` batches for each, half of them for the recogniser. What looks at aligned faces is trained on faces
    as the locator finds them. With `only` a few of the names, the others are those already in `out`. `start` is a
    folder of evaluators to go on from. The figures are also written to `out/report.json`, with what each evaluator was
    trained on. Depth needs depth maps: `TrainingError` before anything is trained where there are none.
    """
    torch.manual_seed(seed)
    renders, held_out = (load_avatars(Path(data), split, limit) for split in ("train", "validation"))
    depths = [true_nearness(images) for images in (renders, held_out)] if "depth" in only else []
    singles = renders.where(people=1)
    labels = {trait: sorted({str(record[trait]) for record in renders.records}) for trait in TRAITS}
    evaluators = load_evaluators(start) if start else Evaluators.new(labels)
    evaluators.networks.requires_grad_(True)
    if set(only) != set(EVALUATOR_NAMES):
        trained = load_evaluators(out)
        evaluators = replace(trained, **{name: getattr(evaluators, name) for name in only})
    rng = np.random.default_rng(seed)
    if "locator" in only:
        _fit(evaluators.locator, _locator_loss(evaluators, singles), _random(singles, rng, IMAGES), steps)
    found = torch.cat([evaluators.locate(singles.floats(rows)) for rows in torch.arange(len(singles)).split(256)])
    if "scene" in only:
        _fit(evaluators.scene, _scene_loss(evaluators, renders), _random(renders, rng, IMAGES), steps)
    if "expression" in only:
        _fit(evaluators.expression, _expression_loss(evaluators, singles, found), _random(singles, rng, FACES), steps)
    if "recogniser" in only:
        _fit(evaluators.recogniser, _recogniser_loss(evaluators, singles, found), _people(singles, rng), steps // 2)
    if "depth" in only:
        _fit(evaluators.depth, _depth_loss(evaluators, renders, depths[0]), _random(renders, rng, IMAGES), steps)
    evaluators.save(out)
    figures = report(load_evaluators(out), held_out)
    path = Path(out) / "report.json"
    known = (
        json.loads(path.read_text()).get("evaluators", {})
        if path.is_file() and set(only) != set(EVALUATOR_NAMES)
        else {}
    )
    run = {
        "trained_on": len(renders),
        "steps": steps,
        "started_from_evaluators": start is not None,
        "seed": seed,
        **circumstances(),
    }
    figures["evaluators"] = known | dict.fromkeys(only, run)
    write_text(path, json.dumps(figures, indent=1) + "\n")
    return figures


def true_nearness(renders: AvatarImages) -> torch.Tensor:
    """(N, 32, 32) in [0, 1]; `TrainingError` where the dataset was written without `--depth`."""
    return torch.cat([depth_cells(part.float() / 255) for part in load_depth(renders).split(256)])


def report(evaluators: Evaluators, renders: AvatarImages) -> dict[str, Any]:
    """Accuracy by trait, mean landmark error in pixels, recogniser AUC, and mean depth error where depth is known.

    Landmarks are those that the evaluators find themselves.

    Only what a picture can show counts, see `decidable`; landmarks and identity on single portraits.
    """
    hits: dict[str, list[bool]] = {trait: [] for trait in TRAITS}
    errors, depth_errors, embeddings, identities = [], [], [], []
    landmarks = landmarks5(renders)
    known = all("depth_file_name" in record for record in renders.records)
    nearness = true_nearness(renders) if known else None
    for rows in torch.arange(len(renders)).split(256):
        images = renders.floats(rows)
        found = evaluators.locate(images)
        said = evaluators.describe(images, found)
        single = [i for i, row in enumerate(rows.tolist()) if renders.records[row]["people"] == 1]
        for i, row in enumerate(rows.tolist()):
            for trait in TRAITS:
                if _decidable(trait, renders.records[row]):
                    hits[trait].append(said[trait][i] == str(renders.records[row][trait]))
        errors.append((found - landmarks[rows])[single].norm(dim=-1).mean(1))
        if nearness is not None:
            depth_errors.append((evaluators.nearness(images) - nearness[rows]).abs().mean(dim=(1, 2)))
        embeddings.append(evaluators.embed(images[single], found[single]))
        identities += [renders.records[int(rows[i])]["identities"][0] for i in single]
    return {
        "accuracy": {trait: float(np.mean(values)) for trait, values in hits.items()},
        "landmark_error_pixels": float(torch.cat(errors).mean()),
        "depth_error": float(torch.cat(depth_errors).mean()) if depth_errors else None,
        "recogniser_auc": verification_auc(np.concatenate(embeddings), np.array(identities)),
        "images": len(renders),
    }


def _fit(network: nn.Module, loss_of: Loss, batches: Iterator, steps: int) -> None:
    """AdamW under one learning-rate cycle."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=max(steps, 2), pct_start=0.15)
    network.train()
    progress = tqdm(range(steps), desc=type(network).__name__, mininterval=5)
    for step in progress:
        loss = loss_of(next(batches))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cycle.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    network.eval()


def _random(renders: AvatarImages, rng: np.random.Generator, size: int) -> Iterator[torch.Tensor]:
    while True:
        yield torch.from_numpy(rng.integers(len(renders), size=size))


def _people(renders: AvatarImages, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Batches of two different images of each of FACES people, first images first."""
    several = [rows for rows in portraits(renders).values() if len(rows) > 1]
    if len(several) < 2:
        raise FaceFusionError(f"the recogniser needs two people with two portraits each or more, found {len(several)}")
    while True:
        chosen = rng.permutation(len(several))[:FACES]
        pairs = np.stack([rng.choice(several[i], 2, replace=False) for i in chosen])
        yield torch.from_numpy(pairs.T.reshape(-1))


def _augment(images: torch.Tensor) -> torch.Tensor:
    """What a small generator does to a render: blur in half of the batch, noise, other brightness and contrast."""
    batch = len(images)
    blur = (torch.rand(batch, 1, 1, 1) * 2 - 1).clamp_min(0)
    images = images + blur * (coarse(images, 2) - images)
    images = images + torch.randn_like(images[:, :1]) * torch.rand(batch, 1, 1, 1) * 0.05
    contrast, brightness = 1 + 0.1 * torch.randn(batch, 1, 1, 1), 0.05 * torch.randn(batch, 1, 1, 1)
    return ((images - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)


def _jitter(landmarks: torch.Tensor) -> torch.Tensor:
    shift, points = torch.randn(len(landmarks), 1, 2), torch.randn_like(landmarks)
    return landmarks + LANDMARK_JITTER * (0.7 * shift + 0.7 * points)


def _locator_loss(evaluators: Evaluators, renders: AvatarImages) -> Loss:
    """Cross-entropy of every heatmap against a Gaussian around the true landmark."""
    sigma, landmarks = HEATMAP_SIGMA * IMAGE_SIZE / evaluators.locator.grid, landmarks5(renders)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        distance = heatmap_cells() - landmarks[rows][:, :, None, None, :]  # (B, 5, 32, 32, 2)
        target = (-distance.square().sum(-1) / (2 * sigma**2)).flatten(2).softmax(-1)
        logits = evaluators.locator.planes(_augment(renders.floats(rows))).flatten(2)
        return -(target * logits.log_softmax(-1)).sum(-1).mean()

    return loss


def _decidable(trait: str, record: dict[str, Any]) -> bool:
    return decidable(trait, str(record[trait]), style=record["style"], people=record["people"])


def _targets(evaluators: Evaluators, renders: AvatarImages, trait: str) -> torch.Tensor:
    """Label index (N,) of each image, -100 (which cross-entropy ignores) where the picture cannot show it."""
    words = evaluators.labels[trait]
    indices = [words.index(str(r[trait])) if _decidable(trait, r) else -100 for r in renders.records]
    return torch.tensor(indices)


def _scene_loss(evaluators: Evaluators, renders: AvatarImages) -> Loss:
    targets = {trait: _targets(evaluators, renders, trait) for trait in SCENE_TRAITS}

    def loss(rows: torch.Tensor) -> torch.Tensor:
        logits = evaluators.scene(_augment(renders.floats(rows)))
        losses = [F.cross_entropy(logits[t], targets[t][rows], reduction="sum") for t in SCENE_TRAITS]
        return torch.stack(losses).sum() / len(rows)

    return loss


def _expression_loss(evaluators: Evaluators, renders: AvatarImages, found: torch.Tensor) -> Loss:
    """An expression stays the same in the mirror, so half of the faces are mirrored."""
    targets = _targets(evaluators, renders, "expression")

    def loss(rows: torch.Tensor) -> torch.Tensor:
        faces = _augment(evaluators.expression.faces(renders.floats(rows), _jitter(found[rows])))
        half = len(faces) // 2
        faces = torch.cat([faces[:half].flip(-1), faces[half:]])
        return F.cross_entropy(evaluators.expression(faces), targets[rows])

    return loss


def _recogniser_loss(evaluators: Evaluators, renders: AvatarImages, found: torch.Tensor) -> Loss:
    """Each image must find the other image of its person among those of all people of the batch (both ways)."""

    def loss(rows: torch.Tensor) -> torch.Tensor:
        faces = _augment(evaluators.recogniser.faces(renders.floats(rows), _jitter(found[rows])))
        first, second = F.normalize(evaluators.recogniser(faces)).chunk(2)
        logits = first @ second.T / TEMPERATURE
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return loss


def _depth_loss(evaluators: Evaluators, renders: AvatarImages, nearness: torch.Tensor) -> Loss:
    """Mean absolute error of the estimated nearness."""

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return (evaluators.depth(_augment(renders.floats(rows))) - nearness[rows]).abs().mean()

    return loss
