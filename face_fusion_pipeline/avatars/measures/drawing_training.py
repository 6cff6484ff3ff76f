"""Training of the evaluator of eyes: true renders are good, damaged ones are not; some pictures were judged by eye."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...evaluation.reports import circumstances
from ...training.loop import Batch, Task
from ..evaluation.evaluators import load_evaluators
from ..training.data import AvatarImages, landmarks5
from ..training.face_embedder import LANDMARK_JITTER, as_generated
from ..world.identity import WORLD
from .agreement import agreement
from .crops import band_eyes, eye_bands, locate
from .damage import damaged
from .drawing import EyeEvaluator, EyeNetwork
from .portraits import DOTS, NO_EYES, eyes_shown
from .verdicts import Verdicts


BLURS = (2, 4)  # pixels: soft eyes may be whole
PARTS = 3  # a third of each batch is damaged, and a third judged where there are verdicts
DOUBT = 0.3  # target of "good" where a verdict is not sure, and 1 less it
RENDERS_GOOD = (
    0.991  # fraction of held-out renders that pass, of those whose eyes show: the threshold is where it is so
)
_HELD_OUT = 6  # each sixth picture with a verdict is never learned from


class DrawingTask(Task):
    """Learns from portraits of one person each, and from `verdicts` on pictures of the same size, if any."""

    name = "drawing"

    def __init__(
        self,
        network: EyeNetwork,
        train: AvatarImages,
        validation: AvatarImages,
        verdicts: Verdicts | None,
        world: int | None = None,
    ) -> None:
        super().__init__()
        self.network, self.data, self.validation = network.requires_grad_(True), train, validation
        self.verdicts, self.evaluators, self.world = verdicts, load_evaluators(), WORLD if world is None else world
        shown = eyes_shown(train.records, self.world)
        self.rows = ((shown >= DOTS) | (shown < NO_EYES)).nonzero()[:, 0]  # dots are neither good nor bad
        self.size, self.whole = len(self.rows), shown >= DOTS
        self.landmarks = landmarks5(train)
        self.jitter = LANDMARK_JITTER * train.pixels.shape[-1] / 128
        if verdicts is not None:
            seen = torch.arange(len(verdicts)) % _HELD_OUT != 0
            self.seen, self.unseen = seen.nonzero()[:, 0], (~seen).nonzero()[:, 0]
            doubt = torch.where(verdicts.sure, 0.02, DOUBT)
            self.targets = torch.where(verdicts.good, 1 - doubt, doubt)
            places = band_eyes(verdicts.bands.shape[-1], verdicts.bands.shape[-2])
            self.usual = places.expand(len(verdicts), -1, -1)

    @property
    def subject(self) -> dict[str, Any]:
        return {"data": self.data.key, "verdicts": 0 if self.verdicts is None else len(self.verdicts)}

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        device = next(self.network.parameters()).device
        judged = 0 if self.verdicts is None else len(indices) // PARTS
        wrong = len(indices) // PARTS if judged else len(indices) // 2
        indices = self.rows[indices[judged:]]
        images, points = (self.data.images(indices, device) + 1) / 2, self.landmarks[indices].to(device)
        images = torch.cat([damaged(images[:wrong], points[:wrong], generator), images[wrong:]])
        shifts = torch.randn(2, *points.shape, generator=generator, device=generator.device).to(device)
        points = points + self.jitter * 0.7 * (shifts[0] + shifts[1, :, :1])
        bands = as_generated(eye_bands(images, points), generator, BLURS)
        good = (self.whole[indices] & (torch.arange(len(indices)) >= wrong)).float().to(device)
        if self.verdicts is not None:
            rows = torch.randint(len(self.seen), (judged,), generator=generator, device=generator.device).cpu()
            rows = self.seen[rows]
            mine = moved(self.verdicts.bands[rows].to(device), generator)
            spoiled = len(mine) // 6  # eyes that are soft and wrong, of which there are few otherwise
            mine = torch.cat([damaged(mine[:spoiled], self.usual[:spoiled].to(device), generator), mine[spoiled:]])
            bands = torch.cat([bands, as_generated(mine, generator, ())])
            targets = self.targets[rows]
            targets[:spoiled] = 0
            good = torch.cat([good, targets.to(device)])
        mirrored = torch.rand(len(bands), 1, 1, 1, generator=generator, device=generator.device).to(device) < 0.5
        return {"bands": torch.where(mirrored, bands.flip(-1), bands), "good": good}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.network(batch["bands"]).float()
        right = ((logits > 0) == (batch["good"] > 0.5)).float().mean()
        return F.binary_cross_entropy_with_logits(logits, batch["good"]), {"right": right}

    def sample(self, path: Path) -> dict[str, float]:
        """How many held-out renders pass at which logit, and what it makes of pictures with verdicts."""
        return {f"validation_{name}": value for name, value in self.evaluator().about["held_out"].items()}

    def evaluator(self) -> EyeEvaluator:
        """The network as it is, with the threshold that lets `RENDERS_GOOD` of the validation portraits pass."""
        evaluator = EyeEvaluator(self.network, 0.0, {})
        parts = []
        for rows in torch.arange(len(self.validation)).split(64):
            images = (self.validation.images(rows) + 1) / 2
            parts.append(evaluator.logits(images, locate(self.evaluators, images)))
        logits, shown = torch.cat(parts), eyes_shown(self.validation.records, self.world)
        evaluator.threshold = float(logits[shown >= DOTS].quantile(1 - RENDERS_GOOD))
        passed = (logits >= evaluator.threshold).float()
        figures = {"renders_good": float(passed[shown >= DOTS].mean()), "all_renders_good": float(passed.mean())}
        if self.verdicts is not None:
            figures |= agreement(evaluator, self.verdicts, self.unseen)
        about = {"size": self.validation.pixels.shape[-1], "world": self.world, "portraits": self.size}
        about["verdicts"] = 0 if self.verdicts is None else len(self.verdicts)
        return EyeEvaluator(self.network, evaluator.threshold, {**about, "held_out": figures, **circumstances()})

    def export(self, folder: Path) -> None:
        self.evaluator().save(folder)


def moved(bands: Tensor, generator: torch.Generator) -> Tensor:
    """Bands as they are cut out when landmarks are a little off: up to a tenth turned, larger or moved."""
    draws = torch.randn(len(bands), 4, generator=generator, device=generator.device).to(bands).clamp(-2, 2)
    angle, size = 0.03 * draws[:, 0], 1 + 0.04 * draws[:, 1]
    cos, sin = angle.cos() * size, angle.sin() * size
    ratio = bands.shape[-2] / bands.shape[-1]
    x, y = 0.02 * draws[:, 2], 0.04 * draws[:, 3]
    matrix = torch.stack([cos, -sin * ratio, x, sin / ratio, cos, y], 1).view(-1, 2, 3)
    places = F.affine_grid(matrix, list(bands.shape), align_corners=False)
    return F.grid_sample(bands, places, padding_mode="border", align_corners=False)
