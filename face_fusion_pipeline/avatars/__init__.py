"""Avatars: a world of rendered portraits with exact identities, scenes, captions and geometry."""

from .world.caption import caption, full_caption
from .world.identity import GENES, SPLITS, Identity, sample_identity, split_of, traits
from .world.render import FAR, Rendered, render
from .world.scene import BACKGROUNDS, CLOTHINGS, EXPRESSIONS, STYLES, Light, Person, Scene, sample_scene


__all__ = [
    "BACKGROUNDS",
    "CLOTHINGS",
    "EXPRESSIONS",
    "FAR",
    "GENES",
    "SPLITS",
    "STYLES",
    "Identity",
    "Light",
    "Person",
    "Rendered",
    "Scene",
    "caption",
    "full_caption",
    "render",
    "sample_identity",
    "sample_scene",
    "split_of",
    "traits",
]
