"""What differs between families of base models (Stable Diffusion 1.x, 2.x, XL) and between models of one family."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .face_attention import attention_layers
from .face_errors import AdapterMismatchError, FaceFusionError


# (text width, number of layers 320, 640 and 1280 wide, number of all layers)
KNOWN_FAMILIES: dict[tuple[int, tuple[int, ...], int], str] = {
    (768, (5, 5, 6), 16): "sd1",
    (1024, (5, 5, 6), 16): "sd2",
    (2048, (0, 10, 60), 70): "sdxl",
}
TEXT, POOLED = "text", "pooled"
MAX_NUMBERS = 20_000  # in a fingerprint


# --- Architecture ------------------------------------------------------------------------------------------------


def face_widths(unet: Any) -> dict[str, tuple[int, int]]:
    """Cross-attention layer -> (width of what enters it, width of its keys). Raises AdapterMismatchError: none."""
    layers = attention_layers(unet, "attn2")
    if not layers:
        raise AdapterMismatchError("this UNet has no cross-attention layers, so there is nothing to adapt")
    return {name: (attn.to_q.in_features, attn.to_k.out_features) for name, attn in layers.items()}


def base_family(unet: Any) -> str:
    """Which adapters fit: "sd1", "sd2", "sdxl", or a hash of all layer names, widths and the text width."""
    widths = [(name, *width) for name, width in face_widths(unet).items()]
    text = sorted({attn.to_k.in_features for attn in attention_layers(unet, "attn2").values()})
    counts = tuple(sum(width[1] == c for width in widths) for c in (320, 640, 1280))
    family = KNOWN_FAMILIES.get((text[0], counts, len(widths))) if len(text) == 1 else None
    return family or "unet-" + hashlib.sha256(repr((text, widths)).encode()).hexdigest()[:12]


def takes_pooled_text(unet: Any) -> bool:
    """Whether the UNet wants pooled text and sizes besides the text's states, as that of SDXL does.

    Raises:
        FaceFusionError: it wants something else yet.
    """
    config = getattr(unet, "_orig_mod", unet).config
    if config.addition_embed_type not in (None, "text_time") or config.class_embed_type is not None:
        raise FaceFusionError(
            f"this UNet takes more than a text (addition_embed_type {config.addition_embed_type!r}, class_embed_type "
            f"{config.class_embed_type!r}): take a Stable Diffusion 1.x, 2.x or XL model"
        )
    return config.addition_embed_type == "text_time"


# --- What the UNet is told ---------------------------------------------------------------------------------------


def text_conditions(pipe: Any, prompts: list[str], device: Any, lora_scale: float | None = None) -> dict[str, Tensor]:
    """What the UNet of `pipe` is told of N prompts: `text` (N, tokens, width), of SDXL also `pooled` (N, width).

    Raises:
        FaceFusionError: the pipeline lacks a text encoder, or its UNet is told something else yet.
    """
    parts = ["text_encoder", "tokenizer"]
    parts += ["text_encoder_2", "tokenizer_2"] if hasattr(pipe, "text_encoder_2") else []
    if missing := [name for name in parts if getattr(pipe, name, None) is None]:
        raise FaceFusionError(
            f"this pipeline has no {' and no '.join(missing)}, and a face is looked at with an empty prompt: load it "
            "with them, or give identities that were encoded before (`pipe.encode_face(...)`, `FaceIdentity.load`)"
        )
    if not takes_pooled_text(pipe.unet):
        return {TEXT: pipe.encode_prompt(prompts, device, 1, False, lora_scale=lora_scale)[0]}
    if not hasattr(pipe, "text_encoder_2"):
        raise FaceFusionError(
            f"this UNet takes pooled text besides its states, as that of SDXL does; {type(pipe).__name__} has none: "
            "take StableDiffusionXLFaceFusionPipeline"
        )
    # The states of the words, also of none: `force_zeros_for_empty_prompt` is for the other half of guidance alone.
    states = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False, lora_scale=lora_scale)
    check_sizes(pipe.unet, states[2].shape[-1])
    return {TEXT: states[0], POOLED: states[2]}


def check_sizes(unet: Any, pooled: int) -> None:
    """Raise FaceFusionError unless a UNet takes six numbers of sizes beside `pooled` numbers of text."""
    config = getattr(unet, "_orig_mod", unet).config
    numbers = (config.projection_class_embeddings_input_dim - pooled) / config.addition_time_embed_dim
    if numbers != 6:
        raise FaceFusionError(
            f"this UNet takes {numbers:g} numbers beside the text instead of 6 sizes, as that of SDXL's refiner does: "
            "draw faces with the base model, and refine without face_image"
        )


def unet_arguments(conditions: Mapping[str, Tensor], height: int, width: int) -> dict[str, Any]:
    """Keyword arguments of the UNet for B rows of `conditions` and whole pictures of this size in pixels."""
    text = conditions[TEXT]
    if POOLED not in conditions:
        return {"encoder_hidden_states": text}
    sizes = torch.tensor([[height, width, 0, 0, height, width]], device=text.device, dtype=text.dtype)
    added = {"text_embeds": conditions[POOLED].to(text.dtype), "time_ids": sizes.expand(len(text), -1)}
    return {"encoder_hidden_states": text, "added_cond_kwargs": added}


def unet_input(latents: Tensor, channels: int) -> Tensor:
    """Latents `(B, c, h, w)` of a reference as a UNet with `channels` inputs takes them.

    One made for inpainting, 2c + 1 inputs, also gets a mask that leaves the whole picture as it is, and the picture.

    Raises:
        FaceFusionError: another number of channels.
    """
    own = latents.shape[1]
    if channels == own:
        return latents
    if channels == 2 * own + 1:
        return torch.cat([latents, torch.zeros_like(latents[:, :1]), latents], dim=1)
    raise FaceFusionError(
        f"this UNet takes {channels} channels, the latents of its VAE have {own}: only UNets for text ({own}) "
        f"and for inpainting ({2 * own + 1}) can look at a face"
    )


def training_alphas(scheduler: Any) -> Tensor:
    """ᾱ (T,) of the scheduler. Raises FaceFusionError for one without it, such as those of flow matching."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise FaceFusionError(
            f"{type(scheduler).__name__} has no alphas_cumprod, so a reference cannot be noised to a timestep: take a "
            "scheduler of Stable Diffusion, or `self_attention=SelfAttentionReference(timestep=0)`"
        )
    return alphas


