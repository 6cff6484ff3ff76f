"""What a model recommends is read with it, kept, carried on and used for what a call does not say."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from tiny_models import face, tiny_pipeline

from face_fusion_pipeline import GuidanceInterval, StableDiffusionFaceFusionPipeline, embedded_model
from face_fusion_pipeline.evaluation.generation import Settings, pipeline_of
from face_fusion_pipeline.face_adapter import create_adapter
from face_fusion_pipeline.face_defaults import DEFAULTS_NAME, FaceDefaults, defaults_of, read_defaults
from face_fusion_pipeline.face_errors import FaceFusionError
from face_fusion_pipeline.face_refinement import steps_of
from face_fusion_pipeline.generation.avatar_model import AVATAR_DEFAULTS
from face_fusion_pipeline.pipeline_img2img import StableDiffusionImg2ImgFaceFusionPipeline


PACKAGE = Path(__file__).parents[1] / "face_fusion_pipeline"
DEFAULTS = FaceDefaults(
    guidance_scale=4.0, low_noise_guidance=2.0, num_inference_steps=3, face_mode="both", face_mirrored=True
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that recommends something."""
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    DEFAULTS.save(folder)
    return folder


@pytest.fixture
def pipe():
    """A model with an adapter, whose first steps are noisy ones."""
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, "xavier", metadata={"resolution": 16}))
    pipe.face_defaults = DEFAULTS
    return pipe


