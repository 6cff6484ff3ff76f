"""FaceStudio: text, a style picture and people make the context, and nothing else of the UNet changes."""

from typing import Any

import numpy as np
import pytest
import torch
from test_several_people import LEFT, RIGHT
from tiny_models import face, for_task, generate, tiny_controlnet, tiny_pipeline, with_adapter
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from face_fusion_pipeline.conditioner import Person
from face_fusion_pipeline.conditioner_face_studio import StudioContext, StudioIdentity, Style
from face_fusion_pipeline.face_errors import (
    AdapterMismatchError,
    FaceFusionError,
    IdentityMismatchError,
    InvalidScaleError,
    ModelNotFoundError,
)
from face_fusion_pipeline.face_files import read_tensors, save_tensors
from face_fusion_pipeline.face_studio import (
    STUDIO_WEIGHTS_NAME,
    FaceStudio,
    StudioMetadata,
    load_studio,
    lora_state,
    new_studio,
    save_studio,
    set_lora,
)
from face_fusion_pipeline.face_style import picture_embeddings, unit_length, without_faces
from face_fusion_pipeline.unet_family import weights_fingerprint


IMAGE_WIDTH, FACE_WIDTH = 10, 6
A, B, STYLE = face(0), face(1), face(7)


class ToyEmbedder:
    name, width = "toy", FACE_WIDTH

    def __call__(self, faces: Any) -> torch.Tensor:
        small = [np.asarray(picture.resize((2, 1))).reshape(-1) for picture in faces]
        return torch.from_numpy(np.stack(small)).float()


def toy_prior(prompts: Any) -> torch.Tensor:
    return torch.stack([torch.randn(IMAGE_WIDTH, generator=torch.Generator().manual_seed(len(p))) for p in prompts])


def toy_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=IMAGE_WIDTH)
    return CLIPVisionModelWithProjection(config).eval()


