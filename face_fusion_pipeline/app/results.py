"""The files of one run: pictures with text chunks, contact sheet, and all of it in a ZIP file."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ..files.atomic import replacing
from ..generation.contact_sheet import contact_sheet, save_png
from ..generation.watermark import add_watermark
from .engine import Picture


def save_picture(picture: Picture, folder: Path, index: int, watermark: bool = False) -> Path:
    """Write picture `index` as PNG; its text chunks say what made it, and that it is generated.

    With `watermark` the pixels say so, too; see `watermark.add_watermark`.
    """
    image = add_watermark(picture.image) if watermark else picture.image
    return save_png(image, folder / f"image_{index:03d}.png", picture.text)


def save_sheet(
    pictures: Sequence[Picture],
    references: Mapping[str, Sequence[Image.Image]],
    folder: Path,
    watermark: bool = False,
) -> Path | None:
    """Write the contact sheet: a column for the references of each person, without and with Face Fusion.

    Returns None without any picture: a run that was cancelled at once has no sheet.
    """
    if not pictures:
        return None
    columns = {
        **references,
        "without Face Fusion": [picture.plain for picture in pictures if picture.plain is not None],
        "with Face Fusion": [picture.image for picture in pictures],
    }
    sheet = contact_sheet({label: column for label, column in columns.items() if column})
    sheet = add_watermark(sheet) if watermark else sheet
    return save_png(sheet, folder / "contact_sheet.png", pictures[0].text)


def save_archive(files: Sequence[Path], pictures: Sequence[Picture], folder: Path) -> Path:
    """Write a ZIP file of the files and of `metadata.json`, which has the text of every picture.

    A finished file is renamed: whoever is downloading an earlier one gets all of that.
    """
    path = folder / "face_fusion.zip"
    # PNG is compressed already
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            archive.write(file, file.name)
        text = [picture.text for picture in pictures]
        archive.writestr("metadata.json", json.dumps(text, ensure_ascii=False, indent=2))
    return path
