"""A reference view: a style picture of somebody else whose head is turned. Does the person's head turn with it?

The view is a true render of what the prompt asks for, but of another person, at a known yaw.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...evaluation.image_files import to_pil
from ...evaluation.metrics import Estimate, bootstrap_mean
from ...evaluation.reports import contact_sheet, markdown_table
from ...face_models import FaceModel
from .detector import AvatarDetector
from .scoring import Panel
from .studio_pictures import METHODS, STRANGER, Studio
from .trials import Trial, portraits, true_renders


VIEWS = (-25.0, 0.0, 25.0)  # degrees of yaw
WITH_VIEW = {  # name -> the method that gets the view as its style picture
    "FaceStudio, reference view": "FaceStudio by picture",
    "style by FaceStudio, identity by Face Fusion, reference view": "style by FaceStudio, identity by Face Fusion",
}
WITHOUT = {"FaceStudio, no style picture": "FaceStudio by text", "Face Fusion, no style picture": "Face Fusion"}
TRUTH, ITSELF = "true render of the person in the view", "the view itself"
SHEET_ROWS = 4
DETECTOR = AvatarDetector()


def viewed(trial: Trial, yaw: float) -> Trial:
    """The trial whose person looks to one side, and neither up nor down."""
    (person,) = trial.scene.people
    return replace(trial, scene=replace(trial.scene, people=(replace(person, yaw=yaw, pitch=0.0, roll=0.0),)))


def view_pictures(studio: Studio, trial: Trial, yaw: float) -> dict[str, torch.Tensor]:
    """By name: (3, S, S) with the view, without it, of the person in the view, and the view itself."""
    turned = [viewed(trial, yaw)]
    view, truth = (true_renders(turned, person_shift=shift)[0] for shift in (STRANGER, 0))
    found = {
        name: studio.picture(trial, f"{method} view{yaw:g}", **METHODS[method], style_picture=to_pil(view))
        for name, method in WITH_VIEW.items()
    }
    found |= {name: studio.picture(trial, method, **METHODS[method]) for name, method in WITHOUT.items()}
    return found | {TRUTH: truth, ITSELF: view}


def yaw_of(model: FaceModel, picture: torch.Tensor) -> float:
    """Degrees by which the head of a portrait (3, S, S) is turned, as a face model sees it."""
    image = to_pil(picture)
    (face,) = DETECTOR.detect(image)
    return float(model.fit(image, face.box).pose.yaw)


def compare_views(studio: Studio, panel: Panel, model: FaceModel) -> tuple[dict[str, Any], list[dict]]:
    """The first prompt of each person in each view: how far heads are from the view's yaw, and likeness.

    Returns:
        by name `yaw_error` (median, degrees), `yaw` (median by view) and `likeness` (cosine by recogniser), and rows.
    """
    rows: list[dict[str, Any]] = []
    firsts = [trial for trial in studio.trials if trial.number == 0]
    for trial in tqdm(firsts, desc="views", unit="trial"):
        person = portraits(trial.person, seed=studio.settings.seed)
        for yaw in VIEWS:
            made = view_pictures(studio, trial, yaw)
            scored = panel.score(trial, torch.stack([*made.values()]), [*made], person)
            for row, picture in zip(scored, made.values(), strict=True):
                rows.append(row | {"view": yaw, "yaw": yaw_of(model, picture)})
    return summarise_views(rows, panel.names, studio.settings.seed), rows


def summarise_views(rows: list[dict], recognisers: list[str], seed: int) -> dict[str, Any]:
    """See [`compare_views`]."""
    result: dict[str, Any] = {}
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        people = np.array([row["person"] for row in mine])
        result[name] = {
            "yaw_error": float(np.median([abs(row["yaw"] - row["view"]) for row in mine])),
            "yaw": {f"{v:g}": float(np.median([row["yaw"] for row in mine if row["view"] == v])) for v in VIEWS},
            "likeness": {
                r: asdict(bootstrap_mean(np.array([row["similarity"][r] for row in mine]), people, seed=seed))
                for r in recognisers
            },
        }
    return result


# --- Reports -----------------------------------------------------------------------------------------------------


def views_markdown(result: dict[str, Any], recognisers: list[str]) -> list[str]:
    """The legend and the table."""
    rows = []
    for name, found in result.items():
        likeness = [str(Estimate(**found["likeness"][r])) for r in recognisers]
        yaws = [f"{yaw:+.1f}°" for yaw in found["yaw"].values()]
        rows.append([name, f"{found['yaw_error']:.1f}°", *yaws, *likeness])
    header = ["method", "yaw error ↓", *(f"yaw at {view:g}°" for view in VIEWS)]
    legend = (
        "Reference views: the style picture shows somebody else in the prompt's scene, turned by a known yaw. Yaw and "
        "its error: medians, by the face model of avatars, whose own error the true render shows; cosine to the "
        "person.\n"
    )
    return [legend, markdown_table([*header, *(f"{r} ↑" for r in recognisers)], rows)]


def views_sheet(studio: Studio) -> Image.Image:
    """Reference, the pictures without a view, and for each view the view and what is drawn with it."""
    rows: list[tuple[str, list[Image.Image]]] = []
    shown = (ITSELF, *WITH_VIEW)
    for trial in [t for t in studio.trials if t.number == 0][:SHEET_ROWS]:
        by_view = [view_pictures(studio, trial, yaw) for yaw in VIEWS]
        pictures = [by_view[0][name] for name in WITHOUT] + [made[name] for made in by_view for name in shown]
        rows.append((trial.text, [portraits(trial.person, seed=studio.settings.seed).face, *map(to_pil, pictures)]))
    titles = [f"{title} {yaw:g}°" for yaw in VIEWS for title in ("view", "FaceStudio", "+ Face Fusion")]
    return contact_sheet(["reference", "FaceStudio by text", "Face Fusion", *titles], rows)
