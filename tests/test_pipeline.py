"""The pipeline's promises: the plain pipeline without a face, nothing left behind, batches that do not mix."""

import inspect

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor
from tiny_models import (
    CASES,
    GUIDED,
    TEXT_WIDTH,
    embeddings,
    face,
    family_of,
    generate,
    in_mode,
    kind_of,
    one_face,
    stock_pipeline,
    tiny_components,
    tiny_pipeline,
    told_of_nothing,
)

from face_fusion_pipeline import face_fusion_mixin
from face_fusion_pipeline.face_adapter import create_adapter
from face_fusion_pipeline.face_attention import FaceCall, FaceFusionAttnProcessor, attention_layers
from face_fusion_pipeline.face_errors import FaceFusionError, InvalidPromptError, InvalidScaleError
from face_fusion_pipeline.face_ownership import installed_processors
from face_fusion_pipeline.reference_pass import capture_hidden_states, face_tensors
from face_fusion_pipeline.training.fused_unet import face_fused_unet
from face_fusion_pipeline.unet_family import encode_latents


@pytest.fixture(params=CASES, ids="-".join)
def pipe(request, monkeypatch):
    family, mode = request.param
    return in_mode(tiny_pipeline(family=family), mode, monkeypatch)


@pytest.fixture
def plain(pipe):
    return stock_pipeline(family_of(pipe))


def processors(pipe):
    return dict(pipe.unet.attn_processors)


def assert_untouched(pipe, before):
    after = processors(pipe)
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def layers_with_faces(pipe):
    layers = {"adapter": 4, "training-free": 2, "both": 6}[pipe.encode_face(face()).mode]
    return layers + (family_of(pipe) == "xl")  # its middle block has two


# --- Without a face ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_no_face_and_scale_zero_are_the_stock_pipeline_and_do_no_face_work(pipe, plain, guidance_scale, monkeypatch):
    expected = generate(plain, guidance_scale=guidance_scale)
    with_face = generate(pipe, face_image=face(), guidance_scale=guidance_scale)
    assert not torch.allclose(with_face, expected, atol=1e-3)
    monkeypatch.setattr(face_fusion_mixin, "conditioner_of", None)
    assert torch.equal(generate(pipe, guidance_scale=guidance_scale), expected)
    assert torch.equal(generate(pipe, face_image=face(), face_scale=0, guidance_scale=guidance_scale), expected)
    for scale in (0.0, {"up": 0.0}):
        pipe.set_face_fusion_scale(scale)
        assert torch.equal(generate(pipe, face_image=face(), guidance_scale=guidance_scale), expected)


def test_scale_near_zero_approaches_no_face(pipe):
    plain = generate(pipe)
    distances = [(generate(pipe, face_image=face(), face_scale=s) - plain).abs().max() for s in (1e-6, 1e-2, 1.0)]
    assert distances[0] < 1e-3 < distances[1] < distances[2]


# --- Nothing is left behind ----------------------------------------------------------------------------------------


def test_processors_are_restored(pipe):
    before = processors(pipe)
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append([getattr(p, "is_face_fusion_processor", False) for p in processors(pipe).values()])
        return tensors

    generate(pipe, face_image=face(), callback_on_step_end=look)
    assert [sum(flags) for flags in seen] == [layers_with_faces(pipe)] * 3
    assert_untouched(pipe, before)


def test_processors_are_restored_after_an_exception(pipe):
    before = processors(pipe)

    def fail(pipe, step, timestep, tensors):
        raise RuntimeError("user code")

    with pytest.raises(RuntimeError, match="user code"):
        generate(pipe, face_image=face(), callback_on_step_end=fail)
    assert_untouched(pipe, before)
    with pytest.raises(ValueError, match="num_inference_steps"):
        generate(pipe, face_image=face(), num_inference_steps=10_000)
    assert_untouched(pipe, before)


def test_nothing_leaks_into_saved_components(pipe, tmp_path):
    keys = set(pipe.unet.state_dict())
    saved_inside = []

    def save(pipe, step, timestep, tensors):
        pipe.unet.save_pretrained(tmp_path / "unet")
        saved_inside.append(set(pipe.unet.state_dict()))
        return tensors

    generate(pipe, face_image=face(), callback_on_step_end=save, num_inference_steps=1)
    assert saved_inside == [keys]
    pipe.save_pretrained(tmp_path / "pipe")
    again = kind_of(family_of(pipe), ours=False).from_pretrained(tmp_path / "pipe")
    assert set(again.unet.state_dict()) == keys
    assert not list((tmp_path / "pipe").rglob("*face*"))


# --- Faces ---------------------------------------------------------------------------------------------------------