def random_weights(unet: Any, context: str = "replace", **metadata: Any) -> None:
    new_studio(
        unet,
        **{
            **{"image_width": IMAGE_WIDTH, "face_width": FACE_WIDTH, "face_embedder": "toy", "context": context},
            **{"tokens": 3, "rank": 4, "picture_mask": 0.0, **metadata},
        },
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in lora_state(unet).values():
            tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights for the tiny UNet of each family."""
    folder = tmp_path_factory.mktemp("studio")
    for family in ("sd", "xl"):
        unet = tiny_pipeline(family=family).unet
        torch.manual_seed(2)
        random_weights(unet)
        save_studio(unet, folder / family / STUDIO_WEIGHTS_NAME)
    return folder


def with_studio(weights: Any, family: str = "sd") -> Any:
    pipe = tiny_pipeline(family=family)
    pipe.load_face_studio(weights / family, face_embedder=ToyEmbedder(), prior=toy_prior)
    if family == "xl":
        pipe.register_modules(image_encoder=toy_encoder())
    else:
        pipe.image_encoder = toy_encoder()
    return pipe


@pytest.fixture(params=["sd", "xl"])
def pipe(request, weights):
    return with_studio(weights, request.param)


@pytest.fixture
def sd(weights):
    return with_studio(weights)


# --- What stays --------------------------------------------------------------------------------------------------


def test_without_style_and_people_of_it_pictures_are_the_stock_ones(pipe):
    family = "xl" if hasattr(pipe, "text_encoder_2") else "sd"
    plain = generate(tiny_pipeline(family=family))
    assert torch.equal(generate(pipe), plain)
    styled = generate(pipe, style_image=STYLE)
    assert not torch.equal(styled, plain)
    assert torch.equal(generate(pipe), plain)  # also after it


def test_weights_of_earlier_versions_have_a_lora_for_fewer_layers(weights, tmp_path):
    tensors, metadata = read_tensors(weights / "sd" / STUDIO_WEIGHTS_NAME)
    kept = {name: tensor for name, tensor in tensors.items() if ".to_q." not in name and ".to_out." not in name}
    file = tmp_path / STUDIO_WEIGHTS_NAME
    save_tensors(file, kept, metadata)
    unet = tiny_pipeline().unet
    load_studio(unet, file)
    before = lora_state(unet)
    assert before.keys() == {name for name in kept if ".lora_" in name}
    load_studio(unet, file, every_layer=True)  # to train on: new layers change nothing yet
    after = lora_state(unet)
    assert after.keys() == {name for name in tensors if ".lora_" in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(tensor.any() for name, tensor in after.items() if ".lora_B." in name and name not in before)

    del kept[next(name for name in kept if ".to_k.lora_B." in name)]
    save_tensors(file, kept, metadata)
    for every_layer in (False, True):
        with pytest.raises(AdapterMismatchError, match="other layers"):
            load_studio(unet, file, every_layer=every_layer)


def test_unloading_leaves_the_unet_as_it_was(sd):
    plain = tiny_pipeline()
    sd.unload_face_studio()
    assert [name for name, _ in sd.unet.named_parameters()] == [name for name, _ in plain.unet.named_parameters()]
    assert torch.equal(generate(sd), generate(plain))
    with pytest.raises(FaceFusionError, match="not loaded"):
        sd.unload_face_studio()


def test_face_fusion_references_do_not_see_the_lora(sd):
    plain = with_adapter(tiny_pipeline())
    expected = plain.encode_face(A)
    found = with_adapter(sd).encode_face(A, face_mode="adapter")
    assert all(torch.equal(found.keys[name], expected.keys[name]) for name in expected.keys)
    assert weights_fingerprint(sd.unet) == weights_fingerprint(plain.unet)
    assert torch.equal(generate(sd, face_image=expected), generate(plain, face_image=expected))


def test_a_lora_of_the_user_stays(weights):
    from peft import LoraConfig

    def with_lora() -> Any:
        pipe = tiny_pipeline()
        torch.manual_seed(5)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="mine")
        return pipe

    plain, pipe = with_lora(), with_lora()
    pipe.load_face_studio(weights / "sd", face_embedder=ToyEmbedder(), prior=toy_prior)
    assert torch.equal(generate(pipe), generate(plain))
    with_face = generate(pipe, face_image=A)
    pipe.unet.set_adapters(["mine"], [0.0])
    assert not torch.equal(generate(pipe, face_image=A), with_face)  # both acted
    pipe.unet.set_adapters(["mine"], [1.0])
    pipe.unload_face_studio()
    assert torch.equal(generate(pipe), generate(plain))


def test_an_error_in_the_call_leaves_the_lora_asleep(sd):
    def stop(*_: Any) -> Any:
        raise RuntimeError("stop")

    plain = generate(sd)
    with pytest.raises(RuntimeError, match="stop"):
        generate(sd, face_image=A, callback_on_step_end=stop)
    assert torch.equal(generate(sd), plain)


# --- The slider --------------------------------------------------------------------------------------------------


def test_at_zero_the_style_picture_and_at_one_the_prompt_do_not_matter(pipe):
    text = generate(pipe, face_image=A)
    assert torch.equal(generate(pipe, face_image=A, style_image=STYLE, style_scale=0), text)
    assert not torch.equal(generate(pipe, "a dog!", face_image=A), text)
    style = generate(pipe, face_image=A, style_image=STYLE, style_scale=1)
    assert not torch.equal(generate(pipe, face_image=A, style_image=B, style_scale=1), style)
    if not hasattr(pipe, "text_encoder_2"):  # XL's pooled text is no context
        assert torch.equal(generate(pipe, "a dog!", face_image=A, style_image=STYLE, style_scale=1), style)


def test_tokens_follow_the_equation():
    metadata = StudioMetadata("sd1", image_width=4, face_width=3, face_embedder="toy", tokens=2, rank=0)
    studio = FaceStudio(metadata, 5).double()
    style, text, known = (torch.randn(1, width, dtype=torch.float64) for width in (4, 4, 3))
    weight, bias = studio.projection.weight, studio.projection.bias
    by_hand = 0.3 * (weight @ torch.cat([style, known], 1)[0] + bias) + 0.7 * (
        weight @ torch.cat([text, known], 1)[0] + bias
    )
    assert torch.allclose(studio.guided(style, text, known, 0.3)[0].flatten(), by_hand, atol=1e-12)


@pytest.mark.parametrize("context", ["replace", "append"])
def test_context_of_one_person_is_what_the_unet_gets_as_its_text(sd, context):
    """The processors give what handing the tokens over as prompt embeddings gives."""
    identity = sd.encode_face(A)
    found = generate(sd, face_image=identity, style_context=context)

    context_of_call = StudioContext(sd, None, unit_length(toy_prior(["a cat"])), 0.0, context == "replace")
    tokens, nothing = context_of_call.tokens(0, Person(identity)), context_of_call.nothing()
    text, negative = sd.encode_prompt("a cat", "cpu", 1, True)
    if context == "append":
        tokens, nothing = torch.cat([text, tokens], 1), torch.cat([negative, nothing], 1)
    set_lora(sd.unet, True)
    expected = sd(
        prompt_embeds=tokens,
        negative_prompt_embeds=nothing,
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert torch.allclose(found, expected, atol=1e-4)


# --- People ------------------------------------------------------------------------------------------------------


def test_beta_of_one_person_is_that_person_and_order_does_not_matter(sd):
    alone = generate(sd, face_image=A)
    assert torch.allclose(generate(sd, face_image=[A, A]), alone, atol=1e-4)
    assert torch.equal(generate(sd, face_image=[A, B], face_weights=[1, 0]), alone)
    mixed = generate(sd, face_image=[A, B], face_weights=[3, 1])
    assert torch.allclose(generate(sd, face_image=[B, A], face_weights=[1, 3]), mixed, atol=1e-4)
    assert not torch.allclose(mixed, alone, atol=1e-2)


def test_strength_zero_is_nobody(sd):
    nobody = generate(sd, style_image=STYLE, style_scale=1)
    assert torch.equal(generate(sd, face_image=A, face_scale=0, style_image=STYLE, style_scale=1), nobody)
    assert torch.equal(generate(sd, face_weights=[1, 2], style_image=STYLE, style_scale=1), nobody)  # of nobody
    assert not torch.equal(generate(sd, face_image=A, style_image=STYLE, style_scale=1), nobody)


def test_strength_scales_the_embedding(sd):
    identity = sd.encode_face(A)
    text = unit_length(toy_prior(["a cat"]))
    tokens = StudioContext(sd, None, text, 0.0, True).tokens(0, Person(identity, 0.5))
    assert torch.allclose(tokens, sd.face_studio(text, 0.5 * identity.face), atol=1e-6)
    assert not torch.allclose(generate(sd, face_image=identity, face_scale=0.5), generate(sd, face_image=identity))


def test_a_person_is_seen_in_their_region_alone(sd):
    """Changing the right person changes no key that the left region's queries see."""
    style = {"style_image": STYLE, "style_scale": 1.0, "num_inference_steps": 1}
    layers: list[torch.Tensor] = []
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    layer = sd.unet.get_submodule(name)
    handle = layer.register_forward_hook(lambda _m, _i, output: layers.append(output.detach().clone()))
    for right in (A, B):
        generate(sd, face_image=[[STYLE], [right]], face_boxes=[LEFT, RIGHT], face_background="none", **style)
    handle.remove()
    first, second = (found[-1].unflatten(0, (8, 8)) for found in (layers[0], layers[1]))
    assert torch.equal(first[:, 0], second[:, 0])  # the left edge
    assert not torch.equal(first, second)


def test_each_picture_of_a_batch_equals_the_single_one(pipe):
    prompts, people = ["a cat", "a dog!"], [[[A]], [[B]]]
    together = generate(pipe, prompts, face_image=people)
    for index, (prompt, who) in enumerate(zip(prompts, (A, B), strict=True)):
        alone = generate(pipe, prompt, seed=index, face_image=who)
        assert torch.allclose(together[index], alone[0], rtol=1e-3, atol=1e-2)


def test_outside_its_time_a_face_is_nobody(sd):
    nobody = generate(sd, style_image=STYLE, style_scale=1)
    late = generate(sd, face_image=A, style_image=STYLE, style_scale=1, face_start=0.99)
    assert torch.equal(late, nobody)


def test_style_by_face_studio_and_identity_by_face_fusion(sd):
    plain = generate(with_adapter(sd), face_image=A)
    both = generate(sd, face_image=A, style_image=STYLE)
    assert not torch.equal(both, plain)
    own = generate(sd, face_image=A, identity_by="face-studio")
    assert not torch.equal(own, plain)
    assert torch.equal(generate(sd, face_image=A, identity_by="face-fusion"), plain)
    assert torch.equal(generate(with_adapter(tiny_pipeline()), face_image=A), plain)  # loading adds nothing


def test_who_takes_the_face_where_nothing_is_said(sd):
    assert sd.encode_face(A).mode == "face-studio"
    assert sd.encode_face(A, face_mode="training-free").mode == "training-free"
    assert with_adapter(sd).encode_face(A).mode == "adapter"


def test_image_to_image_inpainting_and_depth(sd):
    start, mask = face(3), face(4).convert("L")
    assert (
        generate(for_task(sd, "Img2Img"), image=start, strength=0.7, face_image=A, style_image=STYLE).isfinite().all()
    )
    inpaint = for_task(sd, "Inpaint")
    assert generate(inpaint, image=start, mask_image=mask, face_image=A, height=16, width=16).isfinite().all()
    from face_fusion_pipeline import StableDiffusionControlNetFaceFusionPipeline as WithDepth

    depth = WithDepth.from_pipe(sd, controlnet=tiny_controlnet(tiny_pipeline().unet))
    depth.set_progress_bar_config(disable=True)
    assert generate(depth, image=start, face_image=A, style_image=STYLE).isfinite().all()


def test_identities_and_weights_survive_their_files(sd, tmp_path):
    identity = sd.encode_face([A, B], weights=[2, 1])
    identity.save(tmp_path / "a.safetensors")
    again = StudioIdentity.load(tmp_path / "a.safetensors")
    assert repr(again) == "StudioIdentity(n_refs=2, embedder='toy')"
    expected = generate(sd, face_image=identity)
    assert torch.equal(generate(sd, face_image=again), expected)
    sd.save_face_studio(tmp_path)
    other = tiny_pipeline()
    other.load_face_studio(tmp_path, face_embedder=ToyEmbedder(), prior=toy_prior)
    assert torch.equal(generate(other, face_image=identity), expected)


# --- Pictures ----------------------------------------------------------------------------------------------------


def test_faces_of_a_style_picture_are_covered():
    covered = np.asarray(without_faces(face(0, 64), [(20, 20, 30, 40)], 1.5))
    assert (covered[15:45, 10:40] == 128).all()
    assert np.array_equal(covered[:14], np.asarray(face(0, 64))[:14])
    assert without_faces(STYLE, [], 1.5) is STYLE


def test_embeddings_have_length_one():
    found = picture_embeddings(toy_encoder(), [STYLE, face(2, 40)])
    assert found.shape == (2, IMAGE_WIDTH)
    assert torch.allclose(found.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.equal(unit_length(torch.zeros(1, 4)), torch.zeros(1, 4))


# --- Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"style_image": STYLE, "style_scale": 1.2}, InvalidScaleError, "style_scale must be from 0"),
        ({"style_image": STYLE, "style_scale": "much"}, InvalidScaleError, "style_scale must be from 0"),
        ({"style_scale": 0.5}, FaceFusionError, "needs a style_image"),
        ({"style_image": STYLE, "style_context": "both"}, FaceFusionError, "replace or append"),
        ({"style_image": "no-such-file.png"}, FaceFusionError, "no-such-file.png"),
        ({"style_image": [STYLE, STYLE, STYLE]}, FaceFusionError, "3 pictures"),
        ({"face_image": A, "identity_by": "somebody"}, FaceFusionError, "face-fusion or face-studio"),
        ({"face_image": A, "identity_by": "face-studio", "face_mode": "both"}, FaceFusionError, "two systems"),
        ({"face_image": A, "face_self_scale": 2.0}, InvalidScaleError, "not of FaceStudio"),
    ],
)
def test_bad_arguments(sd, arguments, error, words):
    with pytest.raises(error, match=words):
        generate(sd, **arguments)


