"""Training of the trait estimators, and which traits they read well enough to count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...evaluation.reports import circumstances
from ...training.loop import Batch, Task
from ..evaluation.evaluators import Evaluators, load_evaluators
from ..training.data import AvatarImages, landmarks5
from ..training.face_embedder import LANDMARK_JITTER, as_generated
from ..world.identity import WORLD
from .crops import features, heads, locate
from .looks import MEASURES, TRAITS, WORDS, Look
from .traits import TraitEstimators, TraitNetwork


RIGHT, CORRELATION = 0.95, 0.9  # least for a trait to count, on held-out people
BLURS = (2,)  # pixels, of a picture of 128; generated pictures are softer than renders
_UNSEEN = -100  # what cross-entropy ignores
_BATCHES = 40


class TraitsTask(Task):
    """Learns from portraits of one person each; what a picture cannot show is not asked."""

    name = "traits"

    def __init__(
        self, network: TraitNetwork, train: AvatarImages, validation: AvatarImages, world: int | None = None
    ) -> None:
        super().__init__()
        self.network, self.data, self.validation = network.requires_grad_(True), train, validation
        self.evaluators, self.world = load_evaluators(), WORLD if world is None else world
        self.size = len(train)
        self.landmarks = landmarks5(train)
        self.jitter = LANDMARK_JITTER * train.pixels.shape[-1] / 128
        looks = [Look.of_record(record) for record in train.records]
        self.words = {
            name: torch.tensor([words.index(x.word(name)) if x.visible(name) else _UNSEEN for x in looks])
            for name, words in WORDS.items()
        }
        self.measures = torch.tensor(
            [[x.measure(name) if x.visible(name) else float("nan") for name in MEASURES] for x in looks]
        )

    @property
    def subject(self) -> dict[str, Any]:
        return {"data": self.data.key}

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        device = next(self.network.parameters()).device
        points = self.landmarks[indices].to(device)
        shifts = torch.randn(2, *points.shape, generator=generator, device=generator.device).to(device)
        points = points + self.jitter * 0.7 * (shifts[0] + shifts[1, :, :1])
        images = as_generated((self.data.images(indices, device) + 1) / 2, generator, BLURS)
        targets = {"measures": self.measures, **self.words}
        crops = {"heads": heads(images, points), "features": features(images, points)}
        return {**crops, **{name: rows[indices].to(device) for name, rows in targets.items()}}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the words, and squared errors of the measures as fractions of their variance."""
        logits, estimates = self.network(batch["heads"], batch["features"])
        words = torch.stack([F.cross_entropy(logits[t].float(), batch[t], ignore_index=_UNSEEN) for t in WORDS])
        seen = ~batch["measures"].isnan()
        errors = 12 * (estimates.float() - batch["measures"].nan_to_num()).square()[seen]
        return words.sum() + errors.mean() * len(MEASURES) / 4, {"words": words.mean(), "measures": errors.mean()}

    def sample(self, path: Path) -> dict[str, float]:
        """How far each trait is read on people that it has not seen."""
        return {f"validation_{name}": value for name, value in self.estimators().about["held_out"].items()}

    def estimators(self) -> TraitEstimators:
        """The network as it is, with its figures on the validation portraits."""
        self.take_statistics()
        found = TraitEstimators(self.network, TRAITS, {})
        figures = held_out_figures(found, self.evaluators, self.validation)
        kept = tuple(t for t in TRAITS if figures[t] >= (RIGHT if t in WORDS else CORRELATION))
        about = {"size": self.validation.pixels.shape[-1], "world": self.world, "portraits": self.size}
        return TraitEstimators(self.network, kept, {**about, "held_out": figures, **circumstances()})

    @torch.no_grad()
    def take_statistics(self) -> None:
        """Means and variances of batch norm, of the weights as they are now, over `_BATCHES` batches of training."""
        norms = [part for part in self.network.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        self.network.train()
        device = next(self.network.parameters()).device
        generator = torch.Generator(device).manual_seed(0)
        for _ in range(_BATCHES):
            rows = torch.randint(self.size, (64,), generator=generator, device=device).cpu()
            batch = self.batch(rows, generator, 1.0)
            self.network(batch["heads"], batch["features"])
        self.network.eval()

    def export(self, folder: Path) -> None:
        self.estimators().save(folder)


def held_out_figures(estimators: TraitEstimators, evaluators: Evaluators, portraits: AvatarImages) -> dict[str, float]:
    """Of words the fraction right, averaged over the words so that rare ones count; of measures the correlation.

    Faces are found as on generated pictures. Only what a picture can show counts.
    """
    looks = [Look.of_record(record) for record in portraits.records]
    said: list[dict[str, str | float]] = []
    for rows in torch.arange(len(portraits)).split(64):
        images = (portraits.images(rows) + 1) / 2
        said += estimators.estimate(images, locate(evaluators, images))
    figures = {}
    for trait in estimators.kept:
        pairs = [(x.word(trait) if trait in WORDS else x.measure(trait), seen[trait])
                 for x, seen in zip(looks, said, strict=True) if x.visible(trait)]  # fmt: skip
        if trait in WORDS:
            right = {word: [seen == true for true, seen in pairs if true == word] for word, _ in pairs}
            figures[trait] = float(np.mean([np.mean(values) for values in right.values()]))
        else:
            figures[trait] = float(np.corrcoef(np.array(pairs, dtype=float).T)[0, 1])
    return figures
