"""Several people in one picture: is everybody there, does each look like themselves, and not like the neighbour?

Two or three test people and a prompt; the places are the face boxes of the true render of the prompt's scene. Each
face is cut out of the picture at its place, framed as a portrait, and compared with *another* portrait of the person
and of the neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...evaluation.generation import Settings, denoising, keep_settings
from ...evaluation.image_files import from_pil, read_image, to_pil, write_image
from ...evaluation.metrics import Estimate, bootstrap_mean, cosine_similarity
from ...evaluation.reports import circumstances, contact_sheet, markdown_table, write_report
from ...files.atomic import write_text
from .. import render
from ..world.caption import caption
from .evaluators import IMAGE_SIZE, Evaluators
from .framing import portrait_crops
from .trial_pictures import image_path, trial_image
from .trials import Trial, portraits, true_renders


CEILING, FLOOR = "true render", "somebody else"
SHEET_ROWS = 6


@dataclass(frozen=True)
class Method:
    """How people are placed; without `overlap` there are no masks, without `faces` no faces either.

    `refines` names the method whose picture gets a second pass over its faces.
    """

    name: str
    faces: bool = True
    overlap: str | None = None
    background: str | None = None
    refines: str | None = None


METHODS = (
    Method("no faces", faces=False),
    Method("no masks"),
    *(
        Method(f"{overlap}, {background}", overlap=overlap, background=background)
        for overlap in ("nearest", "shared", "literal")
        for background in ("none", "all")
    ),
    Method("faces drawn again", refines="nearest, none"),
)


def compare_people(
    pipe: Any,
    trials: list[Trial],
    evaluators: Evaluators,
    settings: Settings,
    out: Path,
    methods: Sequence[Method] = METHODS,
) -> dict[str, Any]:
    """Generate, score, write `rows.jsonl`, `people.json`, `people.md` and `sheet.png` to `out`; returns the result."""
    keep_settings(out, settings)
    boxes = [true_boxes(trial) for trial in trials]
    for trial, places in zip(tqdm(trials, desc="images", unit="trial"), boxes, strict=True):
        missing = [method for method in methods if not image_path(out, trial, slug(method.name)).is_file()]
        people = [pipe.encode_face(portraits(p, seed=settings.seed).face) for p in members(trial)] if missing else []
        for method in missing:  # a second pass comes after the first
            path = image_path(out, trial, slug(method.name))
            if method.refines is None:
                write_image(path, _image(pipe, trial, method, people, places, settings))
            else:
                first = to_pil(read_image(image_path(out, trial, slug(method.refines))))
                write_image(path, _drawn_again(pipe, trial, first, people, places, settings))
    rows = _score(trials, boxes, evaluators, settings, out, methods)
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    names = [*(method.name for method in methods), CEILING, FLOOR]
    result = {
        "settings": asdict(settings),
        "people": len(trials[0].scene.people),
        "most": most_people(evaluators),
        "images_per_method": len(trials),
        **circumstances(),
        "methods": {name: summarise([row for row in rows if row["method"] == name], settings.seed) for name in names},
    }
    add_leakage(result["methods"])
    write_report(out, "people", result, as_markdown(result))
    write_image(out / "sheet.png", _sheet(trials, methods, settings, out))
    return result


def slug(name: str) -> str:
    """A method's name in file names."""
    return name.replace(", ", "-").replace(" ", "-")


def members(trial: Trial) -> list[int]:
    """Identity seeds of a trial's people, from left to right."""
    return [trial.person + i for i in range(len(trial.scene.people))]


def most_people(evaluators: Evaluators) -> int:
    """The largest number of people that the evaluators can count."""
    return max(map(int, evaluators.labels["people"]))


def true_boxes(trial: Trial) -> list[list[float]]:
    """Face boxes of the people in the true render of a trial's scene, in pixels of 128."""
    return [list(box) for box in render([trial.scene]).boxes[0].tolist()]


def summarise(rows: list[dict], seed: int) -> dict[str, Any]:
    """Similarity to the own person and to the neighbours (mean and interval), fractions of pictures with all people
    and with more; the latter is NaN where nobody counted so far."""
    groups = np.array([row["person"] for row in rows])
    own, neighbour = (
        asdict(bootstrap_mean(np.array([row[key] for row in rows]), groups, seed=seed)) for key in ("own", "neighbour")
    )
    return {
        "own": own,
        "neighbour": neighbour,
        "all_present": float(np.mean([row["all_present"] for row in rows])),
        "doubled": _mean([row["doubled"] for row in rows if row["doubled"] is not None]),
    }


def presence(shown: int, asked: int, most: int) -> dict[str, bool | None]:
    """Whether a picture shows the people asked for, and whether more of them (`doubled`).

    Args:
        shown, asked: numbers of people in the picture and in the prompt.
        most: the largest number that `shown` can be; where it is asked for, nobody knows whether there are more.
    """
    return {"all_present": shown == asked, "doubled": shown > asked if asked < most else None}


