"""`face-fusion face-model`: a linear face model for facial points of photographs, from a clone of ICT-FaceKit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..face_errors import FaceFusionError, LandmarksError, ModelNotFoundError
from ..files.atomic import check_writable


if TYPE_CHECKING:
    import numpy as np

    from ..face_models import LinearFaceModel

HELP = "make a linear face model, for poses of photos, of a clone of ICT-FaceKit"
FEWEST = 20  # people whose mean is that of a population rather than theirs
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
    parser.add_argument(
        "clone", type=Path, metavar="CLONE", help="folder of the clone, its FaceXModel, or a face model made of it"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help=f"photos of {FEWEST} or more people, from whom the model learns where the landmarker sees its points",
    )
    parser.add_argument("--landmarker", metavar="FILE_OR_NAME", help="for --photos, see docs/facesnap.md")
    parser.add_argument("--detector", choices=("auto", "yunet", "haar", "insightface"), default="auto")


def run(args: argparse.Namespace) -> int:
    if not args.out.endswith(".safetensors"):
        raise FaceFusionError(f"--out takes a .safetensors file, got {args.out}")
    check_writable(Path(args.out).parent)
    if args.landmarker and not args.photos:
        raise FaceFusionError("--landmarker is for --photos: name a folder of them, or leave it out")
    model = read_model(args.clone)
    if args.photos:
        seen = points_of_photos(args.photos, args.landmarker, args.detector)
        model = model.calibrated(seen)
        print(f"its points are where {len(seen)} photos have them on average")
    model.save(args.out)
    print(f"a face model of {len(model.expressions)} expressions, written to {args.out}")
    return 0


def read_model(place: Path) -> LinearFaceModel:
    """The model of a clone, or one that was made before; see [`read_ict`] and `face_models.read_face_model`."""
    from ..face_models import LinearFaceModel, read_face_model

    if not place.is_file():
        return read_ict(place)
    arrays, names = read_face_model(place)
    return LinearFaceModel(arrays["neutral"], arrays["identity"], arrays["expression"], names)


def points_of_photos(folder: Path, landmarker: str | None, detector: Any) -> list[np.ndarray]:
    """The points (72, 2) of the faces of a folder's photos; photos without one face are passed over and named.

    Raises:
        FaceFusionError: no folder, or fewer than `FEWEST` faces.
    """
    from tqdm.auto import tqdm

    from ..face_detectors import load_detector
    from ..face_landmarkers import load_landmarker
    from ..generation.photos import locate_face
    from .generate import pictures_in

    if not folder.is_dir():
        raise FaceFusionError(f"--photos {folder}: there is no such folder")
    finder, faces, found = load_landmarker(landmarker), load_detector(detector), []
    for path in tqdm(pictures_in(folder), desc="photos", unit="photo"):
        try:
            photo = locate_face(path, faces)
            assert photo.face is not None
            found.append(finder.find(photo.image, photo.face.box))
        except FaceFusionError as error:
            tqdm.write(f"{path}: {error}")
    if len(found) < FEWEST:
        raise FaceFusionError(f"--photos {folder}: {len(found)} photos show one face, {FEWEST} or more are needed")
    return found


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
