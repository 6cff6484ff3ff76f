"""Depth ControlNet beside Face Fusion: diffusers' own pipeline with our faces, from the same components."""

import io
import logging
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from PIL import Image
from test_several_people import LEFT, RIGHT, FakeDetector, close, differ
from tiny_models import (
    face,
    family_of,
    generate,
    stock_pipeline,
    tiny_controlnet,
    tiny_pipeline,
    with_adapter,
)
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

from face_fusion_pipeline.control_pictures import control_depth, depth_image, is_depth_map, load_depth_estimator
from face_fusion_pipeline.face_errors import (
    FaceAxesError,
    FaceFusionError,
    LandmarksError,
    ModelNotFoundError,
    NoFaceError,
    UnreadableImageError,
)
from face_fusion_pipeline.face_landmarks import Pose, draw_landmarks, posed
from face_fusion_pipeline.face_models import FaceFit
from face_fusion_pipeline.face_text_to_image import one_controlnet
from face_fusion_pipeline.pipeline_controlnet import at_size


A, B = face(0), face(1)
DEPTH = Image.fromarray(np.linspace(0, 255, 256, dtype=np.uint8).reshape(16, 16))
PHOTO = face(7)
LOW = (10, 10, 15, 15)


def brightness(image):
    """A depth estimator that tells photos apart."""
    return np.asarray(image.convert("L"), dtype=np.float32)


def with_nets(count, family="sd"):
    pipe = tiny_pipeline(family=family)
    nets = [tiny_controlnet(pipe.unet, seed) for seed in range(2, 2 + count)]
    pipe.register_modules(controlnet=one_controlnet(nets if count > 1 else nets[0]))
    return pipe


class FacesInTurn(FakeDetector):
    """Finds other faces in every picture it is shown."""

    def __init__(self, *pictures):
        super().__init__()
        self.pictures = pictures

    def detect(self, image):
        self.boxes = self.pictures[len(self.seen) % len(self.pictures)]
        return super().detect(image)


@pytest.fixture
def family():
    """Where a test is not `each_family`."""
    return "sd"


each_family = pytest.mark.parametrize("family", ("sd", "xl"))


@pytest.fixture
def pipe(family):
    return with_adapter(with_nets(1, family))


