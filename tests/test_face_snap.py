"""FaceSnap: a ControlNet sees facial points and reads who it is in the place of a text; nothing else changes."""

from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_face_studio import ToyEmbedder, random_weights, toy_encoder
from test_several_people import LEFT, RIGHT
from tiny_models import (
    face,
    family_of,
    generate,
    kind_of,
    stock_pipeline,
    tiny_controlnet,
    tiny_pipeline,
    with_adapter,
)

from face_fusion_pipeline.conditioner import Person
from face_fusion_pipeline.conditioner_face_snap import SnapContext, SnapIdentity, mixed_tokens
from face_fusion_pipeline.face_attached import detach_module, save_attached
from face_fusion_pipeline.face_errors import (
    AdapterMismatchError,
    FaceFusionError,
    IdentityMismatchError,
    InvalidScaleError,
    LandmarksError,
    ModelNotFoundError,
)
from face_fusion_pipeline.face_landmarks import POINTS, Pose, draw_landmarks, posed
from face_fusion_pipeline.face_models import FaceFit, expression_vector
from face_fusion_pipeline.face_snap import (
    SNAP_WEIGHTS_NAME,
    FaceMixer,
    SnapMetadata,
    check_network,
    new_mixer,
    new_network,
    save_network,
)
from face_fusion_pipeline.face_style import in_oval, picture_patches
from face_fusion_pipeline.unet_family import weights_fingerprint


FACE_WIDTH, PATCH_WIDTH = ToyEmbedder.width, 16
A, B, STYLE = face(0), face(1), face(7)
DOTS = np.random.default_rng(3).uniform(1, 15, (POINTS, 2))
OTHER_DOTS = np.random.default_rng(4).uniform(1, 15, (POINTS, 2))


class ToyModel:
    """Points on a ring as large as a picture is bright; an expression moves the mouth."""

    name, expressions = "toy", ("open",)

    def fit(self, photo: Image.Image, box: Any = None) -> FaceFit:
        shape = np.asarray(photo, dtype=np.float64).mean((0, 1)) / 64
        return FaceFit(shape, np.array([shape[0] % 1]), Pose(yaw=10 * shape[1], x=8, y=8), (1, 1, 15, 15), photo.size)

    def points(self, shape: np.ndarray, expression: np.ndarray, pose: Pose) -> np.ndarray:
        turn = np.linspace(0, 2 * np.pi, POINTS)
        ring = np.stack([shape[0] * np.cos(turn), shape[1] * np.sin(turn), shape[2] * np.cos(3 * turn)], 1)
        ring[52:, 1] -= expression[0]
        return posed(ring, pose)

    def expression_of(self, given: Any) -> np.ndarray:
        return expression_vector(self.expressions, given, np.zeros(1))


def fit(picture: Image.Image) -> FaceFit:
    return ToyModel().fit(picture)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: Any) -> Any:
    """Random weights for the tiny UNet of each family, by family and by what the UNet sees of the tokens."""
    folder = tmp_path_factory.mktemp("snap")
    for family in ("sd", "xl"):
        unet = tiny_pipeline(family=family).unet
        for context in ("none", "append"):
            torch.manual_seed(2)
            sizes = {"image_width": PATCH_WIDTH, "face_width": FACE_WIDTH, "tokens": 3, "depth": 2}
            new_mixer(unet, **sizes, face_embedder="toy", context=context)
            save_attached(unet, FaceMixer, folder / family / context / SNAP_WEIGHTS_NAME)
            detach_module(unet, "face_snap")
            save_network(tiny_controlnet(unet), folder / family / context)
    return folder


def loaded(pipe: Any, weights: Any, context: str = "none") -> Any:
    if family_of(pipe) == "xl":
        pipe.register_modules(image_encoder=toy_encoder())
    else:
        pipe.image_encoder = toy_encoder()
    pipe.load_face_snap(weights / family_of(pipe) / context, face_embedder=ToyEmbedder())
    pipe.face_model = ToyModel()
    return pipe


