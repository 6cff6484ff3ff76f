"""Face models of avatars: exact ones of people whose genes are known, and one that estimates them from pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..face_landmarks import Pose, posed
from ..face_models import Box, FaceFit, expression_vector
from .world import head, points
from .world.first_world import head as first_head
from .world.identity import CATEGORICAL, CONTINUOUS, GENES, WORLD, Identity, traits
from .world.scene import EXPRESSIONS, Scene


NEUTRAL = EXPRESSIONS.index("neutral")
_COLOURS = ("skin", "hair_", "eye_r", "eye_g", "eye_b", "rim", "lip_red", "freckles", "mole", "beard", "hairline", "age")
# The genes that move points; kind is man, woman or child.
SHAPE = (
    *(name for name in CONTINUOUS if not name.startswith(_COLOURS) and name not in ("ear_size", "brow_thick")),
    *(f"kind={kind}" for kind in CATEGORICAL["kind"]),
)


class AvatarFaceModel:
    """Exact points of the heads of a world: a shape is its genes `SHAPE`, an expression a strength for each name.

    It cannot read pictures: see [`EstimatedAvatarFaceModel`]. A scene's people are [`of_scene`].
    """

    name = "avatars"

    def __init__(self, world: int | None = None) -> None:
        self.world = WORLD if world is None else world
        self.expressions: Sequence[str] = tuple(name for name in EXPRESSIONS if name != "neutral")

    def expression_of(self, given: Any) -> np.ndarray:
        if isinstance(given, (str, dict)):
            vector = expression_vector(self.expressions, given, np.zeros(len(self.expressions)))
            return np.insert(vector, NEUTRAL, max(0.0, 1 - float(vector.sum())))
        return expression_vector(EXPRESSIONS, given, np.zeros(len(EXPRESSIONS)))

    def fit(self, photo: Image.Image, box: Box | None = None) -> FaceFit:
        raise NotImplementedError("exact avatars are fitted by their scenes: of_scene(scene, size)")

    def points(self, shape: np.ndarray, expression: np.ndarray, pose: Pose) -> np.ndarray:
        return posed(self.head(shape, expression), pose)

    def head(self, shape: np.ndarray, expression: np.ndarray) -> np.ndarray:
        """Points (72, 3) in the head's frame, in units of half the height of a head of average size."""
        return head_points(torch.tensor(shape)[None], torch.tensor(expression)[None], self.world)[0].double().numpy()

    def of_identity(self, identity: Identity) -> np.ndarray:
        """The shape of a person."""
        return identity.vector[[GENES.index(name) for name in SHAPE]].double().numpy()

    def of_scene(self, scene: Scene, size: int, boxes: Any = None) -> list[FaceFit]:
        """The people of a scene that is drawn in `size`² pixels, exactly; `boxes` are those of `render`."""
        fits = []
        for i, person in enumerate(scene.people):
            place = {"x": (person.x + 1) * size / 2, "y": (1 - person.y) * size / 2, "scale": person.scale * size / 2}
            pose = Pose(person.yaw, person.pitch, person.roll, **place)
            fit = FaceFit(self.of_identity(person.identity), self.expression_of(person.expression), pose)
            box = None if boxes is None else tuple(float(side) for side in boxes[i])
            fits.append(replace(fit, box=box, size=(size, size)))  # type: ignore[arg-type]
        return fits


def head_points(shapes: Tensor, expressions: Tensor, world: int) -> Tensor:
    """Points (P, 72, 3) of P heads, as large as they are beside each other.

    Args:
        shapes: (P, len(SHAPE)) genes, near [0, 1].
        expressions: (P, len(EXPRESSIONS)) strengths, a sum of 1 for those that the renderer draws.
    """
    people, forms = len(shapes), first_head if world == 1 else head
    vectors = torch.zeros(people, len(GENES))
    vectors[:, [GENES.index(name) for name in SHAPE]] = shapes.float()
    genes = traits(vectors)
    each = [forms.measure(genes, [name] * people) for name in EXPRESSIONS]  # linear in the expression
    face = head.Face(
        *((torch.stack(column, 1) * expressions.float()).sum(1) for column in zip(*each, strict=True))
    )
    found = points.points72(genes, face, forms.build(genes, face, ["suit"] * people), world)
    return found * head.relative_size(genes)[:, None, None]
