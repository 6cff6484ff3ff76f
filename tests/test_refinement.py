"""A second pass for small faces: only they change, each as its own person, and nothing else of the picture."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import face, family_of, kind_of, tiny_controlnet, tiny_pipeline, with_adapter

from face_fusion_pipeline.face_detectors import Face
from face_fusion_pipeline.face_errors import (
    FaceAxesError,
    FaceFusionError,
    InvalidLayoutError,
    InvalidPromptError,
    InvalidScaleError,
)
from face_fusion_pipeline.face_layout import box_masks
from face_fusion_pipeline.face_refinement import longer_side, put_back, square_around, strength_for


A, B, C = face(0), face(1), face(2)
LEFT, RIGHT, LARGE = (8, 10, 13, 17), (40, 12, 46, 18), (2, 2, 30, 40)  # of 64x48; the model draws 16x16
STEPS = {"num_inference_steps": 4, "strength": 0.5}


KINDS = {"kl": {}, "tiny-vae": {"tiny_vae": True}, "xl": {"family": "xl"}}


@pytest.fixture(params=KINDS)
def pipe(request):
    return with_adapter(tiny_pipeline(**KINDS[request.param]))


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def generators(count=2):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def changed(before, after):
    """Bool (H, W)."""
    return (np.asarray(before) != np.asarray(after)).any(-1)


def near(box, margin=3):
    """Bool (48, 64): the place of a face, and the soft edge around it."""
    x0, y0, x1, y1 = box
    return box_masks([(x0 - margin, y0 - margin, x1 + margin, y1 + margin)], 48, 64)[0].numpy()


def test_small_faces_change_and_nothing_else(pipe, picture):
    (refined,) = pipe.refine_faces(
        picture, "a", face_image=[[A], [B]], face_boxes=[LEFT, RIGHT], generator=generators(), **STEPS
    )
    assert refined.size == picture.size and refined is not picture
    difference = changed(picture, refined)
    assert not difference[~(near(LEFT) | near(RIGHT))].any()
    for x0, y0, x1, y1 in (LEFT, RIGHT):
        assert difference[y0:y1, x0:x1].mean() > 0.9


def test_it_is_image_to_image_of_the_enlarged_crop(pipe, picture):
    (refined,) = pipe.refine_faces(picture, "a", face_image=A, face_boxes=[LEFT], generator=generators(1), **STEPS)
    square = square_around(LEFT)
    assert square == (4, 8, 16, 20)  # 1.75 times 7, about the middle of the box
    other = kind_of(family_of(pipe), "Img2Img").from_pipe(pipe, vae=pipe.vae)
    crop = picture.crop(square).resize((16, 16), Image.Resampling.LANCZOS)
    drawn = other("a", image=crop, face_image=A, generator=generators(1), **STEPS).images[0]
    x0, y0, x1, y1 = LEFT  # the heart of it is what was drawn, in the size of the picture
    expected = np.asarray(drawn.resize((12, 12), Image.Resampling.LANCZOS))[y0 - 8 : y1 - 8, x0 - 4 : x1 - 4]
    np.testing.assert_allclose(np.asarray(refined, int)[y0:y1, x0:x1], expected, atol=1)


def test_each_face_is_that_of_its_own_person(pipe, picture):
    def refine(left, right):
        return pipe.refine_faces(
            picture, "a", face_image=[[left], [right]], face_boxes=[LEFT, RIGHT], generator=generators(), **STEPS
        )[0]

    difference = changed(refine(A, B), refine(A, C))
    assert difference[near(RIGHT)].any() and not difference[near(LEFT)].any()


def test_together_as_one_after_the_other(pipe, picture):
    first, second = generators()
    together = pipe.refine_faces(
        picture, ["a", "b"], face_image=[[A], [B]], face_boxes=[LEFT, RIGHT], generator=generators(), **STEPS
    )
    once = pipe.refine_faces(picture, "a", face_image=A, face_boxes=[LEFT], generator=[first], **STEPS)
    twice = pipe.refine_faces(once, "b", face_image=B, face_boxes=[RIGHT], generator=[second], **STEPS)
    np.testing.assert_allclose(np.asarray(together[0], int), np.asarray(twice[0], int), atol=1)


def test_a_strength_and_a_negative_prompt_for_each_person(pipe, picture):
    def refine(**options):
        return pipe.refine_faces(
            picture, "a", face_image=[[A], [B]], face_boxes=[LEFT, RIGHT], generator=generators(), **STEPS, **options
        )[0]

    usual = refine(face_scale=1.0, negative_prompt="c")
    for other in (refine(face_scale=[1.0, 5.0], negative_prompt="c"), refine(negative_prompt=["c", "d"])):
        assert changed(usual, other)[near(RIGHT)].any() and not changed(usual, other)[near(LEFT)].any()


def test_large_faces_stay_as_they_are(pipe, picture):
    assert 1.75 * 1.25 * longer_side(LARGE) > 16
    (refined,) = pipe.refine_faces(picture, "a", face_image=A, face_boxes=[LARGE], **STEPS)
    assert not changed(picture, refined).any()
    (refined,) = pipe.refine_faces(
        picture, ["a", "b"], face_image=[[A], [B]], face_boxes=[LARGE, RIGHT], generator=generators(), **STEPS
    )
    difference = changed(picture, refined)
    assert difference[near(RIGHT)].any() and not difference[~near(RIGHT)].any()


def test_a_face_at_the_border(pipe, picture):
    corner = (-2, -1, 4, 5)
    (refined,) = pipe.refine_faces(picture, "a", face_image=A, face_boxes=[corner], generator=generators(1), **STEPS)
    difference = changed(picture, refined)
    assert difference[:5, :4].any() and not difference[~near(corner)].any()


def test_what_two_places_share_belongs_to_the_nearer_face(pipe, picture):
    close = (12, 10, 17, 17)  # its place reaches into LEFT's
    for left in (A, C):
        (refined,) = pipe.refine_faces(
            picture, "a", face_image=[[left], [B]], face_boxes=[LEFT, close], generator=generators(), **STEPS
        )
        if left is A:
            first = refined
    assert not changed(first, refined)[10:17, 15:17].any()
    options = {"face_boxes": [close, LEFT], **STEPS}  # also where the other one is put back last
    one, other = (
        pipe.refine_faces(picture, "a", face_image=[[B], [left]], generator=generators(), **options)[0]
        for left in (A, C)
    )
    assert not changed(one, other)[10:17, 14:17].any() and changed(one, other)[10:17, 8:12].any()


def test_several_pictures_with_the_boxes_of_a_result(pipe, picture):
    result = pipe("a", face_image=[[A], [B]], face_boxes=[LEFT, RIGHT], width=64, height=48, num_inference_steps=1,
                  num_images_per_prompt=2)  # fmt: skip
    options = {"face_image": [[A], [B]], "generator": generators(), **STEPS}
    refined = pipe.refine_faces(result.images, "a", face_boxes=result.face_boxes, **options)
    assert len(refined) == 2
    for before, after in zip(result.images, refined, strict=True):
        assert changed(before, after).any() and not changed(before, after)[~(near(LEFT) | near(RIGHT))].any()
    for_all = pipe.refine_faces(result.images, "a", face_boxes=[LEFT, RIGHT], **options | {"generator": generators()})
    assert not changed(refined[0], for_all[0]).any()


def test_each_picture_may_have_its_own_people(pipe, picture):
    options = {"face_boxes": [LEFT], **STEPS}
    one, other = pipe.refine_faces(
        [picture, picture], "a", face_image=[[[A]], [[B]]], generator=generators(1), **options
    )
    assert changed(one, other)[near(LEFT)].any()
    same = pipe.refine_faces([picture, picture], "a", face_image=[[[A]], [[A]]], generator=generators(1), **options)
    assert not changed(same[0], one).any() and changed(same[1], other)[near(LEFT)].any()


def test_faces_are_found_where_no_boxes_are_given(pipe, picture):
    class Detector:
        name, sizes = "fake", (64,)

        def detect(self, image):
            return [Face(box, 0.99) for box in (RIGHT, LEFT)]

    options = {"face_image": [[A], [B]], "generator": generators(), **STEPS}
    found = pipe.refine_faces(picture, "a", face_detector=Detector(), **options)
    given = pipe.refine_faces(
        picture, "a", face_boxes=[LEFT, RIGHT], **options | {"generator": generators()}
    )  # from left to right
    assert not changed(found[0], given[0]).any()
    with pytest.raises(InvalidLayoutError, match="2 faces found for 3 people"):
        pipe.refine_faces(picture, "a", face_detector=Detector(), face_image=[[A], [B], [C]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"face_boxes": [LEFT]}, FaceAxesError, "1 of face_boxes for 2 people"),
        ({"face_boxes": [[LEFT, RIGHT], [LEFT, RIGHT]]}, FaceAxesError, "face_boxes for 2 pictures, but there are 1"),
        ({"face_boxes": [LEFT, (90, 2, 95, 9)]}, InvalidLayoutError, "outside the 64x48 image"),
        ({"prompt": ["a"]}, InvalidPromptError, "one prompt for all 2 people or one for each"),
        ({"prompt": None}, InvalidPromptError, "got None"),
        ({"strength": 2}, InvalidScaleError, "strength must be above 0 and at most 1, got 2"),
        ({"strength": 0.4}, InvalidScaleError, "strength 0.4 of 2 steps is not one step"),
        ({"face_scale": -1}, InvalidScaleError, "face_scale"),
        ({"face_scale": [1.0]}, FaceAxesError, "1 values of face_scale for 2 people"),
        ({"output_type": "np"}, FaceFusionError, "leave output_type='np' out"),
        ({"num_images_per_prompt": 2}, FaceFusionError, "leave num_images_per_prompt=2 out"),
        ({"return_dict": False}, FaceFusionError, "leave return_dict=False out"),
        ({"face_weights": [1, 2]}, FaceAxesError, "a list with one number for each of its images"),
        ({"stength": 1}, TypeError, "unknown argument 'stength'"),
    ],
)
def test_bad_input_is_named(pipe, picture, arguments, error, message):
    usual = {"prompt": "a", "face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT]} | {
        "num_inference_steps": 2,
        "strength": 0.5,
    }
    with pytest.raises(error, match=message):
        pipe.refine_faces(picture, **usual | arguments)


def test_weights_of_each_persons_references(pipe, picture):
    settings = {"face_boxes": [LEFT, RIGHT], **STEPS}
    alone = pipe.refine_faces(picture, "a", face_image=[[A], [B]], generator=generators(), **settings)
    two = {"face_image": [[A, C], [C, B]], "face_weights": [[1, 0], [0, 1]]}
    weighted = pipe.refine_faces(picture, "a", generator=generators(), **two, **settings)
    assert not changed(alone[0], weighted[0]).any()


@pytest.mark.parametrize("kind", ["array", "batch", "floats", "tensor"])
def test_pictures_of_any_kind(pipe, picture, kind):
    array = np.asarray(picture)
    given = {
        "array": array,
        "batch": array[None],
        "floats": array[None].astype(np.float32) / 255,
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255,
    }[kind]
    settings = {"face_image": A, "face_boxes": [LEFT], **STEPS}
    expected = pipe.refine_faces(picture, "a", generator=generators(1), **settings)
    refined = pipe.refine_faces(given, "a", generator=generators(1), **settings)
    assert len(refined) == 1 and not changed(expected[0], refined[0]).any()


def test_a_face_that_the_safety_checker_refuses_stays(picture, monkeypatch, caplog):
    pipe, kind = with_adapter(tiny_pipeline()), kind_of("sd", "Img2Img")  # XL has none
    plain = kind.run_safety_checker

    calls = []

    def refuse_second(self, image, device, dtype):
        calls.append(1)
        return plain(self, image, device, dtype)[0], [len(calls) == 2]

    monkeypatch.setattr(kind, "run_safety_checker", refuse_second)
    with caplog.at_level(logging.WARNING):
        (refined,) = pipe.refine_faces(
            picture, "a", face_image=[[A], [B]], face_boxes=[LEFT, RIGHT], generator=generators(), **STEPS
        )
    assert "person 1" in caplog.text
    assert changed(picture, refined)[near(LEFT)].any() and not changed(picture, refined)[near(RIGHT)].any()


def test_layer_scales_progress_bar_and_controlnet_of_the_pipeline(pipe, picture):
    pipe.set_face_fusion_scale({"up": 1.0})
    pipe.register_modules(controlnet=tiny_controlnet(pipe.unet))
    inner = pipe.as_pipeline(kind_of(family_of(pipe), "Img2Img"))
    assert inner._face_layer_scales == pipe._face_layer_scales and inner._face_adapter is pipe._face_adapter
    assert inner._progress_bar_config == pipe._progress_bar_config and inner.unet is pipe.unet
    assert not inner.interrupt
    pipe._interrupt = True
    assert inner.interrupt
    (refined,) = pipe.refine_faces(picture, "a", face_image=A, face_boxes=[LEFT], generator=generators(1), **STEPS)
    assert changed(picture, refined).any()


def test_smaller_faces_are_drawn_anew_for_the_most_part(pipe, picture, monkeypatch):
    strengths = []
    kind = kind_of(family_of(pipe), "Img2Img")
    original = kind.__call__
    monkeypatch.setattr(
        kind,
        "__call__",
        lambda self, *args, **options: strengths.append(options["strength"]) or original(self, *args, **options),
    )
    boxes = [LEFT, (40, 12, 44, 16)]
    pipe.refine_faces(picture, "a", face_image=[[A], [B]], face_boxes=boxes, num_inference_steps=3)
    assert strengths == [strength_for(16 / (1.75 * 7)), strength_for(16 / (1.75 * 4))]
    assert strengths[0] == pytest.approx(0.48 * 1.306 / 1.25, abs=1e-3) and strengths[1] == 0.8
    with pytest.raises(InvalidScaleError, match="0.48 of 2 steps is not one step"):
        pipe.refine_faces(picture, "a", face_image=A, face_boxes=[LEFT], num_inference_steps=2)


def test_a_second_pass_that_is_stopped_keeps_what_is_finished(pipe, picture):
    def stop_at_second(inner, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = len(steps) == 3  # two steps for each person
        return tensors

    steps = []
    pipe._interrupt = True  # by whoever stopped the call before
    (refined,) = pipe.refine_faces(
        picture, "a", face_image=[[A], [B]], face_boxes=[LEFT, RIGHT], generator=generators(),
        callback_on_step_end=stop_at_second, **STEPS,
    )  # fmt: skip
    assert len(steps) == 3
    (once,) = pipe.refine_faces(picture, "a", face_image=A, face_boxes=[LEFT], generator=generators(1), **STEPS)
    assert np.array_equal(np.asarray(refined), np.asarray(once))


def test_put_back_has_a_soft_edge():
    picture, drawn = Image.new("RGB", (40, 40)), Image.new("RGB", (10, 10), "white")
    mask = np.zeros((40, 40), dtype=bool)
    mask[10:30, 10:30] = True
    edge = np.asarray(put_back(picture, drawn, (5, 5, 35, 35), mask, 2.0))[20, :, 0].astype(int)
    assert edge[20] == 255 and edge[0] == 0
    assert (np.diff(edge[:20]) >= 0).all() and len(set(edge.tolist())) > 6
