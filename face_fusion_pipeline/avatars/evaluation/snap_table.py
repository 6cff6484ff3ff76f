"""FaceSnap on avatars: are pose and expression the driver's, the shape of the face the person's own, and is it them?

A driver is a true render of somebody else, in a scene of their own. But in one row prompts say nothing of expressions,
so that who shows the driver's has it from the driver.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...control_landmarks import landmark_control
from ...evaluation.generation import Settings, denoising, keep_settings
from ...evaluation.image_files import read_image, to_pil, write_image
from ...evaluation.metrics import bootstrap_mean
from ...evaluation.reports import circumstances, contact_sheet, markdown_table, write_report
from ...face_models import FaceFit
from ...files.atomic import write_text
from ...training.hidden_phrases import without_phrases
from .. import Scene, render, sample_identity, sample_scene
from ..face_model import SHAPE, EstimatedAvatarFaceModel
from ..measures.figures import distances, row_of
from ..measures.looks import Look
from ..world.caption import EXPRESSION_WORDS, caption
from .avatar_table import CEILING, FLOOR, summarise
from .avatar_table import as_markdown as main_table
from .detector import AvatarDetector
from .evaluators import IMAGE_SIZE
from .scoring import Panel
from .trial_pictures import image_path, trial_image
from .trials import Trial, portraits, true_renders


STRANGER = 500  # how far away in the order of people the driver is
MOST_TURNED = 25.0  # degrees to either side, of drivers
ANGLES = ("yaw", "pitch", "roll")
MEDIANS = (*ANGLES, "reference_yaw")
FIGURES = (*MEDIANS, "expression", "landmarks", "own_shape", "driver_shape")
SHEET_ROWS = 6
DETECTOR = AvatarDetector()


@dataclass(frozen=True)
class Method:
    """Who carries the identity (a mode of faces, or None), and what is seen of the driver.

    Args:
        driver: `"recombined"` (the person's shape), `"own"` (the driver's shape), or None.
        read: whether the ControlNet reads who the person is.
        named: whether the prompt names the driver's expression.
    """

    face: str | None
    driver: str | None = "recombined"
    read: bool = True
    named: bool = False


METHODS = {
    "Face Fusion": Method("both", None),
    "Face Fusion, driver": Method("both"),
    "Face Fusion, driver, named": Method("both", named=True),
    "Face Fusion, driver, nobody read": Method("both", read=False),
    "Face Fusion, the driver's own points": Method("both", "own"),
    "FaceSnap alone": Method("face-snap"),
    "points alone": Method(None),
}


@dataclass(frozen=True)
class Driven:
    """A trial whose scene is the person in the driver's pose and with the driver's expression.

    Attributes:
        named: the same with a prompt that names the driver's expression.
        driver: the scene of somebody else that the pose is of, and its picture.
        fit: what the face model sees of the person's reference.
        driver_fit: and of the driver's picture.
    """

    trial: Trial
    named: Trial
    driver: Scene
    picture: Image.Image
    fit: FaceFit
    driver_fit: FaceFit


def driver_scene(trial: Trial) -> Scene:
    """Somebody else, turned by up to `MOST_TURNED` degrees, in a photograph."""
    rng = random.Random(f"driver {trial.key} {trial.seed}")
    yaw, seed = rng.uniform(-MOST_TURNED, MOST_TURNED), rng.randrange(1 << 40)
    own = trial.scene.people[0].identity
    return sample_scene(seed, [sample_identity(own.seed + STRANGER, own.world)], style="photo", yaw=yaw)


def driven_trial(trial: Trial, model: EstimatedAvatarFaceModel, seed: int) -> Driven:
    """The trial as it is asked here: its prompt without an expression, and pose and place of the driver."""
    scene = driver_scene(trial)
    (own,), (other,) = trial.scene.people, scene.people
    posed = replace(other, identity=own.identity, clothing=own.clothing)
    wanted = replace(trial.scene, people=(posed,))
    text = without_phrases(caption(trial.scene, plain=True), EXPRESSION_WORDS[own.expression])
    reference = to_pil(portraits(trial.person, seed=seed).reference)
    picture = to_pil(render([scene]).images[0].cpu())
    asked = replace(trial, scene=wanted, text=text)
    fits = (fitted(model, shown) for shown in (reference, picture))
    return Driven(asked, replace(asked, text=caption(wanted, plain=True)), scene, picture, *fits)


def fitted(model: EstimatedAvatarFaceModel, picture: Image.Image) -> FaceFit:
    """What the face model sees of a picture of one person."""
    (face,) = DETECTOR.detect(picture)
    return model.fit(picture, face.box)


class Snap:
    """Draws the pictures of an evaluation; what is there already is not drawn again."""

    def __init__(self, pipe: Any, model: EstimatedAvatarFaceModel, settings: Settings, out: Path) -> None:
        self.pipe, self.model, self.settings, self.out = pipe, model, settings, out

    def picture(self, driven: Driven, name: str) -> torch.Tensor:
        """(3, S, S) of a trial by a method."""
        words = "".join(letter if letter.isalnum() else " " for letter in name)
        trial = driven.named if METHODS[name].named else driven.trial
        path = image_path(self.out, trial, "-".join(words.split()))
        if not path.is_file():
            arguments = self.arguments(driven, METHODS[name])
            write_image(path, trial_image(self.pipe, trial, self.settings, **arguments))
        return read_image(path, IMAGE_SIZE)

    def arguments(self, driven: Driven, method: Method) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if method.face is not None:
            face = portraits(driven.trial.person, seed=self.settings.seed).face
            mirrored = True if method.face == "both" else None
            arguments = {"face_image": face, "face_mode": method.face, "face_mirrored": mirrored}
            if not method.read:  # what is encoded already shows FaceSnap's ControlNet nobody
                arguments = {"face_image": self.pipe.encode_face(face, face_mode=method.face, mirrored=mirrored)}
        if method.driver is not None:
            shown: Any = driven.picture
            if method.driver == "own":
                shown = driven.driver_fit
            source = driven.fit if method.driver == "recombined" else shown
            arguments |= {"driver_image": shown, "control_source": source, "face_model": self.model}
            arguments |= {"face_detector": DETECTOR}
        return arguments


def compare_snap(
    pipe: Any, trials: Sequence[Trial], panel: Panel, settings: Settings, model: EstimatedAvatarFaceModel, out: Path
) -> dict[str, Any]:
    """Draw, score, write `rows.jsonl`, `snap.json`, `snap.md` and `sheet.png` to `out`; returns the result.

    `pipe` has FaceSnap's weights, and Face Fusion's.
    """
    keep_settings(out, settings)
    snap = Snap(pipe, model, settings, out)
    asked = [driven_trial(trial, model, settings.seed) for trial in trials]
    rows, seen = scored(snap, asked, panel)
    names = [*METHODS, CEILING, FLOOR]
    result: dict[str, Any] = {
        "settings": asdict(settings) | {"cut_out": "true"},
        "identities": len({trial.person for trial in trials}),
        "images_per_method": len(asked),
        "faces_not_detected": 0,
        **circumstances(),
        "methods": summarise(rows, names, panel.names, seed=settings.seed),
        "driver": {name: obeyed([row for row in rows if row["method"] == name], settings.seed) for name in names},
    }
    whose = np.array([trial.person for trial in trials])
    for method in METHODS if seen else ():
        result["methods"][method]["drawing"] |= distances(seen[method], seen[CEILING], whose, seed=settings.seed)
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_report(out, "snap", result, as_markdown(result, panel.names))
    write_image(out / "sheet.png", sheet(snap, asked))
    return result


def scored(snap: Snap, asked: list[Driven], panel: Panel) -> tuple[list[dict], dict[str, list[Any]]]:
    """What is said of the pictures of every method, and of true renders of what is asked for."""
    trials = [driven.trial for driven in asked]
    truth, strangers = true_renders(trials), true_renders(trials, person_shift=1)
    names = [*METHODS, CEILING, FLOOR]
    rows: list[dict] = []
    seen: dict[str, list[Any]] = {}
    for i, driven in enumerate(tqdm(asked, desc="methods", unit="trial")):
        images = torch.stack([*(snap.picture(driven, name) for name in METHODS), truth[i], strangers[i]])
        mine = panel.score(driven.trial, images, names, portraits(driven.trial.person, seed=snap.settings.seed))
        for row, found in zip(mine, followed(snap.model, panel, driven, images), strict=True):
            row |= found
        if panel.measures:
            looks = panel.measures.look(images, [Look.of_scene(driven.trial.scene)])
            for row, look in zip(mine, looks, strict=True):
                row |= row_of(look)
                seen.setdefault(row["method"], []).append(look)
        rows += mine
    return rows, seen


def followed(
    model: EstimatedAvatarFaceModel, panel: Panel, driven: Driven, images: torch.Tensor
) -> list[dict[str, float]]:
    """How far each picture (B, 3, S, S) is from the driver and from the person's own shape, by `FIGURES`.

    Angles in degrees; the five landmarks and both shapes, from the front, in distances of the eyes.
    """
    scene = driven.trial.scene
    (wanted,) = scene.people
    points = render([scene]).landmarks5[0][0]
    eyes = float((points[1] - points[0]).norm())
    placed = ((panel.evaluators.locate(images) - points).norm(dim=-1).mean(1) / eyes).tolist()
    said = panel.evaluators.describe(images)["expression"]
    own, other = (of_average_size(model.of_identity(s.people[0].identity)) for s in (scene, driven.driver))
    found = []
    for image, near, words in zip(images, placed, said, strict=True):
        fit = fitted(model, to_pil(image))
        row = {angle: abs(getattr(fit.pose, angle) - getattr(wanted, angle)) for angle in ANGLES}
        row |= {"reference_yaw": abs(fit.pose.yaw - driven.fit.pose.yaw)}
        row |= {"expression": float(words == wanted.expression), "landmarks": near}
        shape = of_average_size(fit.shape)
        row |= {"own_shape": apart(model, shape, own), "driver_shape": apart(model, shape, other)}
        found.append(row)
    return found


def of_average_size(shape: np.ndarray) -> np.ndarray:
    """A picture does not tell how large a head is from how near it is."""
    shape = shape.copy()
    shape[SHAPE.index("size")] = 0.5
    return shape


def apart(model: EstimatedAvatarFaceModel, shape: np.ndarray, other: np.ndarray) -> float:
    """Mean distance of the points of two neutral faces from the front, over the distance of the latter's eyes."""
    from ..training.landmarks import distance

    neutral = model.expression_of("neutral")
    return distance(model.head(shape, neutral), model.head(other, neutral))


