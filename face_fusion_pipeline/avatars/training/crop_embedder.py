"""The avatars' own face embedder: what FaceStudio and FaceSnap know a person by.

It goes on from the face recogniser of the identity loss (`recogniser.py`), which sees faces that landmarks have put in
their place, and learns to do without them: it sees face crops as detectors cut them. It judges nothing.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...evaluation.metrics import verification_auc
from ...face_embedders import PLACES, SIDE, WEIGHTS_NAME, AvatarEmbedder
from ...face_files import save_tensors
from ...training.base_model import BaseModel
from ...training.latent_cache import Cache, Shards
from ...training.loop import Batch, Task, TrainingError
from ...training.objective import jittered
from ...training.preparation import data_key, read_rows
from ...training.studio_cache import decoded
from .face_embedder import TEMPERATURE, FaceEmbedderTask, as_generated


HELD_OUT = 200  # people


class CropEmbedderTask(Task):
    """Trains on the face crops of a prepared folder; an index is a person of whom there are two or more."""

    name = "crop-embedder"

    def __init__(self, embedder: AvatarEmbedder, folder: Path, cache: Cache, base: BaseModel) -> None:
        super().__init__()
        self.embedder = embedder.requires_grad_(True)
        self.key = data_key(folder)
        self.pixels, names = face_crops(folder, cache, base)
        members: dict[Any, list[int]] = defaultdict(list)
        for row, name in enumerate(names):
            members[name].append(row)
        everybody = [rows for rows in members.values() if len(rows) > 1]
        held_out = min(HELD_OUT, len(everybody) // 2)
        self.people, self.held_out = everybody[held_out:], everybody[:held_out]
        self.size = len(self.people)
        if self.size < 2:
            raise TrainingError("a face embedder needs four people with two face crops each, or more: prepare more")

    @property
    def subject(self) -> dict[str, Any]:
        return {"data": self.key, "people": self.size}

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        device = next(self.embedder.parameters()).device
        draws = torch.rand(len(indices), generator=generator, device=generator.device).tolist()
        pairs = [
            FaceEmbedderTask.pair(self.people[person], draw)
            for person, draw in zip(indices.tolist(), draws, strict=True)
        ]
        rows = torch.tensor(pairs).T.flatten()
        images = self.pixels[rows].to(device).float() / 255
        looks = torch.rand(len(rows), 4, generator=generator, device=generator.device).to(device)
        mirrored = torch.rand(len(rows), generator=generator, device=generator.device).to(device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        places = PLACES.to(device).expand(len(rows), 5, 2) * (images.shape[-1] - 1)
        return {"images": as_generated(images, generator, (2,)), "places": jittered(places, looks, 0.5)}

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses, measured = [], {}
        for name, found in self.embedder.look(batch["images"], batch["places"]).items():
            first, second = found.chunk(2)
            logits = first @ second.T / TEMPERATURE
            truth = torch.arange(len(logits), device=logits.device)
            losses.append((F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2)
            measured[f"found_{name}"] = (logits.argmax(1) == truth).float().mean()
        return torch.stack(losses).sum(), measured

    def sample(self, path: Path) -> dict[str, float]:
        """How well it tells people apart that it has not seen."""
        rows = torch.tensor([row for members in self.held_out for row in members])
        names = np.array([number for number, members in enumerate(self.held_out) for _ in members])
        device = next(self.embedder.parameters()).device
        found = torch.cat(
            [self.embedder.embed(self.pixels[part].to(device).float() / 255).cpu() for part in rows.split(64)]
        )
        return {"validation_auc": verification_auc(found.numpy(), names)}

    def export(self, folder: Path) -> None:
        state = {name: weight.half() for name, weight in self.embedder.state_dict().items()}
        save_tensors(folder / WEIGHTS_NAME, state, self.embedder.metadata)


def face_crops(folder: Path, cache: Cache, base: BaseModel) -> tuple[Tensor, list[Any]]:
    """uint8 (n, 3, SIDE, SIDE) of the face crops of all single portraits, and who is shown."""
    rows = read_rows(folder)
    shards = Shards(cache, len(rows))
    chosen = [index for index, row in enumerate(rows) if row["as_reference"]]
    parts = []
    for start in range(0, len(chosen), 256):
        crops = decoded(base, shards.references([(index, 0) for index in chosen[start : start + 256]]).float())
        arrays = np.stack([np.asarray(crop.resize((SIDE, SIDE))) for crop in crops])
        parts.append(torch.from_numpy(arrays).permute(0, 3, 1, 2))
    return torch.cat(parts), [rows[index]["identity"] for index in chosen]
