"""FaceStudio on avatars: likeness by text and by picture, the slider between them, views, mixing, several people.

Style pictures are true renders of a scene with somebody else, whose face is covered if the weights ask for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...conditioner_face_studio import load_studio_prior
from ...conditioner_tokens import face_embedder_of, image_encoder_of
from ...evaluation.generation import Settings, denoising, keep_settings
from ...evaluation.image_files import to_pil, write_image
from ...evaluation.metrics import bootstrap_mean, bootstrap_normalised, cosine_similarity
from ...evaluation.reports import circumstances, contact_sheet, markdown_table, write_report
from ...face_models import FaceModel
from ...face_studio import STUDIO, FaceStudio
from ...face_style import picture_embeddings
from ...files.atomic import write_text
from ..measures.figures import distances, row_of
from ..measures.looks import Look
from .avatar_table import CEILING, FLOOR, summarise
from .avatar_table import as_markdown as main_table
from .evaluators import IMAGE_SIZE
from .scoring import Panel
from .studio_pictures import METHODS, STRANGER, Studio
from .studio_views import compare_views, views_markdown, views_sheet
from .trial_pictures import trial_image
from .trials import Trial, portraits, true_renders


SLIDER = (0.0, 0.25, 0.5, 0.75, 1.0)
MIXES = (0.0, 0.25, 0.5, 0.75, 1.0)  # fraction of the second person
SHOWN = ("clothing", "background")  # of the style picture and of the prompt, along the slider
SHEET_ROWS, SLIDER_ROWS = 8, 4


def compare_studio(
    pipe: Any, trials: list[Trial], panel: Panel, settings: Settings, model: FaceModel, out: Path
) -> dict[str, Any]:
    """Draw, score, write `rows.jsonl`, `studio.json`, `studio.md` and three sheets to `out`; returns the result.

    Args:
        model: sees how far heads are turned.
    """
    keep_settings(out, settings)
    studio = Studio(pipe, trials, settings, out)
    rows, seen = main_rows(studio, panel)
    people = {trial.person for trial in trials}
    methods = [*METHODS, CEILING, FLOOR]
    result: dict[str, Any] = {
        "settings": asdict(settings) | {"cut_out": "true"},
        "identities": len(people),
        "images_per_method": len(trials),
        "faces_not_detected": 0,
        **circumstances(),
        "methods": summarise(rows, methods, panel.names, seed=settings.seed),
        "leak": leak(studio, panel),
    }
    whose = np.array([trial.person for trial in trials])
    for method in METHODS if seen else ():
        result["methods"][method]["drawing"] |= distances(seen[method], seen[CEILING], whose, seed=settings.seed)
    result["slider"], slid = slider(studio, panel)
    result["views"], viewed = compare_views(studio, panel, model)
    result["mixing"], mixed = mixing(studio, panel)
    result["two people"] = two_people(studio, panel)
    result["seconds"] = costs(studio)
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, *slid, *viewed, *mixed]))
    write_report(out, "studio", result, as_markdown(result, panel.names))
    write_image(out / "sheet.png", sheet(studio))
    write_image(out / "slider.png", slider_sheet(studio))
    write_image(out / "views.png", views_sheet(studio))
    return result


def main_rows(
    studio: Studio, panel: Panel, methods: Sequence[str] = tuple(METHODS)
) -> tuple[list[dict], dict[str, list[Any]]]:
    """What is said of the pictures of every method, and of true renders with the person and with somebody else."""
    trials, rows, seen = studio.trials, [], dict[str, list[Any]]()
    truth, strangers = true_renders(trials), true_renders(trials, person_shift=1)
    names = [*methods, CEILING, FLOOR]
    for i, trial in enumerate(tqdm(trials, desc="methods", unit="trial")):
        made = [studio.picture(trial, name, **METHODS[name]) for name in methods]
        images = torch.stack([*made, truth[i], strangers[i]])
        mine = panel.score(trial, images, names, portraits(trial.person, seed=studio.settings.seed))
        if panel.measures:
            for row, found in zip(mine, panel.measures.look(images, [Look.of_scene(trial.scene)]), strict=True):
                row |= row_of(found)
                seen.setdefault(row["method"], []).append(found)
        rows += mine
    return rows, seen


def leak(studio: Studio, panel: Panel) -> dict[str, Any]:
    """How far pictures in somebody's style come towards that person: 0 as without the style, 1 the same person."""
    found = {}
    known: dict[int, dict[str, Any]] = {}

    def other(person: int) -> dict[str, Any]:
        if person not in known:
            known[person] = panel.embed(portraits(person, seed=studio.settings.seed).other[None])
        return known[person]

    for name in ("FaceStudio by picture", "style by FaceStudio, identity by Face Fusion"):
        values: dict[str, list[tuple[float, ...]]] = {r: [] for r in panel.names}
        for trial in studio.trials:
            whose = trial.person + STRANGER
            image = panel.embed(studio.picture(trial, name)[None])
            plain = panel.embed(studio.picture(trial, "Face Fusion")[None])
            reference = panel.embed(portraits(whose, seed=studio.settings.seed).reference[None])
            for r in panel.names:
                to = other(whose)[r]
                values[r].append(tuple(float(cosine_similarity(e[r], to)[0]) for e in (image, plain, reference)))
        people = np.array([trial.person for trial in studio.trials])
        found[name] = {
            r: asdict(bootstrap_normalised(*((np.array(column), people) for column in zip(*values[r], strict=True))))
            for r in panel.names
        }
    return found


