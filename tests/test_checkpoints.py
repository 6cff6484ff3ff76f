"""A checkpoint in one file, as model sites give it: the pictures of its parts, offline, and clear refusals."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, ControlNetModel, EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import constants
from ldm_layout import save_checkpoint, unet_tensors
from safetensors.torch import load_file, save_file
from tiny_models import (
    SIZES,
    TEXT_WIDTH,
    XL_UNET,
    face,
    generate,
    quiet,
    tiny_components,
    tiny_controlnet,
    tiny_pipeline,
    tiny_unet,
)
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPTextModelWithProjection

from face_fusion_pipeline import (
    FaceDefaults,
    StableDiffusionFaceFusionPipeline,
    StableDiffusionImg2ImgFaceFusionPipeline,
    StableDiffusionInpaintFaceFusionPipeline,
    StableDiffusionXLFaceFusionPipeline,
    StableDiffusionXLInpaintFaceFusionPipeline,
)
from face_fusion_pipeline.cli import main
from face_fusion_pipeline.evaluation.generation import hash_weights
from face_fusion_pipeline.face_defaults import defaults_of
from face_fusion_pipeline.face_errors import FaceFusionError, ModelNotFoundError
from face_fusion_pipeline.face_single_file import PIPELINES, check_pipeline, checkpoint_kind
from face_fusion_pipeline.generation.loading import load_pipeline, model_class, pipeline_for
from face_fusion_pipeline.training.base_model import load_base


PIPELINE = StableDiffusionFaceFusionPipeline
SD2 = {"layers_per_block": 2, "use_linear_projection": True}
DEFAULT_CONFIG = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def pipeline_with(pipeline_class: Any = PIPELINE, **changed: Any) -> Any:
    pipe = pipeline_class(**tiny_components() | changed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_order(pipe: Any) -> Any:
    """`pipe` with weights that lie in memory as new ones do: kernels round otherwise where a file's begin anywhere."""
    for part in pipe.components.values():
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.data = weight.data.clone()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reloaded(file: Path, pipeline_class: Any = PIPELINE, **options: Any) -> Any:
    return in_order(pipeline_class.from_single_file(file, **options))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def places(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in one file, and a folder with its configuration alone."""
    place = tmp_path_factory.mktemp("checkpoint")
    pipe.save_pretrained(place / "config")
    for weights in (place / "config").rglob("*.safetensors"):
        weights.unlink()
    return save_checkpoint(pipe, place / "model.safetensors"), place / "config"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a folder into an empty cache of the Hub, as a repository of this name."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def cached(folder: Path, name: str) -> None:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))

    return cached


# --- The same pictures ---------------------------------------------------------------------------------------------


def test_a_file_gives_the_pictures_of_its_parts(pipe: Any, places: tuple[Path, Path], tmp_path: Path) -> None:
    file, config = places
    once = reloaded(file, config=config, local_files_only=True)
    once.save_pretrained(tmp_path / "folder")
    for again in (once, in_order(PIPELINE.from_pretrained(tmp_path / "folder"))):
        assert torch.equal(generate(again), generate(pipe))
        assert torch.equal(generate(again, face_image=face()), generate(pipe, face_image=face()))
    assert not torch.equal(generate(once, face_image=face()), generate(once))
    identity = once.encode_face(face())  # fits, for it is the same model
    assert torch.equal(generate(pipe, face_image=identity), generate(pipe, face_image=face()))


def test_stable_diffusion_2_with_what_its_scheduler_says(tmp_path: Path) -> None:
    """Another text encoder, linear projections, and velocity, which the configuration says and the file does not."""
    parts = tiny_components()
    scheduler = type(parts["scheduler"]).from_config(parts["scheduler"].config, prediction_type="v_prediction")
    pipe = pipeline_with(unet=tiny_unet(**SD2), scheduler=scheduler)
    pipe.save_pretrained(tmp_path / "config")
    file = save_checkpoint(pipe, tmp_path / "model.safetensors", open_clip=True)
    again = reloaded(file, config=tmp_path / "config")
    assert again.scheduler.config.prediction_type == "v_prediction"
    assert torch.equal(generate(again, face_image=face()), generate(pipe, face_image=face()))


def xl_components() -> dict[str, Any]:
    """As of `tiny_models`, with a second text encoder as deep as makes a file known for XL, and of another width."""
    parts = tiny_components(family="xl")
    config = copy.deepcopy(parts["text_encoder_2"].config)
    config.hidden_size, config.projection_dim, config.num_hidden_layers = 32, 32, 10
    told = {"cross_attention_dim": TEXT_WIDTH + 32, "projection_class_embeddings_input_dim": 32 + 6 * SIZES}
    second = CLIPTextModelWithProjection(config).eval()
    return parts | {"text_encoder_2": second, "unet": tiny_unet(**XL_UNET | told)}


def test_stable_diffusion_xl(tmp_path: Path) -> None:
    pipe = quiet(StableDiffusionXLFaceFusionPipeline(**xl_components()))
    pipe.save_pretrained(tmp_path / "config")
    file = save_checkpoint(pipe, tmp_path / "xl.safetensors")
    drawn = generate(pipe, face_image=face())
    again = reloaded(file, StableDiffusionXLFaceFusionPipeline, config=tmp_path / "config")
    assert torch.equal(generate(again, face_image=face()), drawn)
    for model, config in ((str(file), str(tmp_path / "config")), (str(tmp_path / "config"), None)):
        again = in_order(load_pipeline(model, config=config))  # of the commands
        assert torch.equal(generate(again, face_image=face()), drawn)
        base = load_base(model, config=config)  # of the trainings, by diffusers' own class
        assert base.is_xl and torch.equal(base.unet.conv_in.weight, pipe.unet.conv_in.weight)
    with pytest.raises(FaceFusionError, match="load it with StableDiffusionXLFaceFusionPipeline, not with Stable"):
        PIPELINE.from_single_file(file, config=tmp_path / "config")


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_file_may_say_itself_that_it_predicts_velocity(
    pipe: Any, places: tuple[Path, Path], tmp_path: Path, zero_snr: bool
) -> None:
    marks = {"v_pred": torch.zeros(0)} | ({"ztsnr": torch.zeros(0)} if zero_snr else {})
    again = reloaded(save_checkpoint(pipe, tmp_path / "v.safetensors", **marks), config=places[1])
    config = again.scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr == zero_snr
    assert (config.timestep_spacing == "trailing") == zero_snr
    assert not torch.equal(generate(again), generate(pipe))


def test_inpainting_with_nine_channels(tmp_path: Path) -> None:
    pipe = pipeline_with(StableDiffusionInpaintFaceFusionPipeline, unet=tiny_unet(in_channels=9))
    pipe.save_pretrained(tmp_path / "config")
    file = save_checkpoint(pipe, tmp_path / "inpainting.safetensors")
    again = reloaded(file, StableDiffusionInpaintFaceFusionPipeline, config=tmp_path / "config")
    given = {"image": face(2), "mask_image": face(3).convert("L"), "height": 16, "width": 16, "face_image": face()}
    assert torch.equal(generate(again, **given), generate(pipe, **given))
    for refused in (PIPELINE, StableDiffusionImg2ImgFaceFusionPipeline):
        with pytest.raises(FaceFusionError, match="for inpainting: load it with StableDiffusionInpaintFaceFusionP"):
            refused.from_single_file(file, config=tmp_path / "config")
    for model, config in ((str(file), str(tmp_path / "config")), (str(tmp_path / "config"), None)):
        with pytest.raises(FaceFusionError, match="inpainting"):  # the commands draw from a text, and train for that
            load_pipeline(model, config=config)
        with pytest.raises(FaceFusionError, match="inpainting"):
            load_base(model, config=config)


def test_the_other_pipelines_load_a_file_too(pipe: Any, places: tuple[Path, Path]) -> None:
    image = generate(pipe, output_type="pil")[0]
    again = reloaded(places[0], StableDiffusionImg2ImgFaceFusionPipeline, config=places[1])
    whole = StableDiffusionImg2ImgFaceFusionPipeline.from_pipe(pipe)
    settings = {"image": image, "strength": 1.0, "face_image": face()}
    assert torch.equal(generate(again, **settings), generate(whole, **settings))


def test_optional_parts_of_the_configuration_stay_out(pipe: Any, tmp_path: Path) -> None:
    """A file has no ControlNet and no safety checker: they are there only if they are given."""
    text, vision = {"hidden_size": 16, "intermediate_size": 16}, {"hidden_size": 16, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_hidden_layers": 1}
    small = CLIPConfig(
        text_config=text | heads, vision_config=vision | heads | {"image_size": 8, "patch_size": 8}, projection_dim=8
    )
    net = tiny_controlnet(pipe.unet)
    checker = {"safety_checker": StableDiffusionSafetyChecker(small), "feature_extractor": CLIPImageProcessorPil()}
    full = pipeline_with(**checker, controlnet=net)
    full.save_pretrained(tmp_path / "config")
    file = save_checkpoint(full, tmp_path / "model.safetensors")
    again = reloaded(file, config=tmp_path / "config")
    assert again.controlnet is None and again.safety_checker is None
    again = reloaded(file, config=tmp_path / "config", controlnet=net)
    assert isinstance(again.controlnet, ControlNetModel)


def test_a_small_vae_comes_from_the_configuration_or_is_given(places: tuple[Path, Path], tmp_path: Path) -> None:
    small = pipeline_with(vae=tiny_components(tiny_vae=True)["vae"])
    again = reloaded(places[0], config=places[1], vae=small.vae)
    assert isinstance(again.vae, AutoencoderTiny) and torch.equal(generate(again), generate(small))
    small.save_pretrained(tmp_path / "config")
    assert isinstance(reloaded(places[0], config=tmp_path / "config").vae, AutoencoderTiny)


def test_face_defaults_are_those_of_the_configuration(places: tuple[Path, Path], tmp_path: Path) -> None:
    file, config = places
    assert reloaded(file, config=config).face_defaults is None
    shutil.copytree(config, tmp_path / "config")
    defaults = FaceDefaults(guidance_scale=3.0, num_inference_steps=2)
    defaults.save(tmp_path / "config")
    again = reloaded(file, config=tmp_path / "config")
    again("a cat")
    assert again.face_defaults == defaults and again.num_timesteps == 2


# --- Offline -------------------------------------------------------------------------------------------------------


def test_offline_a_folder_and_a_cached_repository_load(
    pipe: Any, tmp_path: Path, hub_cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path / "folder")
    hub_cache(tmp_path / "folder", "someone/model")
    for again in (in_order(load_pipeline(str(tmp_path / "folder"))), in_order(load_pipeline("someone/model"))):
        assert torch.equal(generate(again, face_image=face()), generate(pipe, face_image=face()))


def test_offline_a_file_takes_the_cached_configuration(pipe: Any, places: tuple[Path, Path], hub_cache: Any) -> None:
    file, config = places
    with pytest.raises(ModelNotFoundError, match=f"its configuration {DEFAULT_CONFIG} is not here") as refused:
        reloaded(file, local_files_only=True)
    assert "--model-config" in str(refused.value) and f"hf download {DEFAULT_CONFIG}" in str(refused.value)
    hub_cache(config, DEFAULT_CONFIG)
    hub_cache(config, "someone/model")
    for options in ({}, {"config": "someone/model"}):
        again = reloaded(file, local_files_only=True, **options)
        assert torch.equal(generate(again), generate(pipe))


# --- Refusals ------------------------------------------------------------------------------------------------------


def of_parts(place: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, place)
    return place


@pytest.mark.parametrize("name", ["model.ckpt", "MODEL.CKPT", "model.pt", "model.pth", "model.bin"])
def test_pickles_are_refused_by_name(
    name: str, places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", never)
    (tmp_path / name).write_bytes(b"never read")
    for source in (str(tmp_path / name), f"https://huggingface.co/someone/model/blob/main/{name}"):
        with pytest.raises(FaceFusionError, match="is a pickle"):
            PIPELINE.from_single_file(source, config=places[1])


def test_files_of_other_kinds_are_refused(pipe: Any, places: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x80\x02}q\x00." * 10)
    unet = unet_tensors(pipe.unet)
    for name, tensors, said in (
        ("lora", {"lora_unet_down.weight": torch.zeros(2)}, "a LoRA"),
        ("empty", {}, "nothing at all"),
        ("broken", None, "not a readable safetensors file"),
        ("unet", unet, "has no vae"),
        ("flux", unet | {"double_blocks.0.img_attn.norm.key_norm.scale": torch.zeros(2)}, "flux"),
    ):
        file = tmp_path / f"{name}.safetensors"
        if tensors is not None:
            of_parts(file, tensors)
        with pytest.raises(FaceFusionError, match=said) as refused:
            PIPELINE.from_single_file(file, config=places[1])
        assert "\n" not in str(refused.value)
    with pytest.raises(ModelNotFoundError, match="there is no file"):
        PIPELINE.from_single_file(tmp_path / "absent.safetensors", config=places[1])


@pytest.mark.parametrize("unet", [{"block_out_channels": (32, 32)}, {"layers_per_block": 2}], ids=["wide", "deep"])
def test_a_configuration_of_another_model_is_refused(
    unet: dict[str, Any], places: tuple[Path, Path], tmp_path: Path
) -> None:
    pipeline_with(unet=tiny_unet(**unet)).save_pretrained(tmp_path / "other")
    with pytest.raises(FaceFusionError, match="cannot be loaded with the configuration"):
        PIPELINE.from_single_file(places[0], config=tmp_path / "other")
    with pytest.raises(ModelNotFoundError, match=r"no model_index\.json"):
        PIPELINE.from_single_file(places[0], config=tmp_path)


def test_weights_that_the_file_lacks(places: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(places[0])
    for part in ("middle_block", "decoder.mid", "final_layer_norm"):  # of the UNet, the VAE, the text encoder
        file = of_parts(tmp_path / "part.safetensors", {k: t for k, t in tensors.items() if part not in k})
        with pytest.raises(FaceFusionError, match="lacks weights"):
            PIPELINE.from_single_file(file, config=places[1])


UNET = "model.diffusion_model."
V2 = {f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (2, 1024)}
XL = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (2,)}
NINE = {f"{UNET}input_blocks.0.0.weight": (2, 9, 1, 1)}
FOUR = {f"{UNET}input_blocks.0.0.weight": (2, 4, 1, 1)}


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        (FOUR, "v1"),
        (FOUR | V2, "v2"),
        (NINE, "inpainting"),
        (NINE | V2, "inpainting_v2"),
        (FOUR | XL, "xl_base"),
        (NINE | XL, "xl_inpaint"),
    ],
)
def test_what_a_file_is_decides_its_pipeline(shapes: dict[str, Any], kind: str, tmp_path: Path) -> None:
    file = of_parts(tmp_path / "model.safetensors", {name: torch.zeros(shape) for name, shape in shapes.items()})
    assert checkpoint_kind(file) == kind
    xl, inpaints = "xl" in kind, "inpaint" in kind
    for pipeline_class, is_xl, takes_mask in (
        (PIPELINE, False, False),
        (StableDiffusionInpaintFaceFusionPipeline, False, True),
        (StableDiffusionXLPipeline, True, False),
        (StableDiffusionXLFaceFusionPipeline, True, False),
        (StableDiffusionXLInpaintFaceFusionPipeline, True, True),
    ):
        if xl == is_xl and (takes_mask or not inpaints):
            check_pipeline(pipeline_class, file, kind)
        else:
            ours = PIPELINES[kind].replace("Pipeline", "FaceFusionPipeline")
            with pytest.raises(FaceFusionError, match=f"load it with {ours}, not with"):
                check_pipeline(pipeline_class, file, kind)
    assert pipeline_for(model_class(str(file))) is (StableDiffusionXLFaceFusionPipeline if xl else PIPELINE)


# --- Commands ------------------------------------------------------------------------------------------------------


def test_a_file_on_the_command_line(
    pipe: Any, places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = places
    face(1, size=32).save(tmp_path / "face.png")
    common = [f"--face={tmp_path / 'face.png'}", "--prompt=a cat", "--no-detect", "--steps=1"]
    pipe.save_pretrained(tmp_path / "folder")
    draw = ["generate", *common, "--num-images=1", "--no-sheet"]
    assert main([*draw, f"--model={file}", f"--model-config={config}", f"--out={tmp_path / 'file'}"]) == 0
    assert main([*draw, f"--model={tmp_path / 'folder'}", f"--out={tmp_path / 'whole'}"]) == 0
    pictures = [(tmp_path / name / "image_000.png").read_bytes()[-400:] for name in ("file", "whole")]
    assert pictures[0] == pictures[1]
    one = ["--timesteps=0", "--scales=2", "--layers=up"]
    assert main(["sweep", *common, *one, f"--model={file}", f"--model-config={config}", f"--out={tmp_path}"]) == 0
    assert (tmp_path / "sweep.png").is_file()
    base = load_base(file, config=str(config))  # of prepare and train
    assert torch.equal(base.unet.conv_in.weight, pipe.unet.conv_in.weight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model={tmp}/model.ckpt"], "is a pickle"),
        (["--model={tmp}/absent.safetensors"], "there is no file"),
        (["--model=models/absent.safetensors"], "there is no file"),
        (["--model={file}"], f"its configuration {DEFAULT_CONFIG} is not here"),
        (["--model={file}", "--model-config={tmp}/nowhere"], "there is no folder"),
        (["--model={file}", "--model-config={tmp}"], "no model_index.json"),
        (["--model={file}", "--model-config={file}"], "is a file"),
        (["--model={file}", "--model-config={config}", "--variant=fp16"], "has no variants"),
        (["--model={config}", "--model-config={config}"], "is for a --model that is one .safetensors file"),
        (["--model-config={config}"], "give --model"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "sweep", "prepare"])
def test_one_line_says_what_is_missing(
    command: str,
    options: list[str],
    said: str,
    places: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "model.ckpt").write_bytes(b"never read")
    face(1, size=32).save(tmp_path / "face.png")
    words = [word.format(tmp=tmp_path, file=places[0], config=places[1]) for word in options]
    draw = [f"--face={tmp_path / 'face.png'}", "--prompt=a cat", "--no-detect"]
    status = main([command, *words, f"--out={tmp_path / 'out'}", *([str(tmp_path)] if command == "prepare" else draw)])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert status == 2 and len(errors) == 1 and said in errors[0]


def test_a_relative_path_is_no_hub_id(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "models").mkdir()
    shutil.copy(places[0], tmp_path / "models" / "my.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **_: pytest.fail("the Hub was asked"))
    assert defaults_of("models/my.safetensors") is None
    assert hash_weights("models/my.safetensors") is not None


def test_the_scheduler_of_the_configuration_is_kept(pipe: Any, places: tuple[Path, Path], tmp_path: Path) -> None:
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipeline_with(scheduler=euler).save_pretrained(tmp_path / "config")
    assert isinstance(reloaded(places[0], config=tmp_path / "config").scheduler, EulerDiscreteScheduler)


def test_a_base_that_cannot_be_fetched_is_said_without_warnings(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        load_base("nobody/nothing")
    assert [str(warning.message) for warning in recwarn] == []
