"""Everything that looks at a picture, as far as it is at hand; what is not is named, with the way to get it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import try_to_load_from_cache

from ..face_detectors import YUNET_WAYS, FaceDetector
from ..face_errors import ModelNotFoundError, also_named
from ..face_recognisers import OnnxRecogniser, Recogniser, insightface_recogniser
from .clip_score import CLIP_ID, ClipScore
from .faces import FaceFinder, Locator
from .observation import Classifier, Observer
from .people import Person
from .picture_rows import PicturePanel
from .recognisers import DeepFaceRecogniser, load_recognisers


PAPER = {  # the recognisers of the paper's tables, and how to have them
    "ArcFace": "--recogniser insightface (pip install 'face-fusion-pipeline[insightface]'; for research only)",
    "Facenet512": "--recogniser deepface:Facenet512 (pip install 'face-fusion-pipeline[deepface]')",
    "VGG-Face": "--recogniser deepface:VGG-Face (pip install 'face-fusion-pipeline[deepface]')",
}
EXPRESSION = (
    "--expression FILE.onnx, such as facial_expression_recognition_mobilefacenet_2022july.onnx of "
    "`hf download opencv/facial_expression_recognition`"
)
LANDMARKS = f"the detector gives no landmarks, as YuNet does: {YUNET_WAYS}"
COMPARED = "face recognition, pose, expression, PSNR and SSIM"


class Evaluators(Locator, Recogniser, Protocol):
    """Networks for one kind of picture, such as rendered avatars, that recognise, give landmarks and expressions."""

    path: Path | None  # of their weights

    @property
    def expressions(self) -> Classifier:
        """Who names expressions."""
        ...


@also_named(judges="evaluators")
def load_panel(
    people: dict[str, Person],
    detector: FaceDetector,
    *,
    recognisers: Sequence[str] = (),
    folder: Path | None = None,
    expression: Path | None = None,
    clip: str | None = None,
    evaluators: Evaluators | None = None,
    device: Any = "cpu",
) -> tuple[PicturePanel, dict[str, str]]:
    """The panel, and what is left out with the reason.

    Args:
        recognisers: `NAME=FILE.onnx[:PREPROCESSING]`, `insightface[:PACK]` or `deepface:NAME`.
        folder: of further recognisers as ONNX files.
        expression: an ONNX classifier of aligned 112 x 112 crops.
        clip: folder or Hub id; None takes CLIP_ID if it is in the cache.
        evaluators: for pictures of their kind; `avatars.evaluation.evaluators.load_evaluators` gives those of avatars.

    Raises FaceFusionError for a bad specification, ModelNotFoundError for a file that is not there.
    """
    known, missing = _recognisers(list(recognisers), folder)
    known += [evaluators] if evaluators is not None else []
    present = {recogniser.name for recogniser in known}
    left_out = {name: way for name, way in PAPER.items() if name not in present} | missing
    classifier = evaluators.expressions if evaluators is not None else None
    if expression is not None:
        classifier = OnnxRecogniser(expression, preprocessing="arcface")
    if classifier is None:
        left_out["expression"] = EXPRESSION
    if detector.name == "haar" and evaluators is None:
        left_out[COMPARED] = LANDMARKS
    if not any(person.others for person in people.values()):
        left_out["Sim(GT), copy-paste"] = "nobody in --identities has a second photo"
    score = _clip(clip, left_out, device)
    files = [r.path for r in known if isinstance(r, OnnxRecogniser)]
    files += [expression] if expression is not None else []
    files += [evaluators.path] if evaluators is not None and evaluators.path is not None else []
    mark = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return PicturePanel(people, Observer(FaceFinder(detector, evaluators), known, classifier), score, mark), left_out


def _recognisers(specs: list[str], folder: Path | None) -> tuple[list[Recogniser], dict[str, str]]:
    """A package that is not installed is left out; a file that is not there is a mistake of the caller."""
    found: list[Recogniser] = []
    missing: dict[str, str] = {}
    files = [spec for spec in specs if "=" in spec or not spec.startswith(("insightface", "deepface:"))]
    for spec in specs:
        package, _, rest = spec.partition(":")
        if spec in files:
            continue
        try:
            found.append(
                DeepFaceRecogniser(rest) if package == "deepface" else insightface_recogniser(rest or "buffalo_l")
            )
        except ModelNotFoundError as error:
            missing["ArcFace" if package == "insightface" else rest] = str(error)
    found += load_recognisers(files, folder)
    return found, missing


def _clip(model: str | None, left_out: dict[str, str], device: Any) -> ClipScore | None:
    if model is None and isinstance(try_to_load_from_cache(CLIP_ID, "config.json"), str):
        model = CLIP_ID
    if model is None:
        left_out["CLIP score, quality (CLIP-IQA), CMMD"] = f"--clip {CLIP_ID} fetches the CLIP"
        return None
    clip = ClipScore(model, device=device)
    if not clip.knows_quality:
        left_out["quality (CLIP-IQA)"] = f"the CLIP of this model knows its own captions only: --clip {CLIP_ID}"
    return clip
