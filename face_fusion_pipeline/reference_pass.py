"""The reference's way through the frozen UNet: pictures, latents, noise, and the hidden states of Eq. 2 on the way."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from .face_attention import attention_layers, call_processor
from .face_errors import FaceFusionError
from .face_ownership import OwnThread, check_idle, installed_processors, is_ip_adapter_processor, own_thread
from .face_pictures import centre_square, load_images
from .face_self_attention import SelfAttentionReference
from .joint_attention import KeysAndValues
from .unet_family import quick_format


NOISE_SEED = 0


def face_tensors(images: Any, resolution: int) -> list[Tensor]:
    """One or several face crops as `(1, 3, resolution, resolution)` in [-1, 1], centre-cropped to a square.

    Args:
        images: what `face_pictures.load_image` takes, a batch of arrays or tensors, or a list of these. All kinds of
            one picture give the same tensor, resized as `FacePhoto.crop` does.

    Raises:
        UnreadableImageError: a picture that cannot be read, or no image at all.
    """
    squares = [centre_square(image, resolution) for image in load_images(images, min_side=1)]
    arrays = [torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() for square in squares]
    return [pixels / 255 * 2 - 1 for pixels in arrays]


def noise_latents(latents: Tensor, alphas_cumprod: Tensor, timestep: int, seed: int = NOISE_SEED) -> Tensor:
    """Latents `(B, c, h, w)` noised to `timestep` (unchanged at 0) with the same seeded noise for every sample.

    Raises:
        FaceFusionError: a timestep that the schedule does not have.
    """
    if timestep == 0:
        return latents
    if timestep >= len(alphas_cumprod):
        raise FaceFusionError(f"a reference cannot be noised to {timestep} of {len(alphas_cumprod)} timesteps")
    noise = torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(seed))
    alpha = float(alphas_cumprod[timestep])
    noised = alpha**0.5 * latents + (1 - alpha) ** 0.5 * noise.to(latents.device)
    return noised.to(latents.dtype)


class _CaptureProcessor:
    """Notes the input of a layer and leaves its output as it is, without what an IP-Adapter would add.

    Only in the thread of the reference pass: calls of the same UNet in other threads are none of its business.
    """

    def __init__(self, thread: OwnThread) -> None:
        self.thread = thread
        self.hidden_states: Tensor | None = None
        self.original: Any = None
        self.plain: Any = None

    @property
    def acts_here(self) -> bool:
        return self.thread.here

    def take_over(self, original: Any) -> None:
        self.original = original
        self.plain = AttnProcessor2_0() if is_ip_adapter_processor(original) else original

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        processor = self.original
        if self.acts_here:
            self.hidden_states, processor = hidden_states, self.plain
        return call_processor(
            processor, attn, hidden_states, encoder_hidden_states, attention_mask, temb, ip_adapter_masks
        )


@contextmanager
def _without_ip_adapter(unet: Any, thread: OwnThread) -> Iterator[None]:
    """An IP-Adapter makes the UNet demand image embeddings; the reference pass, in `thread`, has none of them."""
    unet = getattr(unet, "_orig_mod", unet)
    if unet.config.encoder_hid_dim_type != "ip_image_proj":
        yield
        return
    process = unet.process_encoder_hidden_states

    def text_alone(encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Any]) -> Any:
        return encoder_hidden_states if thread.here else process(encoder_hidden_states, added_cond_kwargs)

    unet.process_encoder_hidden_states = text_alone
    try:
        yield
    finally:
        del unet.process_encoder_hidden_states


@torch.no_grad()
def capture_hidden_states(
    unet: Any,
    latents: Tensor,
    timestep: int | Tensor,
    encoder_hidden_states: Tensor,
    kind: str | Sequence[str] = "attn2",
    **unet_kwargs: Any,
) -> dict[str, Tensor]:
    """h_f of Eq. 2: what enters every attention layer when the UNet sees the reference.

    Args:
        latents: `(B, c, h, w)`, scaled.
        timestep: of the reference pass.
        encoder_hidden_states: `(B or 1, N_c, text width)`, of the empty prompt.
        kind: `"attn2"` for a trained adapter, `"attn1"` for the training-free mode, or both of one pass.
        unet_kwargs: further arguments of the UNet, such as `added_cond_kwargs`.

    Returns:
        layer name -> `(B, N_f, C)`.

    Raises:
        FaceFusionError: there are faces in the UNet, which would show in the reference.
    """
    check_idle(unet)
    thread = own_thread()
    kinds = [kind] if isinstance(kind, str) else kind
    layers = {name: layer for each in kinds for name, layer in attention_layers(unet, each).items()}
    captures = {name: _CaptureProcessor(thread) for name in layers}
    cross = attention_layers(unet, "attn2")
    bystanders = {name: _CaptureProcessor(thread) for name in cross if name not in layers}
    ip_adapter = {name: p for name, p in bystanders.items() if is_ip_adapter_processor(cross[name].processor)}
    text = encoder_hidden_states.expand(latents.shape[0], -1, -1)
    with _without_ip_adapter(unet, thread), installed_processors(unet, {**captures, **ip_adapter}):
        unet(quick_format(latents), timestep, encoder_hidden_states=text, return_dict=False, **unet_kwargs)
    return {name: capture.hidden_states for name, capture in captures.items() if capture.hidden_states is not None}


def reference_passes(
    adapter_timestep: int | None, own: SelfAttentionReference | None
) -> dict[tuple[int, int], list[str]]:
    """(timestep, seed) of the noise -> kinds of attention that read that pass: one, where one level serves both.

    Args:
        adapter_timestep: that of a trained adapter, None without.
        own: of the self-attention, None without.
    """
    passes: dict[tuple[int, int], list[str]] = {}
    if adapter_timestep is not None:
        passes.setdefault((adapter_timestep, NOISE_SEED if adapter_timestep else 0), []).append("attn2")
    if own is not None:
        passes.setdefault(own.noise, []).append("attn1")
    return passes


def self_attention_projections(unet: Any, hidden_states: Mapping[str, Tensor]) -> KeysAndValues:
    """Training-free keys and values: the model's own `to_k`, `to_v` of each `attn1` on the reference's states."""
    layers = attention_layers(unet, "attn1")
    return {name: (layers[name].to_k(h), layers[name].to_v(h)) for name, h in hidden_states.items()}
