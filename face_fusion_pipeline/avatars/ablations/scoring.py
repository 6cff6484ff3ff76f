"""What is measured of a picture: likeness to another render of the person, to the reference, and prompt obedience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...evaluation.image_files import from_pil, read_image
from ...evaluation.metrics import cosine_similarity
from ...face_recognisers import Recogniser
from ..evaluation.avatar_table import ASKED, CEILING, FLOOR
from ..evaluation.evaluators import IMAGE_SIZE, Evaluators
from ..evaluation.people_table import members, portrait_crops, true_boxes
from ..evaluation.trials import Trial, portraits, true_renders
from .pictures import reference_photos


Row = dict[str, Any]
COPYABLE = ("expression", "clothing", "background")


class Scorer:
    """Scores pictures with the package's evaluators; `recogniser` says who it is. Each person is embedded once."""

    def __init__(self, evaluators: Evaluators, recogniser: Recogniser, seed: int = 0) -> None:
        self.evaluators, self.recogniser, self.seed = evaluators, recogniser, seed
        self.known: dict[int, dict[str, Any]] = {}
        self.boxes: dict[Trial, list[list[float]]] = {}

    def embed(self, images: torch.Tensor) -> np.ndarray:
        """Embeddings (B, D) of images (B, 3, 128, 128); landmarks are found, in true and generated ones alike."""
        return self.recogniser.embed(images, self.evaluators.locate(images))

    def person(self, number: int) -> dict[str, Any]:
        """What is known of a person: embeddings of the reference and of another photo, and the reference's traits."""
        if number not in self.known:
            reference = from_pil(reference_photos(number, 1, self.seed)[0].picture)
            images = torch.stack([reference, portraits(number, seed=self.seed).other])
            reference_embedding, other = self.embed(images)
            said = self.evaluators.describe(images[:1])
            self.known[number] = {"reference": reference_embedding, "other": other, "said": said}
        return self.known[number]

    def rows(self, trials: list[Trial], images: list[torch.Tensor]) -> list[Row]:
        """One row for each person in each picture (3, 128, 128)."""
        return [row for trial, image in zip(trials, images, strict=True) for row in self._rows(trial, image)]

    def files(self, trials: list[Trial], paths: list[Path]) -> list[Row]:
        return self.rows(trials, [read_image(path, IMAGE_SIZE) for path in paths])

    def bounds(self, trials: list[Trial]) -> dict[str, list[Row]]:
        """The same of true renders of the scenes, with the person and with somebody else in the person's place."""
        shift = len(trials[0].scene.people)
        return {
            CEILING: self.rows(trials, list(true_renders(trials))),
            FLOOR: self.rows(trials, list(true_renders(trials, person_shift=shift))),
        }

    def _rows(self, trial: Trial, image: torch.Tensor) -> list[Row]:
        said, wanted = self.evaluators.describe(image[None]), trial.wanted
        if trial not in self.boxes:
            self.boxes[trial] = true_boxes(trial)
        people, boxes = members(trial), self.boxes[trial]
        faces = self.embed(image[None] if len(people) == 1 else portrait_crops(image, boxes))
        rows = []
        for number, face, box in zip(people, faces, boxes, strict=True):
            person = self.person(number)
            told = {trait: person["said"][trait][0] for trait in COPYABLE}
            rows.append(
                {
                    "trial": trial.key,
                    "person": number,
                    "likeness": float(cosine_similarity(face, person["other"])),
                    "to_reference": float(cosine_similarity(face, person["reference"])),
                    "face_height": float(box[3] - box[1]),
                    "right": {t: said[t][0] == wanted[t] for t in ASKED if t in wanted},
                    # Only where the prompt asks for something else can one see that a trait was copied.
                    "copied": {t: said[t][0] == told[t] for t in COPYABLE if t in wanted and wanted[t] != told[t]},
                }
            )
        return rows
