"""The reference at the self-attention, alone and beside trained weights: which keys, how strong, in whose place."""

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_several_people import LEFT, RIGHT, close, differ
from tiny_models import face, generate, tiny_controlnet, tiny_pipeline, told_of_nothing, with_adapter

from face_fusion_pipeline import FaceIdentity, SelfAttentionReference
from face_fusion_pipeline.face_adapter import create_adapter
from face_fusion_pipeline.face_attention import attention_layers
from face_fusion_pipeline.face_errors import FaceFusionError, IdentityMismatchError, InvalidScaleError
from face_fusion_pipeline.face_layout import box_masks, pool, visible_people
from face_fusion_pipeline.face_self_attention import WHOLE_AND_CLEAN, ellipse
from face_fusion_pipeline.pipeline_img2img import StableDiffusionImg2ImgFaceFusionPipeline
from face_fusion_pipeline.pipeline_inpaint import StableDiffusionInpaintFaceFusionPipeline
from face_fusion_pipeline.reference_pass import face_tensors, noise_latents, reference_passes
from face_fusion_pipeline.unet_family import encode_latents


A, B = face(0), face(1)
BOTH = {"face_mode": "both"}
PLACED = {"face_image": [[A], [B]], "face_boxes": [LEFT, RIGHT]}


@pytest.fixture
def family():
    """Where a test is not for each."""
    return "sd"


@pytest.fixture
def pipe(family):
    return with_adapter(tiny_pipeline(family=family))


# --- The whole, against an explicit softmax ------------------------------------------------------------------------


def inputs_of(layers, call):
    """layer name -> (hidden states, text states) of the last call of each, and what it put out."""
    seen = {}

    def note(name):
        def hook(module, args, kwargs, output):
            seen[name] = (args[0], kwargs.get("encoder_hidden_states"), output)

        return hook

    handles = [layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    result = call()
    for handle in handles:
        handle.remove()
    return seen, result


def reference_states(pipe, image, kind, timestep, seed):
    """What enters the layers when the UNet alone looks at a reference."""
    layers = attention_layers(pipe.unet, kind)
    with torch.no_grad():
        latents = encode_latents(pipe.vae, *face_tensors(image, 16)).to(pipe.unet.dtype)
        latents = noise_latents(latents, pipe.scheduler.alphas_cumprod, timestep, seed)
        seen, _ = inputs_of(layers, lambda: pipe.unet(latents, timestep, **told_of_nothing(pipe)))
    return {name: hidden for name, (hidden, _, _) in seen.items()}


def explicit(layer, hidden, context, faces, visible):
    """Eq. 1-7 with a dense mask, in double precision.

    Args:
        hidden: (N_h, C). context: (N_c, C') that keys and values of the layer itself are made of.
        faces: for each person keys (K_f, inner), values and the bias (K_f,) of its keys.
        visible: bool (people, N_h).
    """
    keys = torch.cat([layer.to_k(context), *(key for key, _, _ in faces)])
    values = torch.cat([layer.to_v(context), *(value for _, value, _ in faces)])
    bias = [torch.zeros(len(hidden), len(context), dtype=torch.float64)]
    for (_, _, own), sees in zip(faces, visible, strict=True):
        bias.append(own.double().expand(len(hidden), -1).masked_fill(~sees[:, None], -math.inf))
    q, k, v = (x.unflatten(-1, (layer.heads, -1)).transpose(0, 1) for x in (layer.to_q(hidden), keys, values))
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + torch.cat(bias, 1)).softmax(-1)
    return layer.to_out[0]((weights @ v).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("family", ("sd", "xl"))
@pytest.mark.parametrize("own", [SelfAttentionReference(), SelfAttentionReference(2.0, 300, 7, (0.9, 0.5))])
def test_both_attentions_equal_the_explicit_softmax_with_people_in_their_places(pipe, own):
    """Two references of one person, weighted, and another person; strengths, regions and noise all at once."""
    metadata = {"resolution": 16, "token_count_bias": True}
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, "xavier", metadata=metadata))
    pipe.to(dtype=torch.float64)
    people, weights, scales = [[A, B], [face(2)]], [[3.0, 1.0], [1.0]], [0.5, 2.0]
    identities = [
        pipe.encode_face(images, w, face_mode="both", self_attention=own)
        for images, w in zip(people, weights, strict=True)
    ]
    layers = attention_layers(pipe.unet, "attn1") | attention_layers(pipe.unet, "attn2")
    options = {"face_boxes": [LEFT, RIGHT], "face_scale": scales, "num_inference_steps": 1, "guidance_scale": 1.0}
    seen, _ = inputs_of(layers, lambda: generate(pipe, face_image=identities, **options))
    states = {
        "attn1": [[reference_states(pipe, image, "attn1", *own.noise) for image in refs] for refs in people],
        "attn2": [[reference_states(pipe, image, "attn2", 0, 0) for image in refs] for refs in people],
    }
    masks = box_masks([LEFT, RIGHT], 16, 16)
    for name, layer in layers.items():
        hidden, text, output = (None if x is None else x[0] for x in seen[name])
        kind = name.rsplit(".", 1)[1]
        trained = pipe._face_adapter.get_submodule(name) if kind == "attn2" else None
        side = math.isqrt(len(hidden))
        faces, visible = [], visible_people(pool(masks, side, side))
        for refs, proportions, scale in zip(states[kind], weights, scales, strict=True):
            if kind == "attn1" and not name.startswith("up_blocks."):
                continue
            if kind == "attn2":
                keys, values, strength = trained.to_k_face, trained.to_v_face, scale
                chosen = torch.ones(side * side, dtype=torch.bool)
            else:
                keys, values, strength = layer.to_k, layer.to_v, scale * own.scale
                chosen = in_ellipse(side, *own.half_axes)
            dtype = keys.weight.dtype
            for state, proportion in zip(refs, proportions, strict=True):
                h_f = state[name][0][chosen].to(dtype)
                bias = math.log(strength) + math.log(proportion / sum(proportions))
                bias -= math.log(len(h_f) / len(text)) if kind == "attn2" else 0.0
                faces.append((keys(h_f).double(), values(h_f).double(), torch.full((len(h_f),), bias)))
        of_person = [0] * len(people[0]) + [1] * len(people[1])
        expected = explicit(layer, hidden, hidden if text is None else text, faces, visible[of_person[: len(faces)]])
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)  # the adapter is in single precision


