"""Joint attention over text and face (Eq. 1-7) and the attention processor that runs it inside a UNet."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor

from .face_errors import FaceFusionError, InvalidScaleError


PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


# --- Equations ---------------------------------------------------------------------------------------------------


def reference_log_weights(weights: Tensor, drop: Tensor | None = None) -> Tensor | None:
    """Bias of each reference: log(w_i / sum w). Equal weights give -log(n_refs), so a face given twice counts once.

    Args:
        weights: `(n_refs,)` or `(B, n_refs)`, >= 0, any positive sum.
        drop: bool `(B,)`; True removes the face of that sample (-inf: zeroed keys would still take mass).

    Returns:
        `(1 or B, n_refs)`, or `None` if there is nothing to add (one reference, nothing dropped).

    Raises:
        InvalidScaleError: negative, non-finite or all-zero weights.
    """
    weights = torch.atleast_2d(weights)
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and (weights.sum(-1) > 0).all()):
        raise InvalidScaleError(f"face weights must be >= 0 with a positive sum, got {weights.tolist()}")
    if weights.shape[-1] == 1 and drop is None:
        return None
    log_weights = (weights / weights.sum(-1, keepdim=True)).log()
    if drop is not None:
        log_weights = log_weights.to(drop.device).masked_fill(drop[:, None], -math.inf)
    return log_weights


def constant_bias(scale: float, face_tokens: int, text_tokens: int, token_count_bias: bool) -> float:
    """Bias of all face logits: log(scale), and with `token_count_bias` also -log(N_f / N_c).

    The second term makes a face of N_f tokens and a text of N_c tokens equals: with equal logits each takes half of
    the attention, whatever the resolution. Without it 4096 face tokens leave 77 text tokens 1.8 %.
    """
    return math.log(scale) - (math.log(face_tokens / text_tokens) if token_count_bias else 0.0)


def identity_mask_bias(query_masks: Tensor, key_identity: Tensor) -> Tensor:
    """Eq. 7: -inf where the key is of identity i and the query lies inside the mask of another identity j != i.

    Args:
        query_masks: bool `(n_identities, N_h)`, the region of each identity among the queries.
        key_identity: int `(K_f,)`, the identity that each face key belongs to.

    Returns:
        `(N_h, K_f)` of 0 and -inf. A query in two masks sees neither face, as the equation says.
    """
    inside = query_masks.to(torch.int64)
    inside_another = (inside.sum(0) - inside) > 0  # (n_identities, N_h)
    forbidden = inside_another[key_identity].T
    return torch.zeros(forbidden.shape, device=forbidden.device).masked_fill(forbidden, -math.inf)


def joint_attention(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    face_key: Tensor,
    face_value: Tensor,
    face_bias: Tensor | None = None,
    text_bias: Tensor | None = None,
    **dispatch: Any,
) -> Tensor:
    """Eq. 3-6: softmax(M + Q [K_c; K_f]^T / sqrt(d)) [V_c; V_f] with one softmax over text and face.

    Args:
        query: `(B, N_h, heads, d)`.
        text_key, text_value: `(B, N_c, heads, d)`.
        face_key, face_value: `(B or 1, K_f, heads, d)`, all references one after another (Eq. 6).
        face_bias: broadcastable to `(B, heads, N_h, K_f)`, `None` for zero: fast kernels refuse any mask.
        text_bias: broadcastable to `(B, heads, N_h, N_c)`, `None` for zero.
        dispatch: `backend` and `parallel_config` of diffusers' `dispatch_attention_fn`.

    Returns:
        `(B, N_h, heads, d)`.
    """
    batch = query.shape[0]
    key = torch.cat([text_key, face_key.expand(batch, -1, -1, -1)], dim=1)
    value = torch.cat([text_value, face_value.expand(batch, -1, -1, -1)], dim=1)
    mask = None
    if face_bias is not None or text_bias is not None:
        zero = query.new_zeros(1, 1, 1, 1)
        parts = [
            (zero if text_bias is None else text_bias.to(query.dtype), text_key.shape[1]),
            (zero if face_bias is None else face_bias.to(query.dtype), face_key.shape[1]),
        ]
        lead = torch.broadcast_shapes(*(bias.shape[:-1] for bias, _ in parts))
        mask = torch.cat([bias.expand(*lead, count) for bias, count in parts], dim=-1)
    return dispatch_attention_fn(query, key, value, attn_mask=mask, **dispatch)


# --- Processor ---------------------------------------------------------------------------------------------------


@dataclass
class FusionSwitch:
    """What all layers share during one call: are we inside the time window, does guidance double the batch?"""

    active: bool = True
    guided: bool = False


class FaceFusionAttnProcessor:
    """Attention whose keys and values are joined by those of a face; drop-in for `AttnProcessor2_0`.

    At `attn2` the face joins the text (the paper); at `attn1` it joins the image itself (training-free). It holds no
    weights: keys and values are projected once, before the denoising loop, so nothing can leak into a saved UNet.

    Args:
        key, value: `(B or 1, n_refs, N_f, inner)`.
        log_weights: `(B or 1, n_refs)` from [`reference_log_weights`].
        scale: strength > 0 of the face at this layer.
        token_count_bias: see [`constant_bias`].
        switch: shared state of the call. With guidance the first half of the batch is computed without the face.
    """

    is_face_fusion_processor = True

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        log_weights: Tensor | None = None,
        scale: float = 1.0,
        token_count_bias: bool = False,
        switch: FusionSwitch | None = None,
    ) -> None:
        self.tokens_per_reference = key.shape[2]
        self.key, self.value = key.flatten(1, 2), value.flatten(1, 2)
        self.reference_bias = (
            None if log_weights is None else log_weights.repeat_interleave(key.shape[2], dim=1)[:, None, None, :]
        )
        self.scale = scale
        self.token_count_bias = token_count_bias
        self.switch = switch or FusionSwitch()
        self.additive: Any = None
        self._attention_backend: Any = None
        self._parallel_config: Any = None

    def take_over(self, original: Any) -> None:
        """Inherit the backend of the replaced processor; one that adds to the output (IP-Adapter) still adds."""
        self.additive = original if is_ip_adapter_processor(original) else None
        self._attention_backend = getattr(original, "_attention_backend", None)
        self._parallel_config = getattr(original, "_parallel_config", None)

    def face_bias(self, text_tokens: int) -> Tensor | None:
        """M of Eq. 4 on the face keys, `(B or 1, 1, 1, K_f)`, or `None` where it is zero."""
        constant = constant_bias(self.scale, self.tokens_per_reference, text_tokens, self.token_count_bias)
        if self.reference_bias is not None:
            return self.reference_bias + constant
        return None if constant == 0.0 else self.key.new_full((1, 1, 1, self.key.shape[1]), constant)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        added: Tensor | float = 0.0
        if self.additive is not None:
            # The output projection is affine, so what the other processor adds is its output less the plain one.
            assert isinstance(encoder_hidden_states, tuple)
            both, text = encoder_hidden_states, encoder_hidden_states[0]
            added = self.additive(attn, hidden_states, both, attention_mask, temb, ip_adapter_masks=ip_adapter_masks)
            added = added - AttnProcessor2_0()(attn, hidden_states, text, attention_mask, temb)
            encoder_hidden_states = text

        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        assert not isinstance(encoder_hidden_states, tuple)
        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)

        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], key.shape[0])
            attention_mask = attention_mask.unflatten(0, (key.shape[0], attn.heads))
        hidden_states = self._attend(attn, query, key, value, attention_mask)

        hidden_states = hidden_states.flatten(2).to(query.dtype)
        for layer in attn.to_out:  # projection, dropout
            hidden_states = layer(hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor + added

    def _attend(self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        dispatch = {"backend": self._attention_backend, "parallel_config": self._parallel_config}
        face = (self.key, self.value)
        face_key, face_value = (x.to(query.dtype).unflatten(-1, (attn.heads, -1)) for x in face)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key, face_key = attn.norm_k(key), attn.norm_k(face_key)

        plain = query.shape[0] if not self.switch.active else query.shape[0] // 2 if self.switch.guided else 0
        parts = []
        if plain:
            rows_mask = None if mask is None else mask[:plain]
            parts.append(dispatch_attention_fn(query[:plain], key[:plain], value[:plain], rows_mask, **dispatch))
        if plain < query.shape[0]:
            parts.append(
                joint_attention(
                    query[plain:],
                    key[plain:],
                    value[plain:],
                    face_key,
                    face_value,
                    self.face_bias(key.shape[1]),
                    None if mask is None else mask[plain:],
                    **dispatch,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def is_ip_adapter_processor(processor: Any) -> bool:
    """True for processors that add image-prompt attention to the text's, recognised by their weights."""
    return hasattr(processor, "to_k_ip")