@each_family
def test_without_a_face_it_is_diffusers_own_controlnet_pipeline(pipe):
    stock = stock_pipeline(family_of(pipe), "ControlNet", controlnet=pipe.controlnet)
    options = {"controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.6}
    expected = generate(stock, image=DEPTH.convert("RGB"), **options)
    assert torch.equal(generate(pipe, control_image=DEPTH, **options), expected)
    assert differ(expected, generate(pipe))
    faced = generate(pipe, control_image=DEPTH, face_image=A, **options)
    assert differ(faced, expected)
    assert close(faced, generate(pipe, control_image=DEPTH, face_image=pipe.encode_face(A), **options))


@each_family
def test_several_controlnets(family):
    pipe = with_nets(2, family)
    both = generate(pipe, control_image=[DEPTH, DEPTH], face_image=A, controlnet_conditioning_scale=[1.0, 0.5])
    one = generate(pipe, control_image=[DEPTH, DEPTH], face_image=A, controlnet_conditioning_scale=[1.0, 0.0])
    assert differ(both, one)


def test_only_photos_have_their_depth_estimated():
    """Beside a depth net, the coloured map of another net (a pose, say) reaches it as it is."""
    pipe = with_nets(2)
    pose, estimated, seen = face(8), [], []

    def estimator(image):
        estimated.append(image)
        return brightness(image)

    hook = pipe.controlnet.nets[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            kwargs["controlnet_cond"] if "controlnet_cond" in kwargs else args[3]
        ),
        with_kwargs=True,
    )
    options = {"num_inference_steps": 1, "depth_estimator": estimator}
    generate(pipe, control_image=[PHOTO, pose], control_kind=["photo", "map"], face_image=A, **options)
    hook.remove()
    assert [image.tobytes() for image in estimated] == [PHOTO.tobytes()]
    expected = torch.from_numpy(np.array(pose)).permute(2, 0, 1) / 255
    torch.testing.assert_close(seen[0][0], expected)
    with pytest.raises(FaceFusionError, match=r"control_kind=\['photo', 'map'\]"):  # a photo or a map?
        generate(pipe, control_image=[PHOTO, pose], **options)
    with pytest.raises(FaceAxesError, match="3 values of control_kind for 2 ControlNets"):
        generate(pipe, control_image=[PHOTO, pose], control_kind=["photo"] * 3, **options)
    for wrong in (PHOTO, [PHOTO] * 3, [[PHOTO], [pose]]):
        with pytest.raises(FaceAxesError, match="control images for 2 ControlNets"):
            generate(pipe, ["a cat", "a dog"], control_image=wrong, control_kind="map", **options)
    with pytest.raises(FaceAxesError, match="for 3 prompts, but there are 2"):
        generate(pipe, ["a cat", "a dog"], control_image=[[PHOTO, pose]] * 3, control_kind="map", **options)


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        list(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))),
        np.random.default_rng(0).random((2, 16, 16, 3), dtype=np.float32),
        [DEPTH.convert("RGB"), DEPTH.convert("RGB").transpose(Image.Transpose.ROTATE_90)],
    ],
    ids=["tensor", "tensors", "array", "pictures"],
)
def test_what_diffusers_takes_is_taken(pipe, image):
    stock = stock_pipeline(family_of(pipe), "ControlNet", controlnet=pipe.controlnet)
    prompts = ["a cat", "a dog"]
    expected = generate(stock, prompts, image=image, num_inference_steps=1)
    assert torch.equal(generate(pipe, prompts, control_image=image, num_inference_steps=1), expected)
    people = {"face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT]}
    faced = generate(pipe, prompts, control_image=image, num_inference_steps=1, **people)
    assert faced.shape == expected.shape
    assert differ(faced, expected)


def test_several_images_for_several_controlnets():
    """Prompts × ControlNets, as diffusers nests them."""
    pipe = with_nets(2)
    stock = stock_pipeline(task="ControlNet", controlnet=MultiControlNetModel(list(pipe.controlnet.nets)))
    images = [[face(10), face(11)], [face(12), face(13)]]
    prompts, options = ["a cat", "a dog"], {"num_inference_steps": 1}
    expected = generate(stock, prompts, image=[list(row) for row in images], **options)
    assert torch.equal(generate(pipe, prompts, control_image=images, control_kind="map", **options), expected)
    people = {"face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT]}
    faced = generate(pipe, prompts, control_image=images, control_kind="map", **people, **options)
    alone = generate(pipe, "a dog", 1, control_image=images[1], control_kind="map", **people, **options)
    assert close(faced[1:], alone)


@each_family
def test_guidance_start_and_end(pipe):
    strengths = []
    hook = pipe.controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: strengths.append(kwargs["conditioning_scale"]), with_kwargs=True
    )
    options = {"control_image": DEPTH, "face_image": A, "num_inference_steps": 4}
    faced = generate(pipe, control_guidance_start=0.25, control_guidance_end=0.75, **options)
    hook.remove()
    assert strengths == [0, 1, 1, 0]
    assert differ(faced, generate(pipe, **options))
    assert differ(faced, generate(pipe, **{**options, "face_image": None}, control_guidance_start=0.25))


@each_family
def test_interrupting_the_pipeline_called_stops_the_steps(pipe):
    steps = []

    def stop(_, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True
        return tensors

    options = {"control_image": DEPTH, "face_image": A}
    stopped = generate(pipe, callback_on_step_end=stop, **options)
    assert steps == [0]
    finished = generate(pipe, **options)  # the next call is not stopped
    assert differ(stopped, finished)


@each_family
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


def test_the_controlnet_is_weaker_in_the_calling_thread_only(pipe):
    inputs = {"sample": torch.rand(1, 4, 8, 8), "timestep": 1, "encoder_hidden_states": torch.rand(1, 12, 24)}
    inputs |= {"controlnet_cond": torch.rand(1, 3, 16, 16), "return_dict": False}

    @torch.no_grad()
    def control():
        return pipe.controlnet(**inputs)[1]

    expected, seen = control(), []

    def other_thread(_, step, timestep, tensors):
        thread = threading.Thread(target=lambda: seen.append(control()))
        thread.start()
        thread.join()
        return tensors

    options = {"face_image": A, "face_boxes": [LEFT], "control_image": DEPTH, "num_inference_steps": 1}
    generate(pipe, control_face_scale=0.0, callback_on_step_end=other_thread, **options)
    assert torch.equal(seen[0], expected)


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


@each_family
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


def test_each_prompt_has_the_people_of_its_own_photo(pipe):
    photos, prompts = [PHOTO, face(8)], ["a cat", "a dog"]
    places = [[LEFT, RIGHT], [LEFT, LOW]]
    options = {"face_image": [[A], [B]], "depth_estimator": brightness, "num_inference_steps": 1}
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    result = pipe(
        prompts,
        control_image=photos,
        face_detector=FacesInTurn(*places),
        generator=generators,
        output_type="latent",
        **options,
    )
    np.testing.assert_allclose(result.face_boxes, places, atol=0.1)
    for index, (prompt, photo, found) in enumerate(zip(prompts, photos, places, strict=True)):
        alone = generate(pipe, prompt, index, control_image=photo, face_detector=FakeDetector(*found), **options)
        assert close(result.images[index : index + 1], alone)
    with pytest.raises(FaceAxesError, match="for 3 prompts, but there are 2"):
        generate(pipe, prompts, control_image=[PHOTO] * 3, **options)


def test_control_face_scale_without_a_face_says_that_it_does_nothing(pipe, caplog):
    options = {"control_image": DEPTH, "num_inference_steps": 1}
    plain = generate(pipe, **options)
    assert not caplog.records
    assert torch.equal(generate(pipe, control_face_scale=0.5, **options), plain)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "control_face_scale=0.5 does nothing without a face_image" in caplog.text


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


@each_family
def test_a_controlnet_is_saved_and_loaded_as_a_component(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    assert isinstance(again.controlnet, ControlNetModel)
    assert "controlnet" in again.components
    tiny_pipeline(family=family_of(pipe)).save_pretrained(tmp_path / "without")
    assert type(pipe).from_pretrained(tmp_path / "without").controlnet is None


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
    with pytest.raises(FaceFusionError, match="auto, depth, photo, map, got 'sketch'"):
        control_depth(DEPTH, "sketch")
    with pytest.raises(UnreadableImageError, match=r"Tensor of shape \(2, 3, 4, 4\)"):
        control_depth(torch.zeros(2, 3, 4, 4), "photo")
    with pytest.raises(UnreadableImageError, match="finite numbers"):
        control_depth([["a", "b"], ["c", "d"]])


@pytest.mark.parametrize("kind", ["photo", "depth", "map"])
def test_photos_and_maps_are_turned_upright(kind):
    """As `face_layout` is: boxes found in one photo and the depth of the same photo have to agree."""
    sideways = PHOTO.resize((32, 16)) if kind != "depth" else DEPTH.resize((32, 16))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    sideways.save(file, "png", exif=exif)
    upright = sideways.transpose(Image.Transpose.ROTATE_270)
    found = control_depth(Image.open(file), kind, brightness)
    expected = control_depth(upright, kind, brightness)
    assert found.size == (16, 32)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_depth_values_are_stretched_and_near_is_white():
    picture = np.asarray(depth_image(np.array([[1.0, 2.0], [3.0, 5.0]])))
    assert picture[..., 0].tolist() == [[0, 64], [128, 255]]
    assert np.asarray(depth_image(torch.full((1, 4, 4), 3.0))).max() == 0
    half = depth_image(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16).expand(2, 2))
    assert np.asarray(half)[0, :, 0].tolist() == [0, 255]
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


class StubMidas:
    """`controlnet_aux.MidasDetector`: an RGB picture in, a grey one of its own size out."""

    loaded: list[str] = []

    @classmethod
    def from_pretrained(cls, repo):
        cls.loaded.append(repo)
        return cls()

    def __call__(self, image):
        assert image.mode == "RGB"
        return image.convert("L").resize((64, 32))


@pytest.mark.parametrize("name", ["auto", "midas"])
def test_midas_of_controlnet_aux(name, monkeypatch, caplog):
    monkeypatch.setattr(StubMidas, "loaded", [])
    monkeypatch.setitem(sys.modules, "controlnet_aux", SimpleNamespace(MidasDetector=StubMidas))
    with caplog.at_level(logging.INFO, "face_fusion_pipeline"):
        depth = control_depth(PHOTO.resize((48, 24)), estimator=name)
    assert StubMidas.loaded == ["lllyasviel/Annotators"]
    assert "MiDaS" in caplog.text
    assert (depth.mode, depth.size) == ("RGB", (48, 24))
    assert np.asarray(depth).std() > 0


def test_several_photos_load_one_estimator(pipe, monkeypatch):
    monkeypatch.setattr(StubMidas, "loaded", [])
    monkeypatch.setitem(sys.modules, "controlnet_aux", SimpleNamespace(MidasDetector=StubMidas))
    for _ in range(2):
        generate(pipe, ["a cat", "a dog"], control_image=[PHOTO, face(8)], num_inference_steps=1)
    assert len(StubMidas.loaded) == 1


def test_what_a_call_names_is_loaded_once_by_its_name_or_path(pipe):
    loaded = []
    for name in ("here", Path("here"), Path("here")):
        pipe._kept("depth estimator", name, loaded.append)
    assert loaded == ["here"]


def test_a_broken_midas_is_reported_or_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "controlnet_aux", SimpleNamespace())  # as where its imports fail half-way
    with pytest.raises(ModelNotFoundError, match="MiDaS is not at hand.*give a depth map"):
        load_depth_estimator("midas")
    with pytest.raises(ModelNotFoundError, match="no depth estimator 'depth-anything"):  # offline, but it was tried
        load_depth_estimator("auto")


# --- Landmarks -----------------------------------------------------------------------------------------------------


class PlainModel:
    """A face model whose faces are a grid of points, as wide as the shape says and as open as the expression."""

    name, expressions = "plain", ("open",)

    def __init__(self):
        self.fitted = []

    def fit(self, photo, box=None):
        self.fitted.append(photo)
        box = box or (4, 4, 12, 12)
        width = np.asarray(photo).mean() / 255
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        return FaceFit(np.array([width]), np.array([width / 2]), Pose(x=x, y=y, scale=4), box, photo.size)

    def points(self, shape, expression, pose):
        grid = np.stack(np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1, 1, 8)), -1).reshape(72, 2)
        return posed(np.pad(grid * [1 + shape[0], 1 + expression[0]], ((0, 0), (0, 1))), pose)

    def expression_of(self, given):
        return np.array([1.0 if given == "open" else 0.0])


