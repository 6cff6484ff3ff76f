"""Blocks of Modular Diffusers, loaded from the folder in a fresh process: the same pictures as the pipeline's."""

import os
import subprocess
import sys
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "face_fusion_pipeline"

SCRIPT = """
import sys
import pytest
import torch
from diffusers import ModularPipeline
from diffusers.guiders import ClassifierFreeGuidance
from tiny_models import face, generate, tiny_components, tiny_pipeline, with_adapter

PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
LEFT, RIGHT = (1, 4, 6, 12), (10, 4, 15, 12)
modular = ModularPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(modular.blocks).__name__ == "FaceFusionBlocks"
components = tiny_components(family="xl")
guider = ClassifierFreeGuidance(guidance_scale=5.0)
modular.update_components(**{name: components[name] for name in PARTS}, guider=guider)
modular.set_progress_bar_config(disable=True)
ours = with_adapter(tiny_pipeline(family="xl"))
size = {"height": 16, "width": 16}


def blocks(**arguments):
    settings = {"num_inference_steps": 3, "output": "images", "output_type": "latent", **size}
    return modular(prompt="a cat", generator=torch.Generator().manual_seed(0), **settings, **arguments)


def pipeline(**arguments):
    return generate(ours, "a cat", guidance_scale=5.0, **size, **arguments)


plain = blocks()
torch.testing.assert_close(plain, pipeline(), atol=1e-3, rtol=1e-3)
weights = {"face_adapter": dict(ours._face_adapter.state_dict())}
for arguments in (
    {"face_image": face()},
    {"face_image": face(), "face_mode": "both", "face_scale": 0.5},
    {"face_image": [face(0), face(1)], "face_weights": [1, 3], "face_end": 0.6},
    {"face_image": [[face(0)], [face(1)]], "face_boxes": [LEFT, RIGHT]},
):
    found = blocks(**arguments, **weights)
    torch.testing.assert_close(found, pipeline(**arguments), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found, plain, atol=1e-2)
assert not torch.allclose(blocks(face_image=face()), blocks(face_image=face(), **weights), atol=1e-2)  # training-free
assert torch.equal(blocks(face_image=face(), face_scale=0.0), plain) and torch.equal(blocks(), plain)
with pytest.raises(ValueError, match="makes no draft: give face_boxes"):
    blocks(face_image=[[face(0)], [face(1)]])
assert torch.equal(blocks(), plain)  # nothing is left behind
"""


def test_the_folder_is_a_set_of_blocks(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(PACKAGE.parent)])
    command = [sys.executable, "-c", SCRIPT, str(PACKAGE)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