@pytest.fixture(params=["sd", "xl"])
def pipe(request: Any, weights: Any) -> Any:
    return loaded(tiny_pipeline(family=request.param), weights)


@pytest.fixture
def sd(weights: Any) -> Any:
    return loaded(tiny_pipeline(), weights)


@pytest.fixture
def appended(weights: Any) -> Any:
    return loaded(tiny_pipeline(), weights, "append")


# --- What stays --------------------------------------------------------------------------------------------------


def test_without_a_driver_and_people_of_it_pictures_are_the_stock_ones(pipe):
    plain = generate(tiny_pipeline(family=family_of(pipe)))
    assert torch.equal(generate(pipe), plain)
    driven = generate(pipe, face_image=A, driver_image=DOTS)
    assert not torch.equal(driven, plain)
    assert torch.equal(generate(pipe), plain)  # also after it


def test_at_strength_zero_and_outside_its_time_the_picture_is_the_stock_one(pipe):
    plain = generate(tiny_pipeline(family=family_of(pipe)))
    driven = {"face_image": A, "driver_image": DOTS}
    assert torch.equal(generate(pipe, **driven, controlnet_conditioning_scale=0.0), plain)
    assert torch.equal(generate(pipe, **driven, control_guidance_start=0.98, control_guidance_end=0.99), plain)


def test_unloading_leaves_the_pipeline_as_it_was(sd):
    plain = tiny_pipeline()
    sd.unload_face_snap()
    assert [name for name, _ in sd.unet.named_parameters()] == [name for name, _ in plain.unet.named_parameters()]
    assert sd.controlnet is None and sd.face_snap is None
    assert torch.equal(generate(sd), generate(plain))
    with pytest.raises(FaceFusionError, match="FaceSnap is not loaded"):
        sd.unload_face_snap()


def test_face_fusion_references_do_not_see_the_mixer(sd):
    plain = with_adapter(tiny_pipeline())
    expected, found = plain.encode_face(A), with_adapter(sd).encode_face(A, face_mode="adapter")
    assert all(torch.equal(found.keys[name], expected.keys[name]) for name in expected.keys)
    assert weights_fingerprint(sd.unet) == weights_fingerprint(plain.unet)


def test_another_controlnet_is_seen_as_before(weights):
    depth = tiny_controlnet(tiny_pipeline().unet, seed=5)

    def with_depth() -> Any:
        return kind_of("sd")(**{**tiny_pipeline().components, "controlnet": depth}, requires_safety_checker=False)

    plain, pipe = with_depth(), loaded(with_depth(), weights)
    assert len(pipe.controlnet.nets) == 2
    expected = generate(plain, control_image=STYLE, control_kind="map")
    assert torch.equal(generate(pipe, control_image=STYLE, control_kind="map"), expected)
    both = {"control_image": STYLE, "control_kind": "map", "driver_image": DOTS, "face_image": A}
    assert not torch.equal(generate(pipe, **both), expected)
    assert torch.equal(generate(pipe, **both, controlnet_conditioning_scale=[1.0, 0.0]), expected)
    alone = generate(loaded(tiny_pipeline(), weights), face_image=A, driver_image=DOTS)
    assert torch.equal(generate(pipe, **both, controlnet_conditioning_scale=[0.0, 1.0]), alone)
    assert torch.equal(generate(pipe, face_image=A, driver_image=DOTS), alone)
    pipe.unload_face_snap()
    assert pipe.controlnet is depth


def test_saved_models_hold_nothing_of_what_is_loaded(sd, tmp_path):
    """Also not FaceStudio, whose LoRA would rename the UNet's own weights."""
    random_weights(sd.unet)
    expected = generate(sd, face_image=A, driver_image=DOTS, identity_by="face-snap")
    sd.image_encoder, encoder = None, sd.image_encoder
    sd.save_pretrained(tmp_path)
    sd.image_encoder = encoder
    plain = tiny_pipeline()
    (file,) = (tmp_path / "unet").glob("*.safetensors")
    assert load_file(file).keys() == plain.unet.state_dict().keys()
    assert not (tmp_path / "controlnet").exists()
    assert torch.equal(generate(sd, face_image=A, driver_image=DOTS, identity_by="face-snap"), expected)
    assert sd.face_studio is not None
    again = kind_of("sd").from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(generate(again), generate(plain))