def in_ellipse(side, across, down):
    """Cell by cell."""
    places = [(2 * (i + 0.5) / side - 1) for i in range(side)]
    return torch.tensor([(x / across) ** 2 + (y / down) ** 2 <= 1 for y in places for x in places])


# --- What is seen of a reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", range(1, 18))
def test_an_ellipse_is_never_empty_and_turns_with_its_axes(side):
    assert torch.equal(ellipse(side, (0.75, 0.5)), ellipse(side, (0.5, 0.75)).T)
    assert torch.equal(ellipse(side, (0.75, 0.5)), ellipse(side, (0.75, 0.5)).flip(0, 1))
    assert ellipse(side, (1e-3, 1e-3)).any() and ellipse(side, (2.0, 2.0)).all()
    assert not ellipse(4 + side, (0.75, 0.75))[0, 0]


def test_the_background_of_a_reference_is_not_seen_by_the_self_attention(pipe):
    """Keys and values are those of the cells in the ellipse, in the named layers; what lies outside is not kept."""
    identity = pipe.encode_face(A, face_mode="training-free", face_resolution=32)
    assert {name.split(".")[0] for name in identity.keys} == {"up_blocks"}
    for name, cells in identity.cells.items():
        assert cells.shape == (16, 16) and 0.35 < cells.float().mean() < 0.5
        assert identity.keys[name].shape == identity.values[name].shape == (1, int(cells.sum()), 16)
    everything = pipe.encode_face(A, face_mode="training-free", self_attention=WHOLE_AND_CLEAN)
    assert set(everything.keys) == set(attention_layers(pipe.unet, "attn1"))
    assert all(cells.all() for cells in everything.cells.values())


def test_noise_level_and_seed_are_those_of_the_settings(pipe):
    def key(**settings):
        own = SelfAttentionReference(**settings)
        return next(iter(pipe.encode_face(A, face_mode="training-free", self_attention=own).keys.values()))

    assert torch.equal(key(), key(timestep=150, seed=0))
    assert torch.equal(key(timestep=0), key(timestep=0, seed=5))
    assert differ(key(), key(seed=1)) and differ(key(), key(timestep=300)) and differ(key(), key(timestep=0))
    with pytest.raises(FaceFusionError, match="cannot be noised to 1000 of 1000"):
        key(timestep=1000)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": -1.0},
        {"scale": 101.0},
        {"scale": math.nan},
        {"timestep": -1},
        {"timestep": 1.5},
        {"half_axes": (0.0, 1.0)},
        {"half_axes": (1.0,)},
        {"layers": "up_blocks"},
        {"layers": ()},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(FaceFusionError):
        SelfAttentionReference(**settings)


