"""The model that comes with the package: an ordinary Stable Diffusion, and the whole way from a photo to pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTextModelWithProjection

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline, embedded_model
from face_fusion_pipeline.avatars.evaluation.trials import portraits
from face_fusion_pipeline.avatars.world import sheet
from face_fusion_pipeline.cli import main


ROOT = Path(__file__).parents[1]
PROMPT = "a photo of a smiling person in a red shirt in a garden"


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(embedded_model())
    pipe.load_face_fusion_adapter(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **options):
    options = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "np", **options}
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **options).images[0]


def test_is_small_safe_and_says_what_it_took():
    size = {path: path.stat().st_size for path in embedded_model().rglob("*.safetensors")}
    beside = [bytes for path, bytes in size.items() if path.parent.name in ("controlnet", "ffrnet")]
    assert sum(size.values()) - sum(beside) < 62_000_000 and len(beside) == 2 and sum(beside) < 30_000_000
    assert not [
        path for path in embedded_model().rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    ]
    card = (embedded_model() / "README.md").read_text()
    for record in json.loads((embedded_model() / "training.json").read_text()).values():
        assert f"{record['steps']:,}" in card and record["machine"] in card
    CLIPTextModelWithProjection.from_pretrained(embedded_model() / "clip_score")


def test_without_a_face_it_is_plain_stable_diffusion(pipe):
    plain = StableDiffusionPipeline.from_pretrained(embedded_model())
    plain.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(pipe), draw(plain))


def test_prompt_decides_the_shirt(pipe):
    """The shirt fills the bottom of the picture: red for a red shirt, and not for a blue one."""
    red = draw(pipe)[-16:, 40:88].mean((0, 1))
    options = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    blue = pipe(PROMPT.replace("red", "blue"), generator=generator, **options).images[0][-16:, 40:88].mean((0, 1))
    assert red[0] > red[2] + 0.15 and blue[2] > blue[0] + 0.15


def test_face_changes_the_picture_and_two_people_differ(pipe):
    first, second = (draw(pipe, face_image=portraits(1_100_000 + k).face) for k in (0, 4))
    assert np.abs(first - draw(pipe)).mean() > 0.005
    assert np.abs(first - second).mean() > 0.005


def test_generate_command_on_a_rendered_portrait(tmp_path, capsys):
    sheet.portrait(1_100_007).save(tmp_path / "face.png")
    options = ["--num-images", "2", "--steps", "4", "--out", str(tmp_path / "out"), "--json"]
    assert main(["generate", "--face", str(tmp_path / "face.png"), "--prompt", PROMPT, *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["face_mode"] == "both" and len(answer["files"]) == 3
    with Image.open(tmp_path / "out" / "image_000.png") as image:
        assert image.size == (128, 128) and image.text["prompt"] == PROMPT


@pytest.mark.parametrize("photo", ["astronaut.png", "synthetic/sdxl_0.jpg"])
def test_generate_command_on_a_photograph(tmp_path, test_data, photo, capsys):
    face = str(test_data / "photos" / photo)
    options = ["--num-images", "1", "--steps", "2", "--no-sheet", "--out", str(tmp_path)]
    assert main(["generate", "--face", face, "--prompt", PROMPT, *options]) == 0
    assert (tmp_path / "image_000.png").is_file()
