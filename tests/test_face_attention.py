"""The equations against an explicit float64 softmax, and the processor against diffusers' own."""

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from tiny_models import GUIDED, identity_mask_bias, one_face, tiny_unet

from face_fusion_pipeline.face_attention import FaceCall, attention_layers
from face_fusion_pipeline.face_errors import FaceFusionError, InvalidScaleError
from face_fusion_pipeline.face_ownership import installed_processors
from face_fusion_pipeline.joint_attention import PersonKeys, constant_bias, joint_attention, reference_log_weights


def tensors(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def explicit(query, keys, values, bias):
    """Softmax over every (query, key) pair, one at a time; bias(b, head, q, k) -> float."""
    out = torch.zeros_like(query)
    batch, queries, heads, width = query.shape
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                logits = [
                    float(query[b, q, h] @ keys[b, k, h]) / math.sqrt(width) + bias(b, h, q, k)
                    for k in range(keys.shape[1])
                ]
                top = max(logits)
                weights = [math.exp(logit - top) for logit in logits]
                for k, weight in enumerate(weights):
                    out[b, q, h] += weight / sum(weights) * values[b, k, h]
    return out


@pytest.mark.parametrize("with_text_bias", [False, True])
def test_everything_at_once_equals_the_explicit_softmax(with_text_bias):
    batch, queries, heads, width, text, per_ref, identities = 2, 6, 2, 4, 5, 3, 2
    q, tk, tv = tensors((batch, queries, heads, width), *[(batch, text, heads, width)] * 2)
    fk, fv = tensors(*[(batch, identities * per_ref, heads, width)] * 2, seed=1)
    (text_bias,) = tensors((batch, 1, 1, text), seed=2)
    masks = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)  # query 4 in both, 5 in none
    key_identity = torch.arange(identities).repeat_interleave(per_ref)
    log_weights = reference_log_weights(torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64))
    constant = constant_bias(0.7, per_ref, text, token_count_bias=True)
    face_bias = identity_mask_bias(masks, key_identity).double() + constant
    face_bias = face_bias + log_weights.repeat_interleave(per_ref, 1)[:, None, None]

    def bias(b, h, query, k):
        if k < text:
            return float(text_bias[b, 0, 0, k]) if with_text_bias else 0.0
        i = (k - text) // per_ref
        if any(j != i and masks[j, query] for j in range(identities)):
            return -math.inf
        weight = [[0.75, 0.25], [0.5, 0.5]][b][i]
        return math.log(0.7) + math.log(weight) - math.log(per_ref / text)

    expected = explicit(q, torch.cat([tk, fk], 1), torch.cat([tv, fv], 1), bias)
    actual = joint_attention(q, tk, tv, fk, fv, face_bias, text_bias if with_text_bias else None)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_a_query_outside_of_the_place_of_a_face_sees_the_text_alone():
    q, tk, tv, fk, fv = tensors(*[(2, 4, 2, 8)] * 5)
    places = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    flat = (x[:, None].flatten(-2) for x in (fk, fv))  # one reference each
    bias = PersonKeys(*flat, scale=0.5, places={4: places, 9: places[:, :1]}).bias(text_tokens=4, queries=4)

    def expected_bias(b, _, query, k):
        return 0.0 if k < 4 else math.log(0.5) if places[b, query] else -math.inf

    expected = explicit(q, torch.cat([tk, fk], 1), torch.cat([tv, fv], 1), expected_bias)
    torch.testing.assert_close(joint_attention(q, tk, tv, fk, fv, bias), expected, rtol=1e-10, atol=1e-12)


def test_scale_one_and_one_reference_is_plain_concatenation_without_a_mask(monkeypatch):
    q, tk, tv, fk, fv = tensors(*[(1, 4, 2, 8)] * 5)
    expected = explicit(q, torch.cat([tk, fk], 1), torch.cat([tv, fv], 1), lambda *_: 0.0)
    torch.testing.assert_close(joint_attention(q, tk, tv, fk, fv), expected, rtol=1e-10, atol=1e-12)
    processor = one_face(*tensors(*[(1, 1, 4, 16)] * 2), reference_log_weights(torch.ones(1)))
    bias = processor.shares[0].people[0].bias(text_tokens=4, queries=9)
    assert bias is None  # fast kernels refuse any mask, even of zeros


def test_query_inside_a_mask_puts_zero_weight_on_another_identity():
    q, tk, fk = tensors((1, 4, 1, 8), *[(1, 3, 1, 8)] * 2)
    fv = torch.zeros(1, 3, 1, 8, dtype=torch.float64)
    fv[:, 1:] = 1e6  # identity 1 would show at once
    masks = torch.tensor([[True, True, False, False], [False, False, True, False]])
    bias = identity_mask_bias(masks, torch.tensor([0, 1, 1]))
    out = joint_attention(q, tk, torch.zeros_like(tk), fk, fv, bias)
    assert (out[:, :2] == 0).all()
    assert (out[:, 2:] > 1).all()


def test_token_count_bias_gives_text_and_face_half_each():
    zeros = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    text, face = 77, 4096
    constant = constant_bias(1.0, face, text, token_count_bias=True)
    bias = torch.full((1, 1, 1, face), constant, dtype=torch.float64)
    keys = [zeros.expand(1, n, 1, 4) for n in (text, text, face)]
    out = joint_attention(zeros, *keys, torch.ones_like(zeros).expand(1, face, 1, 4), bias)
    torch.testing.assert_close(out, torch.full_like(out, 0.5))


