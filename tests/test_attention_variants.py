"""Other ways to compute attention beside a face: slicing, xformers, IP-Adapter with masks."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from diffusers.models.attention_processor import XFormersAttnProcessor
from diffusers.utils.import_utils import is_xformers_available
from test_pipeline import load_random_ip_adapter
from test_several_people import LEFT, RIGHT, close, differ
from tiny_models import face, generate, tiny_pipeline

from face_fusion_pipeline.face_adapter import create_adapter


A, B = face(0), face(1)


@pytest.fixture
def pipe():
    pipe = tiny_pipeline()
    torch.manual_seed(1)
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, "xavier", metadata={"resolution": 16}))
    return pipe


@pytest.mark.parametrize("faces", [{"face_image": A}, {"face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT]}])
def test_slicing_is_off_where_faces_are_seen_and_this_is_said_once(pipe, faces, caplog):
    expected = generate(pipe, **faces)
    pipe.enable_attention_slicing(1)
    pipe.encode_face(A)
    generate(pipe)
    assert not caplog.records  # encoding and plain calls are sliced as ever
    assert close(generate(pipe, **faces), expected)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "attention slicing is off in 4 layers" in caplog.text


def test_xformers_where_it_cannot_run_changes_nothing(pipe):
    if is_xformers_available() and torch.cuda.is_available():
        pytest.skip("xformers is here: the next test is about it")
    expected = generate(pipe, face_image=A)
    with pytest.raises((ModuleNotFoundError, ValueError), match="xformers|cuda"):
        pipe.enable_xformers_memory_efficient_attention()
    assert close(generate(pipe, face_image=A), expected)


def test_xformers_processors_give_way_to_faces_and_come_back(pipe, monkeypatch):
    """With a stand-in for the kernel, which takes (batch x heads, tokens, width)."""
    calls = []

    def kernel(query, key, value, attn_bias=None, op=None, scale=None):
        calls.append(query.shape)
        return F.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)

    expected, plain = generate(pipe, face_image=A), generate(pipe)
    ops = SimpleNamespace(memory_efficient_attention=kernel)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops), raising=False)
    pipe.unet.set_attn_processor(XFormersAttnProcessor())
    assert close(generate(pipe, face_image=A), expected)
    assert calls  # layers that see no face, and the reference pass
    assert close(generate(pipe), plain)
    assert all(isinstance(each, XFormersAttnProcessor) for each in pipe.unet.attn_processors.values())


def test_ip_adapter_masks(pipe):
    load_random_ip_adapter(pipe)
    ip = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))]}
    masks = {name: torch.zeros(1, 1, 16, 16) for name in ("none", "half", "all")}
    masks["half"][..., 8:], masks["all"][:] = 1, 1

    def picture(mask, **kwargs):
        return generate(pipe, **ip, cross_attention_kwargs={"ip_adapter_masks": [mask]}, **kwargs)

    whole = generate(pipe, face_image=A, **ip)
    assert close(picture(masks["all"], face_image=A), whole)
    nothing = picture(masks["none"], face_image=A)
    pipe.set_ip_adapter_scale(0.0)
    assert close(nothing, generate(pipe, face_image=A, **ip))
    pipe.set_ip_adapter_scale(1.0)
    half = picture(masks["half"], face_image=A)
    assert differ(half, whole)
    assert differ(half, nothing)
    assert differ(half, picture(masks["half"]))  # the face is still there