def draw(pipe, **options):
    """Latents of a call that says nothing of guidance, steps and mode but what is in `options`."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", generator=generator, output_type="latent", **options).images


def plainly(pipe, **options):
    """The same call, where the model recommends nothing."""
    kept, pipe.face_defaults = pipe.face_defaults, None
    try:
        return draw(pipe, **options)
    finally:
        pipe.face_defaults = kept


SAID = {"num_inference_steps": 3, "guidance_scale": 4.0}


def test_a_bare_call_is_the_one_that_is_recommended(pipe):
    bare = draw(pipe, face_image=face())
    said = {**SAID, "face_mode": "both", "face_mirrored": True, "callback_on_step_end": GuidanceInterval(2.0)}
    assert torch.equal(bare, plainly(pipe, face_image=face(), **said))
    for other in (
        {"callback_on_step_end": None},
        {"face_mode": "adapter"},
        {"face_mirrored": False},
        {"num_inference_steps": 4},
        {"guidance_scale": 5.0},
    ):
        assert not torch.equal(bare, plainly(pipe, face_image=face(), **{**said, **other})), other
    assert torch.equal(draw(pipe), plainly(pipe, **SAID, callback_on_step_end=GuidanceInterval(2.0)))  # without a face
    assert torch.equal(draw(pipe), draw(pipe, face_image=face(), face_scale=0))


def test_what_is_given_wins(pipe):
    late = GuidanceInterval(2.0)
    assert torch.equal(draw(pipe, guidance_scale=4.0), plainly(pipe, **SAID))  # guidance of all steps
    steps = draw(pipe, num_inference_steps=2)
    assert torch.equal(steps, plainly(pipe, num_inference_steps=2, guidance_scale=4.0, callback_on_step_end=late))
    generator = torch.Generator().manual_seed(0)  # by position: height, width, steps
    positional = pipe("a cat", 16, 16, 2, generator=generator, output_type="latent").images
    assert torch.equal(positional, steps)
    options = {"face_mode": "adapter", "face_mirrored": False, "guidance_scale": 1.0}
    given = draw(pipe, face_image=face(), **options)
    assert torch.equal(given, plainly(pipe, face_image=face(), num_inference_steps=3, **options))


def test_a_callback_is_called_and_one_about_guidance_stands_alone(pipe):
    seen = []

    def watch(pipeline, step, timestep, tensors):
        seen.append((step, pipeline.guidance_scale, sorted(tensors)))
        return tensors

    watched = draw(pipe, callback_on_step_end=watch)
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[-1][1] == 2.0 and seen[0][2] == ["latents"]
    assert torch.equal(watched, draw(pipe))
    own = GuidanceInterval(3.0, below=1.0)
    assert torch.equal(
        draw(pipe, callback_on_step_end=own),
        plainly(pipe, **SAID, callback_on_step_end=GuidanceInterval(3.0, below=1.0)),
    )
    with pytest.raises(TypeError, match="unknown argument"):
        draw(pipe, guidance=3)
    cut = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    assert torch.equal(draw(pipe, callback_on_step_end=cut), plainly(pipe, **SAID, callback_on_step_end=cut))


def test_identities(pipe):
    pipe.face_defaults = FaceDefaults(face_mode="both", face_mirrored=True)
    one = pipe.encode_face(face())
    assert one.mode == "both" and one.n_refs == 2
    assert pipe.encode_face(face(), weights=[3]).weights.tolist() == [3, 3]
    assert pipe.encode_face(face(), weights=torch.tensor(3.0)).weights.tolist() == [3, 3]
    assert pipe.encode_face([face(0), face(1)], [2, 1]).n_refs == 2  # several photos show enough
    assert pipe.encode_face([face(0), face(1)], [2, 1], mirrored=True).weights.tolist() == [2, 1, 2, 1]
    assert pipe.encode_face(face(), face_mode="adapter", mirrored=False).n_refs == 1
    flipped = face().transpose(0)
    by_hand = pipe.encode_face([face(), flipped])
    assert all(torch.equal(one.keys[name], by_hand.keys[name]) for name in one.keys)
    pipe.unload_face_fusion_adapter()
    assert pipe.encode_face(face()).mode == "training-free"  # "both" needs weights


def test_models_that_recommend_nothing_are_as_before(pipe):
    pipe.face_defaults = None
    expected = StableDiffusionPipeline(**{k: v for k, v in pipe.components.items() if k != "controlnet"},
                                       requires_safety_checker=False)  # fmt: skip
    expected.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe, num_inference_steps=2), draw(expected, num_inference_steps=2))
    assert pipe.encode_face(face()).n_refs == 1 and pipe.encode_face(face()).mode == "adapter"
    assert steps_of(pipe, {}) == 50 and steps_of(pipe, {"num_inference_steps": 7}) == 7
    pipe.face_defaults = DEFAULTS
    assert steps_of(pipe, {}) == 3


def test_every_way_to_load_reads_the_file(folder, tmp_path, monkeypatch):
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(folder)
    assert pipe.face_defaults == DEFAULTS
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    dynamic = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(PACKAGE), trust_remote_code=True)
    assert type(dynamic).__module__ != "face_fusion_pipeline.pipeline"
    assert dynamic.face_defaults.to_dict() == DEFAULTS.to_dict()
    stock = StableDiffusionPipeline.from_pretrained(folder)
    assert StableDiffusionFaceFusionPipeline.from_pipe(stock).face_defaults == DEFAULTS
    assert tiny_pipeline().face_defaults is None

    other = pipe.from_pipe(pipe)
    pipe.face_defaults = FaceDefaults(guidance_scale=3.0)
    image_to_image = StableDiffusionImg2ImgFaceFusionPipeline.from_pipe(pipe)
    assert other.face_defaults == DEFAULTS and image_to_image.face_defaults == pipe.face_defaults
    assert pipe.as_pipeline(StableDiffusionImg2ImgFaceFusionPipeline).face_defaults == pipe.face_defaults
    used = []
    image_to_image.set_progress_bar_config(disable=True)
    image_to_image(
        "a cat", image=face(), num_inference_steps=2, strength=1.0, output_type="latent",
        callback_on_step_end=lambda p, i, t, tensors: used.append(p.guidance_scale) or tensors,
    )  # fmt: skip
    assert set(used) == {3.0}


def test_saved_along_and_not_left_behind(folder, tmp_path):
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "copy")
    assert read_defaults(tmp_path / "copy") == DEFAULTS
    pipe.face_defaults = None
    pipe.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / DEFAULTS_NAME).exists()


def test_evaluations_say_everything_themselves(folder):
    assert pipeline_of(Settings.of(str(folder))).face_defaults is None


@pytest.mark.parametrize("cached", [True, False])
def test_of_a_model_on_the_hub(folder, tmp_path, monkeypatch, cached):
    """diffusers does not download files that it does not know: this one is fetched, of the same commit."""
    snapshot = tmp_path / "models--ada--avatars" / "snapshots" / "0123abcd"
    shutil.copytree(folder, snapshot)
    if not cached:
        os.rename(snapshot / DEFAULTS_NAME, tmp_path / DEFAULTS_NAME)
    asked = []

    def download(repo_id, filename, **place):
        asked.append((repo_id, filename, place["revision"]))
        shutil.copy(tmp_path / DEFAULTS_NAME, snapshot)
        return str(snapshot / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(StableDiffusionFaceFusionPipeline, "download", lambda *args, **options: str(snapshot))
    pipe = StableDiffusionFaceFusionPipeline.from_pretrained("ada/avatars")
    assert pipe.face_defaults == DEFAULTS
    assert asked == ([] if cached else [("ada/avatars", DEFAULTS_NAME, "0123abcd")])


def test_a_model_that_cannot_be_asked_recommends_nothing(tmp_path):
    assert defaults_of("nobody/nothing", cache_dir=tmp_path) is None  # tests are offline
    assert defaults_of("no hub id") is None and defaults_of(tmp_path) is None


WRONG = {
    "guidance_scale": (-1, "from 0 to 100"),
    "low_noise_guidance": (1, "above 1"),
    "num_inference_steps": (2.5, "whole number"),
    "face_mode": ("magic", "one of adapter"),
    "face_mirrored": ("yes", "true or false"),
    "vocabulary": (["a"], "a list of texts for each group"),
    "guidence": (4, "unknown key"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_bad_value_is_refused_with_file_and_key(folder, tmp_path, key):
    value, words = WRONG[key]
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / DEFAULTS_NAME).write_text(json.dumps({"guidance_scale": 4, key: value}))
    with pytest.raises(FaceFusionError, match=f"(?s){DEFAULTS_NAME}.*{key}.*{words}|{DEFAULTS_NAME}.*{words}.*{key}"):
        StableDiffusionFaceFusionPipeline.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "words"), [("{", "as JSON"), ("[]", "an object"), ('{"low_noise_guidance": 2}', "above 1")]
)
def test_a_file_that_says_nothing_sensible_is_refused(tmp_path, text, words):
    (tmp_path / DEFAULTS_NAME).write_text(text)
    with pytest.raises(FaceFusionError, match=f"{DEFAULTS_NAME}.*{words}"):
        read_defaults(tmp_path)


def test_the_embedded_model_recommends_what_models_of_avatars_do():
    embedded = read_defaults(embedded_model()).to_dict()
    embedded.pop("vocabulary", None)
    assert embedded.pop("face_familiarity") == "face_familiarity.safetensors"  # fitted to these weights alone
    assert embedded == AVATAR_DEFAULTS.to_dict()
