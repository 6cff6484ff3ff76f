"""Eyes that were looked at: bands of generated pictures with verdicts, and how each picture is drawn again.

A folder, or a common beginning of two files: `NAME.json` has the verdicts in order, `NAME.webp` the bands of eyes
(`crops.eye_bands` of pictures of 128 pixels), ten in a row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...face_errors import ModelNotFoundError


SHIPPED = Path(__file__).parent / "verdicts" / "eyes"  # of weights that do not ship: what the evaluator learns from
COLUMNS = 10
HEIGHT, WIDTH = 48, 112  # of a band


@dataclass(frozen=True)
class Verdicts:
    """What was seen.

    Attributes:
        bands: (N, 3, 48, 112) in [0, 1].
        good: (N,) bool, both eyes are well drawn.
        sure: (N,) bool, false where another look might say otherwise.
        about: everything else in the file: `pictures` says how each one is drawn.
    """

    bands: Tensor
    good: Tensor
    sure: Tensor
    about: dict[str, Any]

    def __len__(self) -> int:
        return len(self.good)


def read_verdicts(name: Path = SHIPPED) -> Verdicts:
    """The verdicts of `NAME.json` with the bands of `NAME.webp`. ModelNotFoundError where one of them is missing."""
    record, mosaic = name.with_suffix(".json"), name.with_suffix(".webp")
    for path in (record, mosaic):
        if not path.is_file():
            raise ModelNotFoundError(f"no verdicts on eyes: {path} does not exist")
    about = json.loads(record.read_text())
    with Image.open(mosaic) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    rows = pixels.unflatten(0, (-1, HEIGHT)).unflatten(2, (COLUMNS, WIDTH))  # (rows, 48, columns, 112, 3)
    bands = rows.permute(0, 2, 4, 1, 3).flatten(0, 1)[: len(about["pictures"])].float() / 255
    good, sure = (torch.tensor([picture[key] for picture in about["pictures"]]) for key in ("good", "sure"))
    return Verdicts(bands, good, sure, about)


def write_verdicts(name: Path, bands: Tensor, about: dict[str, Any]) -> None:
    """Write bands (N, 3, 48, 112) in [0, 1] and `about`, whose `pictures` have `good` and `sure` for each of them."""
    name.parent.mkdir(parents=True, exist_ok=True)
    missing = -len(bands) % COLUMNS
    whole = torch.cat([bands, bands.new_zeros(missing, *bands.shape[1:])])
    mosaic = whole.unflatten(0, (-1, COLUMNS)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    pixels = (mosaic * 255).round().byte().numpy()
    Image.fromarray(pixels).save(name.with_suffix(".webp"), quality=95, method=6)
    lines = ",\n  ".join(json.dumps(picture) for picture in about["pictures"])
    rest = json.dumps({key: value for key, value in about.items() if key != "pictures"}, indent=1)[1:-2].strip()
    name.with_suffix(".json").write_text(f'{{\n {rest},\n "pictures": [\n  {lines}\n ]\n}}\n')
