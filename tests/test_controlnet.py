"""Depth ControlNet beside Face Fusion: diffusers' own pipeline with our faces, from the same components."""

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from test_several_people import LEFT, RIGHT, FakeDetector, close, differ
from tiny_models import face, generate, tiny_components, tiny_controlnet, tiny_pipeline
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

from face_fusion_pipeline import StableDiffusionFaceFusionPipeline
from face_fusion_pipeline.face_adapter import create_adapter
from face_fusion_pipeline.face_depth import control_depth, depth_image, is_depth_map
from face_fusion_pipeline.face_errors import FaceFusionError, ModelNotFoundError, UnreadableImageError
from face_fusion_pipeline.pipeline_controlnet import at_size


A, B = face(0), face(1)
DEPTH = Image.fromarray(np.linspace(0, 255, 256, dtype=np.uint8).reshape(16, 16))
PHOTO = face(7)


@pytest.fixture
def pipe():
    components = tiny_components()
    pipe = StableDiffusionFaceFusionPipeline(**components, controlnet=tiny_controlnet(components["unet"]))
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, "xavier", metadata={"resolution": 16}))
    return pipe


def test_without_a_face_it_is_diffusers_own_controlnet_pipeline(pipe):
    stock = StableDiffusionControlNetPipeline(**tiny_components(), controlnet=pipe.controlnet, image_encoder=None)
    stock.set_progress_bar_config(disable=True)
    options = {"controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.6}
    expected = generate(stock, image=DEPTH.convert("RGB"), **options)
    assert torch.equal(generate(pipe, control_image=DEPTH, **options), expected)
    assert differ(expected, generate(pipe))
    faced = generate(pipe, control_image=DEPTH, face_image=A, **options)
    assert differ(faced, expected)
    assert close(faced, generate(pipe, control_image=DEPTH, face_image=pipe.encode_face(A), **options))


def test_several_controlnets():
    components = tiny_components()
    nets = [tiny_controlnet(components["unet"], seed) for seed in (2, 3)]
    pipe = StableDiffusionFaceFusionPipeline(**components, controlnet=nets)
    pipe.set_progress_bar_config(disable=True)
    both = generate(pipe, control_image=[DEPTH, DEPTH], face_image=A, controlnet_conditioning_scale=[1.0, 0.5])
    one = generate(pipe, control_image=[DEPTH, DEPTH], face_image=A, controlnet_conditioning_scale=[1.0, 0.0])
    assert differ(both, one)


def test_the_controlnet_is_weaker_inside_faces_only(pipe):
    seen = []
    boxes = [(1, 6, 6, 10), (10, 6, 15, 10)]  # enlarged they leave the uppermost latents free
    options = {"num_inference_steps": 1, "face_image": [[A], [B]], "face_boxes": boxes, "control_image": DEPTH}
    handle = None
    for scale in (1.0, 0.0):
        handle and handle.remove()
        # a hook on the UNet sees what comes out of ControlNet's hooks
        handle = pipe.unet.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("down_block_additional_residuals")), with_kwargs=True
        )
        generate(pipe, control_face_scale=scale, **options)
    handle.remove()
    full, weak = (states[0] for states in seen if states is not None)  # the first: 8x8 latents
    assert full.shape[0] == 2  # guidance
    assert (weak[:, :, 4, 0:3] == 0).all()
    assert (weak[:, :, 4, 5:8] == 0).all()
    assert torch.equal(weak[:, :, 0], full[:, :, 0])
    assert not pipe.controlnet._forward_hooks


def test_control_face_scale_of_a_single_person_finds_its_place(pipe):
    detector = FakeDetector(LEFT)
    options = {"face_image": A, "control_image": PHOTO, "depth_estimator": lambda image: np.asarray(DEPTH)}
    weak = generate(pipe, control_face_scale=0.0, face_detector=detector, **options)
    assert len(detector.seen) > 0
    assert differ(weak, generate(pipe, **options))
    boxed = {"control_image": DEPTH, "face_image": A, "face_boxes": [LEFT], "control_face_scale": 0.0}
    assert close(weak, generate(pipe, **boxed))
    with pytest.raises(FaceFusionError, match="control_face_scale"):
        generate(pipe, control_face_scale=-1, **options)


