"""Attention maps: the weights are those of Eq. 4, sums of them are kept, and the call does not notice."""

import math

import pytest
import torch
from tiny_models import face, generate, tiny_pipeline

from face_fusion_pipeline.face_adapter import create_adapter
from face_fusion_pipeline.face_attention import FaceFusionAttnProcessor, attention_layers
from face_fusion_pipeline.face_defaults import FACE_MODES
from face_fusion_pipeline.face_errors import FaceFusionError, InvalidLayoutError
from face_fusion_pipeline.face_self_attention import ellipse
from face_fusion_pipeline.inspection import attention_maps
from face_fusion_pipeline.inspection.attention_maps import attention_weights, record_attention
from face_fusion_pipeline.joint_attention import joint_attention


A, B = face(0), face(1)
LEFT, RIGHT = (1, 6, 6, 10), (10, 6, 15, 10)


@pytest.fixture
def pipe():
    pipe = tiny_pipeline()
    torch.manual_seed(1)
    metadata = {"resolution": 16, "token_count_bias": True}
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, "xavier", metadata=metadata))
    for layer in attention_layers(pipe.unet, "attn2").values():  # far from uniform weights
        torch.nn.init.normal_(layer.to_q.weight)
    return pipe


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


# --- Weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_equal_the_explicit_softmax_and_are_those_of_joint_attention(dtype):
    q, tk, tv, fk, fv = tensors((2, 5, 2, 8), *[(2, 3, 2, 8)] * 2, *[(1, 4, 2, 8)] * 2)
    q, tk, tv, fk, fv = (3 * t.to(dtype) for t in (q, tk, tv, fk, fv))
    face_bias, text_bias = (b.to(dtype) for b in tensors((1, 1, 5, 4), (2, 1, 1, 3), seed=1))
    weights = attention_weights(q, tk, fk, face_bias, text_bias)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    keys = torch.cat([tk, fk.expand(2, -1, -1, -1)], 1).double()
    for b in range(2):
        for head in range(2):
            for query in range(5):
                bias = [*text_bias[b, 0, 0].double(), *face_bias[0, 0, query].double()]
                logits = [float(q[b, query, head].double() @ keys[b, k, head]) / math.sqrt(8) for k in range(7)]
                powers = [math.exp(logit + float(m)) for logit, m in zip(logits, bias, strict=True)]
                expected = torch.tensor([power / sum(powers) for power in powers], dtype=torch.float64)
                torch.testing.assert_close(weights[b, head, query].double(), expected, rtol=1e-4, atol=1e-6)

    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    values = torch.cat([tv, fv.expand(2, -1, -1, -1)], 1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values.to(weights.dtype))
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    actual = joint_attention(q, tk, tv, fk, fv, face_bias, text_bias).to(out.dtype)
    torch.testing.assert_close(actual, out, rtol=tolerance, atol=tolerance)


def spy(monkeypatch):
    """What the processors really give to their softmax: the arguments of every `joint_attention`."""
    seen = []

    def joint(query, text_key, text_value, face_key, face_value, face_bias=None, text_bias=None, **dispatch):
        seen.append((query, text_key, face_key, face_bias))
        return joint_attention(query, text_key, text_value, face_key, face_value, face_bias, text_bias, **dispatch)

    monkeypatch.setattr("face_fusion_pipeline.face_attention.joint_attention", joint)
    return seen


