"""Identities: encode once, save, load, reuse; refuse what was made with other models."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import face, family_of, generate, tiny_pipeline, with_adapter

from face_fusion_pipeline import FaceIdentity
from face_fusion_pipeline.face_adapter import create_adapter, load_adapter
from face_fusion_pipeline.face_attention import attention_layers
from face_fusion_pipeline.face_defaults import FACE_MODES
from face_fusion_pipeline.face_detectors import Face
from face_fusion_pipeline.face_errors import (
    AdapterMismatchError,
    FaceFusionError,
    IdentityMismatchError,
    InvalidScaleError,
    ModelNotFoundError,
    UnreadableImageError,
)
from face_fusion_pipeline.face_pictures import load_image
from face_fusion_pipeline.generation.photos import FacePhoto
from face_fusion_pipeline.reference_pass import face_tensors, noise_latents
from face_fusion_pipeline.unet_family import encode_latents, unet_fingerprint, weights_fingerprint


def adapted_pipeline(seed=0, family="sd", **metadata):
    pipe = tiny_pipeline(family=family)
    torch.manual_seed(seed)
    pipe.set_face_fusion_adapter(create_adapter(pipe.unet, "xavier", metadata={"resolution": 16, **metadata}))
    return pipe


@pytest.fixture
def pipe(family):
    return adapted_pipeline(family=family)


@pytest.mark.parametrize("mode", FACE_MODES)
def test_saved_and_loaded_identity_generates_the_same(pipe, tmp_path, mode):
    identity = pipe.encode_face([face(0), face(1)], weights=[1, 2], face_mode=mode)
    identity.save(tmp_path / "someone.safetensors")
    loaded = FaceIdentity.load(tmp_path / "someone.safetensors")
    assert loaded.mode == mode and loaded.n_refs == 2 and loaded.weights.tolist() == [1, 2]
    direct = generate(pipe, face_image=[face(0), face(1)], face_weights=[1, 2], face_mode=mode)
    assert torch.equal(generate(pipe, face_image=loaded), direct)


@pytest.mark.parametrize("mode", FACE_MODES)
def test_a_file_holds_keys_and_values_and_no_picture(pipe, tmp_path, mode):
    identity = pipe.encode_face([face(0, 32), face(1, 32)], face_mode=mode, face_resolution=32)
    identity.save(tmp_path / "someone.safetensors")
    expected = {"weights": (2,)}
    for name in attention_layers(pipe.unet, "attn2") if mode != "training-free" else ():
        tokens, width = (256, 16) if "mid_block" not in name else (64, 32)  # 16x16 and 8x8 latents
        expected |= {f"{name}.key": (2, tokens, width), f"{name}.value": (2, tokens, width)}
    for name in attention_layers(pipe.unet, "attn1") if mode != "adapter" else ():
        if name.startswith("up_blocks"):
            expected |= {f"{name}.{part}": (2, 92, 16) for part in ("key", "value")}  # in the ellipse
            expected |= {f"{name}.cells": (16, 16)}
    tensors = load_file(tmp_path / "someone.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    with safe_open(tmp_path / "someone.safetensors", "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if not name.startswith("self_")}
        assert (len(file.metadata()) > len(metadata)) == (mode != "adapter")
        assert metadata == {
            "format": "face-fusion-identity",
            "format_version": "1" if mode == "adapter" else "2",
            "mode": mode,
            "base_fingerprint": unet_fingerprint(pipe.unet),  # numbers of the model, not of the face
            "adapter_fingerprint": pipe._adapter_fingerprint() if mode != "training-free" else "",
            "weights_fingerprint": weights_fingerprint(pipe.unet),
        }


def test_a_damaged_file_is_refused(pipe, tmp_path):
    path = tmp_path / "someone.safetensors"
    pipe.encode_face(face()).save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for name in ("mode", "base_fingerprint", "adapter_fingerprint"):
        save_file(tensors, path, {key: value for key, value in metadata.items() if key != name})
        with pytest.raises(IdentityMismatchError, match=f"lacks {name}: .*encode the face again"):
            FaceIdentity.load(path)
    some_key = next(name for name in tensors if name.endswith(".key"))
    for name, reason in (("weights", "lacks weights"), (some_key, "a key and a value for each layer")):
        save_file({key: value for key, value in tensors.items() if key != name}, path, metadata)
        with pytest.raises(IdentityMismatchError, match=reason):
            FaceIdentity.load(path)


def test_shapes_follow_the_layers(pipe):
    identity = pipe.encode_face([face(0), face(1), face(2)])
    assert {tuple(key.shape) for key in identity.keys.values()} == {(3, 64, 16), (3, 16, 32)}
    assert all(name.endswith("attn2") for name in identity.keys)
    free = pipe.encode_face(face(), face_mode="training-free", face_resolution=32)
    assert {tuple(key.shape) for key in free.keys.values()} == {(1, 92, 16)}
    assert all(name.endswith("attn1") for name in free.keys)


def test_identity_of_other_models_is_refused(pipe, tmp_path):
    identity = pipe.encode_face(face())
    with pytest.raises(IdentityMismatchError, match="other adapter"):
        generate(adapted_pipeline(5, family_of(pipe)), face_image=identity)
    with pytest.raises(IdentityMismatchError, match="load_face_fusion_adapter"):
        generate(tiny_pipeline(family=family_of(pipe)), face_image=identity)
    with pytest.raises(IdentityMismatchError, match="another base"):
        generate(
            tiny_pipeline(seed=1, family=family_of(pipe)),
            face_image=pipe.encode_face(face(), face_mode="training-free"),
        )
    with pytest.raises(IdentityMismatchError, match="training-free"):
        generate(pipe, face_image=identity, face_mode="training-free")
    with pytest.raises(ModelNotFoundError, match="nobody"):
        FaceIdentity.load(tmp_path / "nobody.safetensors")
    save_file({"weights": torch.ones(1)}, tmp_path / "other.safetensors", {"format": "else"})
    with pytest.raises(IdentityMismatchError, match="else"):
        FaceIdentity.load(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"")
    with pytest.raises(IdentityMismatchError, match="readable"):
        FaceIdentity.load(tmp_path / "broken.safetensors")


def test_what_belongs_to_another_family_is_refused(pipe):
    """Adapter and identities, from 1.x to XL and back."""
    other = with_adapter(tiny_pipeline(family={"sd": "xl", "xl": "sd"}[family_of(pipe)]))
    of_other, own = other._face_adapter.metadata.base_family, pipe._face_adapter.metadata.base_family
    with pytest.raises(AdapterMismatchError, match=f"base family '{of_other}'.*'{own}'"):
        load_adapter(pipe.unet, other._face_adapter.state_dict(), other._face_adapter.metadata)
    for mode in FACE_MODES:
        with pytest.raises(IdentityMismatchError, match="another base model"):
            generate(pipe, face_image=other.encode_face(face(), face_mode=mode))


def test_reference_mode_of_the_adapter_is_followed():
    clean, noised = adapted_pipeline(), adapted_pipeline(reference_mode="noised", reference_timestep=50)
    a, b = (p.encode_face(face()).keys for p in (clean, noised))
    assert all(not torch.allclose(a[name], b[name], atol=1e-3) for name in a)
    again = noised.encode_face(face()).keys
    assert all(torch.equal(b[name], again[name]) for name in b)


def test_noise_follows_the_schedule():
    latents = torch.full((2, 4, 8, 8), 3.0)
    alphas = torch.tensor([0.9, 0.25])
    assert noise_latents(latents, alphas, 0) is latents
    noised = noise_latents(latents, alphas, 1)
    assert torch.equal(noised[0], noised[1])
    noise = (noised - 0.5 * 3.0) / 0.75**0.5
    assert abs(noise[0].mean()) < 0.2 and abs(noise[0].std() - 1) < 0.2


@pytest.mark.parametrize("tiny_vae", [False, True])
def test_latents_are_the_mode_and_scaled(tiny_vae):
    vae = tiny_pipeline(tiny_vae=tiny_vae).vae
    (pixels,) = face_tensors(face(), 16)
    with torch.no_grad():
        encoded = vae.encode(pixels)
        raw = encoded.latents if tiny_vae else encoded.latent_dist.mode()
        torch.testing.assert_close(encode_latents(vae, pixels), raw * vae.config.scaling_factor)


def test_the_same_pixels_in_any_form_give_the_same_reference():
    image = face(size=16)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
    expected = face_tensors(image, 16)[0]
    assert expected.shape == (1, 3, 16, 16) and expected.min() >= -1 and expected.max() <= 1
    for form in (array, tensor, tensor[None], [image], image.convert("RGBA")):
        assert torch.equal(face_tensors(form, 16)[0], expected)
    assert len(face_tensors(torch.stack([tensor] * 3), 16)) == 3
    wide = face_tensors(tensor[:, :8], 4)[0]  # 16x8 is cut to its middle, not squeezed
    torch.testing.assert_close(wide, face_tensors(tensor[:, :8, 4:12], 4)[0])


def test_a_picture_is_turned_as_its_orientation_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    buffer = io.BytesIO()
    face(size=16).save(buffer, "PNG", exif=exif)
    lying = Image.open(buffer)
    upright = face_tensors(face(size=16).transpose(Image.Transpose.ROTATE_270), 16)[0]
    assert torch.equal(face_tensors(lying, 16)[0], upright)
    assert torch.equal(face_tensors(ImageOps.exif_transpose(lying), 16)[0], upright)
    assert not torch.equal(face_tensors(face(size=16), 16)[0], upright)


def test_a_crop_is_encoded_alike_whoever_resizes_it():
    """In the crop, as training does, or by the pipeline from the photo's own pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 80, 3), dtype=np.uint8)
    photo = FacePhoto(Image.fromarray(pixels), Face((20.0, 20.0, 50.0, 60.0), 1.0))
    assert photo.crop().size == (64, 64)
    assert torch.equal(face_tensors(photo.crop(), 16)[0], face_tensors(photo.crop(resolution=16), 16)[0])


