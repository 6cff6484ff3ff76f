"""A good citizen of diffusers: every feature of a Stable Diffusion pipeline goes on working beside a face.

Each test compares with the face against without, or against the same thing done another way: that a call does not
raise would prove nothing.
"""

import functools

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models import attention_dispatch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from test_pipeline import load_random_ip_adapter
from test_several_people import LEFT, RIGHT, close, differ
from tiny_models import (
    TEXT_WIDTH,
    XL_UNET,
    face,
    for_task,
    generate,
    kind_of,
    quiet,
    stock_pipeline,
    tiny_components,
    tiny_pipeline,
    tiny_unet,
    with_adapter,
)
from transformers import CLIPImageProcessorPil, CLIPVisionConfig

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline
from face_fusion_pipeline.face_attention import FaceFusionAttnProcessor, LayerPeople, attention_layers
from face_fusion_pipeline.face_errors import FaceFusionError, IdentityMismatchError
from face_fusion_pipeline.face_ownership import installed_processors


A, B = face(0), face(1)
UNETS = {"sd": {}, "xl": XL_UNET}


each_family = pytest.mark.parametrize("family", ("sd", "xl"))


@pytest.fixture
def family():
    """Where a test is not `each_family`."""
    return "sd"


@pytest.fixture
def pipe(family):
    return with_adapter(tiny_pipeline(family=family))


def text_encoders(pipe):
    return [part for name, part in pipe.components.items() if name.startswith("text_encoder")]


# --- Arguments of the call -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
        "DDPMScheduler",
    ],
)
def test_schedulers(pipe, scheduler):
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    faced = generate(pipe, face_image=A, num_inference_steps=4)
    assert torch.isfinite(faced).all()
    assert differ(faced, generate(pipe, num_inference_steps=4))
    identity = pipe.encode_face(A)  # the identity does not depend on the scheduler
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    again = pipe.encode_face(A)
    assert all(torch.equal(identity.keys[name], again.keys[name]) for name in again.keys)


@each_family
def test_negative_prompt_and_guidance(pipe):
    plain = generate(pipe, face_image=A)
    assert differ(plain, generate(pipe, face_image=A, negative_prompt="a dog"))
    unguided = generate(pipe, face_image=A, guidance_scale=1.0)
    assert close(unguided, generate(pipe, face_image=A, guidance_scale=0.5))  # diffusers: no guidance up to 1