def seen_by(pipe, **call):
    """The control pictures (B, 3, H, W) that the ControlNet sees in a call, and the call's result."""
    seen = []
    hook = pipe.controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("controlnet_cond", args[3] if len(args) > 3 else None)),
        with_kwargs=True,
    )
    result = pipe(num_inference_steps=1, guidance_scale=1.0, output_type="latent", **call)
    hook.remove()
    return seen[0], result


@each_family
def test_a_driver_is_drawn_in_the_shape_of_the_person(pipe):
    model, driver = PlainModel(), face(9)
    options = {"control_image": driver, "control_kind": "landmarks", "face_model": model}
    options |= {"face_detector": FakeDetector(LEFT)}
    seen, result = seen_by(pipe, prompt="a cat", face_image=A, **options)
    fits = [model.fit(A), model.fit(driver, LEFT)]
    expected = draw_landmarks(model.points(fits[0].shape, fits[1].expression, fits[1].pose), driver.size)
    found = (seen[0] * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(expected)) and not hasattr(result, "face_boxes")
    own, _ = seen_by(pipe, prompt="a cat", **options)  # nobody in particular: the driver's own shape
    assert not torch.equal(own, seen)
    pipe.face_model = model
    options.pop("face_model")
    again, _ = seen_by(pipe, prompt="a cat", face_image=pipe.encode_face(A), control_source=A, **options)
    assert torch.equal(again, seen)
    with pytest.raises(FaceFusionError, match="control_source="):
        generate(pipe, face_image=pipe.encode_face(A), **options)