@pytest.mark.parametrize("mode", FACE_MODES)
def test_maps_are_sums_of_the_weights_that_the_layers_use(pipe, mode, monkeypatch):
    seen = spy(monkeypatch)
    boxes = {"corner": (0, 0, 3, 2), "all": (0, 0, 16, 16)}
    layers = set(attention_layers(pipe.unet, "attn2")) if mode != "training-free" else set()
    if mode != "adapter":
        layers |= {name for name in attention_layers(pipe.unet, "attn1") if name.startswith("up_blocks")}
    with record_attention(pipe, boxes=boxes) as record:
        generate(pipe, face_image=[A, B], face_weights=[3, 1], face_scale=0.7, face_mode=mode)
    assert set(record.layers) == layers and record.steps == [0, 1, 2]
    assert len(record.maps) == len(seen) == 3 * len(record.layers)
    masses = []
    for (query, text_key, face_key, bias), ((name, _), images) in zip(seen, record.maps.items(), strict=True):
        keys = torch.cat([text_key, face_key], 1).double()
        logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), keys) / math.sqrt(query.shape[-1])
        logits[..., text_key.shape[1] :] += bias.double()
        weights = logits.softmax(-1)[0, ..., text_key.shape[1] :].mean(0).float()  # (N_h, K_f)
        (maps,) = images
        side = math.isqrt(query.shape[1])
        torch.testing.assert_close(maps.mass, weights.sum(-1).reshape(1, side, side))
        (everywhere,), (corner,) = maps.reference["all"], maps.reference["corner"]
        cells = torch.ones(side, side, dtype=torch.bool) if name.endswith("attn2") else ellipse(side, (0.6, 0.75))
        assert face_key.shape[1] == 2 * cells.sum()
        for seen_from, expected in ((everywhere, weights.mean(0)), (corner, weights[:2].mean(0))):
            if seen_from is everywhere or side == 8:  # two pixels a query: one row, two columns
                torch.testing.assert_close(seen_from[:, cells], expected.reshape(2, -1))
                assert (seen_from[:, ~cells] == 0).all()
        torch.testing.assert_close(everywhere.sum(), maps.mass.mean())
        masses.append(maps.mass)
    everything = torch.cat([mass.flatten() for mass in masses])
    assert everything.min() >= 0 and everything.max() <= 1 and everything.std() > 0.01


def test_portions_of_queries_change_nothing(pipe, monkeypatch):
    found = []
    for limit in (attention_maps.MAX_WEIGHTS, 200):
        monkeypatch.setattr(attention_maps, "MAX_WEIGHTS", limit)
        with record_attention(pipe, steps=[1], boxes={"left": LEFT}) as record:
            generate(pipe, face_image=A)
        found.append(record)
    for key, (maps,) in found[0].maps.items():
        torch.testing.assert_close(maps.mass, found[1].maps[key][0].mass)
        torch.testing.assert_close(maps.reference["left"], found[1].maps[key][0].reference["left"])


# --- People --------------------------------------------------------------------------------------------------------


def test_several_people_are_seen_in_their_places_only(pipe):
    with record_attention(pipe, boxes={"left": LEFT}) as record:
        generate(pipe, face_image=[[A], [B]], face_boxes=[LEFT, RIGHT])
    assert record.maps
    for ((ada, bob),), ((sees_ada, sees_bob),) in (
        ([image.mass for image in images], [image.reference["left"] for image in images])
        for images in record.maps.values()
    ):
        assert ada[:, 0].max() > 0 and (ada[:, -1] == 0).all()
        assert bob[:, -1].max() > 0 and (bob[:, 0] == 0).all()
        assert sees_ada.sum() > 0 and sees_bob.sum() == 0


def test_strength_zero_has_no_mass(pipe):
    with record_attention(pipe) as record:
        generate(pipe, face_image=[[A], [B]], face_boxes=[LEFT, LEFT], face_scale=[0, 1], face_overlap="shared")
    assert record.maps
    for ((ada, bob),) in ([image.mass for image in images] for images in record.maps.values()):
        assert (ada == 0).all() and bob.max() > 0
    with record_attention(pipe) as record:
        generate(pipe, face_image=A, face_scale=0)
    assert record.maps == {}


def test_stronger_faces_get_more_attention(pipe):
    means = []
    for scale in (0.1, 1.0, 10.0):
        with record_attention(pipe, steps=[0]) as record:
            generate(pipe, face_image=A, face_scale=scale)
        means.append(record.maps[record.layers[0], 0][0].mass.mean())
    assert means[0] < means[1] < means[2]