def add_leakage(methods: dict[str, dict]) -> None:
    """How far the neighbour's likeness has come from the floor to the own likeness: 0 is none, 1 is a full mixture."""
    floor = methods[FLOOR]["own"]["mean"]
    for figures in methods.values():
        way = figures["own"]["mean"] - floor
        figures["leakage"] = (figures["neighbour"]["mean"] - floor) / way if way > 0 else float("nan")


def as_markdown(result: dict[str, Any]) -> str:
    """The table with its legend."""
    rows = [
        [
            name,
            str(Estimate(**f["own"])),
            str(Estimate(**f["neighbour"])),
            f["leakage"],
            *(part if np.isnan(part) else f"{100 * part:.1f} %" for part in (f["all_present"], f["doubled"])),
        ]
        for name, f in result["methods"].items()
    ]
    s = result["settings"]
    return (
        markdown_table(
            ["overlap, background", "own person ↑", "neighbour ↓", "leakage ↓", "all present ↑", "doubled ↓"], rows
        )
        + f"\n{result['images_per_method']} pictures of {result['people']} people a method, people that no training "
        f"saw, {denoising(s)}, face scale {s['face_scale']}, seed {s['seed']}; "
        f"{result['machine']}, {result['date']}.\nSimilarity: avatar recogniser, cosine to another portrait, with a "
        "95 % bootstrap interval over people; of somebody else: mean over everybody whom a face is not. Leakage: the "
        "neighbour's similarity, normalised: 0 % is the floor, 100 % the own similarity. All present, doubled: "
        f"pictures in which the evaluator counts as many people as asked for, and more; it counts to "
        f"{result['most']}. Faces drawn again: the pictures of nearest, none after `refine_faces`.\n"
    )


def _image(
    pipe: Any, trial: Trial, method: Method, people: list[Any], boxes: list[list[float]], settings: Settings
) -> torch.Tensor:
    face: dict[str, Any] = {}
    if method.faces:
        face = {"face_image": people, "face_scale": settings.face_scale}
        if method.overlap is None:
            face |= {"face_masks": [np.ones((8, 8))] * len(people), "face_overlap": "shared"}
        else:
            face |= {"face_boxes": boxes, "face_overlap": method.overlap, "face_background": method.background}
    return trial_image(pipe, trial, settings, **face)


def _drawn_again(
    pipe: Any, trial: Trial, first: Image.Image, people: list[Any], boxes: list[list[float]], settings: Settings
) -> torch.Tensor:
    """A picture after `refine_faces`; of each person the prompt says what that of the picture says."""
    alone = [caption(replace(trial.scene, people=(person,)), plain=True) for person in trial.scene.people]
    (image,) = pipe.refine_faces(
        first,
        alone,
        face_image=people,
        face_boxes=boxes,
        face_scale=settings.face_scale,
        **settings.call,
        generator=[torch.Generator().manual_seed(trial.seed + i) for i in range(len(people))],
    )
    return from_pil(image)


def _score(
    trials: list[Trial],
    boxes: list[list[list[float]]],
    evaluators: Evaluators,
    settings: Settings,
    out: Path,
    methods: Sequence[Method],
) -> list[dict]:
    count = len(trials[0].scene.people)
    truth, strangers = true_renders(trials), true_renders(trials, person_shift=count)
    everybody = sorted({person for trial in trials for person in members(trial)})
    others = torch.stack([portraits(person, seed=settings.seed).other for person in everybody])
    known = dict(zip(everybody, evaluators.embed(others, evaluators.locate(others)), strict=True))
    rows = []
    for i, (trial, places) in enumerate(zip(tqdm(trials, desc="scores", unit="trial"), boxes, strict=True)):
        images = [read_image(image_path(out, trial, slug(m.name)), IMAGE_SIZE) for m in methods]
        images += [truth[i], strangers[i]]
        counts = evaluators.describe(torch.stack(images))["people"]
        for name, image, people in zip([*(m.name for m in methods), CEILING, FLOOR], images, counts, strict=True):
            crops = portrait_crops(image, places)
            found = evaluators.embed(crops, evaluators.locate(crops))
            for k, person in enumerate(members(trial)):
                like = {p: float(cosine_similarity(found[k], known[p])) for p in everybody}
                if name == FLOOR:  # against everybody whom this face is not: one stranger alone says little
                    own = neighbour = _mean([like[p] for p in everybody if p != person + count])
                else:
                    own, neighbour = like[person], _mean([like[p] for p in members(trial) if p != person])
                row: dict[str, Any] = {"trial": trial.key, "person": trial.person, "place": k, "method": name}
                row |= presence(int(people), count, most_people(evaluators))
                rows.append({**row, "own": own, "neighbour": neighbour})
    return rows


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _sheet(trials: list[Trial], methods: Sequence[Method], settings: Settings, out: Path) -> Image.Image:
    rows = []
    for trial in trials[:: max(1, len(trials) // SHEET_ROWS)][:SHEET_ROWS]:
        faces = [portraits(person, seed=settings.seed).face for person in members(trial)]
        pictures = [to_pil(read_image(image_path(out, trial, slug(method.name)))) for method in methods]
        rows.append((trial.text, [*faces, *pictures]))
    columns = [f"person {i + 1}" for i in range(len(members(trials[0])))]
    return contact_sheet([*columns, *(method.name for method in methods)], rows)