def test_people_are_looked_for_in_the_control_photo(pipe):
    result = pipe(
        "a cat",
        face_image=[[A], [B]],
        control_image=PHOTO,
        depth_estimator=lambda image: np.asarray(DEPTH),
        face_detector=FakeDetector(RIGHT, LEFT),
        num_inference_steps=2,
    )
    assert result.face_boxes_source == "layout"
    np.testing.assert_allclose(result.face_boxes, [[LEFT, RIGHT]], atol=0.1)


def test_maps_are_averaged_to_each_size():
    strength = torch.ones(2, 1, 8, 8)
    strength[1, :, :, :4] = 0
    out = at_size(torch.ones(4, 3, 2, 2), strength)
    assert out[0].eq(1).all()
    assert out[3, 0].tolist() == [[0, 1], [0, 1]]
    assert at_size(torch.ones(2, 3, 1, 1), strength)[1, 0].item() == 0.5


def test_missing_controlnet_and_positional_arguments_are_refused(pipe):
    with pytest.raises(FaceFusionError, match="needs a ControlNet"):
        generate(tiny_pipeline(), control_image=DEPTH)
    with pytest.raises(TypeError, match="named"):
        pipe("a cat", 16, control_image=DEPTH)


def test_a_controlnet_is_saved_and_loaded_as_a_component(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionFaceFusionPipeline.from_pretrained(tmp_path)
    assert isinstance(again.controlnet, ControlNetModel)
    assert "controlnet" in again.components
    tiny_pipeline().save_pretrained(tmp_path / "without")
    assert StableDiffusionFaceFusionPipeline.from_pretrained(tmp_path / "without").controlnet is None


# --- Depth maps ----------------------------------------------------------------------------------------------------


def test_depth_maps_are_told_from_photos():
    assert is_depth_map(DEPTH)
    assert is_depth_map(DEPTH.convert("RGB"))
    assert is_depth_map(Image.fromarray(np.ones((16, 16), dtype=np.float32)))
    assert not is_depth_map(PHOTO)
    calls = []

    def estimator(image):
        calls.append(image.mode)
        return np.arange(64.0).reshape(8, 8)

    assert control_depth(DEPTH, estimator=estimator).mode == "RGB"
    assert not calls
    estimated = control_depth(PHOTO, estimator=estimator)
    assert estimated.size == PHOTO.size
    control_depth(DEPTH.convert("RGB"), "photo", estimator)
    assert calls == ["RGB", "RGB"]
    with pytest.raises(ValueError, match="'auto', 'depth' or 'photo'"):
        control_depth(DEPTH, "sketch")


def test_depth_values_are_stretched_and_near_is_white():
    picture = np.asarray(depth_image(np.array([[1.0, 2.0], [3.0, 5.0]])))
    assert picture[..., 0].tolist() == [[0, 64], [128, 255]]
    assert np.asarray(depth_image(torch.full((1, 4, 4), 3.0))).max() == 0
    with pytest.raises(UnreadableImageError, match="finite"):
        depth_image(np.full((4, 4), np.nan))


def test_transformers_depth_model_from_a_folder(tmp_path):
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 4, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    DPTForDepthEstimation(config).save_pretrained(tmp_path)
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    depth = control_depth(PHOTO.resize((48, 40)), estimator=str(tmp_path))
    assert depth.size == (48, 40)
    assert np.asarray(depth).std() > 0


def test_a_missing_estimator_is_reported(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no depth estimator"):
        control_depth(PHOTO, estimator=str(tmp_path / "nowhere"))