@pytest.mark.parametrize(("output_type", "kind"), [("pil", Image.Image), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_output_types(pipe, output_type, kind):
    faced, plain = (generate(pipe, face_image=f, output_type=output_type)[0] for f in (A, None))
    assert isinstance(faced, kind)
    assert not np.array_equal(np.asarray(faced), np.asarray(plain))


def test_tuple_instead_of_output_object(pipe):
    options = {"num_inference_steps": 2, "output_type": "latent", "face_image": [[A], [B]]}
    options |= {"face_boxes": [LEFT, RIGHT]}
    images, flags = pipe("a cat", generator=torch.Generator().manual_seed(0), return_dict=False, **options)
    result = pipe("a cat", generator=torch.Generator().manual_seed(0), **options)
    assert torch.equal(images, result.images)
    assert flags is None


def test_callback_may_change_latents(pipe):
    def blank(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert not generate(pipe, face_image=A, callback_on_step_end=blank).any()


def test_custom_timesteps(pipe):
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    faced = generate(pipe, face_image=A, timesteps=[900, 500, 100], num_inference_steps=3)
    assert differ(faced, generate(pipe, timesteps=[900, 500, 100], num_inference_steps=3))


# --- Features of the pipeline --------------------------------------------------------------------------------------


@each_family
def test_lora_and_adapter_in_either_order(pipe, family, tmp_path):
    peft = pytest.importorskip("peft")
    pipe.save_face_fusion_adapter(tmp_path)
    plain, faced = generate(pipe), generate(pipe, face_image=A)
    trained, stock = tiny_unet(**UNETS[family]), kind_of(family, ours=False)
    trained.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    stock.save_lora_weights(
        tmp_path / "lora", unet_lora_layers=peft.get_peft_model_state_dict(trained), safe_serialization=True
    )
    lora_first, face_first = tiny_pipeline(family=family), tiny_pipeline(family=family)
    lora_first.load_lora_weights(tmp_path / "lora")
    lora_first.load_face_fusion_adapter(tmp_path)
    face_first.load_face_fusion_adapter(tmp_path)
    face_first.load_lora_weights(tmp_path / "lora")
    with_lora = generate(lora_first, face_image=A)
    assert torch.equal(with_lora, generate(face_first, face_image=A))
    assert differ(with_lora, faced)
    assert differ(with_lora, generate(lora_first))
    assert differ(generate(lora_first), plain)
    for either in (lora_first, face_first):
        either.unload_lora_weights()
        assert close(generate(either, face_image=A), faced)
        assert close(generate(either), plain)


def test_lora_names_do_not_touch_face_weights(pipe):
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    assert not any("lora" in name for name, _ in pipe._face_adapter.named_parameters())
    assert not any("face" in name for name, _ in pipe.unet.named_parameters())


def test_textual_inversion(pipe):
    plain = generate(pipe, "a b", face_image=A)
    pipe.load_textual_inversion({"<b>": torch.full((TEXT_WIDTH,), 0.5)}, token="<b>")
    assert differ(generate(pipe, "a <b>", face_image=A), plain)
    assert close(generate(pipe, "a b", face_image=A), plain)


@each_family
def test_freeu(pipe):
    identity = pipe.encode_face(A)
    without = generate(pipe, face_image=identity)
    pipe.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5)
    with_freeu = generate(pipe, face_image=identity)
    assert torch.isfinite(with_freeu).all()
    assert differ(with_freeu, without)
    assert differ(with_freeu, generate(pipe))
    pipe.disable_freeu()
    assert close(generate(pipe, face_image=A), without)


@each_family
def test_vae_slicing_and_tiling(pipe):
    identity = pipe.encode_face(A)
    options = {"face_image": identity, "num_images_per_prompt": 2}
    latents, whole = generate(pipe, **options), generate(pipe, **options, output_type="pt")
    seen = []
    pipe.vae.decoder.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    pipe.vae.enable_slicing()
    sliced = generate(pipe, **options, output_type="pt")
    assert [tuple(shape) for shape in seen] == [(1, 4, 8, 8)] * 2
    assert close(sliced, whole)
    assert close(pipe.encode_face(A).keys[next(iter(identity.keys))], next(iter(identity.keys.values())))
    pipe.vae.disable_slicing()

    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 8, 4
    seen.clear()
    tiled = generate(pipe, **options, output_type="pt")
    assert len(seen) > 1 and all(max(shape[-2:]) <= 4 for shape in seen)
    assert tiled.shape == whole.shape and differ(tiled, whole)  # each tile has its own normalisation
    with torch.no_grad():
        expected = pipe.vae.tiled_decode(latents / pipe.vae.config.scaling_factor).sample
    assert close(tiled, (expected / 2 + 0.5).clamp(0, 1))
    encoded = []
    pipe.vae.encoder.register_forward_hook(lambda module, args, output: encoded.append(args[0].shape))
    assert torch.isfinite(generate(pipe, face_image=A)).all()
    assert len(encoded) > 1


@each_family
def test_interrupt_in_a_callback_stops_the_loop(pipe):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    passes = []
    identity = pipe.encode_face(A)
    handle = pipe.unet.register_forward_hook(lambda module, args, output: passes.append(1))
    stopped = generate(pipe, face_image=identity, num_inference_steps=4, callback_on_step_end=stop)
    handle.remove()
    assert steps == [0, 1] and len(passes) == 2
    assert differ(stopped, generate(pipe, face_image=identity, num_inference_steps=4))
    assert not any(hasattr(p, "acts_here") for p in pipe.unet.attn_processors.values())


def test_safety_checker_sees_the_pictures_with_faces():
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**small, image_size=16, patch_size=8)
    clip_config = diffusers.pipelines.stable_diffusion.safety_checker.CLIPConfig(
        vision_config=config.to_dict(), projection_dim=8
    )
    checker = StableDiffusionSafetyChecker(clip_config).eval()
    checker.concept_embeds_weights.data.fill_(-10.0)  # everything is above this threshold: all are refused
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    parts = {**tiny_components(), "safety_checker": checker, "feature_extractor": processor}
    pipe = with_adapter(StableDiffusionFaceFusionPipeline(**{**parts, "requires_safety_checker": True}))
    pipe.set_progress_bar_config(disable=True)
    result = pipe("a cat", face_image=A, num_inference_steps=2, output_type="np")
    assert result.nsfw_content_detected == [True]
    assert not result.images.any()


def test_stable_diffusion_2():
    """v-prediction, linear projections, another text width and heads by size."""
    parts = tiny_components()
    torch.manual_seed(0)
    parts["unet"] = tiny_unet(use_linear_projection=True, attention_head_dim=(2, 4))
    parts["scheduler"] = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    pipe = with_adapter(StableDiffusionFaceFusionPipeline(**parts))
    pipe.set_progress_bar_config(disable=True)
    assert differ(generate(pipe, face_image=A), generate(pipe))
    people = {"face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT]}
    assert torch.isfinite(generate(pipe, **people)).all()


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(pipe, backend, monkeypatch):
    plain = generate(pipe, face_image=A)
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # set for the whole process below
    pipe.unet.set_attention_backend(backend)
    assert close(generate(pipe, face_image=A), plain)
    used = []
    original = attention_dispatch._AttentionBackendRegistry._backends[attention_dispatch.AttentionBackendName(backend)]
    registry = {attention_dispatch.AttentionBackendName(backend): lambda *a, **k: used.append(1) or original(*a, **k)}
    monkeypatch.setattr(
        attention_dispatch._AttentionBackendRegistry,
        "_backends",
        {**attention_dispatch._AttentionBackendRegistry._backends, **registry},
    )
    with attention_dispatch.attention_backend(backend):
        assert close(generate(pipe, face_image=A), plain)
    assert used


@each_family
def test_attention_slicing_and_fused_projections(pipe):
    plain = generate(pipe, face_image=A)
    pipe.enable_attention_slicing(1)
    assert close(generate(pipe, face_image=A), plain)
    assert all(type(p).__name__ == "SlicedAttnProcessor" for p in pipe.unet.attn_processors.values())
    pipe.disable_attention_slicing()
    pipe.fuse_qkv_projections(vae=False)
    try:
        assert close(generate(pipe, face_image=A), plain)
    except FaceFusionError as error:
        assert "fuse" in str(error)
    pipe.unfuse_qkv_projections(vae=False)
    assert close(generate(pipe, face_image=A), plain)


# --- Memory and precision ------------------------------------------------------------------------------------------


@each_family
def test_layerwise_casting(pipe):
    plain = generate(pipe, face_image=A)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    cast = generate(pipe, face_image=A)
    assert torch.isfinite(cast).all()
    assert (cast - plain).abs().mean() < 0.2 * (generate(pipe) - plain).abs().mean()


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting_of_the_vae(pipe, storage):
    plain = generate(pipe, face_image=A)
    pipe.vae.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert next(pipe.vae.parameters()).dtype == storage
    cast = generate(pipe, face_image=A)
    assert (cast - plain).abs().mean() < 0.2 * (generate(pipe) - plain).abs().mean()


def test_an_identity_fits_its_model_however_the_weights_are_kept(pipe):
    identity = pipe.encode_face(A)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    generate(pipe, face_image=identity)


def test_an_identity_is_refused_by_another_model_that_is_offloaded(pipe):
    import accelerate

    identity, before = pipe.encode_face(A), generate(pipe, face_image=A)
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    assert pipe.unet.conv_in.weight.device.type == "meta"
    assert pipe.encode_face(A).base_fingerprint == identity.base_fingerprint
    assert close(generate(pipe, face_image=identity), before)
    pipe.unet = tiny_unet(seed=5)
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    with pytest.raises(IdentityMismatchError, match="another base model"):
        generate(pipe, face_image=identity)


def test_weights_of_an_ip_adapter_move_with_the_unet_during_a_call(pipe):
    """Model offload moves the UNet to the GPU inside the call, when other processors stand in for the IP-Adapter's."""
    load_random_ip_adapter(pipe)
    names = list(attention_layers(pipe.unet, "attn2"))
    before = list(pipe.unet.state_dict())
    with installed_processors(pipe.unet, {name: FaceFusionAttnProcessor([LayerPeople(())]) for name in names}):
        pipe.unet.to(torch.float64)
    assert list(pipe.unet.state_dict()) == before
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float64}


def test_references_go_through_one_model_after_the_other(pipe, monkeypatch):
    order = []
    for name in ("vae", "unet"):
        part = getattr(pipe, name)
        method = "encode" if name == "vae" else "forward"
        monkeypatch.setattr(part, method, functools.partial(_noting, order, name, getattr(part, method)))
    pipe.encode_face([A, B])
    assert order == ["vae", "vae", "unet", "unet"]


def _noting(order, name, method, *args, **kwargs):
    order.append(name)
    return method(*args, **kwargs)


@each_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "faces", [{"face_image": A}, {"face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT]}], ids=["one", "two"]
)
def test_half_precision_is_near_single_precision(pipe, dtype, faces):
    single, without = generate(pipe, **faces), generate(pipe)
    pipe.to(dtype=dtype)
    half = generate(pipe, **faces)
    assert half.dtype == dtype
    assert (half.float() - single).abs().mean() < 0.2 * (without - single).abs().mean()


@each_family
def test_group_offloading(pipe):
    plain = generate(pipe, face_image=A)
    for part in (pipe.unet, *text_encoders(pipe)):
        apply_group_offloading(part, onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert close(generate(pipe, face_image=A), plain)


@each_family
@pytest.mark.parametrize("method", ["cpu_offload_with_hook", "cpu_offload"])
def test_accelerate_offload_hooks(pipe, method):
    """What `enable_model_cpu_offload` and `enable_sequential_cpu_offload` install, with the CPU as the device."""
    import accelerate

    plain = generate(pipe, face_image=A)
    for part in (*text_encoders(pipe), pipe.unet, pipe.vae):
        getattr(accelerate, method)(part, torch.device("cpu"))
    assert close(generate(pipe, face_image=A), plain)
    assert differ(generate(pipe, face_image=[[A], [B]], face_boxes=[LEFT, RIGHT]), plain)


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading(pipe, method):
    pytest.importorskip("accelerate")
    if not torch.cuda.is_available():
        pytest.skip("offloading the pipeline needs an accelerator; the hooks that it installs are tested above")
    plain = generate(pipe, face_image=A)
    getattr(pipe, method)()
    torch.testing.assert_close(generate(pipe, face_image=A).cpu(), plain, rtol=1e-2, atol=1e-2)
    two = generate(pipe, face_image=[[A], [B]], face_boxes=[LEFT, RIGHT]).cpu()
    assert differ(two, plain)
    assert all(parameter.device.type in ("cpu", "meta") for parameter in pipe.vae.parameters())


@pytest.mark.parametrize("people", [1, 2])
def test_compile_repeated_blocks_without_graph_breaks(people):
    pipe = with_adapter(tiny_pipeline())
    faces = {"face_image": A} if people == 1 else {"face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT]}
    other = {"face_image": B} if people == 1 else {"face_image": [[B], [A]], "face_boxes": [LEFT, RIGHT]}
    expected = [generate(pipe, **faces), generate(pipe, **other)]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert close(generate(pipe, **faces), expected[0])
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    assert close(generate(pipe, **other), expected[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    torch.compiler.reset()


def test_another_scale_does_not_compile_again():
    pipe = with_adapter(tiny_pipeline())
    identity = pipe.encode_face(A)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    graphs = []
    for scale in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 1.5, 2.0, 3.0, 4.0):
        generate(pipe, face_image=identity, face_scale=scale)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1] <= 2 * graphs[0]  # scale 1 has no bias
    torch.compiler.reset()


# --- Conversion ----------------------------------------------------------------------------------------------------


@each_family
def test_from_pipe_both_ways(pipe, family):
    stock = kind_of(family, ours=False).from_pipe(pipe)
    assert stock.unet is pipe.unet
    again = quiet(kind_of(family).from_pipe(stock))
    again.set_face_fusion_adapter(pipe._face_adapter)
    assert close(generate(again, face_image=A), generate(pipe, face_image=A))


TASKS = ["", "Img2Img", "Inpaint"]


@each_family
@pytest.mark.parametrize("task", TASKS[:2])
def test_from_pipe_takes_a_tiny_vae_both_ways(family, task):
    ours, task = tiny_pipeline(tiny_vae=True, family=family), kind_of(family, task)
    stock = kind_of(family, ours=False).from_pipe(ours, vae=ours.vae)
    again = task.from_pipe(stock)
    assert again.vae is stock.vae is ours.vae and again.unet is ours.unet
    assert task.from_pipe(ours).vae is ours.vae


@each_family
@pytest.mark.parametrize("task", TASKS)
def test_from_pipe_carries_adapter_and_layer_scales(pipe, family, task):
    pipe.set_face_fusion_scale({"down_blocks": 1.0, "up_blocks": 0.5})
    expected = generate(pipe, face_image=A)
    other = for_task(pipe, task)
    assert other._face_adapter is pipe._face_adapter
    assert other._face_layer_scales == {"down_blocks": 1.0, "up_blocks": 0.5}
    assert other.encode_face(A).mode == "adapter"
    back = quiet(kind_of(family).from_pipe(other))
    assert torch.equal(generate(back, face_image=A), expected)
    other.unload_face_fusion_adapter()  # each has its own state
    assert pipe._face_adapter is not None and pipe._face_layer_scales != 1.0


@each_family
@pytest.mark.parametrize("task", TASKS)
def test_from_pipe_of_a_stock_pipeline_has_no_adapter(family, task):
    other = kind_of(family, task).from_pipe(stock_pipeline(family))
    assert other._face_adapter is None and other._face_layer_scales == 1.0
    assert other.encode_face(A).mode == "training-free"


def test_from_pipe_with_another_unet_leaves_the_adapter_and_says_so(pipe, caplog):
    other = StableDiffusionFaceFusionPipeline.from_pipe(pipe, unet=tiny_unet(seed=3))
    assert other._face_adapter is None
    assert "another UNet" in caplog.text


# --- Other tasks ---------------------------------------------------------------------------------------------------


@each_family
def test_image_to_image(pipe):
    other = for_task(pipe, "Img2Img")
    options = {"image": face(5), "strength": 0.7, "num_inference_steps": 6}
    faced = generate(other, face_image=A, **options)
    assert differ(faced, generate(other, **options))
    placed = generate(other, face_image=[[A], [B]], face_boxes=[LEFT, RIGHT], **options)
    assert differ(placed, faced)


@each_family
def test_inpainting(pipe):
    other = for_task(pipe, "Inpaint")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, 8:] = 255
    options = {"image": face(5), "mask_image": Image.fromarray(mask), "num_inference_steps": 6, "strength": 1.0}
    options |= {"height": 16, "width": 16}
    faced, plain = generate(other, face_image=A, **options), generate(other, **options)
    assert differ(faced[..., 4:], plain[..., 4:])
    assert close(faced[..., :4], plain[..., :4])  # what is kept is kept
