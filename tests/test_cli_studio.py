"""`face-fusion generate` with a style picture and identity by FaceStudio."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_face_studio import ToyEmbedder, random_weights, toy_encoder, toy_prior
from tiny_models import face, tiny_pipeline

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_studio import STUDIO_WEIGHTS_NAME, save_studio


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    """A model folder with an image encoder and FaceStudio weights."""
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline()
    pipe.register_modules(image_encoder=toy_encoder())
    pipe.save_pretrained(folder)
    random_weights(pipe.unet)
    save_studio(pipe.unet, folder / "face_studio" / STUDIO_WEIGHTS_NAME)
    return folder


@pytest.fixture
def generate(model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> Any:
    """Run the command without any of the networks that toys stand for; returns status, stdout, stderr."""
    load = StableDiffusionFaceFusionPipeline.load_face_studio

    def with_toys(pipe: Any, *args: Any, **kwargs: Any) -> None:
        load(pipe, *args, **kwargs, face_embedder=ToyEmbedder(), prior=toy_prior)

    monkeypatch.setattr(StableDiffusionFaceFusionPipeline, "load_face_studio", with_toys)
    for name in ("face", "style"):
        face(len(name), size=32).save(tmp_path / f"{name}.png")

    def run(*words: str) -> tuple[int, str, str]:
        common = ["--model", str(model), "--prompt", "a cat", "--steps", "2", "--num-images", "1", "--json"]
        status = main(["generate", *common, "--out", str(tmp_path / "out"), *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_style_picture_with_and_without_a_person(generate, tmp_path):
    style = ["--style-image", str(tmp_path / "style.png"), "--style-scale", "1"]
    status, out, err = generate(*style)
    assert status == 0, err
    (file,) = json.loads(out)["files"]  # nobody is compared with nobody
    picture = Image.open(file)
    assert picture.text["style_scale"] == "1.0"
    assert "style.png" not in json.dumps(dict(picture.text))
    with_face = ["--face", str(tmp_path / "face.png"), "--no-detect", "--mode", "face-studio"]
    status, out, err = generate(*style, *with_face)
    assert status == 0, err
    report = json.loads(out)
    assert report["face_mode"] == "face-studio"
    assert len(report["files"]) == 2  # a picture and the sheet


def test_identity_by_text(generate, tmp_path):
    status, out, err = generate("--face", str(tmp_path / "face.png"), "--no-detect", "--mode", "face-studio")
    assert status == 0, err
    assert "style_image" not in json.loads(out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--face, or a picture whose style is taken"),
        (["--style-scale", "0.5", "--face", "x.png"], "needs a --style-image"),
        (["--style-image", "nowhere.png"], "no such file"),
    ],
)
def test_options_that_do_not_go_together(generate, words, said):
    status, _, err = generate(*words)
    assert status == 2
    assert said in err


def test_a_model_without_weights_says_so(generate, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "plain")
    status, _, err = generate("--model", str(tmp_path / "plain"), "--style-image", str(tmp_path / "style.png"))
    assert status == 2
    assert "has no FaceStudio weights" in err