# --- What the networks read --------------------------------------------------------------------------------------


def test_the_controlnet_reads_the_tokens_in_the_place_of_the_text(pipe):
    """As a stock pipeline does whose ControlNet is handed them."""
    found = generate(pipe, face_image=A, driver_image=DOTS)
    tokens = torch.cat([pipe.face_snap(), mixed_tokens(pipe, pipe.encode_face(A))])
    network = pipe.face_snap_network
    seen = []

    def hand_over(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        seen.append(kwargs["encoder_hidden_states"].shape)
        return args, {**kwargs, "encoder_hidden_states": tokens}

    handle = network.register_forward_pre_hook(hand_over, with_kwargs=True)
    stock = stock_pipeline(family_of(pipe), "ControlNet", controlnet=network)
    expected = generate(stock, image=draw_landmarks(DOTS, 16))
    handle.remove()
    assert len(seen) == 3
    assert torch.allclose(found, expected, atol=1e-4)


def test_appended_tokens_follow_the_text_of_the_unet(appended):
    identity = appended.encode_face(A)
    found = generate(appended, face_image=identity, guidance_scale=1.0)
    text, _ = appended.encode_prompt("a cat", "cpu", 1, False)
    tokens = torch.cat([text, mixed_tokens(appended, identity)], 1)
    arguments = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 1.0}
    expected = tiny_pipeline()(prompt_embeds=tokens, generator=torch.Generator().manual_seed(0), **arguments).images
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(generate(appended, face_image=identity, face_scale=0.0), generate(tiny_pipeline()))


def test_the_unet_sees_no_tokens_where_the_weights_do_not_say_so(sd, appended):
    driven = {"face_image": A, "driver_image": DOTS}
    off = {"controlnet_conditioning_scale": 0.0}
    assert torch.equal(generate(sd, **driven, **off), generate(tiny_pipeline()))
    assert not torch.equal(generate(appended, **driven, **off), generate(tiny_pipeline()))


def test_the_mixer_follows_its_equations():
    torch.manual_seed(0)
    mixer = FaceMixer(SnapMetadata("sd1", 4, 3, "toy", tokens=2, depth=1), 8).double()
    who, patches = torch.randn(2, 3).double(), torch.randn(2, 5, 4).double()
    q = mixer.who(who)[:, None]
    kv = torch.cat([mixer.patches(patches), q], 1)
    attention = mixer.attention
    weights = (attention.query(q) @ attention.key(kv).mT / 8**0.5).softmax(-1)  # one head
    memory = torch.cat([attention.output(weights @ attention.value(kv)), kv], 1)
    expected = mixer.norm(mixer.decoder[0](mixer.queries.expand(2, -1, -1), memory))
    assert torch.allclose(mixer(who, patches), expected, atol=1e-12)
    present = mixer(who, patches, torch.tensor([True, False]))
    assert torch.equal(present[1], mixer.nobody) and torch.equal(present[0], mixer(who, patches)[0])
    order = torch.randperm(5)
    assert torch.allclose(mixer(who, patches[:, order]), expected, atol=1e-12)  # patches are a set


def test_strength_goes_from_nobody_to_the_person(sd):
    identity = sd.encode_face(A)
    person, nobody = Person(identity, 0.25), sd.face_snap()
    context = SnapContext(sd, sd.face_snap_network, {id(person): identity})
    expected = 0.75 * nobody + 0.25 * mixed_tokens(sd, identity)
    assert torch.allclose(context.tokens(0, person), expected, atol=1e-6)
    assert torch.equal(context.tokens(0, Person(identity)), nobody)  # somebody who is not known
    nobody = generate(sd, driver_image=DOTS)
    assert torch.equal(generate(sd, face_image=A, driver_image=DOTS, face_scale=0.0), nobody)
    assert torch.equal(generate(sd, face_image=A, driver_image=DOTS, face_start=0.99), nobody)
    assert not torch.allclose(generate(sd, face_image=A, driver_image=DOTS), nobody, atol=1e-3)