def test_cached_keys_and_values_equal_recomputing_them_at_every_step(family):
    pipe = tiny_pipeline(family=family)
    adapter = create_adapter(pipe.unet, metadata={"resolution": 16})
    pipe.set_face_fusion_adapter(adapter)
    cached = generate(pipe, face_image=face(), guidance_scale=1.0)
    forward = pipe.unet.forward

    def recompute(sample, timestep, **kwargs):
        (pixels,) = face_tensors(face(), 16)
        empty = told_of_nothing(pipe)
        pipe.unet.forward = forward
        tokens = capture_hidden_states(pipe.unet, encode_latents(pipe.vae, pixels), 0, **empty)
        with face_fused_unet(pipe.unet, adapter, {name: t[:, None] for name, t in tokens.items()}):
            result = forward(sample, timestep, **kwargs)
        pipe.unet.forward = recompute
        return result

    pipe.unet.forward = recompute
    assert torch.equal(generate(pipe, guidance_scale=1.0), cached)


def test_unconditional_rows_are_bit_for_bit_the_stock_ones():
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.randn(2, 6, TEXT_WIDTH)
    with torch.no_grad():
        expected = pipe.unet(latents, 500, text).sample
        identity = pipe.encode_face(face())
        faced = {
            name: one_face(identity.keys[name][None], identity.values[name][None], call=FaceCall(GUIDED))
            for name in identity.keys
        }
        with installed_processors(pipe.unet, faced):
            actual = pipe.unet(latents, 500, text).sample
    assert torch.equal(actual[0], expected[0])
    assert not torch.allclose(actual[1], expected[1], atol=1e-3)


