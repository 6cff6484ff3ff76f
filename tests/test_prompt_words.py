"""The words that a model of avatars knows are those of its captions, and a prompt with others is told so."""

import subprocess
import sys

import pytest

from face_fusion_pipeline import embedded_model
from face_fusion_pipeline.avatars.world.caption import caption, vocabulary
from face_fusion_pipeline.avatars.world.scene import sample_scene
from face_fusion_pipeline.face_defaults import read_defaults
from face_fusion_pipeline.generation.prompt_words import (
    OTHER,
    groups_of_words,
    unknown_words,
    unknown_words_line,
    words_of,
)


KNOWN = {"places": ("a garden",), "clothes": ("chef's hat", "red shirt"), OTHER: ("in", "wearing")}


def test_the_vocabulary_is_all_that_captions_say():
    known = {word for phrases in vocabulary().values() for phrase in phrases for word in words_of(phrase)}
    said = set()
    for seed in range(1500):
        scene = sample_scene(seed, [3 * seed + k for k in range(1 + seed % 3)])
        said |= {word for plain in (False, True) for word in words_of(caption(scene, plain))}
    assert said == known


def test_the_embedded_model_names_the_words_of_its_captions():
    assert read_defaults(embedded_model()).vocabulary == vocabulary()


def test_words_of_a_prompt():
    assert words_of("A Chef’s hat, café 猫; 2 hats") == ["a", "chef's", "hat", "café", "猫", "2", "hats"]
    assert unknown_words("a Garden, in oil, gardens in OIL", KNOWN) == {"oil": None, "gardens": "garden"}
    assert unknown_words("anything", None) == {} and unknown_words_line("anything", None) == ""
    line = unknown_words_line("wearing a chefs hat in oil", KNOWN)
    assert line.startswith("the model does not know “chefs” (nearest: “chef's”), “oil”, and") and "\n" not in line
    assert unknown_words_line("wearing a chef's hat in a garden", KNOWN) == ""
    assert groups_of_words(KNOWN) == [("places", "a garden"), ("clothes", "chef's hat, red shirt")]


@pytest.mark.parametrize("style", ["photo", "pencil sketch", "watercolor", "faded film", "line art"])
def test_styles_that_are_offered_are_known(style):
    assert unknown_words(f"a person in a garden, {style}", vocabulary()) == {}


def test_help_lists_them_without_torch():
    script = "import sys; from face_fusion_pipeline.cli import build_parser; build_parser();"
    script += "assert 'torch' not in sys.modules; from face_fusion_pipeline.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "generate", "--help"]
    out = " ".join(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.split())
    for words in (
        "expressions: neutral, smiling",
        "clothes: red shirt",
        "places: garden",
        "styles: photo, pencil sketch",
    ):
        assert words in out
    assert "plain backgrounds: plain red, plain blue" in out
