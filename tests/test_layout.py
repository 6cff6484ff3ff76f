"""Masks and regions: the grouped queries equal Eq. 7's dense mask, nobody vanishes, nothing is transposed."""

import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image
from tiny_models import identity_mask_bias

from face_fusion_pipeline.face_attention import FaceFusionAttnProcessor, LayerPeople
from face_fusion_pipeline.face_errors import FaceFusionError, InvalidLayoutError
from face_fusion_pipeline.face_fusion_mixin import FaceFusionMixin
from face_fusion_pipeline.face_layout import (
    assign_boxes,
    box_masks,
    even_boxes,
    given_masks,
    group_queries,
    layer_regions,
    layer_sizes,
    pool,
    scale_boxes,
    visible_people,
)
from face_fusion_pipeline.face_places import Placement
from face_fusion_pipeline.joint_attention import PersonKeys, joint_attention, reference_log_weights


def test_box_masks_are_enlarged_about_the_centre_and_cut_at_the_edge():
    mask, edge = box_masks([(10, 20, 20, 40), (-5, 50, 5, 60)], 64, 48, enlarge=1.5)
    inside = mask.nonzero()
    assert inside.min(0).values.tolist() == [15, 7]
    assert inside.max(0).values.tolist() == [44, 22]
    assert edge.nonzero().max(0).values.tolist() == [62, 7]
    assert edge.nonzero().min(0).values.tolist() == [47, 0]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((1, 2, 3), "four numbers"),
        ("abcd", "four numbers"),
        ((5, 5, 5, 9), "empty"),
        ((0, 0, math.nan, 4), "empty"),
        ((64, 0, 70, 9), "outside the 64x32"),
        ((-9, 0, 0, 9), "outside"),
    ],
)
def test_bad_boxes_are_refused(box, message):
    with pytest.raises(InvalidLayoutError, match=message):
        box_masks([box], 32, 64)


def test_given_masks_take_images_arrays_and_tensors_of_any_size():
    array = np.zeros((40, 20), dtype=np.uint8)
    array[10:20, 5:10] = 255
    masks = given_masks([Image.fromarray(array), array, torch.from_numpy(array) / 255], 20, 10)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert masks[0].nonzero().min(0).values.tolist() == [5, 2]
    assert given_masks([array], 80, 40)[0].sum() == 4 * 50
    with pytest.raises(InvalidLayoutError, match="mask 1 is empty"):
        given_masks([array, np.zeros((4, 4))], 20, 10)
    with pytest.raises(InvalidLayoutError, match=r"\(1, 4, 4\)"):
        given_masks([np.ones((1, 4, 4))], 20, 10)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 64), (9, 14), (1, 5)])
def test_layer_sizes_are_those_of_the_unets_feature_maps(height, width):
    down = torch.nn.Conv2d(1, 1, 3, 2, 1)
    x = torch.zeros(1, 1, height, width)
    for size in layer_sizes(height, width):
        assert tuple(x.shape[-2:]) == size
        x = down(x)
    counts = [h * w for h, w in layer_sizes(height, width)]
    assert len(set(counts)) == len(counts)  # the number of queries names the level


def test_a_small_face_never_vanishes_and_odd_sizes_are_not_transposed():
    masks = box_masks([(3, 200, 5, 203), (500, 10, 505, 15)], 520, 512, enlarge=1.0)
    for h, w in layer_sizes(65, 64):
        cells = pool(masks, h, w)
        assert cells.flatten(1).any(1).all(), (h, w)
        row, column = cells[0].nonzero().float().mean(0) + 0.5
        assert abs(row / h - 201.5 / 520) < 1 / h
        assert abs(column / w - 4 / 512) < 1 / w
    regions = layer_regions(masks, 65, 64)
    assert regions[65 * 64].order.shape == (65 * 64,)


