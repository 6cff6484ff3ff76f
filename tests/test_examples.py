"""Every example runs as its docstring says, on the embedded model, and writes the picture it promises."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_models import tiny_pipeline

from face_fusion_pipeline.avatars import render, sample_scene
from face_fusion_pipeline.avatars.world import sheet
from face_fusion_pipeline.control_pictures import depth_image
from face_fusion_pipeline.evaluation.image_files import to_pil


ROOT = Path(__file__).parents[1]
ONE = "a photo of a smiling person in a red shirt in a garden"
TWO = "a photo of two people, a person in a suit and a person in a crown"

EXAMPLES = {
    "one_reference": (["ada.png", ONE], "one_reference_1.png", (128, 128)),
    "several_references": ([ONE, "ada.png", "ada_2.png"], "several_references.png", None),
    "morph": (["ada.png", "bob.png", ONE], "morph.png", None),
    "hybrid_guidance": (["ada.png", "bob.png", ONE], "hybrid_guidance.png", None),
    "two_people": (["ada.png", "bob.png", TWO], "two_people.png", None),
    "two_people_depth": (["ada.png", "bob.png", "layout.png", TWO, "depth.png"], "two_people_depth.png", None),
    "small_faces": (["ada.png", "bob.png", TWO, "a person in a suit", "a person in a crown"], "small_faces.png", None),
    "finished_picture": (["layout.png", "ada.png", "a photo of a person"], "finished_picture.png", None),
    "identity_file": (["ada.png", ONE], "identity_file.png", (128, 128)),
    "pose_of_another": (["bob.png", "ada.png", ONE], "pose_of_another.png", None),
    "stable_diffusion_xl": (["ada.png", ONE, "xl.tiny"], "stable_diffusion_xl.png", (16, 16)),
    "custom_pipeline": (["ada.png", ONE, str(ROOT / "face_fusion_pipeline")], "custom_pipeline.png", (128, 128)),
}
SCRIPTS = {"compare_adapters", "train_face_fusion"}  # trainings, tested with the code they call


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, identity in (("ada", 1_100_007), ("bob", 1_100_004)):
        sheet.portrait(identity).save(folder / f"{name}.png")
    scene = sample_scene(2, [1_100_007], expression="smiling", background="plain blue", style="photo", yaw=-8)
    to_pil(render([scene], 256).images[0]).save(folder / "ada_2.png")
    tiny_pipeline(family="xl").save_pretrained(folder / "xl.tiny")
    frontal = {"yaw": 0, "pitch": 0, "roll": 0, "expression": "neutral"}  # so that both faces are found
    pair = sample_scene(6, [1_100_010, 1_100_011], style="photo", background="plain blue", **frontal)
    rendered = render([pair], 256)
    to_pil(rendered.images[0]).save(folder / "layout.png")
    depth_image(rendered.depth[0]).save(folder / "depth.png")
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, photos, tmp_path, monkeypatch):
    """In this process and with few steps: `main` takes the arguments of the command line and the number of steps."""
    arguments, picture, size = EXAMPLES[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    arguments = [str(photos / a) if a.endswith((".png", ".tiny")) else a for a in arguments]
    if name == "several_references":
        arguments = [arguments[0], arguments[1:]]
    module.main(*arguments, steps=3)
    with Image.open(tmp_path / picture) as image:
        assert size is None or image.size == size
        assert len(set(image.convert("L").getdata())) > 20  # not a blank picture


def test_two_people_need_no_photos(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("two_people", ROOT / "examples" / "two_people.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    module.main(*module.portraits(), steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ada.png", "bob.png", "two_people.png"]


def test_every_example_is_tested_and_says_how_it_is_called():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == EXAMPLES.keys() | SCRIPTS
    for name in names:
        text = (ROOT / "examples" / f"{name}.py").read_text()
        assert re.search(rf"python examples/{name}\.py|accelerate launch examples/{name}\.py", text), name


def test_an_example_is_a_script(photos, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "identity_file.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "usage: python examples/identity_file.py" in result.stderr