def obeyed(rows: list[dict], seed: int) -> dict[str, Any]:
    """Of rows of one method: medians of angles, and means with intervals over people."""
    people = np.array([row["person"] for row in rows])
    values = {name: np.array([row[name] for row in rows]) for name in FIGURES}
    medians = {name: {"median": float(np.median(values[name]))} for name in MEDIANS}
    return medians | {
        name: asdict(bootstrap_mean(values[name], people, seed=seed)) for name in FIGURES if name not in MEDIANS
    }


# --- Reports -----------------------------------------------------------------------------------------------------


def as_markdown(result: dict[str, Any], recognisers: list[str]) -> str:
    """Two tables with their legend: the driver, and the main table."""
    rows = []
    for name, found in result["driver"].items():
        row = [name, *(f"{found[angle]['median']:.1f}°" for angle in MEDIANS)]
        row.append(f"{100 * found['expression']['mean']:.0f} %")
        rows.append([*row, *(f"{100 * found[key]['mean']:.1f} %" for key in FIGURES[len(MEDIANS) + 1 :])])
    header = ["method", *(f"{angle} ↓" for angle in ANGLES), "yaw, from the reference's"]
    header += ["expression ↑", "landmarks ↓"]
    legend = (
        f"\n{result['images_per_method']} pictures a method, {result['identities']} people that no training saw, each "
        f"with a driver of their own, turned by up to {MOST_TURNED:.0f}°, {denoising(result['settings'])}, seed "
        f"{result['settings']['seed']}; {result['machine']}, {result['date']}.\nYaw, pitch, roll: median error, by "
        "the face model of avatars, whose own error the true render shows; beside it how far the head is turned from "
        "where the reference's is. Expression: that of the driver, by an evaluator; the prompt says nothing of it, "
        "but for the row “named”. Landmarks: five, by an evaluator, from where they are in a true render of what is "
        "asked for. Shapes: points of the face from the front, from the person's own and from the driver's. Both over "
        "the distance of the eyes.\n"
    )
    table = markdown_table([*header, "from the own shape ↓", "from the driver's shape"], rows)
    return table + legend + "\n" + main_table(result, recognisers)


def sheet(snap: Snap, asked: list[Driven]) -> Image.Image:
    """Reference, driver, points, and the picture of each method, of the first people."""
    rows: list[tuple[str, list[Image.Image]]] = []
    for driven in [d for d in asked if d.trial.number == 0][:SHEET_ROWS]:
        pictures = [to_pil(snap.picture(driven, name)) for name in METHODS]
        dots = landmark_control(driven.fit, driven.driver_fit, face_model=snap.model, size=driven.picture.size)
        reference = portraits(driven.trial.person, seed=snap.settings.seed).face
        rows.append((driven.trial.text, [reference, driven.picture, dots, *pictures]))
    return contact_sheet(["reference", "driver", "points", *METHODS], rows)
