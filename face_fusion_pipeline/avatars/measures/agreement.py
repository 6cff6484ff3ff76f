"""Does the evaluator of eyes see what one sees? On true renders, and on pictures that it never learned from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...evaluation.generation import Settings, pipeline_of
from ...evaluation.image_files import read_image
from ...evaluation.reports import circumstances
from ...face_adapter import ADAPTER_WEIGHTS_NAME
from ...face_defaults import EARLIER_NAMES
from ...face_errors import FaceFusionError, renamed
from ..evaluation.evaluators import load_evaluators
from ..evaluation.trial_pictures import generate, image_path
from ..evaluation.trials import Trial
from ..world.caption import caption
from ..world.dataset import draw
from ..world.scene import sample_scene
from .crops import eye_bands, locate
from .drawing import EyeEvaluator, load_eye_evaluator
from .portraits import DOTS, eyes_shown, portrait_scene
from .verdicts import Verdicts, read_verdicts


SETTINGS = ("steps", "guidance_scale", "low_noise_guidance", "self_scale", "seed")


@torch.inference_mode()
def agreement(evaluator: EyeEvaluator, verdicts: Verdicts, rows: Tensor | None = None) -> dict[str, float]:
    """Of broken eyes the fraction caught, of good ones the fraction passed; also among those with sure verdicts alone.

    `rows` are those that count, by default all; a fraction of nothing is NaN.
    """
    rows = torch.arange(len(verdicts)) if rows is None else rows
    passed = evaluator.of_bands(verdicts.bands[rows]) >= evaluator.threshold
    good, sure = verdicts.good[rows], verdicts.sure[rows]
    figures = {}
    for name, kept in (("", torch.ones_like(sure)), ("_sure", sure)):
        figures[f"broken_caught{name}"] = float((~passed[kept & ~good]).float().mean())
        figures[f"good_passed{name}"] = float(passed[kept & good].float().mean())
    return figures


def measure_agreement(
    name: Path, model: str | None = None, out: Path | None = None, *, device: str = "cpu", renders: int = 1000
) -> dict[str, Any]:
    """`agreement` of the package's evaluator with the verdicts `NAME.json`, and what fraction of `renders` it passes.

    The renders are of people of the test split. With `model`, the folder of the weights that the verdicts are on, the
    pictures are drawn anew into `out`. FaceFusionError for other weights.
    """
    evaluator, verdicts = load_eye_evaluator(), read_verdicts(name)
    if model is not None:
        if out is None:
            raise FaceFusionError("--model draws pictures: name a folder for them with --out")
        verdicts = drawn_anew(verdicts, model, out, device)
    with_eyes, of_all = renders_passed(evaluator, renders)
    fractions = {
        "true_renders_with_eyes_good": with_eyes,
        "all_true_renders_good": of_all,
        **agreement(evaluator, verdicts),
    }
    counts = {"good": int(verdicts.good.sum()), "broken": int((~verdicts.good).sum()), "renders": renders}
    return {"fractions": fractions, **counts, "drawn_anew": model is not None, **circumstances()}


def renders_passed(evaluator: EyeEvaluator, count: int) -> tuple[float, float]:
    """Of so many portraits of test people the fraction whose eyes are well drawn: of those with eyes, and of all.

    In the first world the eyes of some people lie below their skin (`portraits.eyes_shown`).
    """
    evaluators, size, world = load_evaluators(), int(evaluator.about["size"]), int(evaluator.about["world"])
    passed, shown = [], []
    for drawn in draw((portrait_scene("test", index, world) for index in range(count)), size):
        images = drawn.pixels.float() / 255
        passed.append(evaluator.logits(images, locate(evaluators, images)) >= evaluator.threshold)
        shown.append(eyes_shown(drawn.records, world))
    good = torch.cat(passed).float()
    return float(good[torch.cat(shown) >= DOTS].mean()), float(good.mean())


def drawn_anew(verdicts: Verdicts, model: str, out: Path, device: str) -> Verdicts:
    """The same verdicts with bands of pictures that `model` draws now; see `measure_agreement`."""
    about = renamed(verdicts.about, EARLIER_NAMES, "the file of verdicts")
    adapter = model if (Path(model) / ADAPTER_WEIGHTS_NAME).is_file() else None
    settings = Settings.of(model, adapter, **{key: about[key] for key in SETTINGS})
    if settings.weights_hash != about["weights"]:
        raise FaceFusionError(
            f"the verdicts are on pictures of the weights {about['weights']}, {model} has {settings.weights_hash}: "
            "leave --model out, to have the pictures judged that lie beside the verdicts"
        )
    pipe = pipeline_of(settings, device)
    wanted = [(_trial(picture), picture["method"]) for picture in about["pictures"]]
    for method in dict.fromkeys(method for _, method in wanted):
        generate(pipe, [trial for trial, its in wanted if its == method], [method], settings, out)
    return Verdicts(_bands(wanted, out), verdicts.good, verdicts.sure, about)


def _trial(picture: dict[str, Any]) -> Trial:
    """What a picture of the first world was asked to show."""
    scene = sample_scene(picture["scene"], [picture["person"]], 1, style="photo")
    return Trial(picture["person"], picture["number"], caption(scene, plain=True), scene, picture["seed"])


def _bands(wanted: Sequence[tuple[Trial, str]], out: Path) -> Tensor:
    images = torch.stack([read_image(image_path(out, trial, method), 128) for trial, method in wanted])
    return eye_bands(images, locate(load_evaluators(), images))
