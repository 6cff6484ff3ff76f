"""The watermark is there when asked for, cannot be seen, outlives JPEG, and is found in no other picture."""

import io
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import face, tiny_pipeline

from face_fusion_pipeline.app.engine import Engine, Picture
from face_fusion_pipeline.app.form import Form
from face_fusion_pipeline.app.session import Sessions
from face_fusion_pipeline.cli import app, main
from face_fusion_pipeline.face_errors import FaceFusionError
from face_fusion_pipeline.generation import watermark
from face_fusion_pipeline.generation.watermark import add_watermark, has_watermark


if find_spec("blind_watermark") is None:
    pytest.skip("the watermark extra is not installed", allow_module_level=True)
IMAGES = Path(__file__).parents[1] / "weights_card" / "images"


@pytest.fixture(params=["example_1", "example_2", "reference"])
def picture(request: pytest.FixtureRequest) -> Image.Image:
    with Image.open(IMAGES / f"{request.param}.png") as image:
        return image.convert("RGB")


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def test_found_again_also_after_jpeg_and_only_where_it_is(picture: Image.Image) -> None:
    marked = add_watermark(picture)
    assert has_watermark(marked) and has_watermark(jpeg(marked, 85))
    assert has_watermark(marked.resize((96, 96)).resize(marked.size))
    assert not has_watermark(picture) and not has_watermark(jpeg(picture, 85))
    assert not has_watermark(Image.new("RGB", picture.size, "gray"))


def test_cannot_be_seen(picture: Image.Image) -> None:
    difference = np.asarray(add_watermark(picture), np.float64) - np.asarray(picture, np.float64)
    assert difference.any() and 10 * np.log10(255**2 / np.mean(difference**2)) > 34  # dB


def test_the_package_decides_nothing_for_the_whole_program() -> None:
    """Imported by itself, it sets the start method of all processes, or fails where one was set."""
    script = """
import multiprocessing
from face_fusion_pipeline.generation.watermark import blind_watermark
blind_watermark()
assert multiprocessing.get_start_method(allow_none=True) is None
multiprocessing.set_start_method("spawn")
assert multiprocessing.get_start_method() == "spawn"
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and not result.stdout, result.stdout + result.stderr


def test_small_pictures_and_a_missing_package_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FaceFusionError, match="32 × 32"):
        add_watermark(face(1, size=32))
    assert not has_watermark(face(1, size=32))
    monkeypatch.setitem(watermark.importlib.sys.modules, "blind_watermark", None)
    with pytest.raises(FaceFusionError, match=r"\[watermark\]"):
        add_watermark(face(1, size=128))


def test_the_command_marks_pictures_and_sheet(tmp_path: Path) -> None:
    words = ["--face", str(IMAGES / "reference.png"), "--no-detect", "--prompt", "a photo of a person"]
    words += ["--steps", "2", "--num-images", "1", "--out", str(tmp_path)]
    assert main(["generate", *words, "--watermark"]) == 0
    for name in ("image_000.png", "contact_sheet.png"):
        with Image.open(tmp_path / name) as image:
            assert has_watermark(image) and "AI" in image.info["description"], name


@pytest.mark.parametrize("wanted", [True, False])
def test_the_app_marks_pictures_and_sheet(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gr = pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
    from face_fusion_pipeline.app.handlers import Handlers
    from face_fusion_pipeline.app.page import build_page
    from face_fusion_pipeline.face_defaults import FaceDefaults

    with gr.Blocks():
        widgets = build_page([], 1.0, 25, FaceDefaults(), False, False)
    with Image.open(IMAGES / "reference.png") as image:
        picture = image.convert("RGB")
    made = [Picture(picture, picture, None, False, {"description": "AI"})]
    engine: Any = SimpleNamespace(watermark=wanted, run=lambda *_: iter(made), identities=lambda *_: [])
    sessions, user = Sessions(), SimpleNamespace(session_hash="ada")
    run = sessions.of("ada").new_run()
    monkeypatch.setattr(Handlers, "read_form", lambda *_: Form(people=(), prompt="a cat"))
    list(Handlers(engine, sessions, widgets).run({widgets.run_id: run.id}, user, progress=lambda *_, **__: None))
    for name in ("image_000.png", "contact_sheet.png"):
        with Image.open(run.folder.path / name) as image:
            assert has_watermark(image) == wanted and image.info["description"] == "AI", name
    sessions.close()


def test_the_app_says_when_there_can_be_no_watermark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio", minversion="6.0", reason="the app needs Gradio: pip install -e '.[app]'")
    monkeypatch.setattr(app, "load_pipeline", lambda *_: tiny_pipeline())
    monkeypatch.setattr(app, "studio_beside", lambda *_: None)
    monkeypatch.setattr(app, "snap_beside", lambda *_: None)
    assert main(["app", "--watermark"]) == 2
    assert "16 × 16" in capsys.readouterr().err
    monkeypatch.setattr(watermark, "MIN_SIDE", 16)
    engine = Engine(tiny_pipeline(), watermark=True)
    wide = Form(people=(), prompt="a cat", control=Image.new("RGB", (32, 16)))
    with pytest.raises(FaceFusionError, match="16 × 8"):
        next(engine.run(wide, [], lambda *_: None, lambda: False))

    def load(*_: Any) -> None:
        raise AssertionError("nothing is loaded before the package is looked for")

    monkeypatch.setattr(app, "load_pipeline", load)
    monkeypatch.setitem(sys.modules, "blind_watermark", None)
    assert main(["app", "--watermark"]) == 2
    assert "[watermark]" in capsys.readouterr().err
