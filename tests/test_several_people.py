"""Several people in one call: each in its own place, prompts and people never mixed."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CASES, face, generate, in_mode, tiny_pipeline, with_adapter

from face_fusion_pipeline.face_adapter import create_adapter
from face_fusion_pipeline.face_detectors import Face
from face_fusion_pipeline.face_errors import FaceAxesError, IdentityMismatchError, InvalidLayoutError


LEFT, RIGHT = (1, 4, 6, 12), (10, 4, 15, 12)  # of 16x16 images
A, B, C = face(0), face(1), face(2)


@pytest.fixture(params=CASES, ids="-".join)
def pipe(request, monkeypatch):
    family, mode = request.param
    return in_mode(tiny_pipeline(family=family), mode, monkeypatch)


class FakeDetector:
    """Finds the faces that it is told to."""

    name = "fake"

    def __init__(self, *boxes, size=16):
        self.boxes, self.sizes, self.seen = boxes, (size,), []

    def detect(self, image):
        self.seen.append(image)
        return [Face(box, 0.99) for box in self.boxes]


def close(a, b):
    """Rounding of single precision, enlarged by an untrained network on any processor, stays ten times below this."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def differ(a, b):
    return not torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_swapping_people_and_boxes_together_changes_nothing(pipe):
    one = generate(pipe, face_image=[[A], [B]], face_boxes=[LEFT, RIGHT])
    other = generate(pipe, face_image=[[B], [A]], face_boxes=[RIGHT, LEFT])
    assert close(one, other)
    assert differ(one, generate(pipe, face_image=[[B], [A]], face_boxes=[LEFT, RIGHT]))


def test_a_mask_over_everything_is_the_single_person(pipe):
    whole = np.ones((16, 16))
    masked = generate(pipe, face_image=[[A]], face_masks=[whole])
    assert close(masked, generate(pipe, face_image=A))


def test_each_person_reaches_its_own_mask_only(family):
    """In one layer the outputs at queries outside a person's mask do not depend on that person."""
    pipe = with_adapter(tiny_pipeline(family=family))
    outputs = []
    layer = pipe.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    hook = layer.register_forward_hook(lambda module, args, output: outputs.append(output[-1]))
    for people in ([[A], [B]], [[A], [C]]):
        kwargs = {"face_boxes": [LEFT, RIGHT], "num_inference_steps": 1, "guidance_scale": 1.0}
        generate(pipe, face_image=people, **kwargs)
    hook.remove()
    (*_, first), (*_, second) = outputs[:3], outputs[3:]  # two reference passes before each generation
    changed = (first - second).abs().amax(-1).reshape(8, 8) > 1e-6
    assert changed[:, 4:].any()
    assert not changed[:, :4].any()


def test_one_person_may_have_a_box_too(pipe):
    placed = generate(pipe, face_image=A, face_boxes=[LEFT])
    assert differ(placed, generate(pipe, face_image=A))
    assert differ(placed, generate(pipe))


