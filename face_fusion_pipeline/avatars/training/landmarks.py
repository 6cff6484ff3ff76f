"""Training of the face model that reads pictures of avatars: genes of the shape, expression and pose, from renders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...face_landmarks import inter_eye_distance, posed
from ...training.loop import Batch, Task
from ..face_model import (
    ENLARGE,
    SHAPE,
    WEIGHTS_NAME,
    AvatarFaceModel,
    FaceEstimator,
    face_crops,
    face_square,
    head_points,
    pose_of_numbers,
    save_estimator,
    tidy_shape,
)
from ..measures.portraits import portrait_scene
from ..world.identity import WORLD
from ..world.scene import EXPRESSIONS
from .data import AvatarImages
from .face_embedder import as_generated


BLURS = (2,)  # pixels; generated pictures are softer than renders
MOVED, GROWN = 0.06, 0.08  # deviations of a detector's boxes from the renderer's, in sides of the square
POSE_WEIGHT, SHAPE_WEIGHT, EXPRESSION_WEIGHT = 20.0, 5.0, 1.0
STEP = 0.1  # of a gene, for how far it moves the points


class LandmarksTask(Task):
    """Learns from portraits of one person each (`measures.portraits`), whose scenes are known by their number.

    The loss of a gene counts by how far the gene moves the points of a face: what no point shows is not asked.
    """

    name = "landmarks"

    def __init__(
        self, estimator: FaceEstimator, train: AvatarImages, validation: AvatarImages, world: int | None = None
    ) -> None:
        super().__init__()
        self.estimator, self.data, self.validation = estimator.requires_grad_(True), train, validation
        self.world, self.size = WORLD if world is None else world, len(train)
        self.model = AvatarFaceModel(self.world)
        self.truth = labels(self.model, train, "train")
        self.gene_weights = gene_weights(self.world)

    @property
    def subject(self) -> dict[str, Any]:
        return {"data": self.data.key, "world": self.world}

    def batch(self, indices: Tensor, generator: torch.Generator, progress: float) -> Batch:
        device = next(self.estimator.parameters()).device
        rows = {name: values[indices].to(device) for name, values in self.truth.items()}
        draws = torch.randn(len(indices), 3, generator=generator, device=generator.device).to(device)
        x0, y0, side = rows["squares"].unbind(1)
        grown = side * (1 + GROWN * draws[:, 2].clamp(-2, 2))
        shift = (side - grown)[:, None] / 2 + MOVED * side[:, None] * draws[:, :2]
        moved = torch.cat((torch.stack((x0, y0), 1) + shift, grown[:, None]), 1)
        images = as_generated((self.data.images(indices, device) + 1) / 2, generator, BLURS)
        return {"crops": face_crops(images, moved), "pose": in_square(rows["pose"], moved),
                "genes": rows["genes"], "expression": rows["expression"]}  # fmt: skip

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        genes, logits, pose = self.estimator(batch["crops"])
        weights = self.gene_weights.to(genes.device)
        shape = (weights * (genes.float() - batch["genes"]).square()).mean()
        expression = F.cross_entropy(logits.float(), batch["expression"])
        place = (pose.float() - batch["pose"]).square().mean()
        loss = SHAPE_WEIGHT * shape + EXPRESSION_WEIGHT * expression + POSE_WEIGHT * place
        return loss, {"shape": shape, "expression": expression, "pose": place}

    def sample(self, path: Path) -> dict[str, float]:
        """How far from the truth it is on people that it has not seen."""
        return {f"validation_{name}": value for name, value in self.held_out().items()}

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Median errors: degrees; points, and shapes from the front, in eye distances; share of expressions right.

        `spread` is that of shapes for somebody who knows the average face alone.
        """
        truth, device = labels(self.model, self.validation, "validation"), next(self.estimator.parameters()).device
        neutral = torch.tensor(self.model.expression_of("neutral"))[None]
        mean = head_points(tidy_shapes(truth["genes"].mean(0)[None]), neutral, self.world)
        errors: dict[str, list[float]] = {name: [] for name in ("yaw", "pitch", "roll", "points", "shape", "spread")}
        right = 0
        for rows in torch.arange(len(self.validation)).split(64):
            squares, genes = truth["squares"][rows], truth["genes"][rows]
            crops = face_crops((self.validation.images(rows, device) + 1) / 2, squares.to(device))
            found, logits, poses = (part.float().cpu() for part in self.estimator(crops))
            chosen, shapes = logits.argmax(1), tidy_shapes(found)
            right += int((chosen == truth["expression"][rows]).sum())
            seen = head_points(shapes, expressions(chosen), self.world).double().numpy()
            drawn = head_points(genes, expressions(truth["expression"][rows]), self.world).double().numpy()
            own, guessed = (head_points(part, neutral, self.world) for part in (genes, shapes))
            true = in_square(truth["pose"][rows], squares)
            for k, square in enumerate(squares.tolist()):
                pose, real = (pose_of_numbers(part[k].tolist(), tuple(square)) for part in (poses, true))
                for name in ("yaw", "pitch", "roll"):
                    errors[name].append(abs(getattr(pose, name) - getattr(real, name)))
                errors["points"].append(distance(posed(seen[k], pose)[:, :2], posed(drawn[k], real)[:, :2]))
                errors["shape"].append(distance(guessed[k].numpy(), own[k].numpy()))
                errors["spread"].append(distance(mean[0].numpy(), own[k].numpy()))
        medians = {name: float(np.median(values)) for name, values in errors.items()}
        return medians | {"expressions_right": right / len(self.validation)}

    def export(self, folder: Path) -> None:
        about = {"world": self.world, "portraits": self.size, "held_out": self.held_out()}
        save_estimator(self.estimator, folder / WEIGHTS_NAME, about)


