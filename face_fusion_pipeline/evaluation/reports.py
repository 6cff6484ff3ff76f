"""How results are written: JSON and Markdown with the circumstances of the run, and a contact sheet to look at."""

from __future__ import annotations

import datetime
import json
import os
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from ..files.atomic import write_text


_HEADER, _CAPTION = 16, 26  # pixels


def circumstances() -> dict[str, Any]:
    """Machine, date and versions, for the foot of a table."""
    import diffusers

    machine = f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats are written with three decimals, None and NaN as a dash."""

    def cell(value: Any) -> str:
        if value is None or value != value:
            return "–"
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_report(out: Path, name: str, result: dict[str, Any], markdown: str) -> None:
    """Write `out/name.json` and `out/name.md`."""
    write_text(out / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_text(out / f"{name}.md", markdown)


def contact_sheet(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]], *, cell: int = 160
) -> Image.Image:
    """Rows of (caption, pictures), one picture a column, as one picture with column titles."""
    sheet = Image.new("RGB", (cell * len(columns), _HEADER + (cell + _CAPTION) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(columns):
        draw.text((i * cell + 4, 2), title, fill="black")
    for r, (caption, pictures) in enumerate(rows):
        top = _HEADER + r * (cell + _CAPTION)
        for i, picture in enumerate(pictures):
            sheet.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (i * cell, top))
        lines = textwrap.wrap(caption, cell * len(columns) // 6 - 2)[:2]
        draw.text((4, top + cell + 1), "\n".join(lines), fill="black", spacing=1)
    return sheet