def test_strength_0_of_landmarks_is_the_stock_pipeline(pipe):
    options = {"control_image": face(9), "control_kind": "landmarks", "face_model": PlainModel()}
    off = generate(pipe, controlnet_conditioning_scale=0.0, face_detector=FakeDetector(LEFT), **options)
    assert torch.equal(off, generate(stock_pipeline(family_of(pipe))))


def test_each_of_several_people_has_the_points_of_its_place(pipe):
    model, driver = PlainModel(), face(9)
    options = {"prompt": "a cat", "control_image": driver, "control_kind": "landmarks", "face_model": model}
    seen, result = seen_by(pipe, face_image=[[A], [B]], face_detector=FakeDetector(RIGHT, LEFT), **options)
    assert result.face_boxes_source == "given"
    np.testing.assert_allclose(result.face_boxes, [[LEFT, RIGHT]], atol=0.1)
    swapped, _ = seen_by(pipe, face_image=[[B], [A]], face_detector=FakeDetector(RIGHT, LEFT), **options)
    assigned, _ = seen_by(
        pipe, face_image=[[B], [A]], face_detector=FakeDetector(RIGHT, LEFT), face_assign=[1, 0], **options
    )
    half = seen.shape[-1] // 2
    assert not torch.equal(swapped[..., :half], seen[..., :half])
    assert torch.equal(assigned, seen)
    boxes = {"face_boxes": [RIGHT, LEFT], "face_detector": FakeDetector(LEFT)}  # one face drives both
    placed, result = seen_by(pipe, face_image=[[A], [B]], **boxes, **options)
    assert placed[..., :half].any() and placed[..., half:].any()
    np.testing.assert_allclose(result.face_boxes, [[RIGHT, LEFT]])


