"""The face embedder of the identity loss, in nothing like the one that evaluates (`evaluation/evaluators.py`).

Two towers look at each picture. One sees the whole head, and has learned from blurred pictures: hair, skin and shape,
which are there in a noisy step already. The other sees the features twice as large, and has learned from little
noise, so it asks for what the first does not miss. Both are residual blocks with group norm, pooled by attention; the
evaluator is a plain tower with batch norm on a smaller crop. What was trained to please one network is so measured by
another.

Loss of each tower: a picture must find the other picture of its person among those of everybody in the batch, both
ways (InfoNCE with the temperature 0.1 of cosines).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ...evaluation.metrics import verification_auc
from ...face_embedders import WEIGHTS_NAME, ZOOMS, FaceTowers
from ...face_errors import ModelNotFoundError
from ...face_files import save_tensors
from ...files.folders import present
from ...training.loop import Batch, Task, TrainingError
from ..evaluation.renders import coarse
from .data import AvatarImages, landmarks5, portraits


SHIPPED = Path(__file__).parent / "face_embedder"
EARLIER_WEIGHTS_NAME = "recogniser.safetensors"
BLURS = {"head": (2, 4, 8), "features": (2,)}  # pixels, each of them with the probability 0.3
TEMPERATURE = 0.1
LANDMARK_JITTER = 1.0  # pixels


class TrainingEmbedder(FaceTowers):
    """Embeddings of avatars: a `training.objective.FaceEmbedder`."""

    def forward(self, images: Tensor, landmarks5: Tensor) -> Tensor:
        """(B, 256) of images (B, 3, H, W) in [0, 1] and landmarks (B, 5, 2) in their pixels.

        A cosine of two is the mean of those of the towers.
        """
        return torch.cat(list(self.look(images, landmarks5).values()), -1)


def load_training_embedder(folder: Path = SHIPPED) -> TrainingEmbedder:
    """What `avatars-train face-embedder` wrote into `folder`, by default that of the package, frozen."""
    path = present(folder, WEIGHTS_NAME, EARLIER_WEIGHTS_NAME)
    if not path.is_file():
        raise ModelNotFoundError(f"no face embedder in {folder}: train one, `face-fusion avatars-train face-embedder`")
    embedder = TrainingEmbedder()
    embedder.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return embedder.requires_grad_(False).eval()


class FaceEmbedderTask(Task):
    """Trains on the single portraits of people of whom there are two or more; an index is one of these people."""

    name = "face-embedder"

    def __init__(self, embedder: TrainingEmbedder, train: AvatarImages, validation: AvatarImages) -> None:
        super().__init__()
        self.embedder, self.data, self.validation = embedder.requires_grad_(True), train, validation
        self.people = [rows for rows in portraits(train).values() if len(rows) > 1]
        self.size = len(self.people)
        if self.size < 2:
            raise TrainingError(
                "a face embedder needs two people with two portraits each, or more: render more images"
            )
        self.landmarks = landmarks5(train)

    @property
    def subject(self) -> dict[str, Any]:
        return {"data": self.data.key, "people": self.size}

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        device = next(self.embedder.parameters()).device
        draws = torch.rand(len(indices), generator=generator, device=generator.device).tolist()
        pairs = [self.pair(self.people[person], draw) for person, draw in zip(indices.tolist(), draws, strict=True)]
        rows = torch.tensor(pairs).T.flatten()  # the first pictures of all, then the second ones
        images = (self.data.images(rows, device) + 1) / 2
        points = self.landmarks[rows].to(device)
        shifts = torch.randn(2, *points.shape, generator=generator, device=generator.device).to(device)
        return {
            **{name: as_generated(images, generator, sizes) for name, sizes in BLURS.items()},
            "landmarks5": points + LANDMARK_JITTER * 0.7 * (shifts[0] + shifts[1, :, :1]),
        }

    @staticmethod
    def pair(rows: list[int], draw: float) -> tuple[int, int]:
        """Two different ones of `rows`; `draw` in [0, 1) chooses among the pairs, each in both orders."""
        first, apart = divmod(int(draw * len(rows) * (len(rows) - 1)), len(rows) - 1)
        return rows[first], rows[(first + 1 + apart) % len(rows)]

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, measured = [], {}
        for name in ZOOMS:
            first, second = self.embedder.see(name, batch[name], batch["landmarks5"]).chunk(2)
            logits = first @ second.T / TEMPERATURE
            truth = torch.arange(len(logits), device=logits.device)
            losses.append((F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2)
            measured[f"found_{name}"] = (logits.argmax(1) == truth).float().mean()
        return torch.stack(losses).sum(), measured

    def sample(self, path: Path) -> dict[str, float]:
        """How well it tells people apart that it has not seen."""
        people = portraits(self.validation)
        rows = torch.tensor([row for members in people.values() for row in members])
        names = np.array([name for name, members in people.items() for _ in members])
        device = next(self.embedder.parameters()).device
        points = landmarks5(self.validation)
        found = [
            self.embedder((self.validation.images(part, device) + 1) / 2, points[part].to(device))
            for part in rows.split(64)
        ]
        towers = dict(zip(ZOOMS, torch.cat(found).float().cpu().chunk(len(ZOOMS), 1), strict=True))
        return {f"validation_auc_{name}": verification_auc(rows.numpy(), names) for name, rows in towers.items()}

    def export(self, folder: Path) -> None:
        state = copy.deepcopy(self.embedder).half().state_dict()
        save_tensors(folder / WEIGHTS_NAME, state, {"format": "face-fusion-training-recogniser"})


def as_generated(images: Tensor, generator: torch.Generator, blurs: tuple[int, ...] = BLURS["head"]) -> Tensor:
    """What one step of a diffusion model makes of pictures (B, 3, H, W) in [0, 1]: blur, noise, other brightness.

    The two pictures of a person are blurred apart: a sharp one must be found by a blurred one.
    """

    def draw(kind: Any = torch.rand) -> Tensor:
        return kind(len(images), 1, 1, 1, generator=generator, device=generator.device).to(images)

    blurred = images
    for size in blurs:
        blurred = torch.where(draw() < 0.3, coarse(images, size), blurred)
    images = images + draw() * (blurred - images)
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(images)
    contrast, brightness = 1 + 0.1 * draw(torch.randn), 0.05 * draw(torch.randn)
    return ((images + 0.05 * draw() * noise - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)
