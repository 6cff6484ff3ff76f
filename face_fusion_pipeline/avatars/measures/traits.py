"""Estimators of traits: which hair, which nose, how old. One network that looks at heads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ...face_errors import ModelNotFoundError
from ...face_files import save_tensors
from .crops import features, heads
from .dense import DenseTrunk
from .looks import MEASURES, TRAITS, WORDS


SHIPPED = Path(__file__).parent / "weights"
WEIGHTS_NAME, REPORT_NAME = "traits.safetensors", "traits.json"
PLANES, GRID = 24, 6  # what the heads look at, of both crops: planes, and cells a side


class TraitNetwork(nn.Module):
    """Logits of words and estimates of measures, from crops of the head and of the features (`crops`).

    Both (B, 3, S, S) in [0, 1], of any size S. Batch norm makes it learn several times as quick; its statistics are no
    part of a checkpoint, `TraitsTask.take_statistics` makes them.
    """

    def __init__(self) -> None:
        super().__init__()
        stages = ((2, 32), (4, 32), (4, 40))
        self.head_trunk, self.face_trunk = (DenseTrunk(24, stages, PLANES, nn.BatchNorm2d) for _ in range(2))
        self.hidden = nn.Sequential(nn.Linear((2 * PLANES + 3) * GRID**2, 256), nn.BatchNorm1d(256), nn.ReLU())
        self.words = nn.ModuleDict({name: nn.Linear(256, len(words)) for name, words in WORDS.items()})
        self.measures = nn.Linear(256, len(MEASURES))

    def forward(self, heads: Tensor, features: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits (B, words) by trait, and measures (B, len(MEASURES)) near [0, 1]."""
        found = self.look(heads, features)
        return {name: head(found) for name, head in self.words.items()}, 0.5 + self.measures(found)

    def look(self, heads: Tensor, features: Tensor) -> Tensor:
        """What all traits are read from (B, 256)."""
        parts = (self.head_trunk(heads - 0.5), self.face_trunk(features - 0.5), heads - 0.5)
        return self.hidden(torch.cat([F.adaptive_avg_pool2d(part, GRID).flatten(1) for part in parts], 1))


@dataclass
class TraitEstimators:
    """The network, and the traits among its outputs that it reads well enough (`kept`); `about` is the report."""

    network: TraitNetwork
    kept: tuple[str, ...]
    about: dict[str, Any]

    @torch.inference_mode()
    def estimate(self, images: Tensor, landmarks: Tensor) -> list[dict[str, str | float]]:
        """By picture of images (B, 3, S, S) in [0, 1], landmarks (B, 5, 2) in pixels: each kept trait as estimated."""
        logits, measures = self.network(heads(images, landmarks), features(images, landmarks))
        chosen = {name: rows.argmax(1).tolist() for name, rows in logits.items()}
        numbers = dict(zip(MEASURES, measures.T.tolist(), strict=True))
        return [
            {t: WORDS[t][chosen[t][i]] if t in WORDS else numbers[t][i] for t in self.kept} for i in range(len(images))
        ]

    def save(self, folder: Path) -> None:
        """Write weights in float16 and the report."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.network.state_dict().items()}
        save_tensors(folder / WEIGHTS_NAME, state, {"format": "face-fusion-trait-estimators"})
        text = {**self.about, "kept": list(self.kept), "dropped": [t for t in TRAITS if t not in self.kept]}
        (folder / REPORT_NAME).write_text(json.dumps(text, indent=1) + "\n")


def load_traits(folder: Path = SHIPPED) -> TraitEstimators:
    """What `avatars-train traits` wrote, by default that of the package. ModelNotFoundError where there is none."""
    if not (folder / WEIGHTS_NAME).is_file():
        raise ModelNotFoundError(f"no trait estimators in {folder}: train them, `face-fusion avatars-train traits`")
    about = json.loads((folder / REPORT_NAME).read_text())
    network = TraitNetwork()
    state = load_file(folder / WEIGHTS_NAME)
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return TraitEstimators(network.requires_grad_(False).eval(), tuple(about["kept"]), about)
