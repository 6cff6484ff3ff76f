"""Distilled models: schedulers are recognised, no row is computed for nothing, faces are seen in few steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, StableDiffusionPipeline, TCDScheduler
from test_several_people import differ
from tiny_models import face, generate, tiny_components, tiny_pipeline, tiny_unet, with_adapter
from torch import Tensor

from face_fusion_pipeline import FaceDefaults, StableDiffusionFaceFusionPipeline
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.face_defaults import few_step_defaults
from face_fusion_pipeline.face_refinement import steps_of
from face_fusion_pipeline.generation.loading import defaults_beside, few_steps_beside
from face_fusion_pipeline.pipeline_img2img import StableDiffusionImg2ImgFaceFusionPipeline
from face_fusion_pipeline.pipeline_inpaint import StableDiffusionInpaintFaceFusionPipeline


A, B = face(0), face(1)
MODES = ("adapter", "training-free", "both")
# As the cards of these models say: the scheduler, and how it begins.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LCM": (LCMScheduler, {}),
    "TCD": (TCDScheduler, {}),
    "Lightning": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "Hyper-SD": (DDIMScheduler, {"timestep_spacing": "trailing"}),
}


def distilled(name: str, pipe: Any = None) -> Any:
    """A pipeline with the scheduler of this family."""
    pipe = pipe or with_adapter(tiny_pipeline())
    scheduler, config = SCHEDULERS[name]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
    return pipe


def lora(unet: Any, rank: int = 2) -> dict[str, Tensor]:
    """Random weights under the names of LCM-LoRA: attention, projections, convolutions, time embeddings."""
    chosen = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj")
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, layer in unet.named_modules():
        if not name.endswith(chosen):
            continue
        out, width, *kernel = layer.weight.shape
        one = [1] * len(kernel)
        key = "lora_unet_" + name.replace(".", "_")
        found[f"{key}.lora_down.weight"] = 0.2 * torch.randn((rank, width, *kernel), generator=generator)
        found[f"{key}.lora_up.weight"] = 0.2 * torch.randn((out, rank, *one), generator=generator)
        found[f"{key}.alpha"] = torch.tensor(float(rank))
    return found


class Batches:
    """The sizes of the batches that a UNet sees, and what it is told of guidance."""

    def __init__(self, pipe: Any) -> None:
        self.sizes: list[int] = []
        self.conditions: list[Any] = []
        pipe.unet.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: Any, args: Any, kwargs: Any) -> None:
        self.sizes.append(len(args[0]))
        self.conditions.append(kwargs.get("timestep_cond"))


# --- Recognised ----------------------------------------------------------------------------------------------------

TRAILING = {"timestep_spacing": "trailing", "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("scheduler", "config", "steps", "wanted"),
    [
        ("LCMScheduler", {}, None, FaceDefaults(guidance_scale=1.0, num_inference_steps=8)),
        ("TCDScheduler", {}, None, FaceDefaults(guidance_scale=1.0, num_inference_steps=4)),
        ("EulerDiscreteScheduler", TRAILING, 4, FaceDefaults(guidance_scale=1.0)),
        ("DDIMScheduler", TRAILING, 8, FaceDefaults(guidance_scale=1.0)),
        ("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, 1, FaceDefaults(guidance_scale=1.0)),
        ("EulerDiscreteScheduler", TRAILING, 30, None),
        ("EulerDiscreteScheduler", TRAILING, None, None),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, 4, None),
        ("DDIMScheduler", {**TRAILING, "rescale_betas_zero_snr": True}, 4, None),
        ("DDIMScheduler", {**TRAILING, "prediction_type": "v_prediction"}, 4, None),
        ("PNDMScheduler", {}, 4, None),
        ("DPMSolverMultistepScheduler", TRAILING, 8, None),
        ("None", {}, None, None),
    ],
)
def test_schedulers_are_recognised(
    scheduler: str, config: dict[str, Any], steps: int | None, wanted: FaceDefaults | None
) -> None:
    assert few_step_defaults(scheduler, config, steps) == wanted
    assert getattr(few_step_defaults(scheduler, config, steps, True), "guidance_scale", None) is None


@pytest.mark.parametrize(("name", "steps"), [("LCM", 8), ("TCD", 4)])
def test_a_call_that_says_nothing_is_in_few_steps_without_guidance(name: str, steps: int) -> None:
    pipe = distilled(name)
    said = generate(pipe, face_image=A, num_inference_steps=steps, guidance_scale=1.0)
    seen = Batches(pipe)
    bare = pipe("a cat", face_image=A, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert torch.equal(bare, said) and seen.sizes == [1] + [1] * steps  # the reference, then each step
    assert steps_of(pipe, {}) == steps


@pytest.mark.parametrize("name", ["Lightning", "Hyper-SD"])
def test_few_steps_of_a_trailing_scheduler_are_without_guidance(name: str) -> None:
    pipe = distilled(name)
    seen = Batches(pipe)
    generate(pipe, face_image=A, num_inference_steps=4)
    assert seen.sizes == [1] * 5
    generate(pipe, face_image=A, num_inference_steps=12)
    assert seen.sizes[5:] == [1] + [2] * 12
    pipe.face_defaults = FaceDefaults(guidance_scale=3.0)  # who knows the model knows better
    generate(pipe, face_image=A, num_inference_steps=4)
    assert seen.sizes[18:] == [1] + [2] * 4


def test_what_a_model_recommends_comes_first() -> None:
    pipe = distilled("LCM")
    pipe.face_defaults = FaceDefaults(num_inference_steps=3)
    seen = Batches(pipe)
    pipe("a cat", face_image=A)
    assert seen.sizes == [1] * 4  # its steps, and the scheduler's guidance
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe("a cat", face_image=A)
    assert seen.sizes[4:] == [1, 2, 2, 2]  # another scheduler, and diffusers' own guidance


# --- Faces in few steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_faces_in_few_steps_with_a_lora(name: str, mode: str) -> None:
    """Every scheduler with a random LoRA of LCM-LoRA's form, without guidance: one row for each picture."""
    pytest.importorskip("peft")
    pipe = distilled(name)
    before = generate(pipe, face_image=A, face_mode=mode, guidance_scale=1.0, num_inference_steps=4)
    pipe.load_lora_weights(lora(pipe.unet))
    settings = {"guidance_scale": 1.0, "num_inference_steps": 4, "num_images_per_prompt": 2}
    stock = distilled(name, StableDiffusionPipeline.from_pipe(tiny_pipeline()))
    stock.load_lora_weights(lora(stock.unet))
    plain = generate(pipe, face_image=A, face_mode=mode, face_scale=0, **settings)
    assert torch.equal(plain, generate(stock, **settings))

    identity = pipe.encode_face([A, B], face_mode=mode)
    seen = Batches(pipe)
    faced = generate(pipe, face_image=identity, **settings)
    assert seen.sizes == [2] * 4 and torch.isfinite(faced).all()
    assert differ(faced, plain)
    assert torch.equal(faced, generate(pipe, face_image=[A, B], face_mode=mode, **settings))
    assert differ(faced, generate(pipe, face_image=B, face_mode=mode, **settings))
    assert differ(before, generate(pipe, face_image=A, face_mode=mode, guidance_scale=1.0, num_inference_steps=4))
    late = generate(pipe, face_image=identity, face_start=0.5, **settings)
    assert differ(late, faced) and differ(late, plain)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_several_people_and_small_faces_in_few_steps(name: str) -> None:
    pipe = distilled(name)
    boxes = {"face_boxes": [(0, 0, 8, 16), (8, 0, 16, 16)], "guidance_scale": 1.0, "num_inference_steps": 4}
    both = generate(pipe, face_image=[[A], [B]], **boxes)
    assert differ(both, generate(pipe, face_image=[[B], [A]], **boxes))
    picture = face(4, size=64)
    settings = {"face_image": A, "face_boxes": [(8, 8, 14, 14)], "guidance_scale": 1.0, "num_inference_steps": 4}
    (again,) = pipe.refine_faces(picture, "a cat", generator=torch.Generator().manual_seed(0), **settings)
    assert again.size == picture.size and again.tobytes() != picture.tobytes()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_xl_in_few_steps(name: str) -> None:
    pipe = distilled(name, with_adapter(tiny_pipeline(family="xl")))
    seen = Batches(pipe)
    faced = generate(pipe, face_image=A, face_mode="both", num_inference_steps=4)
    assert seen.sizes == [1] * (2 + 4)  # two looks at the reference, one for each attention
    assert differ(faced, generate(pipe, num_inference_steps=4))