def test_every_image_of_a_batch_has_its_own_maps(pipe):
    ada, bob = pipe.encode_face(A), pipe.encode_face(B)
    with record_attention(pipe, steps=[2]) as record:
        generate(pipe, ["a cat", "b"], face_image=[[ada], [bob]], num_images_per_prompt=2)
    with record_attention(pipe, steps=[2]) as alone:
        generate(pipe, "b", face_image=bob, seed=2)
    for key, images in record.maps.items():
        assert len(images) == 4
        torch.testing.assert_close(images[2].mass, alone.maps[key][0].mass, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(images[0].mass, images[2].mass)


# --- Choosing ------------------------------------------------------------------------------------------------------


def test_layers_and_steps_are_chosen(pipe):
    names = list(attention_layers(pipe.unet, "attn2"))
    with record_attention(pipe, layers=names[1:2], steps=[0, 2]) as record:
        generate(pipe, face_image=A)
    assert list(record.maps) == [(names[1], 0), (names[1], 2)]
    with record_attention(pipe, layers=names[:1]) as record:
        generate(pipe, face_image=A, face_start=0.5)
    assert record.steps == [2]  # of 0, 1, 2: where 0.5 <= step / 3
    with record_attention(pipe, layers=names[:1]) as record:
        generate(pipe, face_image=A)
        generate(pipe, face_image=A, num_inference_steps=2)
        generate(pipe)
    assert record.steps == [0, 1]  # the last call with a face


def test_a_draft_counts_no_steps(pipe, caplog):
    class Nothing:
        name, sizes = "nothing", (16,)

        def detect(self, image):
            return []

    with record_attention(pipe) as record:
        generate(pipe, face_image=[[A], [B]], face_detector=Nothing())
    assert record.steps == [0, 1, 2]


@pytest.mark.parametrize("size", [(16, 24), (24, 16)])
def test_maps_have_the_shape_of_the_picture(pipe, size):
    height, width = size
    with record_attention(pipe, boxes={"right": (width - 1, 0, width, height)}) as record:
        generate(pipe, face_image=A, height=height, width=width)
    (maps,) = record.maps[record.layers[0], 0]
    assert maps.mass.shape == (1, height // 2, width // 2)
    torch.testing.assert_close(maps.reference["right"][0].sum(), maps.mass[0, :, -1].mean())


def test_bad_choices_are_refused(pipe):
    with pytest.raises(FaceFusionError, match="no attention layer 'attn7'"), record_attention(pipe, layers=["attn7"]):
        pass
    with pytest.raises(InvalidLayoutError, match="outside"), record_attention(pipe, boxes={"eye": (20, 0, 22, 2)}):
        generate(pipe, face_image=A)
    compiled = tiny_pipeline()
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    with pytest.raises(FaceFusionError, match="compiled"), record_attention(compiled):
        pass


def test_another_kind_of_attention_is_refused(pipe, monkeypatch):
    class SeparateProcessor(FaceFusionAttnProcessor):
        pass

    monkeypatch.setattr("face_fusion_pipeline.conditioner.FaceFusionAttnProcessor", SeparateProcessor)
    with pytest.raises(FaceFusionError, match="SeparateProcessor"), record_attention(pipe):
        generate(pipe, face_image=A)


# --- The call does not notice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", FACE_MODES)
def test_images_are_unchanged_and_the_pipeline_is_left_as_found(pipe, mode):
    def hooks():
        return [len(module._forward_pre_hooks) for module in pipe.unet.modules()]

    processors, found = dict(pipe.unet.attn_processors), hooks()
    options = {"face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT], "face_mode": mode}
    expected = generate(pipe, **options)
    with record_attention(pipe, boxes={"left": LEFT}) as record:
        actual = generate(pipe, **options)
    assert record.maps
    assert torch.equal(actual, expected)
    assert hooks() == found
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert torch.equal(generate(pipe, **options), expected)


def test_everything_is_put_back_after_an_exception(pipe):
    processors = dict(pipe.unet.attn_processors)

    def stop(pipe, step, timestep, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), record_attention(pipe) as record:
        generate(pipe, face_image=A, callback_on_step_end=stop)
    assert record.steps == [0]
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