def test_each_prompt_has_its_own_people_under_one_driver(pipe):
    options = {"control_image": face(9), "control_kind": "landmarks", "face_model": PlainModel()}
    options |= {"face_detector": FakeDetector(LEFT)}
    seen, _ = seen_by(pipe, prompt=["a cat", "a dog"], face_image=[[[A]], [[B]]], **options)
    alone = [seen_by(pipe, prompt="a cat", face_image=[[who]], **options)[0][0] for who in (A, B)]
    assert torch.equal(seen, torch.stack(alone)) and not torch.equal(*alone)


def test_landmarks_beside_depth_and_points_as_they_are():
    pipe = with_nets(2)
    model = PlainModel()
    points = model.points(np.array([0.5]), np.array([0.2]), Pose(x=8, y=8, scale=4))
    options = {"num_inference_steps": 1, "control_kind": ["depth", "landmarks"], "control_image": [DEPTH, points]}
    assert generate(pipe, **options).shape == generate(pipe, num_inference_steps=1).shape
    options["control_image"] = [DEPTH, points + 500]
    with pytest.raises(LandmarksError, match="no point of the face"):
        generate(pipe, **options)
    with pytest.raises(FaceFusionError, match="auto, depth, photo, map, landmarks, got 'pose'"):
        generate(pipe, control_image=[DEPTH, DEPTH], control_kind="pose")


def test_landmarks_without_a_face_model_say_where_one_is_from(pipe, monkeypatch):
    monkeypatch.delenv("FACE_FUSION_FACE_MODEL", raising=False)
    with pytest.raises(ModelNotFoundError, match="face-fusion face-model"):
        generate(pipe, control_image=face(9), control_kind="landmarks")
    with pytest.raises(NoFaceError, match="no face found in the 16x16 driver"):
        options = {"control_kind": "landmarks", "face_model": PlainModel(), "face_detector": FakeDetector()}
        generate(pipe, control_image=face(9), **options)
