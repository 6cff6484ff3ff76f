"""`face-fusion face-model`: a linear face model for facial points of photographs, from a clone of ICT-FaceKit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..face_errors import FaceFusionError, LandmarksError, ModelNotFoundError
from ..files.atomic import check_writable


if TYPE_CHECKING:
    import numpy as np

    from ..face_models import LinearFaceModel

HELP = "make a linear face model, for poses of photos, of a clone of ICT-FaceKit"
MESHES, NEUTRAL, IDENTITY = "FaceXModel", "generic_neutral_mesh", "identity"
# Vertices of its meshes at the 72 points of `face_landmarks`.
VERTICES = (
    *(1225, 1888, 1052, 367, 1719, 1722, 2199, 1447, 966, 3661, 4390, 3927, 3924, 2608, 3272, 4088, 3443),  # jaw
    *(268, 493, 1914, 2044, 1401, 3615, 4240, 4114, 2734, 2509),  # brows
    *(978, 4527, 4942, 4857, 1140, 2075, 1147, 4269, 3360),  # nose
    *(1507, 1542, 1961, 1537, 1528, 1518, 1554, 1511),  # left eye
    *(3742, 3751, 4161, 3756, 3721, 3725, 3768, 3732),  # right eye
    *(5708, 5695, 2081, 0, 4275, 6200, 6213, 6346, 6461, 5518, 5957, 5841),  # round the lips
    *(5702, 5711, 5533, 6216, 6207, 6470, 5517, 5966),  # round the opening
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Read the meshes of ICT Face Model Light (MIT), a clone of https://github.com/ICT-VGL/ICT-FaceKit, and write "
        "what they do to 72 facial points."
    )
    parser.add_argument("clone", type=Path, metavar="CLONE", help="folder of the clone, or its FaceXModel")
    parser.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")


def run(args: argparse.Namespace) -> int:
    if not args.out.endswith(".safetensors"):
        raise FaceFusionError(f"--out takes a .safetensors file, got {args.out}")
    check_writable(Path(args.out).parent)
    model = read_ict(args.clone)
    model.save(args.out)
    print(f"a face model of {len(model.expressions)} expressions, written to {args.out}")
    return 0


def read_ict(clone: Path) -> LinearFaceModel:
    """The model of a clone of ICT-FaceKit.

    Raises:
        ModelNotFoundError: the meshes are not there. LandmarksError: one that cannot be read.
    """
    import numpy as np

    from ..face_models import LinearFaceModel

    folder = clone / MESHES if (clone / MESHES).is_dir() else clone
    if not (folder / f"{NEUTRAL}.obj").is_file():
        raise ModelNotFoundError(
            f"{folder} has no {NEUTRAL}.obj: give a clone of https://github.com/ICT-VGL/ICT-FaceKit"
        )
    meshes = {path.stem: path for path in sorted(folder.glob("*.obj"))}
    neutral = read_points(meshes.pop(NEUTRAL))
    moved = {name: read_points(path) - neutral for name, path in meshes.items()}
    identity = [points for name, points in moved.items() if name.startswith(IDENTITY)]
    expressions = {name: points for name, points in moved.items() if not name.startswith(IDENTITY)}
    if not identity or not expressions:
        raise ModelNotFoundError(f"{folder} has no {IDENTITY} or no expression meshes: is the clone whole?")
    return LinearFaceModel(neutral, np.stack(identity), np.stack(list(expressions.values())), list(expressions))


def read_points(mesh: Path) -> np.ndarray:
    """The points (72, 3) of a mesh in the OBJ format. Raises [`LandmarksError`] for one that lacks them."""
    import numpy as np

    vertices: list[list[float]] = []
    with open(mesh, encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("v "):
                try:
                    vertices.append([float(word) for word in line.split()[1:4]])
                except ValueError as error:
                    raise LandmarksError(f"{mesh} is no mesh in the OBJ format: {error}") from error
                if len(vertices) > max(VERTICES):
                    break
    if len(vertices) <= max(VERTICES) or any(len(vertex) != 3 for vertex in vertices):
        raise LandmarksError(
            f"{mesh} has {len(vertices)} vertices, {max(VERTICES) + 1} or more are needed: it is another model"
        )
    return np.array(vertices)[list(VERTICES)]
