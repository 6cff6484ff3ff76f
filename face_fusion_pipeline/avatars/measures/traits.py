"""Estimators of traits: which hair, which nose, how old. One network that looks at aligned heads."""

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
from .crops import heads
from .dense import DenseTrunk
from .looks import MEASURES, TRAITS, WORDS


SHIPPED = Path(__file__).parent / "weights"
WEIGHTS_NAME, REPORT_NAME = "traits.safetensors", "traits.json"
PLANES, GRID = 24, 9  # what the heads look at: planes, and cells a side


class TraitNetwork(nn.Module):
    """Logits of words and estimates of measures from heads (B, 3, S, S) in [0, 1] of any size S."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = DenseTrunk(32, ((2, 32), (4, 32), (4, 48)), PLANES)
        self.hidden = nn.Sequential(nn.Linear((PLANES + 3) * GRID**2, 256), nn.ReLU())
        self.words = nn.ModuleDict({name: nn.Linear(256, len(words)) for name, words in WORDS.items()})
        self.measures = nn.Linear(256, len(MEASURES))

    def forward(self, faces: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits (B, words) by trait, and measures (B, len(MEASURES)) near [0, 1]."""
        features = self.features(faces)
        return {name: head(features) for name, head in self.words.items()}, 0.5 + self.measures(features)

    def features(self, faces: Tensor) -> Tensor:
        """What the heads look at (B, 256)."""
        x = faces - 0.5
        seen = F.adaptive_avg_pool2d(self.trunk(x), GRID)
        colours = F.adaptive_avg_pool2d(x, GRID)  # as they are: the norms take the brightness out of the rest
        return self.hidden(torch.cat([seen, colours], 1).flatten(1))


@dataclass
class TraitEstimators:
    """The network, and the traits among its outputs that it reads well enough (`kept`); `about` is the report."""

    network: TraitNetwork
    kept: tuple[str, ...]
    about: dict[str, Any]

    @torch.inference_mode()
    def estimate(self, images: Tensor, landmarks: Tensor) -> list[dict[str, str | float]]:
        """By picture of images (B, 3, S, S) in [0, 1], landmarks (B, 5, 2) in pixels: each kept trait as estimated."""
        logits, measures = self.network(heads(images, landmarks))
        chosen = {name: rows.argmax(1).tolist() for name, rows in logits.items()}
        numbers = dict(zip(MEASURES, measures.T.tolist(), strict=True))
        return [
            {t: WORDS[t][chosen[t][i]] if t in WORDS else numbers[t][i] for t in self.kept} for i in range(len(images))
        ]

    def save(self, folder: Path) -> None:
        """Write weights in float16 and the report."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: weight.half().contiguous() for name, weight in self.network.state_dict().items()}
        save_tensors(folder / WEIGHTS_NAME, state, {"format": "face-fusion-trait-estimators"})
        text = {**self.about, "kept": list(self.kept), "dropped": [t for t in TRAITS if t not in self.kept]}
        (folder / REPORT_NAME).write_text(json.dumps(text, indent=1) + "\n")


def load_traits(folder: Path = SHIPPED) -> TraitEstimators:
    """What `avatars-train traits` wrote, by default that of the package. ModelNotFoundError where there is none."""
    if not (folder / WEIGHTS_NAME).is_file():
        raise ModelNotFoundError(f"no trait estimators in {folder}: train them, `face-fusion avatars-train traits`")
    about = json.loads((folder / REPORT_NAME).read_text())
    network = TraitNetwork()
    network.load_state_dict({name: weight.float() for name, weight in load_file(folder / WEIGHTS_NAME).items()})
    return TraitEstimators(network.requires_grad_(False).eval(), tuple(about["kept"]), about)
