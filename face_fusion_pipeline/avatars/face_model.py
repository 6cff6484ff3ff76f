"""Face models of avatars: exact ones of people whose genes are known, and one that estimates them from pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..face_detectors import load_detector
from ..face_errors import LandmarksError, ModelNotFoundError
from ..face_files import read_tensors, save_tensors
from ..face_images import find_face
from ..face_landmarks import Pose, posed
from ..face_models import Box, FaceFit, expression_vector
from .measures.dense import DenseTrunk
from .world import head, points
from .world.first_world import head as first_head
from .world.identity import CATEGORICAL, CONTINUOUS, GENES, WORLD, Identity, traits
from .world.scene import EXPRESSIONS, Scene


SHIPPED = Path(__file__).parent / "landmarks"
WEIGHTS_NAME, FORMAT = "landmarks.safetensors", "face-fusion-avatar-face-model"
CROP, ENLARGE = 96, 1.4  # pixels of the square that is looked at, and its side in heights of the face box
PLANES, GRID = 32, 6  # what is read: planes, and cells a side
NEUTRAL = EXPRESSIONS.index("neutral")
_COLOURS = (
    "skin",
    "hair_",
    "eye_r",
    "eye_g",
    "eye_b",
    "rim",
    "lip_red",
    "freckles",
    "mole",
    "beard",
    "hairline",
    "age",
)
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
        raise LandmarksError("exact face models of avatars read no pictures: take `of_scene(scene, size)`, or "
                             "`load_avatar_face_model()`")  # fmt: skip

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
    face = head.Face(*((torch.stack(column, 1) * expressions.float()).sum(1) for column in zip(*each, strict=True)))
    found = points.points72(genes, face, forms.build(genes, face, ["suit"] * people), world)
    return found * head.relative_size(genes)[:, None, None]


class FaceEstimator(nn.Module):
    """Shape, expression and pose of the face in crops (B, 3, CROP, CROP) in [0, 1], see [`face_crops`].

    The trunk is that of the measures; statistics of single pictures alone, so that a crop is read the same in any
    company.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = DenseTrunk(24, ((2, 24), (3, 32), (3, 32)), PLANES)
        self.hidden = nn.Linear(PLANES * GRID**2, 192)
        self.read = nn.Linear(192, len(SHAPE) + len(EXPRESSIONS) + 6)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Genes (B, len(SHAPE)), logits (B, len(EXPRESSIONS)), and pose (B, 6) in the units of [`pose_numbers`]."""
        planes = F.adaptive_avg_pool2d(self.trunk(crops - 0.5), GRID).flatten(1)
        found = self.read(self.hidden(planes).relu())
        genes, logits, pose = found.split((len(SHAPE), len(EXPRESSIONS), 6), 1)
        return genes + 0.5, logits, pose


def pose_numbers(pose: Pose, square: tuple[float, float, float]) -> list[float]:
    """A pose in a square crop (x0, y0, side) as six numbers near [-1, 1]."""
    x0, y0, side = square
    middle = [2 * (pose.x - x0) / side - 1, 2 * (pose.y - y0) / side - 1]
    return [pose.yaw / 30, pose.pitch / 30, pose.roll / 30, *(2 * at for at in middle), 2 * pose.scale / side - 1]


def pose_of_numbers(numbers: Sequence[float], square: tuple[float, float, float]) -> Pose:
    """The inverse of [`pose_numbers`]."""
    x0, y0, side = square
    yaw, pitch, roll, x, y, scale = numbers
    place = x0 + (x / 2 + 1) * side / 2, y0 + (y / 2 + 1) * side / 2
    yaw, pitch, roll = (min(max(30 * angle, -90.0), 90.0) for angle in (yaw, pitch, roll))
    return Pose(yaw, pitch, roll, *place, max(scale + 1, 0.02) * side / 2)


def face_square(box: Box, enlarge: float = ENLARGE) -> tuple[float, float, float]:
    """(x0, y0, side) of the square around a face box."""
    side = enlarge * max(box[2] - box[0], box[3] - box[1])
    return (box[0] + box[2] - side) / 2, (box[1] + box[3] - side) / 2, side


def face_crops(images: Tensor, squares: Tensor) -> Tensor:
    """The squares (B, 3) of images (B, 3, H, W), as (B, 3, CROP, CROP); beyond an image its edge goes on."""
    height, width = images.shape[-2:]
    steps = (torch.arange(CROP, device=images.device) + 0.5) / CROP
    x = 2 * (squares[:, :1] + squares[:, 2:] * steps) / width - 1
    y = 2 * (squares[:, 1:2] + squares[:, 2:] * steps) / height - 1
    grid = torch.stack((x[:, None].expand(-1, CROP, -1), y[:, :, None].expand(-1, -1, CROP)), -1)
    return F.grid_sample(images, grid.to(images), mode="bilinear", padding_mode="border", align_corners=False)


class EstimatedAvatarFaceModel(AvatarFaceModel):
    """The face model of avatars that reads pictures: a small network says which genes, expression and pose are seen.

    Args:
        estimator: trained by `face-fusion avatars-train landmarks`, see [`load_avatar_face_model`].
        detector: finds faces where no box is given, see `face_detectors.load_detector`.
    """

    def __init__(self, estimator: FaceEstimator, world: int | None = None, detector: Any = "auto") -> None:
        super().__init__(world)
        self.estimator, self._detector = estimator.eval(), detector

    @torch.inference_mode()
    def fit(self, photo: Image.Image, box: Box | None = None) -> FaceFit:
        if box is None:
            self._detector = load_detector(self._detector)
            box = find_face(photo, self._detector).box
        square = face_square(box)
        pixels = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        genes, logits, pose = self.estimator(face_crops(pixels, torch.tensor([square])))
        expression = np.zeros(len(EXPRESSIONS))
        expression[int(logits[0].argmax())] = 1
        shape = tidy_shape(genes[0].double().numpy())
        return FaceFit(shape, expression, pose_of_numbers(pose[0].tolist(), square), box, photo.size)


def tidy_shape(genes: np.ndarray) -> np.ndarray:
    """Estimated genes in [0, 1], of one kind."""
    tidy, kinds = genes.clip(0, 1), slice(len(SHAPE) - len(CATEGORICAL["kind"]), None)
    tidy[kinds] = np.eye(len(CATEGORICAL["kind"]))[int(genes[kinds].argmax())]
    return tidy


def save_estimator(estimator: FaceEstimator, path: Path, about: dict[str, Any]) -> None:
    """Write the network in float16; `about`, with its world, is a part of the file."""
    state = {name: weight.half() for name, weight in estimator.state_dict().items()}
    save_tensors(path, state, {"format": FORMAT, "about": json.dumps(about)})


def load_avatar_face_model(path: str | Path = SHIPPED, detector: Any = "auto") -> EstimatedAvatarFaceModel:
    """What `face-fusion avatars-train landmarks` wrote, a file or its folder.

    Raises:
        ModelNotFoundError: no such file. LandmarksError: a file of another kind.
    """
    path = Path(path) / WEIGHTS_NAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ModelNotFoundError(
            f"no face model of avatars in {path}: train it, `face-fusion avatars-train landmarks`"
        )
    tensors, metadata = read_tensors(path, LandmarksError)
    estimator = FaceEstimator()
    shapes = {name: weight.shape for name, weight in estimator.state_dict().items()}
    if metadata.get("format") != FORMAT or {name: weight.shape for name, weight in tensors.items()} != shapes:
        raise LandmarksError(f"{path} is no face model of avatars: train one, `face-fusion avatars-train landmarks`")
    estimator.load_state_dict({name: weight.float() for name, weight in tensors.items()})
    world = json.loads(metadata.get("about", "{}")).get("world")
    return EstimatedAvatarFaceModel(estimator.requires_grad_(False), world, detector)
