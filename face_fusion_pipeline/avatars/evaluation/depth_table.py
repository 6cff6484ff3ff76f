"""Faces under a depth ControlNet: does the picture follow the depth map, and is it still the person?

The depth map is that of the prompt's scene with *somebody else* in it, as when a user takes the pose from another
picture: so it asks for another head, and what it costs in likeness shows. One row has the person in the map instead,
which tells the ControlNet's part of that cost from the part of the other head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...control_pictures import depth_image
from ...evaluation.generation import Settings, denoising, keep_settings
from ...evaluation.image_files import from_pil, read_image, to_pil, write_image
from ...evaluation.metrics import Estimate, bootstrap_mean, cosine_similarity
from ...evaluation.reports import circumstances, contact_sheet, markdown_table, write_report
from ...files.atomic import write_text
from .. import Scene, render
from .evaluators import IMAGE_SIZE, Evaluators
from .renders import depth_cells
from .trial_pictures import image_path, trial_image
from .trials import Trial, portraits, true_renders, with_others


POSED, STRANGER = "render that the depth is of", "render of another scene"
POSER = 1  # the depth map shows the next person
ONESELF = 0
SHEET_ROWS = 6


@dataclass(frozen=True)
class Method:
    """With the face or without, and what the ControlNet does.

    Args:
        inside: how strong it is inside the face box; None is no ControlNet.
        until: fraction of the steps after which it is off.
        poser: who is in the depth map.
    """

    name: str
    face: bool
    inside: float | None
    until: float = 1.0
    poser: int = POSER


METHODS = (
    Method("prompt alone", False, None),
    Method("depth", False, 1.0),
    Method("face", True, None),
    Method("face, depth", True, 1.0),
    Method("face, depth, half inside", True, 0.5),
    Method("face, depth, half of both", True, 0.5, until=0.5),
    Method("face, depth, none inside", True, 0.0),
    Method("face, depth of the person", True, 1.0, poser=ONESELF),
)


def compare_depth(
    pipe: Any,
    trials: list[Trial],
    evaluators: Evaluators,
    settings: Settings,
    out: Path,
    methods: Sequence[Method] = METHODS,
) -> dict[str, Any]:
    """Generate, score, write `rows.jsonl`, `depth.json`, `depth.md` and `sheet.png` to `out`; returns the result.

    `pipe` is a Face Fusion pipeline with a depth ControlNet.
    """
    keep_settings(out, settings)
    for trial in tqdm(trials, desc="images", unit="trial"):
        missing = [method for method in methods if not image_path(out, trial, slug(method)).is_file()]
        face = pipe.encode_face(portraits(trial.person, seed=settings.seed).face) if missing else None
        for method in missing:
            write_image(image_path(out, trial, slug(method)), _image(pipe, trial, method, face, settings))
    rows = _score(trials, evaluators, settings, out, methods)
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    names = [*(method.name for method in methods), POSED, STRANGER]
    result = {
        "settings": asdict(settings),
        "images_per_method": len(trials),
        **circumstances(),
        "methods": {name: summarise([row for row in rows if row["method"] == name], settings.seed) for name in names},
    }
    write_report(out, "depth", result, as_markdown(result))
    write_image(out / "sheet.png", _sheet(trials, methods, settings, out))
    return result


def slug(method: Method) -> str:
    """A method's name in file names."""
    return method.name.replace(", ", "-").replace(" ", "-")


def posing_scene(trial: Trial, poser: int = POSER) -> Scene:
    """The trial's scene with somebody else in it, or with the person."""
    return with_others(trial.scene, poser)


def control_depth(scene: Scene) -> Image.Image:
    """The exact depth map of a scene as control image."""
    return depth_image(render([scene]).depth[0])


