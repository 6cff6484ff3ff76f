"""The pictures of an evaluation of FaceStudio: which there are, and how they are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...evaluation.generation import Settings
from ...evaluation.image_files import read_image, to_pil, write_image
from .detector import AvatarDetector
from .evaluators import IMAGE_SIZE
from .trial_pictures import image_path, trial_image
from .trials import Trial, portraits, true_renders


STRANGER = 500  # how far away in the order of people the person of a style picture is
METHODS: dict[str, dict[str, Any]] = {  # call arguments; "face" and "style" stand for the trial's
    "none": {},
    "Face Fusion": {"face": "both"},
    "FaceStudio by text": {"face": "face-studio", "style_context": "replace"},
    "FaceStudio by text, appended": {"face": "face-studio", "style_context": "append"},
    "FaceStudio by picture": {"face": "face-studio", "style": 1.0, "style_context": "replace"},
    "FaceStudio without identity": {"style": 0.0, "style_context": "replace"},
    "style by FaceStudio, identity by Face Fusion": {"face": "both", "style": 1.0, "style_context": "replace"},
}


class Studio:
    """Draws the pictures of an evaluation; what is there already is not drawn again."""

    def __init__(self, pipe: Any, trials: list[Trial], settings: Settings, out: Path) -> None:
        self.pipe, self.trials, self.settings, self.out = pipe, trials, settings, out
        self.identities: dict[tuple[int, str], Any] = {}
        renders = true_renders(trials, person_shift=STRANGER)
        self.styles = dict(zip([t.key for t in trials], map(to_pil, renders), strict=True))

    def identity(self, person: int, mode: str) -> Any:
        if (person, mode) not in self.identities:
            face = portraits(person, seed=self.settings.seed).face
            mirrored = {} if mode == "face-studio" else {"mirrored": True}
            self.identities[person, mode] = self.pipe.encode_face(face, face_mode=mode, **mirrored)
        return self.identities[person, mode]

    def picture(self, trial: Trial, name: str, **arguments: Any) -> torch.Tensor:
        """(3, S, S) of a trial, called `name`; a face and a style that are named become the trial's own."""
        path = image_path(self.out, trial, name.replace(" ", "-").replace(",", ""))
        if not path.is_file():
            mode = arguments.pop("face", None)
            if isinstance(mode, str):
                arguments["face_image"] = self.identity(trial.person, mode)
            scale = arguments.pop("style", None)
            if scale is not None:
                picture = arguments.pop("style_picture", self.styles[trial.key])
                arguments |= {"style_image": picture, "style_scale": scale, "face_detector": COVERED}
            write_image(path, trial_image(self.pipe, trial, self.settings, **arguments))
        return read_image(path, IMAGE_SIZE)


class Covered(AvatarDetector):
    """Boxes that hide who somebody is: of the whole face, and a little more."""

    def box(self, points: torch.Tensor, side: float) -> tuple[float, float, float, float]:
        middle, eyes = points.mean(0), (points[0] - points[1]).norm()
        half = 1.35 * max(float(eyes), float((points[:2].mean(0) - points[3:].mean(0)).norm()))
        x, y = middle.tolist()
        return x - half, y - half, x + half, y + half


COVERED = Covered()
