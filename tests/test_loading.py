"""The folder is a package, a `custom_pipeline` folder, a single file and a Hub repository: each in a fresh process."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.utils.dynamic_modules_utils import find_pipeline_class, get_relative_imports
from safetensors.torch import load_file, save_file
from tiny_models import face, generate, tiny_controlnet, tiny_pipeline

import face_fusion_pipeline
from face_fusion_pipeline.face_adapter import create_adapter
from face_fusion_pipeline.publishing.repository import pipeline_modules, write_folder


PACKAGE = Path(__file__).parents[1] / "face_fusion_pipeline"

SCRIPT = """
import os, shutil, sys
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
from PIL import Image
from safetensors.torch import save_file
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
way, package, repository, work = sys.argv[1:]  # the package is the repository of 1.x
xl = package != repository
stock, name = (StableDiffusionXLPipeline, "pipeline_xl") if xl else (StableDiffusionPipeline, "pipeline")
options = {"trust_remote_code": True}
if way == "import":
    sys.path.insert(0, os.path.dirname(package))
    import face_fusion_pipeline
    assert "torchvision" not in sys.modules
    face_fusion_pipeline.StableDiffusionFaceFusionPipeline
    assert "diffusers.pipelines.controlnet.pipeline_controlnet" not in sys.modules  # slow: imported when called for
    pipe = face_fusion_pipeline.StableDiffusionFaceFusionPipeline.from_pretrained(work + "/model")
elif way == "folder":
    pipe = DiffusionPipeline.from_pretrained(work + "/model", custom_pipeline=repository, **options)
    base = stock.from_pipe(pipe)
    pipe = stock.from_pipe(base, custom_pipeline=repository, **options)
elif way == "file":
    pipe = DiffusionPipeline.from_pretrained(work + "/model", custom_pipeline=f"{package}/{name}.py", **options)
    for task in ("img2img", "inpaint"):
        other = stock.from_pipe(pipe, custom_pipeline=f"{package}/{name}_{task}.py", **options)
        assert task in type(other).__module__ and hasattr(other, "encode_face"), type(other)
else:
    from diffusers.utils import dynamic_modules_utils as loader
    fetched = []
    def download(repo, filename, **kwargs):
        assert repo == "someone/face-fusion", repo
        fetched.append(filename)
        return os.path.join(repository, filename)
    loader.hf_hub_download = download
    loader.model_info = lambda *args, **kwargs: SimpleNamespace(sha="0123abcd")
    pipe = DiffusionPipeline.from_pretrained(work + "/model", custom_pipeline="someone/face-fusion", **options)
    assert "face_attention.py" in fetched, fetched
assert type(pipe).__name__ == stock.__name__.replace("Pipeline", "FaceFusionPipeline")
assert (type(pipe).__module__ == "face_fusion_pipeline.pipeline") == (way == "import"), type(pipe).__module__
assert way == "import" or "face_fusion_pipeline" not in sys.modules
pipe.set_progress_bar_config(disable=True)
pipe.load_face_fusion_adapter(work)
with Image.open(work + "/face.png") as image:
    identity = pipe.encode_face(image)
identity.save(work + "/" + way + "-identity.safetensors")
identity = type(identity).load(work + "/" + way + "-identity.safetensors")
generator = torch.Generator().manual_seed(0)
latents = pipe("a cat", face_image=identity, generator=generator, num_inference_steps=3, output_type="latent").images
save_file({"latents": latents}, work + "/" + way + ".safetensors")

pipe.register_modules(controlnet=ControlNetModel.from_pretrained(work + "/controlnet"))
options = {"num_inference_steps": 1, "output_type": "latent", "generator": generator.manual_seed(0)}
controlled = pipe("a cat", face_image=identity, control_image=Image.new("L", (16, 16)), **options).images
assert controlled.shape == latents.shape, controlled.shape

options = {"num_inference_steps": 2, "strength": 0.5}
picture = Image.new("RGB", (48, 32))
refined = pipe.refine_faces(picture, "a cat", face_image=identity, face_boxes=[(8, 8, 14, 15)], **options)
assert refined[0].size == picture.size and refined[0].getextrema() != picture.getextrema()
"""


@pytest.fixture(scope="module", params=["sd", "xl"])
def work(request, tmp_path_factory):
    """A saved tiny model, adapter and face, what they should give, and a repository's pipelines for such weights."""
    folder = tmp_path_factory.mktemp("loading")
    pipe = tiny_pipeline(family=request.param)
    pipe.save_pretrained(folder / "model")
    if request.param == "xl":
        write_folder(pipeline_modules(xl=True), folder / "repository")
    tiny_controlnet(pipe.unet).save_pretrained(folder / "controlnet")
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, metadata={"resolution": 16}))
    pipe.save_face_fusion_adapter(folder)
    face().save(folder / "face.png")
    save_file({"latents": generate(pipe, face_image=face())}, folder / "expected.safetensors")
    return folder


def run(script, *arguments, cwd):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cwd / "modules")}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("way", ["import", "folder", "file", "hub"])
def test_loads_and_generates_in_a_fresh_process(way, work, tmp_path):
    repository = work / "repository" if (work / "repository").is_dir() else PACKAGE
    if way == "import" and repository != PACKAGE:
        pytest.skip("imported by all other tests")
    result = run(SCRIPT, way, PACKAGE, repository, work, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    actual, expected = (load_file(work / f"{name}.safetensors")["latents"] for name in (way, "expected"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


PIPELINES = sorted(PACKAGE.glob("pipeline*.py"))


@pytest.mark.parametrize("file", [*PIPELINES, PACKAGE / "block.py"], ids=lambda path: path.stem)
def test_a_file_that_diffusers_loads_names_all_siblings(file):
    """diffusers copies the siblings that the file names, not those that these name in turn."""
    named, todo = set(), [file]
    while todo:
        found = {PACKAGE / f"{name}.py" for name in get_relative_imports(todo.pop())} - named
        named |= found
        todo += found
    assert file not in named
    assert {path.stem for path in named} == set(get_relative_imports(file))


@pytest.mark.parametrize("file", PIPELINES, ids=lambda path: path.stem)
def test_a_pipeline_file_shows_one_pipeline(file):
    kind = find_pipeline_class(importlib.import_module(f"face_fusion_pipeline.{file.stem}"))
    assert kind.__module__ == f"face_fusion_pipeline.{file.stem}" and kind.__name__ in face_fusion_pipeline.__all__


def test_importing_the_package_is_cheap(tmp_path):
    script = "import sys; sys.path.insert(0, sys.argv[1]); import face_fusion_pipeline as f; f.__version__;"
    script += "assert 'torch' not in sys.modules; f.FaceFusionError; assert 'torch' not in sys.modules; dir(f)"
    result = run(script, PACKAGE.parent, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