# --- People ------------------------------------------------------------------------------------------------------


def test_beta_of_one_person_is_that_person_and_order_does_not_matter(sd):
    driven = {"driver_image": DOTS}
    alone = generate(sd, face_image=A, **driven)
    assert torch.allclose(generate(sd, face_image=[A, A], **driven), alone, atol=1e-4)
    assert torch.allclose(generate(sd, face_image=[A, B], face_weights=[1, 0], **driven), alone, atol=1e-4)
    mixed = generate(sd, face_image=[A, B], face_weights=[3, 1], **driven)
    assert torch.allclose(generate(sd, face_image=[B, A], face_weights=[1, 3], **driven), mixed, atol=1e-4)
    assert not torch.allclose(mixed, alone, atol=1e-3)


def test_a_person_is_read_in_their_region_alone(sd):
    """Swapping the right person changes nothing of what the left edge reads."""
    seen: list[torch.Tensor] = []
    layer = sd.face_snap_network.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    handle = layer.register_forward_hook(lambda _m, _i, output: seen.append(output.detach().clone()))
    two = np.stack([DOTS, OTHER_DOTS])
    for right in (A, B):
        people = {"face_image": [[STYLE], [right]], "face_boxes": [LEFT, RIGHT]}
        generate(sd, **people, driver_image=two, num_inference_steps=1)
    handle.remove()
    first, second = (found[-1].unflatten(0, (8, 8)) for found in seen)
    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.equal(first, second)


def test_each_picture_of_a_batch_equals_the_single_one(pipe):
    prompts, people = ["a cat", "a dog!"], [[[A]], [[B]]]
    together = generate(pipe, prompts, face_image=people, driver_image=[DOTS, OTHER_DOTS])
    alone = [
        generate(pipe, prompt, seed=index, face_image=who, driver_image=dots)[0]
        for index, (prompt, who, dots) in enumerate(zip(prompts, (A, B), (DOTS, OTHER_DOTS), strict=True))
    ]
    assert torch.allclose(together, torch.stack(alone), rtol=1e-3, atol=1e-2)
    swapped = generate(pipe, prompts, face_image=people[::-1], driver_image=[OTHER_DOTS, DOTS])
    assert not torch.allclose(swapped, together, atol=1e-2)


def test_a_driver_gives_expression_and_pose_and_the_source_its_shape(sd, monkeypatch):
    drawn = []
    network = sd.face_snap_network
    handle = network.register_forward_pre_hook(
        lambda _m, _a, given: drawn.append(given["controlnet_cond"][:1]), with_kwargs=True
    )
    model, one = ToyModel(), {"num_inference_steps": 1}
    for driver in (fit(A), fit(B)):
        generate(sd, face_image=A, driver_image=driver, **one)
        expected = draw_landmarks(model.points(fit(A).shape, driver.expression, driver.pose), 16)
        pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float() / 255
        assert torch.allclose(drawn[-1][0], pixels, atol=1e-6)
    handle.remove()
    own = draw_landmarks(model.points(fit(A).shape, fit(A).expression, fit(A).pose), 16)
    assert torch.allclose(drawn[0][0], torch.from_numpy(np.array(own)).permute(2, 0, 1) / 255, atol=1e-6)