def slider(studio: Studio, panel: Panel) -> tuple[dict[str, Any], list[dict]]:
    """From a prompt to the picture of another scene: which of them clothing and background are of, and likeness."""
    rows: list[dict[str, Any]] = []
    for i, trial in enumerate(tqdm(studio.trials, desc="slider", unit="trial")):
        of_style = studio.trials[(i + 1) % len(studio.trials)]
        for alpha in SLIDER:
            picture = slid(studio, trial, of_style, alpha)
            (row,) = panel.score(
                trial, picture[None], [f"slider {alpha:g}"], portraits(trial.person, seed=studio.settings.seed)
            )
            said = panel.evaluators.describe(picture[None])
            wanted = {"prompt": trial.wanted, "style": of_style.wanted}
            row |= {
                f"as the {name}": [float(said[t][0] == words[t]) for t in SHOWN if t in words]
                for name, words in wanted.items()
            }
            rows.append(row | {"style_scale": alpha})
    result = {}
    for alpha in SLIDER:
        mine = [row for row in rows if row["style_scale"] == alpha]
        people = np.array([row["person"] for row in mine])
        result[f"{alpha:g}"] = {
            name: asdict(bootstrap_mean(np.array([np.mean(row[name]) for row in mine]), people))
            for name in ("as the prompt", "as the style")
        } | {r: asdict(bootstrap_mean(np.array([row["similarity"][r] for row in mine]), people)) for r in panel.names}
    return result, rows


def slid(studio: Studio, trial: Trial, of_style: Trial, alpha: float) -> torch.Tensor:
    return studio.picture(
        trial,
        f"slider{round(100 * alpha):03d}",
        face="face-studio",
        style=alpha,
        style_picture=studio.styles[of_style.key],
        style_context="replace",
    )


def mixing(studio: Studio, panel: Panel) -> tuple[dict[str, Any], list[dict]]:
    """e_f between two people: likeness to the first and to the second."""
    rows: list[dict[str, Any]] = []
    firsts = [trial for trial in studio.trials if trial.number == 0]
    for trial, following in zip(firsts, firsts[1:] + firsts[:1], strict=True):
        both = [portraits(person, seed=studio.settings.seed).face for person in (trial.person, following.person)]
        identity = studio.pipe.encode_face(both, face_mode="face-studio")
        others = [panel.embed(portraits(t.person, seed=studio.settings.seed).other[None]) for t in (trial, following)]
        for fraction in MIXES:
            weights = [1 - fraction, fraction]
            name = f"mix{round(100 * fraction):03d}"
            image = panel.embed(studio.picture(trial, name, face_image=identity, face_weights=weights)[None])
            to = [{r: float(cosine_similarity(image[r], o[r])[0]) for r in panel.names} for o in others]
            rows.append({"trial": trial.key, "method": name, "fraction": fraction, "first": to[0], "second": to[1]})
    result = {
        f"{fraction:g}": {
            whose: {
                r: float(np.mean([row[whose][r] for row in rows if row["fraction"] == fraction])) for r in panel.names
            }
            for whose in ("first", "second")
        }
        for fraction in MIXES
    }
    return result, rows


def two_people(studio: Studio, panel: Panel) -> dict[str, Any]:
    """Two people side by side: how far the face at each place comes to its own person, and to the neighbour."""
    side = IMAGE_SIZE
    boxes = [(0.14 * side, 0.3 * side, 0.4 * side, 0.62 * side), (0.6 * side, 0.3 * side, 0.86 * side, 0.62 * side)]
    firsts = [trial for trial in studio.trials if trial.number == 0]
    own: list[float] = []
    neighbour: list[float] = []
    for trial, following in zip(firsts, firsts[1:] + firsts[:1], strict=True):
        people = [[studio.identity(t.person, "face-studio")] for t in (trial, following)]
        text = "two people, " + trial.text.partition(", ")[2]
        drawn = replace(trial, text=text)
        whole = studio.picture(
            drawn, "two", face_image=[p[0] for p in people], face_boxes=boxes, style_context="replace"
        )
        others = torch.stack([portraits(t.person, seed=studio.settings.seed).other for t in (trial, following)])
        known = panel.evaluators.embed(others, panel.evaluators.locate(others))
        for index, box in enumerate(boxes):
            (points,) = panel.evaluators.landmarks(to_pil(whole), [box])
            found = panel.evaluators.embed(whole[None], torch.from_numpy(points)[None].float())[0]
            own.append(float(cosine_similarity(found, known[index])))
            neighbour.append(float(cosine_similarity(found, known[1 - index])))
    return {"own": float(np.mean(own)), "neighbour": float(np.mean(neighbour)), "pairs": len(firsts)}