def test_a_face_given_twice_equals_once_and_order_does_not_matter(pipe):
    a, b = face(0), face(1)
    close = {"rtol": 1e-3, "atol": 1e-3}  # ten times the rounding, which differs between processors
    torch.testing.assert_close(generate(pipe, face_image=[a, a]), generate(pipe, face_image=a), **close)
    both = generate(pipe, face_image=[a, b], face_weights=[1, 3])
    torch.testing.assert_close(generate(pipe, face_image=[b, a], face_weights=[3, 1]), both, **close)
    assert not torch.allclose(generate(pipe, face_image=[a, b]), both, atol=1e-3)
    assert torch.equal(generate(pipe, face_image=[a, b], face_weights=[1, 0]), generate(pipe, face_image=a))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_element_of_a_batch_equals_the_single_run(pipe, guidance_scale):
    options = {"face_image": [face(0), face(1)], "guidance_scale": guidance_scale}
    prompts = ["a cat", "my dog"]
    together = generate(pipe, prompts, num_images_per_prompt=2, **options)
    assert together.shape[0] == 4
    for index in range(4):
        alone = generate(pipe, prompts[index // 2], seed=index, **options)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_prompt_embeddings_instead_of_a_prompt(pipe):
    options = {"face_image": face(), "num_inference_steps": 2, "output_type": "latent"}
    by_embeds = pipe(**embeddings(pipe, "a cat"), generator=torch.Generator().manual_seed(0), **options).images
    assert torch.equal(by_embeds, generate(pipe, negative_prompt="", **options))


def test_layer_scales(pipe):
    full = generate(pipe, face_image=face())
    pipe.set_face_fusion_scale(0.5)
    half = generate(pipe, face_image=face())
    assert torch.equal(half, generate_with_scale(pipe, 1.0, face_scale=0.5))
    everywhere = generate_with_scale(pipe, {"down": 0.5, "mid": 0.5, "up": {"block_1": [0.5, 0.5]}})
    assert torch.equal(everywhere, half)
    assert torch.equal(generate_with_scale(pipe, {"down_blocks": 1.0, "mid_block": 1.0, "up_blocks.1": 1.0}), full)
    before = processors(pipe)
    some = []
    pipe.set_face_fusion_scale({"up_blocks.1.attentions.0": 1.0})

    def look(pipe, step, timestep, tensors):
        some.append([name for name, p in processors(pipe).items() if p is not before[name]])
        return tensors

    generate(pipe, face_image=face(), callback_on_step_end=look)
    assert [len(names) for names in some] == [2 if pipe.encode_face(face()).mode == "both" else 1] * 3
    assert all(name.startswith("up_blocks.1.attentions.0") for name in some[0])
    for bad in ({"left_blocks": 1.0}, {"up": {"block_7": 1.0}}, {"up": "strong"}, -1.0, True):
        with pytest.raises(InvalidScaleError):
            pipe.set_face_fusion_scale(bad)


def generate_with_scale(pipe, scale, **kwargs):
    pipe.set_face_fusion_scale(scale)
    return generate(pipe, face_image=face(), **kwargs)


@pytest.mark.parametrize("order", [1, 2])
def test_time_window(pipe, order):
    if order == 2:
        pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    active = []
    attend = FaceFusionAttnProcessor._attend

    def spy(self, *args):
        active.append(self.call.active)
        return attend(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FaceFusionAttnProcessor, "_attend", spy)
        generate(pipe, face_image=face(), num_inference_steps=4, face_start=0.25, face_end=0.75)
    steps = active[:: layers_with_faces(pipe)]
    total = 4 if order == 1 else 7
    assert steps == [0.25 <= i / total < 0.75 for i in range(total)]
    options = {"face_image": face(), "num_inference_steps": 4}
    assert torch.equal(generate(pipe, face_end=1.0, **options), generate(pipe, **options))
    assert not torch.equal(generate(pipe, face_end=0.5, **options), generate(pipe, **options))


def test_time_window_and_the_users_callback_work_together(pipe):
    steps = []

    def double(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": 2 * tensors["latents"]}

    options = {"face_image": face(), "callback_on_step_end": double}
    both = generate(pipe, face_start=0.3, **options)
    assert steps == [0, 1, 2]
    assert not torch.allclose(both, generate(pipe, face_image=face(), face_start=0.3), atol=1e-2)
    assert not torch.equal(both, generate(pipe, **options))


@pytest.mark.parametrize("face_end", [0.9, 1.0])
def test_guidance_may_end_half_way(pipe, face_end):
    kind = SDCFGCutoffCallback if family_of(pipe) == "sd" else SDXLCFGCutoffCallback
    callback = kind(cutoff_step_index=1, cutoff_step_ratio=None)
    options = {"face_image": face(), "callback_on_step_end": callback, "num_inference_steps": 4, "face_end": face_end}

    def cutoff_for_two(pipe, step, timestep, tensors):
        tensors = kind.callback_fn(callback, pipe, step, timestep, tensors)
        if step == 1:  # diffusers' own callback keeps the last row alone; both images need theirs
            tensors |= {name: tensors[name].expand(2, *tensors[name].shape[1:]) for name in kind.tensor_inputs}
        return tensors

    alone = [generate(pipe, seed=seed, **options) for seed in (0, 1)]
    options |= {"callback_on_step_end": cutoff_for_two, "callback_on_step_end_tensor_inputs": kind.tensor_inputs}
    together = generate(pipe, num_images_per_prompt=2, **options)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_token_count_bias_of_the_adapter_is_used():
    outs = []
    for bias in (False, True):
        pipe = tiny_pipeline()
        metadata = {"resolution": 16, "token_count_bias": bias}
        pipe.set_face_fusion_adapter(create_adapter(pipe.unet, metadata=metadata))
        outs.append(generate(pipe, face_image=face()))
    assert not torch.allclose(*outs, atol=1e-3)


def test_unload_returns_to_training_free():
    pipe = tiny_pipeline()
    free = generate(pipe, face_image=face())
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, "xavier", metadata={"resolution": 16}))
    adapted = generate(pipe, face_image=face())
    assert torch.equal(generate(pipe, face_image=face(), face_mode="training-free"), free)
    pipe.unload_face_fusion_adapter()
    assert torch.equal(generate(pipe, face_image=face()), free)
    assert not torch.allclose(adapted, free, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_the_pipeline(pipe, dtype):
    pipe.to(dtype=dtype)
    out = generate(pipe, face_image=[face(0), face(1)], face_scale=0.5)
    assert out.dtype == dtype and torch.isfinite(out).all()


def test_odd_sizes_and_tiny_vae():
    pipe = tiny_pipeline(tiny_vae=True)
    image = generate(pipe, face_image=face(3, 20), height=24, width=40, output_type="pil")[0]
    assert image.size == (40, 24)


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"prompt": 3}, InvalidPromptError, "3"),
        ({"prompt": ["a", 3]}, InvalidPromptError, "3"),
        ({"face_scale": -0.1}, InvalidScaleError, "-0.1"),
        ({"face_scale": float("nan")}, InvalidScaleError, "nan"),
        ({"face_scale": 101}, InvalidScaleError, "101"),
        ({"face_scale": "1"}, InvalidScaleError, "'1'"),
        ({"face_start": 0.5, "face_end": 0.5}, InvalidScaleError, "0.5"),
        ({"face_end": 1.5}, InvalidScaleError, "1.5"),
        ({"face_mode": "other"}, FaceFusionError, "other"),
    ],
)
def test_bad_arguments_are_named(pipe, arguments, error, reason):
    with pytest.raises(error, match=reason):
        pipe(**{"prompt": "a cat", "face_image": face(), **arguments})


# --- Beside other features -----------------------------------------------------------------------------------------


