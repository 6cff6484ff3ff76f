"""Evaluators of avatar images: where the face is, what the scene shows, who it is. Small networks, trained on renders.

They measure: nothing of them is used to generate, and nothing is trained with them. The identity loss of a training
has a face embedder of its own, of another architecture (`training/face_embedder.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ...evaluation.image_files import from_pil
from ...face_errors import ModelNotFoundError
from ...face_recognisers import align_faces
from ...files.atomic import write_text
from ...files.folders import present
from ...files.texts import read_json
from .framing import IMAGE_SIZE, in_picture, portrait_crops


EVALUATOR_NAMES = ("locator", "scene", "expression", "recogniser", "depth")
SCENE_TRAITS = ("clothing", "background", "style", "people")
TRAITS = ("expression", *SCENE_TRAITS)
COLOURLESS = ("pencil sketch", "line art")
SHIPPED = Path(__file__).parent / "evaluators"
WEIGHTS_NAME, LABELS_NAME = "evaluators.safetensors", "evaluators.json"
EARLIER_NAMES = {WEIGHTS_NAME: "judges.safetensors", LABELS_NAME: "judges.json"}


def decidable(trait: str, word: str, *, style: str, people: int) -> bool:
    """Whether a picture can show that `trait` is `word` at all.

    Expression and clothing of several people are ambiguous; colours cannot be seen in a drawing without colour.
    """
    if trait in ("expression", "clothing") and people != 1:
        return False
    coloured = (trait == "clothing" and word.endswith("shirt")) or (trait == "background" and word.startswith("plain"))
    return not (coloured and style in COLOURLESS)


def _block(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def _tower(*widths: int) -> nn.Sequential:
    """Blocks that halve the image each, the last one followed by a second at the same size."""
    blocks = [_block(a, b) for a, b in zip((3, *widths[:-1]), widths, strict=True)]
    return nn.Sequential(*blocks, _block(widths[-1], widths[-1], 1))


class _Map(nn.Module):
    """Planes of 32 x 32 cells from an image of 128 pixels, which see what is near and what the whole image shows."""

    grid = 32

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.fine = _tower(16, 32)  # 32 x 32
        self.coarse = nn.Sequential(_block(32, 64), _block(64, 96), _block(96, 96, 1), nn.Conv2d(96, 32, 1))  # 8 x 8
        self.merge = nn.Sequential(_block(32, 32, 1), nn.Conv2d(32, planes, 1))

    def planes(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, planes, 32, 32) for images (B, 3, 128, 128) in [0, 1]."""
        fine = self.fine(images - 0.5)
        coarse = F.interpolate(self.coarse(fine), size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.merge(fine + coarse)


class FaceLocator(_Map):
    """Five landmarks of the main person: one 32 x 32 heatmap each, read around its peak."""

    window = 10.0  # pixels around the peak that the read-out averages

    def __init__(self) -> None:
        super().__init__(5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Landmarks (B, 5, 2), pixels."""
        logits = self.planes(images)
        cells = heatmap_cells().to(logits)
        peak = cells.flatten(0, 1)[logits.flatten(2).argmax(-1)]  # (B, 5, 2)
        near = (cells - peak[..., None, None, :]).norm(dim=-1) <= self.window
        weights = logits.masked_fill(~near, -torch.inf).flatten(2).softmax(-1)
        return weights @ cells.flatten(0, 1)


class DepthEvaluator(_Map):
    """How near everything is: 1 where the picture is nearest, 0 where it is farthest, by cells of four pixels."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Nearness (B, 32, 32) in [0, 1] for images (B, 3, 128, 128) in [0, 1]."""
        return self.planes(images)[:, 0].sigmoid()


def heatmap_cells() -> torch.Tensor:
    """Where the centres of the heatmap's cells lie in the image: (32, 32, 2), pixels."""
    grid = FaceLocator.grid
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return (torch.stack([columns, rows], -1) + 0.5) * (IMAGE_SIZE / grid) - 0.5


class SceneEvaluator(nn.Module):
    """Clothing, background, style and number of people from the whole image: one head each."""

    def __init__(self, labels: dict[str, list[str]]) -> None:
        super().__init__()
        self.tower = _tower(24, 48, 80, 128)
        self.heads = nn.ModuleDict({trait: nn.Linear(256, len(labels[trait])) for trait in SCENE_TRAITS})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (B, labels) by trait for images (B, 3, 128, 128) in [0, 1]."""
        features = self.tower(images - 0.5)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return {trait: head(pooled) for trait, head in self.heads.items()}


class FaceEvaluator(nn.Module):
    """A classifier or an embedding of aligned face crops of `crop` pixels."""

    def __init__(self, outputs: int, *, crop: int, zoom: float) -> None:
        super().__init__()
        self.crop, self.zoom = crop, zoom
        self.tower = _tower(24, 48, 96, 128)
        self.head = nn.Linear(128 * (crop // 16) ** 2, outputs)

    def faces(self, images: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
        """The crops (B, 3, crop, crop) of images (B, 3, H, W) with landmarks (B, 5, 2) in pixels."""
        return align_faces(images, landmarks, self.crop, zoom=self.zoom)

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        """Outputs (B, outputs) for crops (B, 3, crop, crop) in [0, 1]."""
        return self.head(self.tower(faces - 0.5).flatten(1))


@dataclass
class Evaluators:
    """The five networks with the words that their outputs stand for, and the file of weights that they are from."""

    labels: dict[str, list[str]]
    locator: FaceLocator
    scene: SceneEvaluator
    expression: FaceEvaluator
    recogniser: FaceEvaluator
    depth: DepthEvaluator
    path: Path | None = None

    name = "avatar recogniser"

    @classmethod
    def new(cls, labels: dict[str, list[str]]) -> Evaluators:
        """Untrained evaluators for the given words, by trait."""
        expression = FaceEvaluator(len(labels["expression"]), crop=80, zoom=1.1)
        recogniser = FaceEvaluator(96, crop=64, zoom=0.6)  # a wider crop: hair, ears and chin tell people apart
        return cls(labels, FaceLocator(), SceneEvaluator(labels), expression, recogniser, DepthEvaluator())

    @property
    def networks(self) -> nn.ModuleDict:
        """All networks, under the names that their weights carry in the file."""
        return nn.ModuleDict({name: getattr(self, name) for name in EVALUATOR_NAMES})

    @torch.inference_mode()
    def locate(self, images: torch.Tensor) -> torch.Tensor:
        """Five landmarks (B, 5, 2) of the main person of each image (B, 3, 128, 128)."""
        return self.locator(images)

    def landmarks(self, image: Image.Image, boxes: Sequence[Sequence[float]]) -> list[np.ndarray]:
        """Five landmarks (5, 2) of the avatar in each face box (XYXY), all in pixels of any RGB picture."""
        found = self.locate(portrait_crops(from_pil(image), boxes)).numpy()
        return [in_picture(points, box) for points, box in zip(found, boxes, strict=True)]

    @property
    def expressions(self) -> AvatarExpression:
        """The expression evaluator as a classifier."""
        return AvatarExpression(self.expression)

    @torch.inference_mode()
    def describe(self, images: torch.Tensor, landmarks: torch.Tensor | None = None) -> dict[str, list[str]]:
        """What each image (B, 3, 128, 128) in [0, 1] shows: a word per image for every trait."""
        landmarks = self.locator(images) if landmarks is None else landmarks
        logits = {"expression": self.expression(self.expression.faces(images, landmarks)), **self.scene(images)}
        return {trait: [self.labels[trait][i] for i in rows.argmax(1).tolist()] for trait, rows in logits.items()}

    @torch.inference_mode()
    def embed(self, images: torch.Tensor, landmarks: torch.Tensor) -> np.ndarray:
        """Identity embeddings (B, 96) of unit length."""
        return F.normalize(self.recogniser(self.recogniser.faces(images, landmarks))).numpy()

    @torch.inference_mode()
    def nearness(self, images: torch.Tensor) -> torch.Tensor:
        """Estimated depth (B, 32, 32) in [0, 1] of images (B, 3, 128, 128); near is 1, as in a depth control image."""
        return self.depth(images)

    def save(self, folder: str | Path) -> None:
        """Write fp16 weights and labels."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.networks.state_dict().items()}
        save_file({k: v.contiguous().cpu() for k, v in state.items()}, folder / WEIGHTS_NAME)
        write_text(folder / LABELS_NAME, json.dumps(self.labels, indent=1) + "\n")


@dataclass
class AvatarExpression:
    """An `evaluation.observation.Classifier`: logits by word."""

    network: FaceEvaluator
    name: str = "avatar expression evaluator"

    @torch.inference_mode()
    def embed(self, images: torch.Tensor, landmarks: torch.Tensor) -> np.ndarray:
        return self.network(self.network.faces(images, landmarks)).numpy()


def load_evaluators(folder: str | Path = SHIPPED) -> Evaluators:
    """Evaluators from a folder that [`Evaluators.save`] wrote, frozen. ModelNotFoundError if there are none."""
    weights, labels = (present(Path(folder), name, earlier) for name, earlier in EARLIER_NAMES.items())
    if not weights.is_file():
        command = f"face-fusion avatars-evaluate train-evaluators --data DIR --out {folder}"
        raise ModelNotFoundError(f"no evaluators in {folder}: train them, `{command}`")
    evaluators = Evaluators.new(read_json(labels, "train the evaluators again"))
    evaluators.path = weights
    state = load_file(weights)
    evaluators.networks.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    evaluators.networks.eval().requires_grad_(False)
    return evaluators
