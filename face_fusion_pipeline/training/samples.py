"""Pictures to look at while an adapter is trained: the same faces and prompts each time, with and without the face."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..face_adapter import FaceFusionAdapter
from ..generation.contact_sheet import contact_sheet, save_png
from ..generation.provenance import DISCLOSURE, SOURCE_TYPE
from .base_model import BaseModel
from .sources import DataError


@dataclass
class Samples:
    """What is drawn: picture i shows face crop i as prompt i says, from seed + i."""

    faces: list[Image.Image]
    prompts: list[str]
    steps: int = 25
    guidance: float = 5.0
    seed: int = 0
    mode: str | None = None  # of the face; None: the default of the pipeline
    without: list[Image.Image] = field(default_factory=list)  # the base alone does not change: drawn once

    def __post_init__(self) -> None:
        counts = {len(self.faces), len(self.prompts)}
        if len(counts - {1}) > 1 or 0 in counts:
            raise DataError(
                f"{len(self.faces)} validation images and {len(self.prompts)} validation prompts: "
                "give as many of one as of the other, or one of either"
            )
        count = max(counts)
        self.faces, self.prompts = (self.faces * count)[:count], (self.prompts * count)[:count]

    def draw(self, base: BaseModel, adapter: FaceFusionAdapter, path: Path) -> None:
        """Write the contact sheet reference | without | with Face Fusion as the PNG file `path`."""
        pipe = base.pipeline
        pipe.set_face_fusion_adapter(adapter)
        self.without = self.without or self._pictures(pipe, [None] * len(self.faces))
        fused = self._pictures(pipe, self.faces)
        columns = {"reference": self.faces, "without Face Fusion": self.without, "with Face Fusion": fused}
        text = {"prompts": "\n".join(self.prompts), "seed": self.seed}
        text |= {"description": DISCLOSURE, "digital_source_type": SOURCE_TYPE}
        save_png(contact_sheet(columns), path, text)

    def _pictures(self, pipe: Any, faces: list[Any]) -> list[Image.Image]:
        return [
            pipe(
                prompt,
                face_image=face,
                face_mode=self.mode,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=torch.Generator().manual_seed(self.seed + number),
            ).images[0]
            for number, (prompt, face) in enumerate(zip(self.prompts, faces, strict=True))
        ]
