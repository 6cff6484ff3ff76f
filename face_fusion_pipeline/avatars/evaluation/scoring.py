"""What the evaluators say about images, one row an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...evaluation.image_files import to_pil
from ...evaluation.metrics import cosine_similarity
from ...face_detectors import FaceDetector
from ...face_images import detect_faces
from ...face_recognisers import Recogniser
from .evaluators import Evaluators
from .trials import Portraits, Trial


if TYPE_CHECKING:
    from ..measures.panel import Measures


@dataclass
class Panel:
    """All evaluators of an evaluation: the shipped ones, recognisers trained on photographs, a detector if any.

    `measures` say which traits a picture shows and whether its eyes are well drawn.
    """

    evaluators: Evaluators
    recognisers: Sequence[Recogniser] = ()
    detector: FaceDetector | None = None
    measures: Measures | None = None
    others: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of all recognisers, those trained on photographs first."""
        return [r.name for r in (*self.recognisers, self.evaluators)]

    def embed(self, images: torch.Tensor) -> dict[str, Any]:
        """Embeddings (B, D) by recogniser; landmarks come from the locator for every image, true or generated."""
        landmarks = self.evaluators.locate(images)
        return {r.name: r.embed(images, landmarks) for r in (*self.recognisers, self.evaluators)}

    def finds_face(self, image: torch.Tensor) -> bool | None:
        """Whether the detector sees a face; None without a detector."""
        return bool(detect_faces(to_pil(image), self.detector)) if self.detector is not None else None

    def score(
        self, trial: Trial, images: torch.Tensor, methods: Sequence[str], person: Portraits | None
    ) -> list[dict]:
        """One row per image of a trial (an image per method): what is seen, similarity to `person.other`."""
        said = self.evaluators.describe(images)
        similarity: dict[str, Any] = {}
        if person is not None:
            if person.person not in self.others:
                self.others[person.person] = self.embed(person.other[None])
            found, other = self.embed(images), self.others[person.person]
            similarity = {name: cosine_similarity(found[name], other[name]) for name in found}
        return [
            {
                "trial": trial.key,
                "person": trial.person,
                "method": method,
                "prompt": trial.text,
                "wanted": trial.wanted,
                "said": {trait: said[trait][i] for trait in trial.wanted},
                "similarity": {name: float(values[i]) for name, values in similarity.items()},
                "face_found": self.finds_face(images[i]),
            }
            for i, method in enumerate(methods)
        ]