def test_face_fusion_carries_the_identity_and_face_snap_the_pose(sd):
    plain = generate(with_adapter(sd), face_image=A)
    driven = generate(sd, face_image=A, driver_image=DOTS)
    assert not torch.equal(driven, plain)
    off = generate(sd, face_image=A, driver_image=DOTS, controlnet_conditioning_scale=0.0)
    assert torch.equal(off, plain)
    assert not torch.equal(generate(sd, face_image=A, driver_image=DOTS, identity_by="face-snap"), driven)
    assert torch.equal(generate(sd, face_image=A, driver_image=DOTS, identity_by="face-fusion"), driven)

    identity = sd.encode_face(A)  # has no photo: the network reads nobody, and the shape is asked for
    nobody = generate(sd, face_image=identity, driver_image=DOTS)
    assert not torch.equal(nobody, driven)
    with pytest.raises(FaceFusionError, match="control_source"):
        generate(sd, face_image=identity, driver_image=fit(B))
    assert generate(sd, face_image=identity, driver_image=fit(B), control_source=A).isfinite().all()


def test_style_by_face_studio_and_pose_by_face_snap(sd):
    random_weights(sd.unet)
    sd._token_parts = {**sd._token_parts, "face_studio": {}}
    styled = {"style_image": STYLE, "style_scale": 1.0}
    both = generate(sd, driver_image=DOTS, face_image=A, identity_by="face-snap", **styled)
    assert not torch.equal(both, generate(sd, driver_image=DOTS, face_image=A, identity_by="face-snap"))
    assert torch.equal(
        generate(sd, driver_image=DOTS, controlnet_conditioning_scale=0.0, **styled), generate(sd, **styled)
    )


def test_who_takes_the_face_where_nothing_is_said(sd):
    assert sd.encode_face(A).mode == "face-snap"
    assert sd.encode_face(A, face_mode="training-free").mode == "training-free"
    assert with_adapter(sd).encode_face(A).mode == "adapter"


# --- Files and places --------------------------------------------------------------------------------------------


def test_identities_and_weights_survive_their_files(sd, tmp_path):
    identity = sd.encode_face([A, B], weights=[2, 1])
    identity.save(tmp_path / "a.safetensors")
    again = SnapIdentity.load(tmp_path / "a.safetensors")
    assert repr(again) == "SnapIdentity(n_refs=2, embedder='toy')"
    expected = generate(sd, face_image=identity, driver_image=DOTS)
    assert all(torch.equal(getattr(again, name), getattr(identity, name)) for name in (*identity.TENSORS, "weights"))
    assert torch.allclose(generate(sd, face_image=again, driver_image=DOTS), expected, atol=1e-3)
    sd.save_face_snap(tmp_path / "out")
    other = tiny_pipeline()
    other.load_face_snap(tmp_path / "out" / SNAP_WEIGHTS_NAME, face_embedder=ToyEmbedder())
    assert torch.allclose(generate(other, face_image=identity, driver_image=DOTS), expected, atol=1e-3)
    other.load_face_snap(tmp_path / "out", face_embedder=ToyEmbedder())  # in the place of what was
    assert torch.allclose(generate(other, face_image=identity, driver_image=DOTS), expected, atol=1e-3)


def test_a_controlnet_pipeline_of_ones_own(sd, weights):
    """The network that the pipeline has is named, and dots are its image."""
    expected = generate(sd, face_image=A, driver_image=DOTS)
    network = sd.face_snap_network
    pipe = kind_of("sd", "ControlNet")(**{**tiny_pipeline().components, "controlnet": network, "image_encoder": None})
    pipe.set_progress_bar_config(disable=True)
    pipe.image_encoder = toy_encoder()
    pipe.load_face_snap(weights / "sd" / "none", controlnet=network, face_embedder=ToyEmbedder())
    assert pipe.controlnet is network
    assert torch.equal(generate(pipe, image=draw_landmarks(DOTS, 16), face_image=A), expected)


def test_another_pipeline_of_the_same_parts_has_the_weights(sd):
    other = kind_of("sd").from_pipe(sd)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(generate(other, face_image=A, driver_image=DOTS), generate(sd, face_image=A, driver_image=DOTS))