# --- Guidance told to the UNet -------------------------------------------------------------------------------------


def told_pipeline(pipeline_class: Any = StableDiffusionFaceFusionPipeline) -> Any:
    """A UNet that is told the guidance, as one of a latent consistency model."""
    pipe = pipeline_class(**tiny_components() | {"unet": tiny_unet(time_cond_proj_dim=8)})
    pipe.set_progress_bar_config(disable=True)
    return distilled("LCM", with_adapter(pipe))


@pytest.mark.parametrize("mode", MODES)
def test_a_unet_that_is_told_the_guidance(mode: str) -> None:
    pipe = told_pipeline()
    stock = StableDiffusionPipeline.from_pipe(pipe)
    assert torch.equal(generate(pipe, face_image=A, face_scale=0), generate(stock, num_inference_steps=3))

    seen = Batches(pipe)
    faced = generate(pipe, face_image=A, face_mode=mode, guidance_scale=8.0)
    assert set(seen.sizes) == {1} and all(told is not None for told in seen.conditions)
    assert differ(faced, generate(pipe, guidance_scale=8.0))
    assert differ(faced, generate(pipe, face_image=A, face_mode=mode, guidance_scale=2.0))

    at_two, at_eight = [], []
    for guidance, found in ((2.0, at_two), (8.0, at_eight)):
        generate(pipe, guidance_scale=guidance)  # the pipeline remembers the guidance of its last call
        found.append(pipe.encode_face(A, face_mode=mode))
    assert all(torch.equal(key, at_eight[0].keys[name]) for name, key in at_two[0].keys.items())
    assert torch.equal(faced, generate(pipe, face_image=at_two[0], guidance_scale=8.0))