def summarise(rows: list[dict], seed: int) -> dict[str, Any]:
    """Depth error, landmark error and similarity: mean and interval over people."""
    groups = np.array([row["person"] for row in rows])
    return {
        key: asdict(bootstrap_mean(np.array([row[key] for row in rows]), groups, seed=seed))
        for key in ("depth_error", "landmark_error", "similarity")
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table with its legend."""
    rows = [[name, *(str(Estimate(**estimate)) for estimate in f.values())] for name, f in result["methods"].items()]
    s = result["settings"]
    return (
        markdown_table(["", "depth error ↓", "landmark error ↓", "own person ↑"], rows)
        + f"\n{result['images_per_method']} pictures a method, people that no training saw, {denoising(s)}, "
        f"face scale {s['face_scale']}, seed {s['seed']}; {result['machine']}, "
        f"{result['date']}.\nInside: `control_face_scale`, the ControlNet's strength in the face box; half of both: "
        "that and `control_guidance_end=0.5`. The depth map is that of the scene with somebody else in it, in one row "
        "with the person. Depth error: mean absolute difference between it and the depth that an evaluator sees in "
        "the picture, both from 0 to 1. "
        "Landmark error: mean distance of five landmarks from those of the scene, over the "
        "distance of its eyes. Own person: avatar recogniser, cosine to another portrait. 95 % bootstrap intervals "
        "over people.\n"
    )


def _image(pipe: Any, trial: Trial, method: Method, face: Any, settings: Settings) -> torch.Tensor:
    arguments: dict[str, Any] = {}
    if method.face:
        arguments = {"face_image": face, "face_scale": settings.face_scale}
    if method.inside is not None:
        arguments |= {
            "control_image": control_depth(posing_scene(trial, method.poser)),
            "control_kind": "depth",
            "control_guidance_end": method.until,
        }
    if method.face and method.inside is not None:  # a box for all of these, so that they differ in nothing else
        box = render([posing_scene(trial, method.poser)]).boxes[0][0].tolist()
        arguments |= {"control_face_scale": method.inside, "face_boxes": [box]}
    return trial_image(pipe, trial, settings, **arguments)


def _score(
    trials: list[Trial], evaluators: Evaluators, settings: Settings, out: Path, methods: Sequence[Method]
) -> list[dict]:
    posed, strange = true_renders(trials, person_shift=POSER), true_renders(trials[1:] + trials[:1])
    rows = []
    for i, trial in enumerate(tqdm(trials, desc="scores", unit="trial")):
        other = portraits(trial.person, seed=settings.seed).other[None]
        known = evaluators.embed(other, evaluators.locate(other))
        names = [*(method.name for method in methods), POSED, STRANGER]
        posers = [*(method.poser for method in methods), POSER, POSER]
        asked = {poser: render([posing_scene(trial, poser)]) for poser in set(posers)}
        maps = {poser: depth_cells(from_pil(depth_image(seen.depth[0]))[None, :1]) for poser, seen in asked.items()}
        depth = torch.cat([maps[poser] for poser in posers])
        landmarks = torch.stack([asked[poser].landmarks5[0][0] for poser in posers])
        eyes = (landmarks[:, 1] - landmarks[:, 0]).norm(dim=-1)
        generated = [read_image(image_path(out, trial, slug(method)), IMAGE_SIZE) for method in methods]
        images = torch.stack([*generated, posed[i], strange[i]])
        found = evaluators.locate(images)
        depth_errors = (evaluators.nearness(images) - depth).abs().mean(dim=(1, 2)).tolist()
        landmark_errors = ((found - landmarks).norm(dim=-1).mean(dim=1) / eyes).tolist()
        similarity = cosine_similarity(evaluators.embed(images, found), np.repeat(known, len(images), 0)).tolist()
        for name, near, place, own in zip(names, depth_errors, landmark_errors, similarity, strict=True):
            row = {"trial": trial.key, "person": trial.person, "method": name}
            rows.append({**row, "depth_error": near, "landmark_error": place, "similarity": own})
    return rows


def _sheet(trials: list[Trial], methods: Sequence[Method], settings: Settings, out: Path) -> Image.Image:
    rows = []
    for trial in trials[:: max(1, len(trials) // SHEET_ROWS)][:SHEET_ROWS]:
        near = control_depth(posing_scene(trial))
        pictures = [to_pil(read_image(image_path(out, trial, slug(method)))) for method in methods]
        rows.append((trial.text, [portraits(trial.person, seed=settings.seed).face, near, *pictures]))
    return contact_sheet(["reference", "depth map", *(method.name for method in methods)], rows)