# --- VAE ---------------------------------------------------------------------------------------------------------


def quick_format(images: Tensor) -> Tensor:
    """The same images `(B, C, H, W)` in the memory format in which a device convolves them fastest.

    Convolutions follow the format of their input, so the model's weights stay as they are.
    """
    return images.contiguous(memory_format=torch.channels_last) if images.device.type == "cpu" else images


def encode_latents(vae: Any, pixels: Tensor) -> Tensor:
    """Scaled latents of images `(B, 3, H, W)` in [-1, 1]: the posterior's mode, or what AutoencoderTiny returns.

    A VAE that overflows in float16 (`force_upcast`, as that of SDXL) encodes in float32.
    """
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        encoded = vae.encode(quick_format(pixels.to(vae.dtype)))
    finally:
        if upcast:
            vae.to(torch.float16)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    shift, scale = latent_scaling(vae, latents)
    return (latents - shift) * scale


def latent_scaling(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """(shift, scale): scaled latents are `(latents - shift) * scale`; numbers, or `(1, c, 1, 1)` by channel."""
    config = vae.config
    shift, scale = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or deviation is None:
        return shift, scale
    return latents.new_tensor(mean).view(1, -1, 1, 1), scale / latents.new_tensor(deviation).view(1, -1, 1, 1)


# --- Fingerprints ------------------------------------------------------------------------------------------------


def is_fingerprint(text: Any) -> bool:
    """Whether a text is one that [`fingerprint`] makes: finite numbers, or nothing."""
    if not isinstance(text, str) or len(text) > 32 * MAX_NUMBERS:
        return False
    try:
        return all(math.isfinite(float(part)) for part in text.split())
    except ValueError:
        return False


def fingerprint(weights: Sequence[Tensor], samples: int = 4) -> str:
    """A few weights of each tensor as text: tells models apart, yet survives a change of precision (unlike a hash).

    Empty where weights cannot be read (meta device) or are kept in 8 bits, which round too much.
    """
    if any(weight.device.type == "meta" or weight.dtype.itemsize < 2 for weight in weights):
        return ""
    picked = [w.detach().flatten()[:: max(1, w.numel() // samples)][:samples].float().cpu() for w in weights]
    return " ".join(f"{value:.6g}" for value in torch.cat(picked).tolist())


def same_fingerprint(a: str, b: str) -> bool:
    """True if two fingerprints agree within the rounding of bfloat16, or if one is unknown."""
    return _agree(a, b, rtol=2**-7, atol=1e-6)


def _agree(a: str, b: str, rtol: float, atol: float) -> bool:
    if not a or not b:
        return True
    if not (is_fingerprint(a) and is_fingerprint(b)):
        return False
    x, y = (torch.tensor([float(value) for value in text.split()]) for text in (a, b))
    return x.shape == y.shape and torch.allclose(x, y, rtol=rtol, atol=atol)


def plain_weight(module: Any) -> Tensor:
    """The weight of a layer, also where PEFT wraps it or offloading keeps it elsewhere."""
    module = getattr(module, "base_layer", module)
    elsewhere = getattr(getattr(module, "_hf_hook", None), "weights_map", None)  # sequential offload
    return module.weight if elsewhere is None else elsewhere["weight"]


def unet_fingerprint(unet: Any) -> str:
    """[`fingerprint`] of the first and last convolution and of eight attention layers."""
    unet = getattr(unet, "_orig_mod", unet)
    layers = list(attention_layers(unet, "attn2").values()) + list(attention_layers(unet, "attn1").values())
    weights = [plain_weight(unet.conv_in), plain_weight(unet.conv_out)]
    return fingerprint(weights + [plain_weight(attn.to_q) for attn in layers[:: max(1, len(layers) // 8)][:8]])


def lora_strengths(unet: Any, call_scale: float = 1.0) -> dict[str, dict[str, float]]:
    """Layer -> LoRA -> strength, of those that act in a UNet.

    Args:
        call_scale: that of `cross_attention_kwargs={"scale": ...}`.
    """
    found = {}
    for name, layer in getattr(unet, "_orig_mod", unet).named_modules():
        if not hasattr(layer, "lora_A") or getattr(layer, "disable_adapters", False) is True:
            continue
        merged = set(layer.merged_adapters)
        acting = (
            {lora: layer.scaling.get(lora, 0.0) * call_scale for lora in layer.active_adapters} if not merged else {}
        )
        if acting := {lora: strength for lora, strength in acting.items() if strength}:
            found[name] = acting
    return found


_marks: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()


@torch.no_grad()
def weights_fingerprint(unet: Any, call_scale: float = 1.0) -> str:
    """Three numbers for each weight tensor of a UNet and each LoRA in it: others for other contents or strengths.

    They are the tensor's projections on fixed patterns of signs over its norm, which rounding to bfloat16 changes by
    about .001, and a change of the tensor by a tenth of its norm by about .1. They are kept until a tensor changes.
    Empty as that of [`fingerprint`].

    Args:
        call_scale: see [`lora_strengths`].
    """
    unet = getattr(unet, "_orig_mod", unet)
    strengths = lora_strengths(unet, call_scale)
    attached = tuple(f"{name}." for name, module in unet.named_children() if hasattr(module, "is_attached"))
    weights, factors = [], []
    for name, weight in unet.named_parameters():
        if name.startswith(attached):  # see `face_attached`: no weight of the UNet's own
            continue
        layer, _, rest = name.partition(".lora_")
        lora = rest.split(".")[1] if rest else ""
        if not rest or lora in strengths.get(layer, {}):
            weights.append(weight)
            factors.append(strengths[layer][lora] if rest else 1.0)
    if any(weight.device.type == "meta" or weight.dtype.itemsize < 2 for weight in weights):
        return ""
    state = [(weight.data_ptr(), weight._version, factor) for weight, factor in zip(weights, factors, strict=True)]
    if unet not in _marks or _marks[unet][0] != state:
        numbers = torch.cat([f * signed_sums(w) for w, f in zip(weights, factors, strict=True)])
        _marks[unet] = state, " ".join(f"{number:.3f}" for number in numbers.tolist())
    return _marks[unet][1]


def signed_sums(weight: Tensor) -> Tensor:
    """Sums of a tensor's values, rows of it with fixed random signs, over its norm: `(3,)`, on the CPU."""
    rows = weight.detach().reshape(len(weight), -1) if weight.ndim > 1 else weight.detach().reshape(-1, 1)
    precision = torch.promote_types(rows.dtype, torch.float32)
    signs = torch.rand((len(rows), 3), generator=torch.Generator().manual_seed(len(rows))).round() * 2 - 1
    total = rows.sum(1, dtype=precision).cpu() @ signs.to(precision)
    return (total / torch.linalg.vector_norm(rows, dtype=precision).cpu().clamp_min(1e-12)).float()


def same_weights(a: str, b: str) -> bool:
    """True if two [`weights_fingerprint`]s agree within the rounding of bfloat16, or if one is unknown."""
    return _agree(a, b, rtol=0, atol=0.02)