def reference_weights_case(order, weights):
    q, tk, tv = tensors((1, 5, 2, 4), *[(1, 3, 2, 4)] * 2)
    refs_k, refs_v = tensors(*[(3, 4, 2, 4)] * 2, seed=3)
    log_weights = reference_log_weights(torch.tensor(weights, dtype=torch.float64))
    bias = None if log_weights is None else log_weights.repeat_interleave(4, 1)[:, None, None]
    fk, fv = (refs[order].flatten(0, 1)[None] for refs in (refs_k, refs_v))
    return joint_attention(q, tk, tv, fk, fv, bias)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (([0], [1.0]), ([0, 0], [1.0, 1.0])),
        (([0], [5.0]), ([0, 0, 0], [0.2, 0.3, 0.5])),
        (([0, 1, 2], [1.0, 2.0, 3.0]), ([2, 0, 1], [3.0, 1.0, 2.0])),
        (([0, 1], [1.0, 3.0]), ([0, 1, 1, 1], [1.0] * 4)),
        (([0], [1.0]), ([0, 1], [1.0, 0.0])),
    ],
)
def test_references_may_be_repeated_and_permuted(a, b):
    torch.testing.assert_close(reference_weights_case(*a), reference_weights_case(*b), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(reference_weights_case([0], [1.0]), reference_weights_case([1], [1.0]))


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_bad_reference_weights_are_refused(weights):
    with pytest.raises(InvalidScaleError, match="weights"):
        reference_log_weights(torch.tensor(weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_nan_in_half_precision(dtype):
    q, tk, tv, fk, fv = (10 * t for t in tensors(*[(2, 16, 2, 8)] * 5, dtype=dtype))
    masks = torch.ones(2, 16, dtype=torch.bool)  # every query in both masks: no face at all
    bias = identity_mask_bias(masks, torch.arange(2).repeat_interleave(8)) + constant_bias(1e-3, 8, 16, False)
    out = joint_attention(q, tk, tv, fk, fv, bias)
    assert torch.isfinite(out).all()
    plain = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, tk, tv)))
    torch.testing.assert_close(out, plain.transpose(1, 2), rtol=2e-2, atol=2e-2)


# --- Processor -----------------------------------------------------------------------------------------------------

LAYERS = {
    "cross": {"cross_attention_dim": 12},
    "self": {},
    "residual, rescaled": {"residual_connection": True, "rescale_output_factor": 2.0},
    "group norm": {"norm_num_groups": 4},
    "query and key norm": {"qk_norm": "layer_norm"},
}


@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("spatial", [False, True])
def test_switched_off_equals_the_stock_processor_bit_for_bit(config, spatial):
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, **config).eval()
    hidden = torch.randn(2, 16, 3, 5) if spatial else torch.randn(2, 15, 16)
    text = torch.randn(2, 7, 12) if "cross_attention_dim" in config else None
    expected = AttnProcessor2_0()(attn, hidden, text)
    face = torch.randn(2, 1, 2, 4, 16)
    off = one_face(*face, call=FaceCall(active=False))
    assert torch.equal(off(attn, hidden, text), expected)
    on = one_face(*face)
    assert not torch.allclose(on(attn, hidden, text), expected)
    guided = one_face(*face, call=FaceCall(GUIDED))(attn, hidden, text)
    torch.testing.assert_close(guided[:1], expected[:1])
    torch.testing.assert_close(guided[1:], on(attn, hidden, text)[1:])


def test_text_mask_is_kept():
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, cross_attention_dim=12).eval()
    hidden, text, face = torch.randn(2, 5, 16), torch.randn(2, 7, 12), torch.randn(2, 1, 1, 4, 16)
    mask = torch.zeros(2, 1, 7)
    mask[:, :, 3:] = -math.inf
    processor = one_face(*face)
    expected = processor(attn, hidden, text[:, :3])
    torch.testing.assert_close(processor(attn, hidden, text, attention_mask=mask), expected)


def test_dropped_face_equals_no_face():
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, cross_attention_dim=12).eval()
    hidden, text, face = torch.randn(2, 5, 16), torch.randn(2, 7, 12), torch.randn(2, 2, 3, 4, 16)
    log_weights = reference_log_weights(torch.ones(3), drop=torch.tensor([True, False]))
    out = one_face(*face, log_weights)(attn, hidden, text)
    plain = AttnProcessor2_0()(attn, hidden, text)
    torch.testing.assert_close(out[0], plain[0])
    assert not torch.allclose(out[1], plain[1])


def test_backend_of_the_replaced_processor_is_honoured():
    unet = tiny_unet()
    name, layer = next(iter(attention_layers(unet, "attn2").items()))
    layer.processor._attention_backend = "_native_math"
    processor = one_face(*torch.randn(2, 1, 1, 4, 16))
    with installed_processors(unet, {name: processor}):
        assert layer.processor is processor
        assert processor._attention_backend == "_native_math"


def test_foreign_processor_is_refused_and_a_lost_one_reported():
    class Foreign:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    unet = tiny_unet()
    name, layer = next(iter(attention_layers(unet, "attn2").items()))
    mine = {name: one_face(*torch.randn(2, 1, 1, 4, 16))}
    original = layer.processor
    with pytest.raises(FaceFusionError, match="replaced during the call"), installed_processors(unet, mine):
        layer.set_processor(AttnProcessor2_0())
    assert layer.processor is original
    foreign = Foreign()
    layer.set_processor(foreign)
    with pytest.raises(FaceFusionError, match="Foreign"), installed_processors(unet, mine):
        pass
    assert layer.processor is foreign