@pytest.mark.parametrize("method", ["cpu_offload_with_hook", "cpu_offload"])
@pytest.mark.parametrize("system", ["face-snap", "face-studio"])
def test_offloaded_models(appended, method, system):
    """What diffusers' two ways of offloading install, with the CPU as the device."""
    if system == "face-studio":
        random_weights(appended.unet)
        appended._token_parts = {**appended._token_parts, "face_studio": {"face_embedder": ToyEmbedder()}}
    called = {"face_image": A, "driver_image": DOTS, "identity_by": system, "style_image": STYLE, "style_scale": 1.0}
    called = called if system == "face-studio" else {**called, "style_image": None, "style_scale": None}
    expected = generate(appended, **called)
    for part in (appended.text_encoder, appended.unet, appended.vae, appended.controlnet):
        getattr(accelerate, method)(part, torch.device("cpu"))
    assert torch.allclose(generate(appended, **called), expected, atol=1e-4)


def test_controlnets_that_were_offloaded_together_are_brought_together(weights):
    depth = tiny_controlnet(tiny_pipeline().unet, seed=5)
    parts = {**tiny_pipeline().components, "controlnet": depth}
    pipe = loaded(kind_of("sd")(**parts, requires_safety_checker=False), weights)
    brought: list[Any] = []

    class Noting(accelerate.hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            brought.append(module)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(pipe.controlnet, Noting())
    generate(pipe, driver_image=DOTS)
    assert brought == [pipe.controlnet]


def test_half_precision(pipe):
    pipe.to(dtype=torch.bfloat16)
    assert {pipe.face_snap.queries.dtype, pipe.face_snap_network.dtype} == {torch.bfloat16}
    assert generate(pipe, face_image=A, driver_image=DOTS).isfinite().all()


def test_a_network_may_begin_with_another_one_and_does_not_say_where_that_lay(sd, tmp_path):
    other = new_network(sd.unet, sd.vae_scale_factor)
    for weight in other.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    other.save_pretrained(tmp_path / "other")
    begun = new_network(sd.unet, sd.vae_scale_factor, str(tmp_path / "other"))
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters(), other.parameters(), strict=True))
    assert all(weight.requires_grad for weight in begun.parameters())
    begun.save_pretrained(tmp_path / "begun")
    assert str(tmp_path) not in (tmp_path / "begun" / "config.json").read_text()
    with pytest.raises(AdapterMismatchError, match="cannot load the ControlNet"):
        new_network(sd.unet, sd.vae_scale_factor, str(tmp_path / "nothing"))
    with pytest.raises(AdapterMismatchError, match="take one that was trained for this model"):
        new_network(tiny_pipeline(family="xl").unet, 8, str(tmp_path / "other"))


def test_a_new_network_changes_nothing_yet(sd):
    network = new_network(sd.unet, sd.vae_scale_factor)
    check_network(network, sd.unet)
    dots = torch.zeros(1, 3, 16, 16)
    down, middle = network(torch.randn(1, 4, 8, 8), 0, sd.face_snap(), controlnet_cond=dots, return_dict=False)
    assert not middle.any() and not any(each.any() for each in down)


# --- Pictures ----------------------------------------------------------------------------------------------------


def test_an_oval_shows_the_middle_of_a_picture():
    whole = face(0, 64)
    shown = np.asarray(in_oval(whole, 0.5))
    assert np.array_equal(shown[25:40, 25:40], np.asarray(whole)[25:40, 25:40])
    assert (shown[:15] == 128).all() and (shown[20, 20] == 128).all()  # a corner of its box
    assert in_oval(whole, 0) is whole


def test_patches_are_those_of_the_last_layer_but_one():
    found = picture_patches(toy_encoder(), [A, face(2, 40)])
    assert found.shape == (2, 5, PATCH_WIDTH)  # 2 x 2 and the one that stands for all