def test_layers_that_are_not_there_are_refused(pipe):
    with pytest.raises(FaceFusionError, match="no self-attention layer of this UNet is in up_blocks.7"):
        pipe.encode_face(A, face_mode="both", self_attention=SelfAttentionReference(layers=("up_blocks.7",)))


def test_one_pass_serves_both_where_the_noise_is_the_same(pipe, monkeypatch):
    clean, noised = SelfAttentionReference(timestep=0, seed=3), SelfAttentionReference()
    assert reference_passes(0, clean) == {(0, 0): ["attn2", "attn1"]}
    assert reference_passes(0, noised) == {(0, 0): ["attn2"], (150, 0): ["attn1"]}
    assert reference_passes(150, noised) == {(150, 0): ["attn2", "attn1"]}
    assert reference_passes(None, noised) == {(150, 0): ["attn1"]} and reference_passes(0, None) == {(0, 0): ["attn2"]}
    passes, forward = [], pipe.unet.forward

    def counting(sample, timestep, **kwargs):
        passes.append(timestep)
        return forward(sample, timestep, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", counting)
    together = pipe.encode_face(A, face_mode="both", self_attention=clean)
    assert passes == [0]
    for mode in ("adapter", "training-free"):
        alone = pipe.encode_face(A, face_mode=mode, self_attention=clean)
        assert all(torch.equal(together.keys[name], key) for name, key in alone.keys.items())
    passes.clear()
    pipe.encode_face(A, face_mode="both")
    assert passes == [0, 150]


# --- Modes ---------------------------------------------------------------------------------------------------------


def test_both_is_more_than_either_and_its_part_can_be_switched_off(pipe):
    both, adapter = generate(pipe, face_image=A, **BOTH), generate(pipe, face_image=A, face_mode="adapter")
    assert differ(both, adapter) and differ(both, generate(pipe, face_image=A, face_mode="training-free"))
    assert torch.equal(generate(pipe, face_image=A, face_self_scale=0, **BOTH), adapter)
    free = {"face_image": A, "face_mode": "training-free"}
    assert torch.equal(generate(pipe, **free, face_self_scale=0), generate(pipe))
    installed = []

    def count(pipe, step, timestep, tensors):
        found = [name for name, p in pipe.unet.attn_processors.items() if hasattr(p, "is_face_fusion_processor")]
        installed.append(sum("attn1" in name for name in found))
        return tensors

    off = generate(pipe, **PLACED, face_self_scale=[0, 0], **BOTH, callback_on_step_end=count)
    assert torch.equal(off, generate(pipe, **PLACED)) and installed == [0, 0, 0]


def test_scale_multiplies_the_self_scale(pipe):
    free = {"face_image": A, "face_mode": "training-free"}
    assert close(generate(pipe, **free), generate(pipe, **free, face_self_scale=4))
    assert close(generate(pipe, **free, face_scale=0.5), generate(pipe, **free, face_self_scale=2.0))
    identity = pipe.encode_face(A, face_mode="both")
    weaker = generate(pipe, face_image=identity.with_self_scale(1.0))
    assert torch.equal(weaker, generate(pipe, face_image=identity, face_self_scale=1.0))
    assert differ(weaker, generate(pipe, face_image=identity))


def test_layer_scales_reach_both_attentions(pipe):
    pipe.set_face_fusion_scale({"mid_block": 1.0, "down_blocks": 1.0})  # no self-attention of these is used
    outside = generate(pipe, face_image=A, **BOTH)
    assert torch.equal(outside, generate(pipe, face_image=A))
    name = next(name for name in attention_layers(pipe.unet, "attn1") if name.startswith("up_blocks"))
    pipe.set_face_fusion_scale({name: 0.5})
    assert differ(generate(pipe, face_image=A, **BOTH), generate(pipe))
    assert torch.equal(generate(pipe, face_image=A), generate(pipe))


@pytest.mark.parametrize("scale", [-1, 101, "1", True, math.nan])
def test_a_self_scale_out_of_range_is_refused(pipe, scale):
    with pytest.raises(InvalidScaleError, match="face_self_scale"):
        generate(pipe, face_image=A, face_self_scale=scale, **BOTH)


def test_a_self_scale_without_a_self_attention_is_refused(pipe):
    with pytest.raises(InvalidScaleError, match=r"face_self_scale=2 .*'adapter'"):
        generate(pipe, face_image=A, face_self_scale=2)


def test_people_seen_at_different_layers_are_refused(pipe):
    mid = SelfAttentionReference(layers=("mid_block",))
    people = [pipe.encode_face(A, **BOTH), pipe.encode_face(B, **BOTH, self_attention=mid)]
    with pytest.raises(IdentityMismatchError, match="at the same layers"):
        generate(pipe, face_image=people, face_boxes=[LEFT, RIGHT])


def test_both_needs_weights_and_its_own(pipe):
    identity = pipe.encode_face(A, **BOTH)
    with pytest.raises(FaceFusionError, match="face_mode='both' needs weights"):
        generate(tiny_pipeline(), face_image=A, **BOTH)
    with pytest.raises(IdentityMismatchError, match="load_face_fusion_adapter"):
        generate(tiny_pipeline(), face_image=identity)
    other = tiny_pipeline()
    other.set_face_fusion_adapter(create_adapter(other.unet, "xavier", metadata={"resolution": 16}))
    with pytest.raises(IdentityMismatchError, match="other adapter weights"):
        generate(other, face_image=identity)


# --- Several people, several pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_a_person_reaches_its_own_place_only_at_both_attentions(pipe, kind):
    layer = next(layer for name, layer in attention_layers(pipe.unet, kind).items() if name.startswith("up_blocks"))
    people = [pipe.encode_face(person, **BOTH) for person in (A, B, face(2))]
    options = {"face_boxes": [LEFT, RIGHT], "num_inference_steps": 1, "guidance_scale": 1.0}
    seen, _ = inputs_of({"it": layer}, lambda: generate(pipe, face_image=people[:2], **options))
    hidden, text, first = seen["it"]
    with pytest.MonkeyPatch.context() as patch:  # the same input, whatever the layers before it make of the other face
        forward = layer.forward
        patch.setattr(layer, "forward", lambda hidden_states, **more: forward(hidden, **more))
        seen, _ = inputs_of({"it": layer}, lambda: generate(pipe, face_image=[people[0], people[2]], **options))
    changed = (first - seen["it"][2])[0].abs().amax(-1).reshape(8, 8) > 1e-6
    assert changed[:, 5:].any() and not changed[:, :4].any()


def test_images_of_a_batch_equal_the_single_ones(pipe):
    prompts, people = ["a cat", "a dog"], [[[A], [B]], [[B], [face(2)]]]
    boxes = {"face_boxes": [LEFT, RIGHT], **BOTH}
    together = generate(pipe, prompts, face_image=people, num_images_per_prompt=2, **boxes)
    for index in range(4):
        alone = generate(pipe, prompts[index // 2], seed=index, face_image=people[index // 2], **boxes)
        assert close(together[index : index + 1], alone)


def test_references_may_be_repeated_permuted_and_morphed(pipe):
    def with_weights(images, weights):
        return generate(pipe, face_image=images, face_weights=weights, **BOTH)

    assert close(generate(pipe, face_image=[A, A], **BOTH), generate(pipe, face_image=A, **BOTH))
    assert close(with_weights([A, B], [3, 1]), with_weights([B, A], [1, 3]))
    assert close(with_weights([A, B], [1, 0]), generate(pipe, face_image=A, **BOTH))
    assert differ(with_weights([A, B], [3, 1]), with_weights([A, B], [1, 3]))


def test_the_window_holds_for_both_attentions(pipe):
    late = generate(pipe, face_image=A, face_start=0.99, **BOTH)  # no step is so late
    assert torch.equal(late, generate(pipe))
    assert differ(generate(pipe, face_image=A, face_end=0.5, **BOTH), generate(pipe, face_image=A, **BOTH))


# --- Other pipelines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgFaceFusionPipeline, StableDiffusionInpaintFaceFusionPipeline])
def test_pictures_that_exist(pipe, kind):
    other = kind.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    options = {"image": face(5), "strength": 1.0}
    if kind is StableDiffusionInpaintFaceFusionPipeline:
        options["mask_image"] = face(6).convert("L").point(lambda value: 255)
    both = generate(other, **options, **PLACED, **BOTH)
    assert differ(both, generate(other, **options, **PLACED))
    assert torch.equal(generate(other, **options, **PLACED, face_scale=0, **BOTH), generate(other, **options))


def test_with_a_controlnet_and_a_second_pass_over_the_faces(pipe):
    parts = {**pipe.components, "controlnet": tiny_controlnet(pipe.unet)}
    controlled = with_adapter(type(pipe)(**parts, requires_safety_checker=False))
    controlled.set_progress_bar_config(disable=True)
    options = {"control_image": face(5), "control_kind": "map", **PLACED}
    assert differ(generate(controlled, **options, **BOTH), generate(controlled, **options))
    picture = face(7, 48)
    again = {"face_image": [[A], [B]], "face_boxes": [(2, 2, 8, 8), (30, 2, 36, 8)], "num_inference_steps": 4}
    assert differs(pipe, picture, again | BOTH, again)
    assert differs(pipe, picture, again | BOTH, again | BOTH | {"face_self_scale": [4.0, 0.0]})


def differs(pipe, picture, one, other):
    pictures = [
        pipe.refine_faces(picture, "a cat", **options, generator=torch.Generator().manual_seed(0))[0]
        for options in (one, other)
    ]
    return pictures[0].tobytes() != pictures[1].tobytes()


# --- Left as found -------------------------------------------------------------------------------------------------


def test_processors_are_those_from_before_after_an_exception(pipe):
    before = dict(pipe.unet.attn_processors)
    during = []

    def fail(pipe, step, timestep, tensors):
        during.append([getattr(p, "is_face_fusion_processor", False) for p in pipe.unet.attn_processors.values()])
        raise RuntimeError("user code")

    with pytest.raises(RuntimeError, match="user code"):
        generate(pipe, face_image=A, callback_on_step_end=fail, **BOTH)
    assert sum(during[0]) == 6  # four of the cross-attention, two of the self-attention
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())


# --- Files ---------------------------------------------------------------------------------------------------------


def test_a_file_of_both_says_how_it_was_made(pipe, tmp_path):
    own = SelfAttentionReference(3.0, 200, 4, (0.6, 0.8), ("up_blocks.1", "mid_block"))
    identity = pipe.encode_face([A, B], [1, 2], face_mode="both", self_attention=own)
    identity.save(tmp_path / "someone.safetensors")
    with safe_open(tmp_path / "someone.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == "2" and metadata["mode"] == "both"
    assert {name: value for name, value in metadata.items() if name.startswith("self_")} == {
        "self_scale": "3.0",
        "self_timestep": "200",
        "self_seed": "4",
        "self_half_axes": "0.6 0.8",
        "self_layers": "up_blocks.1 mid_block",
    }
    loaded = FaceIdentity.load(tmp_path / "someone.safetensors")
    assert loaded.self_attention == own
    assert all(torch.equal(loaded.cells[name], cells) for name, cells in identity.cells.items())
    assert torch.equal(generate(pipe, face_image=loaded), generate(pipe, face_image=identity))


def test_a_file_of_the_first_version_means_what_it_meant(pipe, tmp_path):
    """The whole clean reference at all self-attention layers, with strength 1."""
    path = tmp_path / "old.safetensors"
    identity = pipe.encode_face(A, face_mode="training-free", self_attention=WHOLE_AND_CLEAN)
    identity.save(path)
    with safe_open(path, "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if not name.startswith("self_")}
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(".cells")}
    save_file(tensors, path, metadata | {"format_version": "1"})
    old = FaceIdentity.load(path)
    assert old.self_attention == WHOLE_AND_CLEAN and old.cells == {}
    assert torch.equal(generate(pipe, face_image=old), generate(pipe, face_image=identity))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"self_scale": "much"}, "damaged"),
        ({"self_half_axes": "0.75"}, "damaged"),
        ({"mode": "magic"}, "mode 'magic'"),
        ({"format_version": "3"}, "version '3'"),
    ],
)
def test_a_file_with_other_words_in_it_is_refused(pipe, tmp_path, change, message):
    path = tmp_path / "someone.safetensors"
    pipe.encode_face(A, **BOTH).save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | change)
    with pytest.raises(IdentityMismatchError, match=message):
        FaceIdentity.load(path)