def test_what_is_missing_is_named(weights):
    plain = tiny_pipeline()
    with pytest.raises(FaceFusionError, match="load_face_studio"):
        generate(plain, style_image=STYLE)
    with pytest.raises(ModelNotFoundError, match="no FaceStudio"):
        plain.load_face_studio(weights / "nowhere")
    plain.load_face_studio(weights / "sd", face_embedder=ToyEmbedder())
    with pytest.raises(FaceFusionError, match="no prior"):
        generate(plain, face_image=A)
    with pytest.raises(FaceFusionError, match="image encoder"):
        generate(plain, style_image=STYLE, style_scale=1)


def test_weights_of_another_base_and_embedders_of_another_name_are_refused(weights, sd):
    with pytest.raises(AdapterMismatchError, match="trained for it"):
        tiny_pipeline().load_face_studio(weights / "xl")

    class Other(ToyEmbedder):
        name = "other"

    pipe = tiny_pipeline()
    pipe.load_face_studio(weights / "sd", face_embedder=Other(), prior=toy_prior)
    with pytest.raises(IdentityMismatchError, match="'other'"):
        generate(pipe, face_image=A)
    stranger = StudioIdentity(torch.ones(1, FACE_WIDTH), torch.ones(1), "other")
    with pytest.raises(IdentityMismatchError, match="embedded by 'other'"):
        generate(sd, face_image=stranger)


def test_files_of_another_format_are_refused(tmp_path, sd):
    from face_fusion_pipeline.face_files import save_tensors

    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"format": "something"})
    with pytest.raises(AdapterMismatchError, match="not FaceStudio weights"):
        sd.load_face_studio(tmp_path / "x.safetensors")
    with pytest.raises(IdentityMismatchError, match="expected 'face-studio-identity'"):
        StudioIdentity.load(tmp_path / "x.safetensors")
    with pytest.raises(AdapterMismatchError, match="context must be"):
        StudioMetadata("sd1", 4, 3, "toy", context="instead")
    with pytest.raises(AdapterMismatchError, match="tokens must be"):
        StudioMetadata("sd1", 4, 3, "toy", tokens=0)


def test_style_without_a_strength_takes_half():
    assert Style(STYLE).alpha == 0.5
    assert Style().alpha == 0.0


def test_attention_maps_are_of_face_fusion_alone(sd):
    from face_fusion_pipeline import record_attention

    with pytest.raises(FaceFusionError, match="leave out style_image"), record_attention(sd):
        generate(sd, face_image=A)