# --- Layers of a UNet --------------------------------------------------------------------------------------------


def attention_layers(unet: Any, kind: str) -> dict[str, Attention]:
    """The `attn1` (self) or `attn2` (cross) layers of all transformer blocks by name, in the order of the UNet."""
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile's wrapper
    return {
        name: module
        for name, module in unet.named_modules()
        if name.endswith(f".{kind}")
        and ".transformer_blocks." in name
        and isinstance(module, Attention)
        and module.is_cross_attention == (kind == "attn2")
    }


def check_replaceable(name: str, processor: Any) -> None:
    """Raise [`FaceFusionError`] unless Face Fusion can stand in for `processor` at layer `name`."""
    if not isinstance(processor, PLAIN_PROCESSORS) and not is_ip_adapter_processor(processor):
        raise FaceFusionError(
            f"{name} uses {type(processor).__name__}, which Face Fusion cannot be combined with; "
            "unload what installed it, or call `unet.set_attn_processor(AttnProcessor2_0())`"
        )


@contextmanager
def installed_processors(unet: Any, processors: Mapping[str, Any]) -> Iterator[None]:
    """Put `processors` (by layer name) into the UNet and, whatever happens, put the very same old objects back."""
    unet = getattr(unet, "_orig_mod", unet)
    layers = {name: unet.get_submodule(name) for name in processors}
    originals = {name: layer.processor for name, layer in layers.items()}
    for name, original in originals.items():
        check_replaceable(name, original)
    try:
        for name, layer in layers.items():
            processors[name].take_over(originals[name])
            layer.set_processor(processors[name])
        yield
        lost = [name for name, layer in layers.items() if layer.processor is not processors[name]]
    finally:
        for name, layer in layers.items():
            layer.set_processor(originals[name])
    if lost:
        raise FaceFusionError(
            f"the attention processors of {len(lost)} layers (first: {lost[0]}) were replaced during the call, so the "
            "face was lost; change attention processors before or after a call, not in a callback"
        )
