"""The pictures of an evaluation in the folder layout of MultiID-Bench, so that scorers of others run on them.

`METHOD/idN/` has `out.jpg` (the picture), `ref_1.jpg` to `ref_4.jpg` (the reference photo of each person, from left to
right), `ori.jpg` (the truth: another photo of each person, side by side) and `meta.json` (the prompt, and more).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ..face_errors import FaceFusionError
from ..face_pictures import load_image
from ..files.atomic import replacing, write_text
from .people import Person
from .pictures import ANOTHER_PHOTO, SOMEBODY_ELSE, Picture


FOLDER = "multiid_bench"
MOST_PEOPLE = 4  # that the layout has names for
QUALITY = 95  # of JPEG


def write_multiid_bench(pictures: Sequence[Picture], people: Mapping[str, Person], out: Path) -> dict[str, str]:
    """Write `out/METHOD/idN/...` for every picture that is there, in place of what an earlier run wrote.

    The same N has the same people and prompt in every method. Photos that stand in for pictures are left out.

    Returns the names of pictures that the layout cannot hold, with the reason.
    """
    left_out: dict[str, str] = {}
    methods = dict.fromkeys(p.method for p in pictures if p.method not in (ANOTHER_PHOTO, SOMEBODY_ELSE))
    for method in methods:
        root = out / method
        for old in root.glob("id[0-9]*"):
            shutil.rmtree(old)
        for number, picture in enumerate((p for p in pictures if p.method == method), 1):
            try:
                _write(picture, [people[name] for name in picture.people], root / f"id{number}")
            except FaceFusionError as error:
                left_out[picture.name or picture.key] = str(error)
    return left_out


def _write(picture: Picture, people: Sequence[Person], folder: Path) -> None:
    """One folder, or none: FaceFusionError where something that belongs in it is missing."""
    if len(people) > MOST_PEOPLE:
        raise FaceFusionError(f"{len(people)} people: the layout of MultiID-Bench has {MOST_PEOPLE} at most")
    if alone := [person.name for person in people if not person.others]:
        raise FaceFusionError(f"{alone[0]} has no second photo, which is the truth (ori.jpg) of MultiID-Bench")
    files = {"out.jpg": load_image(picture.source)}
    files |= {f"ref_{i}.jpg": load_image(person.reference.content) for i, person in enumerate(people, 1)}
    files["ori.jpg"] = side_by_side([load_image(person.others[0].content) for person in people])
    for name, image in files.items():
        with replacing(folder / name) as partial:
            image.save(partial, format="JPEG", quality=QUALITY, subsampling=0)
    meta = {"prompt": picture.prompt, "identities": list(picture.people), "seed": picture.seed, "file": picture.name}
    write_text(folder / "meta.json", json.dumps(meta, ensure_ascii=False) + "\n")


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row, as high as the lowest of them."""
    height = min(picture.height for picture in pictures)
    scaled = [picture.resize((max(1, round(picture.width * height / picture.height)), height)) for picture in pictures]
    row = Image.new("RGB", (sum(picture.width for picture in scaled), height))
    left = 0
    for picture in scaled:
        row.paste(picture, (left, 0))
        left += picture.width
    return row
