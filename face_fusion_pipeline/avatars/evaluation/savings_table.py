"""What it costs in likeness to see less of a face: smaller references, fewer steps, fewer layers, fewer queries.

Every way is an option of the pipeline. The same trials with the same noise run through all of them, so what is
compared is the difference within a trial, which is far steadier than the likeness itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ...evaluation.generation import Settings, denoising, keep_settings
from ...evaluation.image_files import read_image, to_pil, write_image
from ...evaluation.metrics import Estimate, bootstrap_mean, cosine_similarity
from ...evaluation.reports import circumstances, contact_sheet, markdown_table, write_report
from ...face_attention import attention_layers
from ...face_self_attention import WHOLE_AND_CLEAN, SelfAttentionReference
from ...files.atomic import write_text
from .evaluators import IMAGE_SIZE, Evaluators
from .people_table import true_boxes
from .trial_pictures import image_path, trial_image
from .trials import Trial, portraits


SHEET_ROWS = 6


@dataclass(frozen=True)
class Saving:
    """A way to see less, or more, of a face.

    Attributes:
        side: side of the reference, as a fraction of the side of the model's own pictures.
        encode: further arguments of `encode_face`.
        call: arguments of the pipeline's call.
        finest: whether the layers with the most queries, the outermost ones of the UNet, see the face.
        in_box: only queries in the face box of the true render's scene see it (`face_boxes`).
    """

    name: str
    side: float = 1.0
    encode: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    finest: bool = True
    in_box: bool = False


EVERYTHING = Saving("everything")
SAVINGS = (
    EVERYTHING,
    Saving("reference of 3/4 the side", side=0.75),
    Saving("reference of half the side", side=0.5),
    Saving("first 80 % of the steps", call={"face_end": 0.8}),
    Saving("first 60 % of the steps", call={"face_end": 0.6}),
    Saving("last 80 % of the steps", call={"face_start": 0.2}),
    Saving("without the finest layers", finest=False),
    Saving("queries in the face box", in_box=True),
)


def at_self_attention(name: str, **how: Any) -> Saving:
    """The mode without training, which sees this of a reference; see [`SelfAttentionReference`]."""
    return Saving(name, encode={"face_mode": "training-free", "self_attention": SelfAttentionReference(**how)})


REFERENCES = (
    at_self_attention("as it is"),
    at_self_attention("clean reference", timestep=0),
    at_self_attention("noised to 300", timestep=300),
    at_self_attention("downward half", layers=("down_blocks",)),
    at_self_attention("all layers", layers=("down_blocks", "mid_block", "up_blocks")),
    at_self_attention("whole crop", half_axes=(2.0, 2.0)),
    at_self_attention("strength 1", scale=1.0),
    Saving(
        "clean, all layers, whole crop, strength 1",
        encode={"face_mode": "training-free", "self_attention": WHOLE_AND_CLEAN},
    ),
)


def compare_savings(
    pipe: Any,
    trials: list[Trial],
    evaluators: Evaluators,
    settings: Settings,
    out: Path,
    savings: Sequence[Saving] = SAVINGS,
) -> dict[str, Any]:
    """Generate, score, write `rows.jsonl`, `savings.json`, `savings.md` and `sheet.png` to `out`; returns the result.

    The first of `savings` is what the others are compared with. The layers' scales of `pipe` are 1 afterwards.
    """
    keep_settings(out, settings)
    for trial in tqdm(trials, desc="images", unit="trial"):
        for saving in savings:
            path = image_path(out, trial, slug(saving.name))
            if not path.is_file():
                write_image(path, _image(pipe, trial, saving, settings))
    rows = []
    for trial in tqdm(trials, desc="scores", unit="trial"):
        other = portraits(trial.person, seed=settings.seed).other[None]
        paths = [image_path(out, trial, slug(saving.name)) for saving in savings]
        images = torch.stack([read_image(path, IMAGE_SIZE) for path in paths])
        known = evaluators.embed(other, evaluators.locate(other))
        similarity = cosine_similarity(evaluators.embed(images, evaluators.locate(images)), known)
        for saving, value in zip(savings, similarity.tolist(), strict=True):
            row = {"trial": trial.key, "person": trial.person, "saving": saving.name, "similarity": value}
            rows.append({**row, "difference": value - similarity[0]})
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    result = {
        "settings": asdict(settings),
        "trials": len(trials),
        **circumstances(),
        "savings": {s.name: summarise([row for row in rows if row["saving"] == s.name], settings) for s in savings},
    }
    write_report(out, "savings", result, as_markdown(result))
    write_image(out / "sheet.png", _sheet(trials, savings, settings, out))
    return result


def slug(name: str) -> str:
    """A saving's name in file names."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def summarise(rows: list[dict], settings: Settings) -> dict[str, Any]:
    """Likeness, and what it lost or won against everything, within trials: means and intervals over people."""
    people = np.array([row["person"] for row in rows])
    return {
        key: asdict(bootstrap_mean(np.array([row[key] for row in rows]), people, seed=settings.seed))
        for key in ("similarity", "difference")
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table with its legend."""
    first, *_ = result["savings"].values()
    whole = first["similarity"]["mean"]
    rows = [
        [
            name,
            str(Estimate(**found["similarity"])),
            str(Estimate(**found["difference"])),
            f"{100 * found['difference']['mean'] / whole:+.1f} %",
        ]
        for name, found in result["savings"].items()
    ]
    s = result["settings"]
    return (
        markdown_table(["face sees", "likeness ↑", "difference", "of the likeness"], rows)
        + f"\n{result['trials']} pictures a row of people that no training saw, {denoising(s)}, "
        f"face scale {s['face_scale']}, seed {s['seed']}; {result['machine']}, "
        f"{result['date']}.\nAvatar recogniser, cosine to another portrait, with a 95 % bootstrap interval over "
        "people; the difference is that of pictures from the same noise.\n"
    )


def _image(pipe: Any, trial: Trial, saving: Saving, settings: Settings) -> torch.Tensor:
    face, cell = portraits(trial.person, seed=settings.seed).face, pipe.vae_scale_factor
    side = max(1, round(pipe.unet.config.sample_size * saving.side)) * cell
    identity = pipe.encode_face(face, face_resolution=side, **saving.encode)
    places = {"face_boxes": true_boxes(trial)} if saving.in_box else {}
    pipe.set_face_fusion_scale(1.0 if saving.finest else inner_scales(pipe.unet))
    try:
        return trial_image(
            pipe, trial, settings, face_image=identity, face_scale=settings.face_scale, **places, **saving.call
        )
    finally:
        pipe.set_face_fusion_scale(1.0)


def inner_scales(unet: Any) -> dict[str, float]:
    """Scale 1 for the attention of all blocks of a UNet but the first and the last, which have the most queries."""
    outer = ("down_blocks.0.", f"up_blocks.{len(unet.up_blocks) - 1}.")
    return {name: 1.0 for name in attention_layers(unet, "attn2") if not name.startswith(outer)}


def _sheet(trials: list[Trial], savings: Sequence[Saving], settings: Settings, out: Path) -> Image.Image:
    rows = []
    for trial in trials[:: max(1, len(trials) // SHEET_ROWS)][:SHEET_ROWS]:
        pictures = [to_pil(read_image(image_path(out, trial, slug(saving.name)))) for saving in savings]
        rows.append((trial.text, [portraits(trial.person, seed=settings.seed).face, *pictures]))
    return contact_sheet(["reference", *(saving.name for saving in savings)], rows)