# --- Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"face_image": A}, FaceFusionError, "give a driver_image"),
        ({"driver_image": DOTS + 100}, LandmarksError, "is in the 16x16 picture"),
        ({"driver_image": DOTS, "control_image": STYLE}, FaceFusionError, "own takes a driver_image"),
        ({"driver_image": [DOTS, DOTS, DOTS]}, FaceFusionError, "3 prompts, but there are 1"),
        ({"driver_image": DOTS, "guess_mode": True}, FaceFusionError, "guess_mode"),
        ({"driver_image": DOTS, "face_image": A, "face_self_scale": 2.0}, InvalidScaleError, "not of FaceSnap"),
        ({"driver_image": DOTS, "face_image": A, "identity_by": "x"}, FaceFusionError, "or face-snap"),
        (
            {"driver_image": DOTS, "face_image": A, "identity_by": "face-snap", "face_mode": "face-studio"},
            FaceFusionError,
            "two systems",
        ),
    ],
)
def test_bad_arguments(sd, arguments, error, words):
    with pytest.raises(error, match=words):
        generate(sd, **arguments)


def test_attention_maps_are_of_face_fusion_alone(appended):
    from face_fusion_pipeline import record_attention

    with pytest.raises(FaceFusionError, match="FaceSnap are of none"), record_attention(appended):
        generate(appended, face_image=A)


def test_what_is_missing_is_named(weights, sd, tmp_path):
    plain = tiny_pipeline()
    with pytest.raises(FaceFusionError, match="load_face_snap"):
        generate(plain, driver_image=DOTS)
    with pytest.raises(FaceFusionError, match="load_face_snap"):
        plain.encode_face(A, face_mode="face-snap")
    with pytest.raises(FaceFusionError, match="no FaceSnap weights to save"):
        plain.save_face_snap(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no FaceSnap"):
        plain.load_face_snap(weights / "nowhere")
    sd.image_encoder = None
    with pytest.raises(FaceFusionError, match="FaceSnap weights look at pictures with the model's own image encoder"):
        generate(sd, face_image=A, driver_image=DOTS)


def test_weights_that_do_not_fit_are_refused_and_those_loaded_stay(weights, sd, tmp_path):
    expected = generate(sd, face_image=A, driver_image=DOTS)
    with pytest.raises(AdapterMismatchError, match="--conditioner face-snap"):
        sd.load_face_snap(weights / "xl" / "none")
    with pytest.raises(AdapterMismatchError, match="the ControlNet is"):
        sd.load_face_snap(weights / "sd" / "none", controlnet=tiny_controlnet(tiny_pipeline(family="xl").unet))
    save_attached(sd.unet, FaceMixer, tmp_path / SNAP_WEIGHTS_NAME)
    with pytest.raises(AdapterMismatchError, match="cannot load the ControlNet"):
        sd.load_face_snap(tmp_path)
    with pytest.raises(AdapterMismatchError, match="not FaceStudio weights"):
        sd.load_face_studio(tmp_path / SNAP_WEIGHTS_NAME)
    assert torch.equal(generate(sd, face_image=A, driver_image=DOTS), expected)


def test_identities_that_do_not_fit_are_refused(sd):
    ones = torch.ones(1)
    stranger = SnapIdentity(torch.ones(1, FACE_WIDTH), ones, "other", torch.ones(1, 5, PATCH_WIDTH))
    with pytest.raises(IdentityMismatchError, match="embedded by 'other'"):
        generate(sd, face_image=stranger, driver_image=DOTS)
    narrow = SnapIdentity(torch.ones(1, FACE_WIDTH), ones, "toy", torch.ones(1, 5, PATCH_WIDTH - 1))
    with pytest.raises(IdentityMismatchError, match="patches of 15 numbers"):
        generate(sd, face_image=narrow, driver_image=DOTS)


def test_metadata_out_of_range_are_refused():
    with pytest.raises(AdapterMismatchError, match="context must be none or append"):
        SnapMetadata("sd1", 4, 3, "toy", context="replace")
    with pytest.raises(AdapterMismatchError, match="depth must be"):
        SnapMetadata("sd1", 4, 3, "toy", depth=0)
    strings = SnapMetadata("sd1", 4, 3, "toy").to_strings()
    assert SnapMetadata.from_strings(strings) == SnapMetadata("sd1", 4, 3, "toy")
    with pytest.raises(AdapterMismatchError, match="'oval' is missing"):
        SnapMetadata.from_strings({name: text for name, text in strings.items() if name != "oval"})