def load_random_ip_adapter(pipe):
    torch.manual_seed(0)
    text = pipe.unet.config.cross_attention_dim
    projection = {"proj.weight": torch.randn(4 * text, 6), "proj.bias": torch.zeros(4 * text)}
    projection |= {"norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
    weights = {}
    names = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for name in names:
        index = 2 * list(pipe.unet.attn_processors).index(name) // 2
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for which in ("k", "v"):
            weights[f"{index}.to_{which}_ip.weight"] = torch.randn(width, text)
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])


def test_ip_adapter_beside_face_fusion(pipe):
    no_ip = generate(pipe, face_image=face(), face_scale=1e-6)
    identity = pipe.encode_face(face())
    load_random_ip_adapter(pipe)
    before = processors(pipe)
    same = pipe.encode_face(face())
    assert all(torch.equal(identity.keys[name], same.keys[name]) for name in identity.keys)
    ip = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))]}
    alone = generate(pipe, **ip)
    barely = generate(pipe, face_image=face(), face_scale=1e-6, **ip)
    torch.testing.assert_close(barely, alone, rtol=1e-3, atol=1e-3)
    both = generate(pipe, face_image=face(), **ip)
    assert not torch.allclose(both, alone, atol=1e-3) and not torch.allclose(alone, no_ip, atol=1e-3)
    assert_untouched(pipe, before)


def test_other_stock_processors_are_replaced_and_come_back(pipe):
    expected = generate(pipe, face_image=face())
    pipe.unet.set_attn_processor(AttnProcessor())
    before = processors(pipe)
    torch.testing.assert_close(generate(pipe, face_image=face()), expected, rtol=1e-3, atol=1e-3)
    assert_untouched(pipe, before)
    pipe.enable_attention_slicing()
    before = processors(pipe)
    generate(pipe, face_image=face())
    assert_untouched(pipe, before)


def test_foreign_processors_are_named(pipe):
    class Foreign:
        def __call__(self, attn, hidden_states, **kwargs):
            return hidden_states

    for kind in ("attn1", "attn2"):
        next(iter(attention_layers(pipe.unet, kind).values())).set_processor(Foreign())
    with pytest.raises(FaceFusionError, match="Foreign"):
        generate(pipe, face_image=face())


@pytest.mark.parametrize("tiny_vae", [False, True])
def test_from_pipe_keeps_all_components(family, tiny_vae):
    components = tiny_components(tiny_vae=tiny_vae, family=family)
    stock, ours = kind_of(family, ours=False), kind_of(family)
    pipe = ours.from_pipe(stock(**components, image_encoder=None))
    assert type(pipe) is ours
    for name, part in components.items():
        assert name.startswith("requires") or getattr(pipe, name) is part
    pipe.set_progress_bar_config(disable=True)
    generate(pipe, face_image=face(), num_inference_steps=1)
    assert tiny_vae or type(stock.from_pipe(pipe)) is stock


def test_compiles_without_graph_breaks_and_another_identity_does_not_recompile():
    pipe = tiny_pipeline()
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, metadata={"resolution": 16}))
    first, second = (generate(pipe, face_image=face(seed)) for seed in (0, 1))
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    torch.testing.assert_close(generate(pipe, face_image=face(0)), first)
    torch._dynamo.config.error_on_recompile = True
    try:
        torch.testing.assert_close(generate(pipe, face_image=face(1)), second)
    finally:
        torch._dynamo.config.error_on_recompile = False
        torch._dynamo.reset()


def test_stock_arguments_may_be_positional(pipe):
    steps = []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        return tensors

    settings = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", "face_image": face()}
    sizes = (16, 16, 2) if family_of(pipe) == "sd" else (None, 16, 16, 2)  # the second prompt comes before them
    out = pipe("a cat", *sizes, callback_on_step_end=callback, **settings).images
    assert steps == [0, 1]
    assert torch.equal(out, generate(pipe, num_inference_steps=2, face_image=face()))


def test_every_stock_argument_is_accepted(family):
    stock = set(inspect.signature(kind_of(family, ours=False).__call__).parameters)
    whole = inspect.signature(kind_of(family).__call__).parameters
    ours = set(whole) - stock
    assert stock <= set(whole) and {"face_image", "face_boxes", "control_image"} <= ours  # help shows all
    mixin = set(inspect.signature(face_fusion_mixin.FaceFusionMixin.__call__).parameters)
    assert not (mixin - {"self", "prompt", "args", "kwargs"}) & stock  # no name of ours hides a stock one
    sizes = ["height", "width"] if family == "sd" else ["prompt_2", "height"]
    assert list(whole)[:4] == ["self", "prompt", *sizes] and whole["face_scale"].default == 1.0
    assert "guidance_rescale" in stock
    pipe = tiny_pipeline(family=family)
    generate(pipe, face_image=face(), guidance_rescale=0.5, eta=0.1, num_inference_steps=1)
