"""Contact sheets, and PNG files that are either complete or not there."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from ..files.atomic import aside, replacing, take_free_name


GAP, BAR = 8, 28  # pixels between cells, and of the bar above them that carries the labels
SMALLEST_CELL, LARGEST_CELL = 256, 512


def contact_sheet(columns: Mapping[str, Sequence[Image.Image]], rows: Sequence[str] = ()) -> Image.Image:
    """Labelled columns of pictures side by side, first picture on top.

    Args:
        columns: label -> pictures, of any sizes and numbers; cells are squares between 256 and 512 pixels.
        rows: labels of the rows, written into the last column's pictures.

    Returns:
        RGB image on white.
    """
    pictures = [picture for column in columns.values() for picture in column]
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    cell = min(max(SMALLEST_CELL, *(max(picture.size) for picture in pictures)), LARGEST_CELL)
    count = max(len(column) for column in columns.values())
    sheet = Image.new("RGB", (GAP + len(columns) * (cell + GAP), BAR + count * (cell + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for x, (label, column) in zip(range(GAP, sheet.width, cell + GAP), columns.items(), strict=False):
        draw.text((x + cell / 2, BAR / 2), label, fill="black", font=font, anchor="mm")
        for y, picture in zip(range(BAR, sheet.height, cell + GAP), column, strict=False):
            fitted = ImageOps.contain(picture.convert("RGB"), (cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (x + (cell - fitted.width) // 2, y + (cell - fitted.height) // 2))
    for y, label in zip(range(BAR + cell, sheet.height, cell + GAP), rows, strict=False):
        where = (sheet.width - GAP - 6, y - 6)
        draw.rectangle(draw.textbbox(where, label, font=font, anchor="rd"), fill="white")
        draw.text(where, label, fill="black", font=font, anchor="rd")
    return sheet


def save_png(image: Image.Image, path: str | os.PathLike[str], text: Mapping[str, object] | None = None) -> Path:
    """Write a PNG file with text chunks by renaming a finished one: a stop half-way leaves nothing behind.

    Args:
        text: keyword -> value of the text chunks; values that are None are left out.
    """
    path = Path(path)
    with replacing(path) as partial:
        _write(image, partial, text)
    return path


def save_new_png(
    image: Image.Image, folder: Path, names: Iterable[str], text: Mapping[str, object] | None = None
) -> Path:
    """As [`save_png`], under the first of `names` that no file in `folder` has, not even one of another process."""
    with aside(folder) as partial:
        _write(image, partial, text)
        return take_free_name(partial, (folder / name for name in names))


def _write(image: Image.Image, path: Path, text: Mapping[str, object] | None) -> None:
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        if value is not None:
            readable = str(value).encode(errors="backslashreplace").decode()  # a file's name may be no text
            chunks.add_text(key, readable)  # Pillow writes what is not Latin-1 as an international chunk
    image.save(path, format="PNG", pnginfo=chunks)