def test_a_unet_that_is_told_the_guidance_keeps_diffusers_own() -> None:
    pipe = told_pipeline()
    seen = Batches(pipe)
    pipe("a cat", face_image=A)
    guidance = pipe.get_guidance_scale_embedding(torch.tensor([6.5]), 8)  # 7.5 less 1
    assert seen.sizes == [1] * 9 and all(torch.equal(told, guidance) for told in seen.conditions)


@pytest.mark.parametrize(
    "pipeline_class", [StableDiffusionImg2ImgFaceFusionPipeline, StableDiffusionInpaintFaceFusionPipeline]
)
def test_the_other_pipelines_are_told_the_guidance_too(pipeline_class: Any) -> None:
    pipe = told_pipeline(pipeline_class)
    given: dict[str, Any] = {"image": face(2), "strength": 1.0, "num_inference_steps": 4}
    if pipeline_class is StableDiffusionInpaintFaceFusionPipeline:
        given |= {"mask_image": face(3).convert("L"), "height": 16, "width": 16}
    seen = Batches(pipe)
    assert differ(generate(pipe, face_image=A, **given), generate(pipe, **given))
    assert set(seen.sizes) == {1} and all(told is not None for told in seen.conditions)


# --- Commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scheduler is that of a latent consistency model."""
    folder = tmp_path_factory.mktemp("lcm")
    distilled("LCM", tiny_pipeline()).save_pretrained(folder)
    return folder


def test_a_folder_says_it_before_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    assert few_steps_beside(str(folder)) == FaceDefaults(guidance_scale=1.0, num_inference_steps=8)
    assert defaults_beside(str(folder)) == FaceDefaults(guidance_scale=1.0, num_inference_steps=8)
    told_pipeline().save_pretrained(tmp_path / "told")
    assert few_steps_beside(str(tmp_path / "told")) == FaceDefaults(num_inference_steps=8)
    distilled("Lightning", tiny_pipeline()).save_pretrained(tmp_path / "trailing")
    assert few_steps_beside(str(tmp_path / "trailing"), steps=4) == FaceDefaults(guidance_scale=1.0)
    assert few_steps_beside(str(tmp_path / "trailing")) is None
    (tmp_path / "trailing" / "scheduler" / "scheduler_config.json").write_text("no JSON")
    assert few_steps_beside(str(tmp_path / "trailing"), steps=4) is None and few_steps_beside("nobody/nothing") is None


def test_the_command_draws_in_few_steps(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    face(1, size=32).save(tmp_path / "face.png")
    words = [f"--face={tmp_path / 'face.png'}", "--prompt=a cat", "--no-detect", "--num-images=1", "--no-sheet"]
    draw = ["generate", *words, f"--model={folder}", f"--out={tmp_path / 'out'}", "--json"]
    for options, steps, guidance in (([], 8, 1.0), (["--steps=2", "--guidance=2"], 2, 2.0)):
        assert main([*draw, *options]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["steps"], said["guidance"], said["scheduler"]) == (steps, guidance, "LCMScheduler")
