"""Which rows of a batch see a face is said by the pipeline: guidance, PAG, other people's pipelines and mixins."""

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionPipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from test_several_people import LEFT, RIGHT, FakeDetector
from tiny_models import GUIDED, face, generate, tiny_components, tiny_pipeline, with_adapter

from face_fusion_pipeline.face_attention import FaceCall
from face_fusion_pipeline.face_errors import FaceFusionError
from face_fusion_pipeline.face_fusion_mixin import FaceFusionMixin
from face_fusion_pipeline.face_self_attention import SelfAttentionReference


A, B = face(0), face(1)


class PerturbedPipeline(FaceFusionMixin, StableDiffusionPAGPipeline):
    """Perturbed-attention guidance with faces."""


def perturbed(**kwargs: Any) -> Any:
    pipe = PerturbedPipeline(**tiny_components(), pag_applied_layers="mid", **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return with_adapter(pipe)


@pytest.mark.parametrize(
    ("call", "batch", "shares", "expected"),
    [
        (FaceCall(), 4, 1, [(0, 4, 0)]),
        (FaceCall(active=False), 4, 2, [(0, 4, None)]),
        (FaceCall(GUIDED), 4, 2, [(0, 2, None), (2, 3, 0), (3, 4, 1)]),
        (FaceCall((*GUIDED, "perturbed")), 6, 1, [(0, 2, None), (2, 6, 0)]),
        (FaceCall((*GUIDED, "perturbed")), 6, 2, [(0, 2, None), (2, 3, 0), (3, 4, 1), (4, 5, 0), (5, 6, 1)]),
    ],
)
def test_rows_by_their_roles(call, batch, shares, expected):
    assert call.segments(batch, shares) == expected


@pytest.mark.parametrize(("call", "batch"), [(FaceCall(GUIDED), 3), (FaceCall(GUIDED, images=1), 4)])
def test_a_batch_of_another_form_is_refused(call, batch):
    with pytest.raises(FaceFusionError, match=f"got {batch} rows, where unconditional \\+ conditional"):
        call.segments(batch, 1)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_perturbed_rows_see_the_face_as_conditional_ones_do(guidance):
    pipe = perturbed()
    settings = {"guidance_scale": guidance, "pag_scale": 2.0}
    both = generate(pipe, ["a cat", "a dog"], face_image=[[[A]], [[B]]], face_boxes=[LEFT], **settings)
    for index, (prompt, someone) in enumerate((("a cat", A), ("a dog", B))):
        alone = generate(pipe, prompt, index, face_image=[[someone]], face_boxes=[LEFT], **settings)
        torch.testing.assert_close(both[index], alone[0], atol=1e-4, rtol=1e-3)
    plain = generate(pipe, ["a cat", "a dog"], **settings)
    assert not torch.allclose(both[0], plain[0], atol=1e-3)


def test_perturbation_of_layers_that_see_a_face_is_refused():
    pipe = perturbed()
    own = pipe.encode_face(A, face_mode="both", self_attention=SelfAttentionReference(layers=("mid_block",)))
    with pytest.raises(FaceFusionError, match="mid_block.*perturbed"):
        generate(pipe, face_image=own, pag_scale=2.0)
    generate(pipe, face_image=own, pag_scale=0.0)
    generate(pipe, face_image=pipe.encode_face(A, face_mode="both"), pag_scale=2.0)  # those of up_blocks stay whole


# --- Other people's pipelines --------------------------------------------------------------------------------------


class Talkative:
    """A mixin that takes one argument and hands the rest on, as many do."""

    said: str = ""

    def __call__(self, *args: Any, greeting: str = "", **kwargs: Any) -> Any:
        self.said = greeting
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class TalkativePipeline(FaceFusionMixin, Talkative, StableDiffusionPipeline):
    """Our mixin before another's."""


class BarePipeline(StableDiffusionPipeline):
    """A pipeline whose call has no step callback."""

    def __call__(
        self, prompt: Any = None, num_inference_steps: int = 2, generator: Any = None, output_type: str = "pil"
    ):
        return super().__call__(
            prompt, num_inference_steps=num_inference_steps, generator=generator, output_type=output_type
        )


class BareFacePipeline(FaceFusionMixin, BarePipeline):
    """Our mixin before it."""

    _guidance_scale = 7.5


def pipeline_of(kind: type) -> Any:
    pipe = kind(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return with_adapter(pipe)


def test_mixins_compose():
    pipe = pipeline_of(TalkativePipeline)
    expected = generate(with_adapter(tiny_pipeline()), face_image=A)
    assert torch.equal(generate(pipe, face_image=A, greeting="hello"), expected) and pipe.said == "hello"


def test_a_pipeline_without_step_callback():
    pipe = pipeline_of(BareFacePipeline)
    expected = generate(with_adapter(tiny_pipeline()), face_image=A)
    assert torch.equal(generate(pipe, face_image=A), expected)
    with pytest.raises(FaceFusionError, match="callback_on_step_end"):
        generate(pipe, face_image=A, face_start=0.5)


def test_without_text_encoder_an_identity_serves_and_a_photo_is_refused():
    pipe = with_adapter(tiny_pipeline())
    identity = pipe.encode_face(A)
    states, negative = pipe.encode_prompt("a cat", "cpu", 1, True)
    expected = generate(pipe, face_image=identity)
    pipe.text_encoder = pipe.tokenizer = None
    embeds = {"prompt_embeds": states, "negative_prompt_embeds": negative}
    settings = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    assert torch.equal(pipe(face_image=identity, **embeds, **settings).images, expected)
    with pytest.raises(FaceFusionError, match="no text_encoder and no tokenizer.*empty prompt"):
        pipe(face_image=A, **embeds)


def test_a_scheduler_without_noise_levels_is_named():
    pipe = tiny_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(FaceFusionError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        pipe.encode_face(A)
    pipe.encode_face(A, self_attention=SelfAttentionReference(timestep=0))


# --- The draft -----------------------------------------------------------------------------------------------------


def test_a_draft_that_is_stopped_ends_the_call():
    pipe = with_adapter(tiny_pipeline())
    calls: list[int] = []

    def stop(running: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append(step)
        running._interrupt = True
        return tensors

    result = pipe(
        "a cat",
        num_inference_steps=3,
        face_image=[[A], [B]],
        face_detector=FakeDetector(LEFT, RIGHT),
        callback_on_step_end=stop,
    )
    assert calls == [0] and len(result.images) == 1 and "face_boxes" not in result
    generate(pipe, face_image=A)  # the UNet is free
