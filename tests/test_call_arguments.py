"""Arguments of a call: what their numbers must match, which sizes they mean, what is ignored and what refused."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_several_people import LEFT, RIGHT, FakeDetector, close
from tiny_models import XL_UNET, embeddings, face, family_of, for_task, generate, tiny_pipeline, tiny_unet

from face_fusion_pipeline import GuidanceInterval, SelfAttentionReference
from face_fusion_pipeline.face_defaults import few_step_defaults
from face_fusion_pipeline.face_embedders import CheckedEmbedder
from face_fusion_pipeline.face_errors import FaceAxesError, FaceFusionError, InvalidLayoutError, InvalidScaleError
from face_fusion_pipeline.face_prior import PriorSettings
from face_fusion_pipeline.face_refinement import check_strength


A, B, C = face(0), face(1), face(2)
TWO = {"face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT]}


@pytest.fixture
def pipe(family):
    return tiny_pipeline(family=family)


# --- Sizes ---------------------------------------------------------------------------------------------------------


def picture(height=24, width=20):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def made_and_expected(pipe, monkeypatch, **arguments):
    """Size of the images that a call with two people makes, and the sizes that were counted on before."""
    expected = []

    def output_size(arguments, original=pipe._output_size):
        expected.append(original(arguments))
        return expected[-1]

    monkeypatch.setattr(pipe, "_output_size", output_size)
    latents = generate(pipe, **TWO, **arguments)
    assert expected
    return tuple(2 * side for side in latents.shape[-2:]), set(expected)


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, (16, 16)), ({"height": 24}, (16, 16)), ({"width": 40}, (16, 16)), ({"height": 24, "width": 40}, (24, 40))],
)
def test_text_to_image_takes_both_sides_or_none(pipe, monkeypatch, given, size):
    if family_of(pipe) == "xl":  # there each side counts for itself
        size = (given.get("height", 16), given.get("width", 16))
    assert made_and_expected(pipe, monkeypatch, **given) == (size, {size})


def test_a_unet_may_be_wider_than_high(monkeypatch):
    pipe = tiny_pipeline()  # diffusers' XL pipelines take squares only
    pipe.unet = tiny_unet(sample_size=(8, 12))
    pipe._is_unet_config_sample_size_int = False  # what the constructor notes
    assert made_and_expected(pipe, monkeypatch) == ((16, 24), {(16, 24)})


@pytest.mark.parametrize(
    "image",
    [
        picture(),
        [picture()],
        np.asarray(picture()) / 255,
        torch.rand(3, 24, 20),
        torch.rand(1, 3, 24, 20),
        torch.randn(1, 4, 12, 10),
    ],
    ids=["picture", "list", "array", "tensor", "batch", "latents"],
)
def test_image_to_image_takes_the_size_of_the_image(pipe, monkeypatch, image):
    other = for_task(pipe, "Img2Img")
    assert made_and_expected(other, monkeypatch, image=image, strength=1.0) == ((24, 20), {(24, 20)})


@pytest.mark.parametrize(
    ("given", "size"),
    [({}, (16, 16)), ({"height": 24}, (24, 16)), ({"width": 40}, (16, 40)), ({"height": 24, "width": 40}, (24, 40))],
)
def test_inpainting_takes_the_size_of_the_unet(pipe, monkeypatch, given, size):
    other = for_task(pipe, "Inpaint")
    options = {"image": picture(), "mask_image": Image.new("L", (20, 24), "white"), "strength": 1.0}
    assert made_and_expected(other, monkeypatch, **options, **given) == (size, {size})


def test_latents_say_the_size_where_they_are_given(pipe, monkeypatch):
    noise = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    assert made_and_expected(pipe, monkeypatch, latents=noise) == ((24, 16), {(24, 16)})


def test_people_are_not_placed_in_a_part_of_a_picture(pipe):
    other = for_task(pipe, "Inpaint")
    mask = np.zeros((16, 16), np.uint8)
    mask[9:, 9:] = 255
    options = {"image": picture(16, 16), "mask_image": Image.fromarray(mask), "strength": 1.0, "padding_mask_crop": 2}
    options["output_type"] = "pil"
    generate(other, face_image=A, **options)  # one person is everywhere
    with pytest.raises(InvalidLayoutError, match="with padding_mask_crop"):
        generate(other, **TWO, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("face_imagee", "did you mean 'face_image'"),
        ("guidance", "did you mean 'guidance_"),
        ("controlnet_conditioning_scale", "goes with a control_image"),
        ("zzzz", "unknown argument 'zzzz'$"),
    ],
)
@pytest.mark.parametrize("faces", [{}, {"face_image": A}])
def test_an_argument_that_nobody_knows_is_refused(pipe, name, message, faces):
    with pytest.raises(TypeError, match=message):
        generate(pipe, **faces, **{name: 1.0})


def test_a_unet_for_inpainting_looks_at_faces_too(pipe):
    pipe.unet = tiny_unet(in_channels=9, **(XL_UNET if family_of(pipe) == "xl" else {}))
    other = for_task(pipe, "Inpaint")
    options = {"image": picture(16, 16), "mask_image": Image.new("L", (16, 16), "white"), "strength": 1.0}
    assert not close(generate(other, **options, face_image=A), generate(other, **options))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 8}, "takes 8 channels, the latents of its VAE have 4"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 64,
            },
            "as that of SDXL does",
        ),
    ],
)
def test_a_unet_that_cannot_look_at_a_face_is_named(config, message):
    pipe = tiny_pipeline()
    pipe.unet = tiny_unet(**config)
    with pytest.raises(FaceFusionError, match=message):
        pipe.encode_face(A)


# --- What XL is told -----------------------------------------------------------------------------------------------


def told(pipe, call):
    """What the UNet is told in every pass of a call: text, pooled text, sizes."""
    seen = []

    def note(module, args, kwargs):
        added = kwargs["added_cond_kwargs"]
        seen.append((kwargs["encoder_hidden_states"], added["text_embeds"], added["time_ids"]))

    handle = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    call()
    handle.remove()
    return seen


def test_the_reference_has_no_words_and_its_own_size_and_the_picture_what_the_call_says():
    pipe = tiny_pipeline(family="xl")
    options = {"height": 24, "width": 40, "num_inference_steps": 1, "guidance_scale": 1.0}
    options |= {
        "prompt_2": "a dog",
        "original_size": (64, 48),
        "crops_coords_top_left": (4, 2),
        "target_size": (32, 30),
    }
    call = partial(generate, pipe, face_image=A, face_resolution=32, **options)
    (text, pooled, sizes), (of_picture, pooled_2, sizes_2) = told(pipe, call)
    states, _, expected, _ = pipe.encode_prompt("", device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(text, states) and torch.equal(pooled, expected) and pooled.any()
    assert sizes.tolist() == [[32, 32, 0, 0, 32, 32]]
    states, _, expected, _ = pipe.encode_prompt("a cat", "a dog", device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(of_picture, states) and torch.equal(pooled_2, expected)
    assert sizes_2.tolist() == [[64, 48, 4, 2, 32, 30]]


@pytest.mark.parametrize("zeros", [True, False])
def test_the_reference_is_not_the_unconditional_half(zeros):
    """Whether XL zeroes the empty prompt of guidance does not change what a face is encoded with."""
    pipe = tiny_pipeline(family="xl")
    expected = pipe.encode_face(A)
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    found = pipe.encode_face(A)
    assert all(torch.equal(found.keys[name], key) for name, key in expected.keys.items())
    seen = told(pipe, partial(generate, pipe, face_image=found, num_inference_steps=1))
    assert bool(seen[0][1][0].any()) is not zeros


def test_the_refiner_of_xl_is_named():
    pipe = tiny_pipeline(family="xl")
    pipe.unet = tiny_unet(**XL_UNET | {"projection_class_embeddings_input_dim": 24 + 5 * 8})
    with pytest.raises(FaceFusionError, match="takes 5 numbers beside the text"):
        pipe.encode_face(A)


def test_a_part_of_the_steps_and_the_rest_by_image_to_image_make_the_whole():
    """`denoising_end` and `denoising_start`; the window of the faces is of the steps of each call."""
    pipe = tiny_pipeline(family="xl")
    options = {"face_image": pipe.encode_face(A), "num_inference_steps": 4}
    whole = generate(pipe, **options)
    first = generate(pipe, denoising_end=0.5, **options)
    rest = generate(for_task(pipe, "Img2Img"), image=first, denoising_start=0.5, **options)
    assert close(rest, whole) and not close(first, whole)
    late = generate(pipe, denoising_end=0.5, face_start=0.5, **options)
    assert not close(late, first) and not close(late, generate(pipe, denoising_end=0.5, num_inference_steps=4))


def test_pooled_embeddings_have_to_come_along():
    pipe = tiny_pipeline(family="xl")
    given = {name: value for name, value in embeddings(pipe, "a cat").items() if name != "pooled_prompt_embeds"}
    with pytest.raises(ValueError, match="pooled_prompt_embeds"):
        pipe(face_image=A, num_inference_steps=1, **given)


def test_another_pipeline_for_a_part_of_the_work_is_set_up_alike():
    pipe = tiny_pipeline(family="xl")
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pipe.watermark = object()
    inner = pipe.as_pipeline(pipe._image_to_image_class())
    assert inner.config.force_zeros_for_empty_prompt is False and inner.watermark is pipe.watermark
    assert tiny_pipeline().as_pipeline(tiny_pipeline()._image_to_image_class()).config.requires_safety_checker is False


# --- Numbers that belong to people ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[0.9, 0.1], 0.9, (1, [1]), np.array([0.9, 0.1]), [np.float32(0.9), [1]]])
def test_weights_of_several_people_are_nested(pipe, weights):
    with pytest.raises(FaceAxesError, match=r"face_weights=.* for 2 people: .*such as \[\[1\], \[1\]\]"):
        generate(pipe, **TWO, face_weights=weights)


def test_nested_weights_shift_between_the_references_of_each_person(pipe):
    boxes = {"face_boxes": [LEFT, RIGHT]}
    expected = generate(pipe, face_image=[pipe.encode_face([A, C], [3, 1]), pipe.encode_face(B)], **boxes)
    assert close(generate(pipe, face_image=[[A, C], [B]], face_weights=[np.array([3, 1]), None], **boxes), expected)
    with pytest.raises(FaceAxesError, match=r"such as \[\[1, 1\], \[1\]\]"):
        generate(pipe, face_image=[pipe.encode_face([A, C]), [B]], face_weights=[3, 1], **boxes)
    with pytest.raises(FaceAxesError, match="3 values of face_weights for 2 people"):
        generate(pipe, **TWO, face_weights=[[1], [1], [1]])


def test_a_list_of_scales_is_ignored_without_a_face(pipe):
    assert torch.equal(generate(pipe, face_scale=[1.0, 0.5]), generate(pipe))


def test_numbers_of_numpy_are_numbers(pipe):
    """A value that was computed means what the same value written down means."""
    settings = {"face_image": A, "face_mode": "training-free", "num_inference_steps": 2}
    numbers = {"face_scale": 0.5, "face_self_scale": 2, "face_resolution": 16, "face_end": 0.5}
    computed = {name: np.asarray(number)[()] for name, number in numbers.items()}
    assert torch.equal(generate(pipe, **settings, **computed), generate(pipe, **settings, **numbers))
    assert GuidanceInterval(np.float32(2), np.float64(0.25)).config.guidance_scale == 2
    assert SelfAttentionReference(np.float32(4), np.int64(150), np.int64(0)) == SelfAttentionReference()
    trailing = {"timestep_spacing": "trailing"}
    assert few_step_defaults("DDIMScheduler", trailing, np.int64(4)) == few_step_defaults("DDIMScheduler", trailing, 4)
    assert few_step_defaults("DDIMScheduler", trailing, np.int64(4)) is not None
    check_strength(np.float32(0.5), np.int64(10))
    assert json.loads(PriorSettings(np.int64(9), np.float32(2.5)).to_json()) == vars(PriorSettings(9, 2.5))
    assert CheckedEmbedder("mine", np.int64(3), lambda faces: np.ones((len(faces), 3)))([A]).shape == (1, 3)


@pytest.mark.parametrize("window", [{"face_start": "0"}, {"face_end": None}, {"face_start": float("nan")}])
def test_a_window_that_is_no_numbers_is_refused(pipe, window):
    with pytest.raises(InvalidScaleError, match="face_start < face_end"):
        generate(pipe, face_image=A, **window)


@pytest.mark.parametrize("resolution", [0, -16, 15, "16", 16.5])
def test_a_resolution_that_is_none_is_refused(pipe, resolution):
    with pytest.raises(FaceFusionError, match="face_resolution .* multiple of 2"):
        pipe.encode_face(A, face_resolution=resolution)


# --- What the result says ------------------------------------------------------------------------------------------


def test_the_source_of_the_boxes_is_that_of_each_image(pipe):
    class FirstOnly(FakeDetector):
        def detect(self, image):
            return super().detect(image) if not self.seen else []

    settings = {"face_image": [[A], [B]], "num_inference_steps": 2, "num_images_per_prompt": 2}
    mixed = pipe("a cat", face_detector=FirstOnly(LEFT, RIGHT), **settings)
    assert mixed.face_boxes_source == ["draft", "even"]
    assert len(mixed.face_boxes) == 2
    alike = pipe("a cat", face_detector=FakeDetector(LEFT, RIGHT), **settings)
    assert alike.face_boxes_source == "draft"