def test_scale_of_each_person(pipe):
    both = {"face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT]}
    only_left = generate(pipe, **both, face_scale=[1.0, 0.0])
    assert close(only_left, generate(pipe, face_image=[[A]], face_boxes=[LEFT]))
    assert differ(only_left, generate(pipe, **both))
    assert torch.equal(generate(pipe, **both, face_scale=[0, 0]), generate(pipe))
    assert close(generate(pipe, **both, face_scale=[0.7, 0.7]), generate(pipe, **both, face_scale=0.7))


def test_references_and_weights_of_each_person(pipe):
    boxes = {"face_boxes": [LEFT, RIGHT]}
    expected = generate(pipe, face_image=[pipe.encode_face([A, C], [3, 1]), pipe.encode_face(B)], **boxes)
    actual = generate(pipe, face_image=[[A, C], [B]], face_weights=[[3, 1], [1]], **boxes)
    assert close(actual, expected)
    assert differ(generate(pipe, face_image=[[A, C], [B]], **boxes), expected)


def test_prompts_with_their_own_people_equal_single_calls(pipe):
    prompts = ["a cat", "a dog"]
    together = generate(pipe, prompts, face_image=[[[A], [B]], [[C], [A]]], face_boxes=[LEFT, RIGHT])
    for index, people in enumerate(([[A], [B]], [[C], [A]])):
        alone = generate(pipe, prompts[index], seed=index, face_image=people, face_boxes=[LEFT, RIGHT])
        assert close(together[index : index + 1], alone)


def test_prompts_with_their_own_boxes_and_several_images_each(pipe):
    prompts, boxes = ["a cat", "a dog"], [[LEFT, RIGHT], [RIGHT, LEFT]]
    together = generate(pipe, prompts, face_image=[[A], [B]], face_boxes=boxes, num_images_per_prompt=2)
    for index in range(4):
        places = boxes[index // 2]
        alone = generate(pipe, prompts[index // 2], seed=index, face_image=[[A], [B]], face_boxes=places)
        assert close(together[index : index + 1], alone)


def test_layout_image_is_searched_and_its_boxes_scaled(pipe):
    layout = Image.new("RGB", (64, 32))
    detector = FakeDetector((40, 8, 60, 24), (4, 8, 24, 24), size=64)
    kwargs = {"face_image": [[A], [B]], "output_type": "latent", "num_inference_steps": 3}
    result = pipe(
        "a cat", generator=torch.Generator().manual_seed(0), face_layout=layout, face_detector=detector, **kwargs
    )
    assert result.face_boxes_source == "layout"
    np.testing.assert_allclose(result.face_boxes, [[(1, 4, 6, 12), (10, 4, 15, 12)]], atol=0.1)
    assert close(result.images, generate(pipe, face_image=[[A], [B]], face_boxes=[LEFT, RIGHT]))
    swapped = generate(pipe, face_image=[[A], [B]], face_layout=layout, face_detector=detector, face_assign=[1, 0])
    assert close(swapped, generate(pipe, face_image=[[A], [B]], face_boxes=[RIGHT, LEFT]))


def test_each_prompt_may_have_a_layout_image_of_its_own(pipe):
    prompts, pictures = ["a cat", "a dog"], [Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16))]
    low = (10, 10, 15, 15)

    class ByColour(FakeDetector):
        def detect(self, image):
            self.boxes = (LEFT, RIGHT) if image.getpixel((8, 8))[0] > 127 else (LEFT, low)
            return super().detect(image)

    options = {"face_image": [[A], [B]], "num_inference_steps": 2, "face_detector": ByColour()}
    options |= {"generator": [torch.Generator().manual_seed(seed) for seed in range(2)], "output_type": "latent"}
    result = pipe(prompts, face_layout=pictures, **options)
    np.testing.assert_allclose(result.face_boxes, [[LEFT, RIGHT], [LEFT, low]], atol=0.1)
    boxes = {"face_image": [[A], [B]], "face_boxes": [[LEFT, RIGHT], [LEFT, low]], "num_inference_steps": 2}
    assert close(result.images, generate(pipe, prompts, **boxes))
    one = pipe(prompts, face_layout=pictures[:1], **options)
    np.testing.assert_allclose(one.face_boxes, [[LEFT, RIGHT]] * 2, atol=0.1)
    with pytest.raises(FaceAxesError, match="3 pictures, but there are 2 prompts"):
        pipe(prompts, face_layout=[*pictures, pictures[0]], **options)


def test_without_places_a_draft_of_the_same_noise_is_searched(pipe):
    plain = pipe("a cat", generator=torch.Generator().manual_seed(0), num_inference_steps=3).images[0]
    detector = FakeDetector(LEFT, RIGHT)
    steps = []

    def count(pipe, step, timestep, tensors):
        steps.append(step)
        return tensors

    result = pipe(
        "a cat",
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=3,
        output_type="latent",
        face_image=[[A], [B]],
        face_detector=detector,
        callback_on_step_end=count,
    )
    assert result.face_boxes_source == "draft"
    assert steps == [0, 1, 2, 0, 1, 2]  # the draft is an ordinary call: who wants to stop it, can
    centred = [np.asarray(image) for image in detector.seen if image.size == plain.size]
    assert any(np.array_equal(image, np.asarray(plain)) for image in centred)
    assert close(result.images, generate(pipe, face_image=[[A], [B]], face_boxes=[LEFT, RIGHT]))


def test_a_draft_with_too_few_faces_places_people_side_by_side(pipe, caplog):
    kwargs = {"face_image": [[A], [B]], "num_inference_steps": 2, "num_images_per_prompt": 2}
    result = pipe("a cat", face_detector=FakeDetector(LEFT), **kwargs)
    assert result.face_boxes_source == "even"
    assert len(result.face_boxes) == 2
    assert "1 faces for 2 people" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"face_image": [A, B], "face_boxes": [LEFT, RIGHT]},
            FaceAxesError,
            r"2 of face_boxes for 1 people.*\[\[image",
        ),
        ({"face_image": [[A], [B]], "face_boxes": [LEFT]}, FaceAxesError, "1 of face_boxes for 2 people"),
        ({"face_image": [[A], [B]], "face_boxes": [LEFT, (3, 3, 3, 9)]}, InvalidLayoutError, "is empty"),
        ({"face_image": [[A], [B]], "face_boxes": [[LEFT, RIGHT]] * 3}, FaceAxesError, "3 prompts, but there are 1"),
        ({"face_image": [[A], [B]], "face_scale": [1, 1, 1]}, FaceAxesError, "3 values of face_scale for 2 people"),
        ({"face_image": [[A], [B]], "face_masks": [np.zeros((4, 4))] * 2}, InvalidLayoutError, "mask 0 is empty"),
        ({"face_image": [[[A]], [[B]]]}, FaceAxesError, "2 prompts, but there are 1"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(pipe, kwargs, error, message):
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(error, match=message):
        generate(pipe, **kwargs)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


def test_people_of_different_modes_are_refused():
    pipe = tiny_pipeline()
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, metadata={"resolution": 16}))
    people = [pipe.encode_face(A), pipe.encode_face(B, face_mode="training-free")]
    with pytest.raises(IdentityMismatchError, match="one mode"):
        generate(pipe, face_image=people, face_boxes=[LEFT, RIGHT])


def test_odd_sizes_work(pipe):
    image = generate(pipe, face_image=[[A], [B]], face_boxes=[(1, 4, 6, 12), (20, 4, 30, 12)], height=24, width=40)
    assert image.shape[-2:] == (12, 20)


def test_an_assignment_holds_where_a_draft_shows_too_few_faces(pipe):
    nobody = {"face_detector": FakeDetector(), "output_type": "pil", "prompt": "a cat"}

    def places(assign):
        return generate_output(pipe, face_image=[[A], [B]], face_assign=assign, **nobody).face_boxes[0]

    assert places([1, 0]) == places([0, 1])[::-1] == places([3, 2])
    assert places(None) == places([0, 1])


def generate_output(pipe, **arguments):
    return pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"face_boxes": [LEFT, RIGHT], "face_assign": [0, 1]}, "face_boxes are taken in the order of the people"),
        ({"face_assign": [1, 1]}, "different faces"),
    ],
)
def test_an_assignment_that_says_nothing_is_refused_at_once(pipe, options, message):
    with pytest.raises(InvalidLayoutError, match=message):
        generate(pipe, face_image=[[A], [B]], **options)
