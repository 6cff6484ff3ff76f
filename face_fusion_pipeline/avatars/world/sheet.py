"""Labelled grids of pictures that a person can look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .identity import SPLITS
from .render import render
from .scene import sample_scene


def to_pil(image: Tensor) -> Image.Image:
    """A picture (3, H, W) in [0, 1] as an 8-bit RGB image."""
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def identity_grid(people: int, per_person: int, split: str = "test", size: int = 128, seed: int = 0) -> Image.Image:
    """A row for each person, a column for each scene, with what the scene says under every picture."""
    first = SPLITS[split].start + seed
    scenes = [sample_scene(seed * 10_000 + first + k, [first + k // per_person]) for k in range(people * per_person)]
    pictures: list[Image.Image] = []
    for start in range(0, len(scenes), 16):  # a few at a time, so that memory does not grow with the grid
        pictures += [to_pil(image) for image in render(scenes[start : start + 16], size).images]
    captions = [f"{s.people[0].expression}, {s.people[0].clothing}\n{s.background}, {s.style}" for s in scenes]
    rows = [f"person {first + k}" for k in range(people)]
    return labelled_grid(pictures, captions, per_person, rows)


def labelled_grid(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int, rows: Sequence[str] = ()
) -> Image.Image:
    """Pictures of one size in a grid, each with a caption of up to two lines below and a name left of each row."""
    font = ImageFont.load_default(size=11)
    width, height = pictures[0].size
    margin, text = (92 if rows else 0), 30
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (margin + columns * (width + 4), lines * (height + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (picture, words) in enumerate(zip(pictures, captions, strict=True)):
        x, y = margin + k % columns * (width + 4), k // columns * (height + text)
        sheet.paste(picture, (x, y))
        draw.multiline_text((x + 2, y + height + 1), words, fill="black", font=font, spacing=1)
    for k, name in enumerate(rows):
        draw.text((4, k * (height + text) + height // 2), name, fill="black", font=font)
    return sheet


def portrait(seed: int, size: int = 256) -> Image.Image:
    """A neutral, frontal photo of one person before a plain background: what one would give as a reference."""
    scene = sample_scene(seed, [seed], expression="neutral", clothing="white shirt", background="plain gray",
                         style="photo", yaw=8, pitch=0, roll=0)  # fmt: skip
    with torch.no_grad():
        return to_pil(render([scene], size).images[0])
