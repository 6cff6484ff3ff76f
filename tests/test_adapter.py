"""Weights: shapes, counts, initialisation, files, refusals, and a differentiable forward for training."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import SD15_UNET, SDXL_UNET, TEXT_WIDTH, one_face, tiny_pipeline, tiny_unet

from face_fusion_pipeline.face_adapter import AdapterMetadata, FaceFusionAdapter, adapter_fingerprint, create_adapter
from face_fusion_pipeline.face_attention import attention_layers
from face_fusion_pipeline.face_errors import AdapterMismatchError, FaceFusionError, ModelNotFoundError
from face_fusion_pipeline.joint_attention import reference_log_weights
from face_fusion_pipeline.reference_pass import capture_hidden_states
from face_fusion_pipeline.training.fused_unet import face_fused_unet
from face_fusion_pipeline.unet_family import base_family, fingerprint, same_fingerprint, unet_fingerprint


FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("config", "family", "layers", "parameters"),
    [(SD15_UNET, "sd1", 16, 24_780_800), (SDXL_UNET, "sdxl", 70, 204_800_000)],
)
def test_layers_and_parameters_of_the_published_models(config, family, layers, parameters):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    adapter = create_adapter(unet)
    assert base_family(unet) == family == adapter.metadata.base_family
    assert len(adapter.layer_names) == layers
    assert sum(p.numel() for p in adapter.parameters()) == parameters
    assert all(p.requires_grad for p in adapter.parameters())


def test_keys_are_layer_names():
    keys = list(create_adapter(tiny_unet()).state_dict())
    assert keys[:2] == [f"{FIRST}.to_k_face.weight", f"{FIRST}.to_v_face.weight"]
    assert len(keys) == 2 * len(attention_layers(tiny_unet(), "attn2")) == 8


@pytest.mark.parametrize("init", ["attn1", "zero_v", "xavier"])
def test_initialisation(init):
    unet = tiny_unet()
    adapter = create_adapter(unet, init)
    for name, attn1 in attention_layers(unet, "attn1").items():
        layer = adapter.get_submodule(name.replace("attn1", "attn2"))
        assert torch.equal(layer.to_k_face.weight, attn1.to_k.weight) == (init != "xavier")
        assert torch.equal(layer.to_v_face.weight, attn1.to_v.weight) == (init == "attn1")
        assert bool(layer.to_v_face.weight.any()) == (init != "zero_v")
    with pytest.raises(FaceFusionError, match="ones"):
        create_adapter(unet, "ones")


# --- Files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def saved(pipe, tmp_path):
    metadata = {"token_count_bias": True, "resolution": 16, "reference_mode": "noised", "reference_timestep": 20}
    adapter = create_adapter(pipe.unet, "xavier", metadata=metadata)
    pipe.set_face_fusion_adapter(adapter)
    pipe.save_face_fusion_adapter(tmp_path)
    pipe.unload_face_fusion_adapter()
    return tmp_path / "face_fusion_adapter.safetensors", adapter


@pytest.mark.parametrize("source", ["folder", "file", "subfolder", "dict"])
def test_round_trip(pipe, saved, source):
    path, adapter = saved
    if source == "folder":
        pipe.load_face_fusion_adapter(path.parent)
    elif source == "file":
        pipe.load_face_fusion_adapter(path)
    elif source == "subfolder":
        pipe.load_face_fusion_adapter(path.parent.parent, subfolder=path.parent.name)
    else:
        pipe.load_face_fusion_adapter(adapter.state_dict())
    loaded = pipe._face_adapter
    assert loaded.state_dict().keys() == adapter.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), adapter.parameters(), strict=True))
    if source != "dict":
        assert loaded.metadata == adapter.metadata
    assert not [p for p in path.parent.iterdir() if p != path]  # no temporary file is left


def test_file_has_readable_metadata(saved):
    with safe_open(saved[0], "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "face-fusion-adapter"
    assert metadata["format_version"] == "1"
    assert metadata["token_count_bias"] == "true"
    assert metadata["reference_timestep"] == "20"
    assert metadata["face_crop"] == "1.6"


def broken(change_tensors=None, **change_metadata):
    return change_tensors, change_metadata


BROKEN = {
    "another family": (broken(base_family="sd1"), "base family 'sd1'"),
    "another version": (broken(format_version="2"), "version '2'"),
    "another format": (broken(format="ip-adapter"), "ip-adapter"),
    "bad flag": (broken(token_count_bias="yes"), "true"),
    "bad number": (broken(resolution="big"), "big"),
    "mode against timestep": (broken(reference_mode="clean"), "clean"),
    "unknown key": (broken(lambda t: {**t, "extra.weight": torch.zeros(1)}), "extra.weight"),
    "missing key": (broken(lambda t: {k: v for k, v in t.items() if FIRST not in k}), "missing"),
    "another shape": (broken(lambda t: {k: v[:-1].clone() for k, v in t.items()}), r"\(15, 16\)"),
}


@pytest.mark.parametrize(("change", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_does_not_fit_is_refused_with_the_reason(pipe, saved, change, reason):
    path, adapter = saved
    change_tensors, change_metadata = change
    tensors = adapter.state_dict() if change_tensors is None else change_tensors(adapter.state_dict())
    save_file(tensors, path, {**adapter.metadata.to_strings(), **change_metadata})
    with pytest.raises(AdapterMismatchError, match=reason):
        pipe.load_face_fusion_adapter(path)
    assert pipe._face_adapter is None


def test_unreadable_files_are_refused(pipe, tmp_path):
    with pytest.raises(ModelNotFoundError, match="face_fusion_adapter"):
        pipe.load_face_fusion_adapter(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"not a model")
    with pytest.raises(AdapterMismatchError, match="safetensors"):
        pipe.load_face_fusion_adapter(tmp_path, weight_name="a.safetensors")
    (tmp_path / "a.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterMismatchError, match=r"a\.bin"):
        pipe.load_face_fusion_adapter(tmp_path / "a.bin")
    with pytest.raises(FaceFusionError, match="no adapter"):
        pipe.save_face_fusion_adapter(tmp_path)
    with pytest.raises(TypeError, match="nonsense"):
        pipe.load_face_fusion_adapter(tmp_path, nonsense=1)


def test_adapter_of_another_architecture_is_refused(saved):
    other = tiny_pipeline()
    other.unet = tiny_unet(cross_attention_dim=TEXT_WIDTH + 8)
    with pytest.raises(AdapterMismatchError, match="base family"):
        other.load_face_fusion_adapter(saved[0])


def test_fingerprints_tell_models_apart_but_not_precisions():
    unet, other = tiny_unet(0), tiny_unet(1)
    mark = unet_fingerprint(unet)
    assert not same_fingerprint(mark, unet_fingerprint(other))
    for dtype in (torch.float16, torch.bfloat16):
        assert same_fingerprint(mark, unet_fingerprint(tiny_unet(0).to(dtype)))
    assert same_fingerprint(mark, fingerprint([torch.ones(3, device="meta")]))  # unknown
    a, b = create_adapter(unet), create_adapter(unet, "xavier")
    assert not same_fingerprint(adapter_fingerprint(a), adapter_fingerprint(b))


def test_metadata_is_checked():
    with pytest.raises(AdapterMismatchError, match="'often'"):
        AdapterMetadata("sd1", reference_mode="often")


# --- Training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    torch.manual_seed(0)
    unet = tiny_unet().requires_grad_(False)
    latents, text = torch.randn(3, 4, 8, 8), torch.randn(3, 5, TEXT_WIDTH)
    references = [capture_hidden_states(unet, torch.randn(3, 4, 8, 8), 0, torch.zeros(1, 5, TEXT_WIDTH)) for _ in "ab"]
    tokens = {name: torch.stack([r[name] for r in references], dim=1) for name in references[0]}
    return unet, latents, text, tokens


def forward(unet, adapter, latents, text, tokens, **kwargs):
    with face_fused_unet(unet, adapter, tokens, **kwargs):
        return unet(latents, 500, encoder_hidden_states=text).sample


def test_gradients_reach_all_weights_of_the_adapter_and_nothing_else(batch):
    unet, latents, text, tokens = batch
    adapter = create_adapter(unet)
    before = dict(unet.attn_processors)
    forward(unet, adapter, latents, text, tokens).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in unet.parameters())
    assert all(unet.attn_processors[name] is processor for name, processor in before.items())


def test_a_few_steps_of_training_lower_the_loss(batch):
    unet, latents, text, tokens = batch
    adapter = create_adapter(unet)
    target = forward(unet, create_adapter(tiny_unet(7)), latents, text, tokens).detach()
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (forward(unet, adapter, latents, text, tokens) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_dropped_faces_are_as_no_face_and_pass_no_gradient(batch):
    unet, latents, text, tokens = batch
    adapter = create_adapter(unet)
    face_mask = torch.tensor([True, False, True])
    out = forward(unet, adapter, latents, text, tokens, face_mask=face_mask)
    plain = unet(latents, 500, encoder_hidden_states=text).sample
    full = forward(unet, adapter, latents, text, tokens)
    torch.testing.assert_close(out[1], plain[1])
    torch.testing.assert_close(out[[0, 2]], full[[0, 2]])
    assert not torch.allclose(out[0], plain[0], atol=1e-4)
    out[1].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in adapter.parameters())


def test_each_sample_sees_its_own_references_and_weights(batch):
    unet, latents, text, tokens = batch
    adapter = create_adapter(unet)
    weights = torch.tensor([[1.0, 0.0], [1.0, 3.0], [1.0, 1.0]])
    together = forward(unet, adapter, latents, text, tokens, weights=weights, scale=0.5, token_count_bias=True)
    for i in range(3):
        one = {name: t[i : i + 1] for name, t in tokens.items()}
        options = {"weights": weights[i], "scale": 0.5, "token_count_bias": True}
        alone = forward(unet, adapter, latents[i : i + 1], text[i : i + 1], one, **options)
        torch.testing.assert_close(together[i : i + 1], alone)
    first = {name: t[:1, :1] for name, t in tokens.items()}
    options = {"scale": 0.5, "token_count_bias": True}
    torch.testing.assert_close(together[:1], forward(unet, adapter, latents[:1], text[:1], first, **options))


def test_wrapped_adapter_is_called_once_through_its_forward(batch):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, tokens):
            self.calls += 1
            return self.module(tokens)

    unet, latents, text, tokens = batch
    wrapped = Wrapper(create_adapter(unet))
    torch.testing.assert_close(
        forward(unet, wrapped, latents, text, tokens), forward(unet, wrapped.module, latents, text, tokens)
    )
    assert wrapped.calls == 1


def test_capture_is_the_input_of_the_cross_attention(batch):
    unet, latents, text, _ = batch
    name, layer = next(iter(attention_layers(unet, "attn2").items()))
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    captured = capture_hidden_states(unet, latents, 0, text)
    hook.remove()
    assert torch.equal(captured[name], seen[0])
    assert not captured[name].requires_grad
    adapter = create_adapter(unet)
    assert isinstance(adapter, FaceFusionAdapter)
    key, value = adapter(captured)[name]
    torch.testing.assert_close(key, seen[0] @ adapter.get_submodule(name).to_k_face.weight.T)
    processor = one_face(key[:, None], value[:, None], reference_log_weights(torch.ones(1)))
    assert processor.shares[0].people[0].tokens_per_reference == 64