def costs(studio: Studio, repeats: int = 5) -> dict[str, float]:
    """Seconds of processor time: a picture without FaceStudio, and the parts that FaceStudio asks for one."""
    pipe, trial = studio.pipe, studio.trials[0]
    encoder, processor = image_encoder_of(pipe, FaceStudio)
    prior = load_studio_prior(pipe._token_parts[STUDIO]["prior"])
    face = portraits(trial.person, seed=studio.settings.seed).face
    parts: dict[str, Callable[[], Any]] = {
        "image encoder": lambda: picture_embeddings(encoder, [studio.styles[trial.key]], processor),
        "prior": lambda: prior._sampled(trial.text),  # what is kept of a prompt costs nothing
        "one more reference": lambda: face_embedder_of(pipe, FaceStudio)([face]),
    }

    def seconds(run: Callable[[], Any], times: int) -> float:
        run()
        start = time.process_time()
        for _ in range(times):
            run()
        return (time.process_time() - start) / times

    picture = seconds(lambda: trial_image(pipe, trial, studio.settings), 1)
    return {"picture": picture, **{name: seconds(run, repeats) for name, run in parts.items()}}


# --- Reports -----------------------------------------------------------------------------------------------------


def as_markdown(result: dict[str, Any], recognisers: list[str]) -> str:
    """The tables with their legend."""
    parts = [main_table(result, recognisers)]
    header = ["α", "as the prompt", "as the style picture", *recognisers]
    rows = [
        [alpha, *(f"{100 * found[name]['mean']:.0f} %" for name in ("as the prompt", "as the style"))]
        + [f"{found[r]['mean']:.3f}" for r in recognisers]
        for alpha, found in result["slider"].items()
    ]
    parts += ["Slider: clothing and background as the one and as the other ask for them; cosine to the person.\n"]
    parts += [markdown_table(header, rows)]
    parts += views_markdown(result["views"], recognisers)
    rows = [
        [fraction, *(f"{found[whose][r]:.3f}" for r in recognisers for whose in ("first", "second"))]
        for fraction, found in result["mixing"].items()
    ]
    header = ["β of the second", *(f"{r}, {whose}" for r in recognisers for whose in ("first", "second"))]
    parts += ["Mixing: cosine to both people.\n", markdown_table(header, rows)]
    rows = [
        [name, *(f"{100 * found[r]['mean']:.0f} %" for r in recognisers)] for name, found in result["leak"].items()
    ]
    parts += ["How far pictures come towards the person of the style picture.\n"]
    parts += [markdown_table(["method", *recognisers], rows)]
    two = result["two people"]
    parts += [
        f"Two people, {two['pairs']} pairs: cosine to the own person {two['own']:.3f}, to the neighbour "
        f"{two['neighbour']:.3f} (avatar recogniser). {denoising(result['settings'])}.\n",
        "Processor time of a picture: "
        + ", ".join(
            f"{name} {100 * seconds / result['seconds']['picture']:.2f} %"
            for name, seconds in result["seconds"].items()
            if name != "picture"
        )
        + ".\n",
    ]
    return "\n".join(parts)


def sheet(studio: Studio) -> Image.Image:
    rows: list[tuple[str, list[Image.Image]]] = []
    for trial in [t for t in studio.trials if t.number == 0][:SHEET_ROWS]:
        pictures = [to_pil(studio.picture(trial, name)) for name in METHODS]
        face = portraits(trial.person, seed=studio.settings.seed).face
        rows.append((trial.text, [face, studio.styles[trial.key], *pictures]))
    return contact_sheet(["reference", "style picture", *METHODS], rows)


def slider_sheet(studio: Studio) -> Image.Image:
    rows: list[tuple[str, list[Image.Image]]] = []
    for i, trial in enumerate(studio.trials):
        if trial.number or len(rows) == SLIDER_ROWS:
            continue
        of_style = studio.trials[(i + 1) % len(studio.trials)]
        pictures = [to_pil(slid(studio, trial, of_style, alpha)) for alpha in SLIDER]
        face = portraits(trial.person, seed=studio.settings.seed).face
        rows.append((trial.text, [face, *pictures, studio.styles[of_style.key]]))
    return contact_sheet(["reference", *(f"style_scale {alpha:g}" for alpha in SLIDER), "style picture"], rows)
