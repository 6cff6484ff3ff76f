"""A face crop made to look like another photo of the person, for people of whom there is only one.

Paired with itself a photo teaches to copy pose and framing; so its reference is mirrored, recoloured, turned, blurred
and put before another background.
"""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps


TURN, SHRINK, GROW, SHIFT = 15.0, 0.85, 1.15, 0.06  # degrees; scale from, to; fraction of the side
COLOUR = 0.25  # largest change of brightness, contrast and saturation
# The head in a crop of 1.6 face heights, as fractions of its side; hair, ears and chin are in.
HEAD = (0.17, 0.04, 0.83, 0.9)


def augmented(crop: Image.Image, rng: random.Random) -> Image.Image:
    """Another picture of the same size, drawn from `rng` alone: equal seeds give equal pictures."""
    if rng.random() < 0.5:
        crop = erased_background(crop, rng)
    if rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    crop = turned(crop, rng)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        crop = enhance(crop).enhance(rng.uniform(1 - COLOUR, 1 + COLOUR))
    if rng.random() < 0.3:
        crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 0.5) * crop.width / 128))
    return crop


def erased_background(crop: Image.Image, rng: random.Random) -> Image.Image:
    """The crop with one colour outside an ellipse around the head; the edge is soft."""
    width, height = crop.size
    mask = Image.new("L", crop.size, 0)
    x0, y0, x1, y1 = HEAD
    ImageDraw.Draw(mask).ellipse((x0 * width, y0 * height, x1 * width, y1 * height), fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(0.03 * width))
    colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
    return Image.composite(crop, Image.new("RGB", crop.size, colour), mask)


def turned(crop: Image.Image, rng: random.Random) -> Image.Image:
    """The crop turned and scaled about its centre, and moved; where the picture ends, its edge is repeated."""
    side, margin = crop.width, crop.width // 2
    padded = Image.fromarray(np.pad(np.asarray(crop), ((margin, margin), (margin, margin), (0, 0)), mode="edge"))
    move = [round(side * rng.uniform(-SHIFT, SHIFT)) for _ in range(2)]
    padded = padded.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC, translate=(move[0], move[1]))
    middle, half = padded.width / 2, side / rng.uniform(SHRINK, GROW) / 2
    box = (middle - half, middle - half, middle + half, middle + half)
    return padded.resize(crop.size, Image.Resampling.BICUBIC, box=box)
