"""Captions: varied wording for the same scene, never a trait of identity beyond "man", "woman" or "child"."""

from __future__ import annotations

import random

from .scene import PLACES, Scene


_STYLE_WORDS = {
    "photo": ("a photo of {}", "a portrait photo of {}", "{}", "a picture of {}"),
    "pencil sketch": ("a pencil sketch of {}", "{}, pencil sketch", "a pencil drawing of {}"),
    "watercolor": ("a watercolor of {}", "{}, watercolor", "a watercolor painting of {}"),
    "faded film": ("a faded film photo of {}", "{}, faded film", "an old faded film photo of {}"),
    "line art": ("line art of {}", "{}, line art", "a line art drawing of {}"),
}
_PLACE_WORDS = {
    "garden": ("in a garden", "in the garden"),
    "beach": ("on a beach", "at the beach"),
    "city": ("in a city", "in the city"),
    "forest": ("in a forest", "in the forest"),
    "space": ("in space", "in outer space"),
    "library": ("in a library", "in the library"),
}
_EXPRESSION_WORDS = {
    "neutral": ("with a neutral expression", "with a neutral face"),
    "smiling": ("smiling", "with a smile"),
    "laughing": ("laughing", "laughing out loud"),
    "sad": ("looking sad", "with a sad face"),
    "crying": ("crying", "in tears, crying"),
    "angry": ("looking angry", "with an angry face"),
    "surprised": ("looking surprised", "with a surprised face"),
}
_NUMBERS = {2: "two", 3: "three"}
_PLURALS = {"man": "men", "woman": "women", "child": "children"}


def _clothing(rng: random.Random, clothing: str) -> str:
    article = "an" if clothing[0] in "aeiou" else "a"
    return f"{rng.choice(('wearing', 'in'))} {article} {clothing}"


def _people(rng: random.Random, scene: Scene, plain: bool) -> str:
    nouns = [p.identity.kind if not plain and rng.random() < 0.6 else "person" for p in scene.people]
    if len(nouns) == 1:
        return f"a {nouns[0]} {_clothing(rng, scene.people[0].clothing)}"
    clothes = [f"a {noun} {_clothing(rng, p.clothing)}" for noun, p in zip(nouns, scene.people, strict=True)]
    number = _NUMBERS[len(nouns)]
    group = _PLURALS.get(nouns[0], "people") if len(set(nouns)) == 1 else "people"
    return f"{number} {group}, " + ", ".join(clothes[:-1]) + f" and {clothes[-1]}"


def caption(scene: Scene, plain: bool = False) -> str:
    """One English sentence for a scene, deterministic from its seed.

    `plain` keeps to the word "person" for everybody, so that a prompt gives no hint about who is meant.
    """
    rng = random.Random(f"caption {scene.seed}")
    if scene.background in PLACES:
        place = rng.choice(_PLACE_WORDS[scene.background])
    else:
        place = f"{rng.choice(('on', 'against'))} a {scene.background} background"
    parts = [rng.choice(_EXPRESSION_WORDS[scene.people[0].expression]), place]
    if rng.random() < 0.3:
        parts.reverse()
    text = _people(rng, scene, plain) + ", " + ", ".join(parts)
    return rng.choice(_STYLE_WORDS[scene.style]).format(text)