def expressions(chosen: Tensor) -> Tensor:
    """Expressions (B,) by number as vectors."""
    return torch.eye(len(EXPRESSIONS))[chosen]


def tidy_shapes(genes: Tensor) -> Tensor:
    """[`face_model.tidy_shape`] of several (B, len(SHAPE))."""
    return torch.stack([torch.from_numpy(tidy_shape(row)) for row in genes.double().numpy()])


def distance(points: Any, others: Any) -> float:
    """Mean distance of points (72, D), in distances of the eyes of the latter."""
    return float(np.linalg.norm(points - others, axis=-1).mean()) / inter_eye_distance(others)


def labels(model: AvatarFaceModel, portraits: AvatarImages, split: str) -> dict[str, Tensor]:
    """Of each portrait: genes, expression, pose in pixels (N, 6), and the square around its face."""
    size, rows = portraits.pixels.shape[-1], []
    for index, record in enumerate(portraits.records):
        scene = portrait_scene(split, index, model.world)
        (fit,) = model.of_scene(scene, size, record["boxes"])
        assert fit.box is not None
        # A picture does not tell how large a head is from how near it is: all are taken to be of average size.
        larger, fit.shape[SHAPE.index("size")] = 0.94 + 0.12 * fit.shape[SHAPE.index("size")], 0.5
        pose = (fit.pose.yaw, fit.pose.pitch, fit.pose.roll, fit.pose.x, fit.pose.y, fit.pose.scale * larger)
        rows.append((fit.shape.tolist(), fit.expression.argmax(), pose, face_square(fit.box, ENLARGE)))
    genes, expressions, poses, squares = zip(*rows, strict=True)
    return {
        "genes": torch.tensor(genes, dtype=torch.float32),
        "expression": torch.tensor(expressions),
        "pose": torch.tensor(poses, dtype=torch.float32),
        "squares": torch.tensor(squares, dtype=torch.float32),
    }


def in_square(poses: Tensor, squares: Tensor) -> Tensor:
    """[`face_model.pose_numbers`] of poses (B, 6) in pixels, in squares (B, 3)."""
    x0, y0, side = squares.unbind(1)
    yaw, pitch, roll, x, y, scale = poses.unbind(1)
    place = (2 * (2 * (x - x0) / side - 1), 2 * (2 * (y - y0) / side - 1), 2 * scale / side - 1)
    return torch.stack((yaw / 30, pitch / 30, roll / 30, *place), 1)


def gene_weights(world: int) -> Tensor:
    """How far a step of each gene moves the points of an average head (len(SHAPE),), over the mean of all genes."""
    genes = torch.full((len(SHAPE) + 1, len(SHAPE)), 0.5)
    genes[1:] += STEP * torch.eye(len(SHAPE))
    genes[:, -3:] = torch.tensor([1.0, 0.0, 0.0])
    genes[-3:, -3:] = torch.tensor([[1.0, STEP, 0.0], [1.0 - STEP, STEP, 0.0], [1.0 - STEP, 0.0, STEP]])
    neutral = torch.eye(len(EXPRESSIONS))[[EXPRESSIONS.index("neutral")]].expand(len(genes), -1)
    found = head_points(genes, neutral, world)
    moved = (found[1:] - found[:1]).norm(dim=-1).mean(1)
    return moved / moved.mean()
