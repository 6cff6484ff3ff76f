"""Less guidance at low noise, in pipelines of ours and of diffusers."""

import numpy as np
import pytest
import torch
from test_several_people import LEFT, RIGHT, FakeDetector
from tiny_models import face, for_task, generate, stock_pipeline, tiny_pipeline

from face_fusion_pipeline import GuidanceInterval
from face_fusion_pipeline.face_errors import InvalidScaleError
from face_fusion_pipeline.guidance_interval import place


@pytest.fixture(params=["stock", "without a face", "with a face"])
def draw(request):
    """Generates, and notes the guidance scale of each step."""
    plain = request.param == "stock"
    pipe = stock_pipeline() if plain else tiny_pipeline()
    used = []
    step = pipe.scheduler.step

    def noted(*args, **kwargs):
        used.append(pipe.guidance_scale)
        return step(*args, **kwargs)

    pipe.scheduler.step = noted
    options = {"face_image": face()} if request.param == "with a face" else {}

    def draw(**more):
        used.clear()
        return generate(pipe, num_inference_steps=4, **options, **more), list(used)

    return draw


def test_later_steps_get_another_scale_and_nothing_is_left_behind(draw):
    before, used = draw(guidance_scale=4.0)
    assert used == [4.0] * 4
    late, used = draw(guidance_scale=4.0, callback_on_step_end=GuidanceInterval(2.0))
    assert used == [4.0, 4.0, 2.0, 2.0]
    assert not torch.equal(late, before)
    same, _ = draw(guidance_scale=4.0, callback_on_step_end=GuidanceInterval(4.0))
    assert torch.equal(same, before) and torch.equal(draw(guidance_scale=4.0)[0], before)


@pytest.mark.parametrize(("below", "scales"), [(0.0, [4, 4, 4, 4]), (0.8, [4, 2, 2, 2]), (1.0, [4, 2, 2, 2])])
def test_which_steps_are_later_ones(draw, below, scales):
    assert draw(guidance_scale=4.0, callback_on_step_end=GuidanceInterval(2.0, below))[1] == scales


def test_a_call_without_guidance_stays_without(draw):
    images, used = draw(guidance_scale=1.0, callback_on_step_end=GuidanceInterval(2.0))
    assert used == [1.0] * 4
    assert torch.equal(images, draw(guidance_scale=1.0)[0])


def test_a_draft_is_drawn_with_it_too():
    pipe = tiny_pipeline()
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "callback_on_step_end": GuidanceInterval(2.0)}
    plain = pipe("a cat", generator=torch.Generator().manual_seed(0), **options).images[0]
    detector = FakeDetector(LEFT, RIGHT)
    generate(pipe, face_image=[[face()], [face(1)]], face_detector=detector, **options)
    assert any(np.array_equal(np.asarray(seen), np.asarray(plain)) for seen in detector.seen)


@pytest.mark.parametrize(
    ("family", "task", "part", "expected"),
    [
        ("sd", "Img2Img", {"image": face(), "strength": 0.5}, [4.0, 2.0, 2.0, 2.0]),  # after 376, 251, 126 and 1
        ("xl", "Img2Img", {"image": face(), "strength": 0.5}, [4.0, 2.0, 2.0, 2.0]),
        ("xl", "", {"denoising_end": 0.9}, [4.0] * 5 + [2.0, 2.0]),  # after 876, 751, 626, 501, 376, 251 and 126
        ("xl", "Img2Img", {"image": face(), "denoising_start": 0.5, "denoising_end": 0.9}, [4.0, 2.0, 2.0]),
    ],
)
def test_a_part_of_the_steps_has_the_scale_of_its_timesteps(family, task, part, expected):
    pipe = for_task(tiny_pipeline(family=family), task)
    used = []
    options = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "latent"} | part

    class Noted(GuidanceInterval):
        def callback_fn(self, pipeline, *args):
            tensors = super().callback_fn(pipeline, *args)
            used.append(pipeline.guidance_scale)
            return tensors

    pipe("a cat", face_image=face(), callback_on_step_end=Noted(2.0, 0.2), **options)
    assert used == expected


def test_the_place_of_a_timestep_in_those_of_its_scheduler():
    whole = torch.tensor([9, 8, 8, 7, 7, 6])  # of second order
    assert [place(whole, whole[i], i, 6) for i in range(6)] == list(range(6))
    assert [place(whole, whole[i], i, 3) for i in range(3)] == [0, 1, 2]
    assert [place(whole, whole[i + 2], i, 4) for i in range(4)] == [2, 3, 4, 5]
    assert [place(torch.arange(9, 0, -1), 9 - i, i - 3, 3) for i in range(3, 6)] == [3, 4, 5]


@pytest.mark.parametrize("scale", [1.0, 0, -2, float("nan"), float("inf"), "2"])
def test_a_scale_that_is_no_guidance_is_refused(scale):
    with pytest.raises(InvalidScaleError, match="above 1"):
        GuidanceInterval(scale)


@pytest.mark.parametrize("below", [-0.1, 1.1, None])
def test_a_fraction_out_of_range_is_refused(below):
    with pytest.raises(InvalidScaleError, match="from 0 to 1"):
        GuidanceInterval(2.0, below)
