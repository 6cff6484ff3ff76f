"""Are both eyes well drawn? An evaluator of the band of the eyes."""

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
from .crops import eye_bands
from .dense import DenseTrunk
from .traits import SHIPPED


WEIGHTS_NAME, REPORT_NAME = "drawing.safetensors", "drawing.json"
PLANES, GRID = 24, (3, 7)  # what the head looks at: planes, and cells of the band


class EyeNetwork(nn.Module):
    """How sure it is that both eyes are well drawn: logits (B,) of bands (B, 3, H, W) in [0, 1], of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = DenseTrunk(24, ((3, 24), (3, 32)), PLANES)
        self.head = nn.Sequential(nn.Linear(PLANES * GRID[0] * GRID[1], 96), nn.ReLU(), nn.Linear(96, 1))

    def forward(self, bands: Tensor) -> Tensor:
        seen = F.adaptive_avg_pool2d(self.trunk(bands - 0.5), GRID)
        return self.head(seen.flatten(1))[:, 0]


@dataclass
class EyeEvaluator:
    """The network, and the logit from which eyes are well drawn; `about` is the report."""

    network: EyeNetwork
    threshold: float
    about: dict[str, Any]

    @torch.inference_mode()
    def logits(self, images: Tensor, landmarks: Tensor) -> Tensor:
        """(B,) of images (B, 3, S, S) in [0, 1], landmarks (B, 5, 2) in pixels: the mean with the mirrored one."""
        return self.of_bands(eye_bands(images, landmarks))

    @torch.inference_mode()
    def of_bands(self, bands: Tensor) -> Tensor:
        """As `logits`, of bands of eyes (B, 3, H, W) in [0, 1] that are cut out already."""
        return (self.network(bands) + self.network(bands.flip(-1))) / 2

    def well_drawn(self, images: Tensor, landmarks: Tensor) -> list[bool]:
        """By picture, whether both eyes are well drawn; arguments as for `logits`."""
        return (self.logits(images, landmarks) >= self.threshold).tolist()

    def save(self, folder: Path) -> None:
        """Write weights in float16 and the report."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: weight.half().contiguous() for name, weight in self.network.state_dict().items()}
        save_tensors(folder / WEIGHTS_NAME, state, {"format": "face-fusion-eye-judge"})
        text = json.dumps({**self.about, "threshold": self.threshold}, indent=1)
        (folder / REPORT_NAME).write_text(text + "\n")


def load_eye_evaluator(folder: Path = SHIPPED) -> EyeEvaluator:
    """What `avatars-train drawing` wrote, by default that of the package. ModelNotFoundError where there is none."""
    if not (folder / WEIGHTS_NAME).is_file():
        raise ModelNotFoundError(
            f"no evaluator of drawing in {folder}: train one, `face-fusion avatars-train drawing`"
        )
    about = json.loads((folder / REPORT_NAME).read_text())
    network = EyeNetwork()
    network.load_state_dict({name: weight.float() for name, weight in load_file(folder / WEIGHTS_NAME).items()})
    return EyeEvaluator(network.requires_grad_(False).eval(), float(about["threshold"]), about)