@pytest.mark.parametrize(
    "bad", ["face.png", None, [], torch.zeros(1, 8, 8), torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), torch.nan)]
)
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(UnreadableImageError):
        face_tensors(bad, 16)


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [-1, 2], [0, 0], "ab"])
def test_bad_weights_are_refused(pipe, weights):
    with pytest.raises(InvalidScaleError, match="weights"):
        pipe.encode_face([face(0), face(1)], weights=weights)


def test_bad_mode_and_resolution_are_refused(pipe):
    with pytest.raises(FaceFusionError, match="magic"):
        pipe.encode_face(face(), face_mode="magic")
    with pytest.raises(FaceFusionError, match="multiple of 2"):
        pipe.encode_face(face(), face_resolution=15)
    with pytest.raises(FaceFusionError, match="needs weights"):
        tiny_pipeline().encode_face(face(), face_mode="adapter")


@pytest.mark.parametrize("mode", ["I;16", "RGBA"])
def test_a_picture_is_the_same_reference_as_object_and_as_file(mode):
    """16-bit grey was clipped to white, and what lies under transparency came to light."""
    if mode == "I;16":
        picture = Image.fromarray(np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16))
    else:
        picture = face(0).convert("RGBA")
        picture.putalpha(Image.linear_gradient("L").resize((16, 16)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    assert torch.equal(face_tensors(picture, 16)[0], face_tensors(load_image(buffer.getvalue()), 16)[0])
    assert float(face_tensors(picture, 16)[0].std()) > 0.2 and picture.mode == mode


# --- Weights and LoRAs of the base ---------------------------------------------------------------------------------


def add_lora(pipe, name="style"):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(5)
    pipe.unet.add_adapter(config, name)


def test_an_identity_goes_with_the_weights_it_was_encoded_with(pipe, tmp_path):
    identity = pipe.encode_face(face())
    identity.save(tmp_path / "ada.safetensors")
    weight = pipe.unet.up_blocks[0].resnets[0].conv1.weight
    original = weight.detach().clone()
    torch.manual_seed(7)
    with torch.no_grad():
        weight += 0.2 * weight.std() * torch.randn_like(weight)  # nowhere near what a fingerprint of samples looks at
    for one in (identity, FaceIdentity.load(tmp_path / "ada.safetensors")):
        with pytest.raises(IdentityMismatchError, match="other weights of the base model"):
            generate(pipe, face_image=one)
    with torch.no_grad():
        weight.copy_(original)
    generate(pipe, face_image=identity)
    pipe.unet.to(torch.bfloat16).float()  # rounding is no other model
    generate(pipe, face_image=identity)


def test_an_identity_goes_with_the_loras_and_their_strength(pipe):
    plain = pipe.encode_face(face())
    add_lora(pipe)
    with pytest.raises(IdentityMismatchError, match="LoRAs or strengths"):
        generate(pipe, face_image=plain)
    whole = pipe.encode_face(face())
    generate(pipe, face_image=whole)
    pipe.unet.set_adapters("style", 0.5)
    with pytest.raises(IdentityMismatchError, match="LoRAs or strengths"):
        generate(pipe, face_image=whole)
    pipe.unet.disable_adapters()
    generate(pipe, face_image=plain)
    pipe.unet.enable_adapters()
    pipe.unet.set_adapters("style", 1.0)
    generate(pipe, face_image=whole)
    with pytest.raises(IdentityMismatchError, match="LoRAs or strengths"):
        generate(pipe, face_image=whole, cross_attention_kwargs={"scale": 0.5})


def test_what_a_call_says_of_loras_reaches_the_reference(pipe):
    """Strength 0 for the call is no LoRA, for the reference as for the picture."""
    expected = generate(pipe, face_image=face())
    add_lora(pipe)
    assert not torch.allclose(generate(pipe, face_image=face()), expected, atol=1e-3)
    off = generate(pipe, face_image=face(), cross_attention_kwargs={"scale": 0})
    torch.testing.assert_close(off, expected, atol=1e-4, rtol=1e-3)


def test_identities_are_compared_and_shown_as_objects(pipe):
    one, other = pipe.encode_face(face()), pipe.encode_face(face())
    assert one == one and one != other and len({one, other}) == 2
    assert repr(one).startswith("FaceIdentity(mode=") and "\n" not in repr(one) and len(repr(one)) < 100


def test_a_bare_state_dict_is_for_references_of_the_bases_own_size(pipe):
    state = pipe._face_adapter.state_dict()
    pipe.load_face_fusion_adapter(dict(state))
    tokens = next(iter(pipe.encode_face(face(0, 32), face_mode="adapter").keys.values())).shape[1]
    assert tokens == 64  # 16 pixels are 8 x 8 latents


def test_an_adapter_that_is_shared_stays_where_it_is(pipe):
    from face_fusion_pipeline.conditioner_reference import at_device

    moved = at_device(pipe._face_adapter, torch.device("meta"))
    assert next(moved.parameters()).device.type == "meta"
    assert next(pipe._face_adapter.parameters()).device.type == "cpu"
    assert at_device(pipe._face_adapter, torch.device("cpu")) is pipe._face_adapter