def test_policies():
    a = torch.tensor([[1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    b = torch.tensor([[0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    masks = torch.stack([a, b])

    def sees(**policy):
        return ["".join("ab"[i] for i in range(2) if v[i]) for v in visible_people(masks, **policy).T]

    assert sees(overlap="literal", background="all") == ["a", "", "", "b", "ab", "ab"]
    assert sees(overlap="literal", background="none") == ["a", "", "", "b", "", ""]
    assert sees(overlap="shared", background="none") == ["a", "ab", "ab", "b", "", ""]
    assert sees(overlap="nearest", background="none") == ["a", "a", "b", "b", "", ""]


def test_literal_policy_is_equation_7():
    torch.manual_seed(0)
    masks = torch.rand(3, 6, 5) > 0.6
    bias = identity_mask_bias(masks.flatten(1), torch.arange(3))  # (N, 3)
    assert torch.equal(visible_people(masks, "literal", "all").T, bias == 0)


@pytest.mark.parametrize("overlap", ["literal", "shared", "nearest"])
@pytest.mark.parametrize("background", ["none", "all"])
def test_grouped_queries_equal_the_dense_mask(overlap, background):
    """Three people with several references, weights and scales of their own, against one dense float64 softmax."""
    torch.manual_seed(0)
    height, width, heads, inner, text = 6, 5, 2, 16, 7
    attn = Attention(16, heads=heads, dim_head=8, cross_attention_dim=12).eval().double()
    hidden, context = torch.randn(4, height * width, 16).double(), torch.randn(4, text, 12).double()
    masks = torch.rand(3, height, width) > 0.6
    visible = visible_people(masks, overlap, background)
    people, columns, bias = [], [], []
    for index, (refs, scale) in enumerate(((1, 1.0), (2, 0.5), (3, 2.0))):
        key, value = torch.randn(2, 1, refs, 4, inner).double()
        log_weights = reference_log_weights(torch.rand(refs).double() + 0.1)
        people.append(PersonKeys(key, value, log_weights, scale, token_count_bias=True))
        columns.append((key.flatten(1, 2), value.flatten(1, 2)))
        own = torch.full((refs,), math.log(scale) - math.log(4 / text), dtype=torch.float64)
        own = own if log_weights is None else own + log_weights[0]
        hidden_from = torch.zeros(height * width, 4 * refs).double().masked_fill(~visible[index][:, None], -math.inf)
        bias.append(hidden_from + own.repeat_interleave(4))
    regions = {height * width: group_queries(visible)}
    actual = FaceFusionAttnProcessor([LayerPeople(tuple(people), regions)])(attn, hidden, context)

    def heads_of(x):
        return x.unflatten(-1, (heads, -1))

    query, key, value = (heads_of(x) for x in (attn.to_q(hidden), attn.to_k(context), attn.to_v(context)))
    faces = [heads_of(torch.cat(kv, 1)) for kv in zip(*columns, strict=True)]
    dense = joint_attention(query, key, value, *faces, torch.cat(bias, 1)[None, None])
    expected = attn.to_out[0](dense.flatten(2))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_layer_of_unknown_size_is_refused():
    attn = Attention(16, heads=2, dim_head=8, cross_attention_dim=12).eval()
    cast = LayerPeople((PersonKeys(*torch.randn(2, 1, 1, 4, 16)),), layer_regions(torch.ones(1, 8, 8).bool(), 8, 8))
    with pytest.raises(FaceFusionError, match="49 queries"):
        FaceFusionAttnProcessor([cast])(attn, torch.randn(1, 49, 16), torch.randn(1, 3, 12))


def test_boxes_found_are_assigned_left_to_right_or_as_asked():
    left, small, right = (0, 0, 10, 10), (20, 0, 24, 4), (40, 0, 52, 12)
    assert assign_boxes([right, small, left], 2) == [left, right]
    assert assign_boxes([right, left], 2, [1, 0]) == [right, left]
    assert assign_boxes([right, small, left], 1, [1]) == [small]
    assert assign_boxes([right, left, left, right], 2) == [right, right]
    assert assign_boxes([left, left, left], 2) == [left, left]  # equal boxes are as many as people
    with pytest.raises(InvalidLayoutError, match="1 faces found for 2 people"):
        assign_boxes([left], 2)
    for wrong in ([0], [0, 0], [0, 2]):
        with pytest.raises(InvalidLayoutError, match="face_assign"):
            assign_boxes([left, right], 2, wrong)


def test_even_boxes_and_scaling():
    boxes = even_boxes(3, 64, 96)
    assert all(0 < b[0] < b[2] < 96 and 0 < b[1] < b[3] < 64 for b in boxes)
    assert scale_boxes([(1, 2, 3, 4)], (10, 20), (20, 60)) == [(2, 6, 6, 12)]


def test_placement_is_checked():
    with pytest.raises(InvalidLayoutError, match="face_boxes and face_layout"):
        Placement(boxes=[(0, 0, 1, 1)], layout=Image.new("RGB", (8, 8))).check()
    with pytest.raises(InvalidLayoutError, match="face_overlap must be one of nearest, shared, literal, got 'maybe'"):
        Placement(overlap="maybe").check()
    with pytest.raises(InvalidLayoutError, match="face_background"):
        Placement(background="some").check()
    with pytest.raises(InvalidLayoutError, match="one entry for each person"):
        Placement(boxes=(0, 0, 1, 1)).per_prompt()
    assert Placement(boxes=np.zeros((2, 4))).per_prompt()[0][1].shape == (4,)
    assert len(Placement(boxes=[[(0, 0, 1, 1)], [(0, 0, 2, 2)]]).per_prompt()) == 2
    assert len(Placement(masks=[np.zeros((4, 4))] * 3).per_prompt()[0]) == 3


def test_the_mixin_has_no_own_init():
    assert "__init__" not in vars(FaceFusionMixin)  # from_pipe reads the pipeline's signature


def test_a_mask_that_grows_on_one_side_and_shrinks_on_the_other_does_not_vanish():
    mask = torch.zeros(1, 512, 32, dtype=torch.bool)
    mask[:, 101:103] = True
    pooled = pool(mask, 64, 64)
    assert pooled[0, 12].all() and pooled.sum() == 64
