"""Joint attention over text and face (Eq. 1-7) and the attention processor that runs it inside a UNet."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
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
from .face_layout import Regions
from .face_ownership import IN_USE, OwnThread


logger = logging.getLogger(__name__)

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
        log_weights = log_weights.to(drop.device, non_blocking=True).masked_fill(drop[:, None], -math.inf)
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
    """What all layers share during one call.

    Attributes:
        active: are we inside the time window?
        guided: does guidance double the batch?
        thread: the one that sees faces. None for all: autograd recomputes a training step in a thread of its own.
    """

    active: bool = True
    guided: bool = False
    thread: OwnThread | None = None


class PersonKeys:
    """The face of one person at one layer.

    Args:
        key, value: `(B or 1, n_refs, N_f, inner)`.
        log_weights: `(B or 1, n_refs)` from [`reference_log_weights`].
        scale: strength of this face at this layer; at 0 nobody sees it.
        token_count_bias: see [`constant_bias`].
        places: number of queries -> bool `(B, N_h)`, which of them see this face; None for all. This is the dense
            mask of Eq. 7, for batches in which it differs from row to row (training); `Cast.regions` is cheaper.
        cells: bool `(h_f, w_f)`, which cells of a reference the N_f keys are; None for all of a square. Attention does
            not ask for it, those who draw it do.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        log_weights: Tensor | None = None,
        scale: float = 1.0,
        token_count_bias: bool = False,
        places: Mapping[int, Tensor] | None = None,
        cells: Tensor | None = None,
    ) -> None:
        self.places, self.cells = places, cells
        self.tokens_per_reference = key.shape[2]
        self.key, self.value = key.flatten(1, 2), value.flatten(1, 2)
        self.reference_bias = (
            None if log_weights is None else log_weights.repeat_interleave(key.shape[2], dim=1)[:, None, None, :]
        )
        self.scale = scale
        # What layers read of it is no number: torch.compile would compile again for every other scale.
        self.seen = scale > 0
        self.strength = None if scale in (0, 1) else self.key.new_full((1, 1, 1, self.key.shape[1]), math.log(scale))
        self.token_count_bias = token_count_bias

    def bias(self, text_tokens: int, queries: int) -> Tensor | None:
        """M of Eq. 4 on these keys, `(B or 1, 1, 1 or N_h, K_f)`, or `None` where it is zero."""
        bias = self._bias_of_keys(text_tokens)
        if self.places is None:
            return bias
        bias = self.key.new_zeros(1, 1, 1, self.key.shape[1]) if bias is None else bias
        return bias.masked_fill(~self.places[queries][:, None, :, None], -math.inf)

    def _bias_of_keys(self, text_tokens: int) -> Tensor | None:
        count = constant_bias(1.0, self.tokens_per_reference, text_tokens, self.token_count_bias)
        parts = [part for part in (self.reference_bias, self.strength) if part is not None]
        if not parts:
            return None if count == 0.0 else self.key.new_full((1, 1, 1, self.key.shape[1]), count)
        bias = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return bias if count == 0.0 else bias + count


def join_people(people: Sequence[PersonKeys], text_tokens: int, queries: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values `(B or 1, K_f, inner)` of several people one after another, and their bias."""
    biases = [person.bias(text_tokens, queries) for person in people]
    if len(people) == 1:
        return people[0].key, people[0].value, biases[0]
    batch = max(person.key.shape[0] for person in people)
    keys, values = (torch.cat([t.expand(batch, -1, -1) for t in kv], dim=1) for kv in _columns(people))
    if all(bias is None for bias in biases):
        return keys, values, None
    columns = [
        person.key.new_zeros(1, 1, 1, person.key.shape[1]) if bias is None else bias
        for person, bias in zip(people, biases, strict=True)
    ]
    rows = max(column.shape[0] for column in columns)
    return keys, values, torch.cat([column.expand(rows, -1, -1, -1) for column in columns], dim=-1)


def _columns(people: Sequence[PersonKeys]) -> tuple[list[Tensor], list[Tensor]]:
    return [person.key for person in people], [person.value for person in people]


def split_heads(attn: Attention, key: Tensor, value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Projected face keys and values `(B or 1, K_f, inner)` as the layer attends to them, `(B or 1, K_f, heads, d)`.

    Keys go through the layer's `norm_k` where it has one, as those of the text do.
    """
    key, value = (x.to(dtype).unflatten(-1, (attn.heads, -1)) for x in (key, value))
    return key if attn.norm_k is None else attn.norm_k(key), value


@dataclass(frozen=True)
class Cast:
    """The people of a picture at one layer; `regions` says by number of queries which of them each query sees.

    Without regions every query sees everybody.
    """

    people: tuple[PersonKeys, ...]
    regions: Mapping[int, Regions] | None = None


class FaceFusionAttnProcessor:
    """Attention whose keys and values are joined by those of faces; drop-in for `AttnProcessor2_0`.

    At `attn2` the faces join the text (the paper), at `attn1` the image itself (ours, without training). It holds no
    weights: keys and values are projected once, before the denoising loop, so nothing can leak into a saved UNet.

    Args:
        casts: one for the whole batch, or one for each equal share of it in order (one a prompt, or one an image).
        switch: shared state of the call. With guidance the first half of the batch is computed without faces.
    """

    is_face_fusion_processor = True

    def __init__(self, casts: Sequence[Cast], switch: FusionSwitch | None = None) -> None:
        self.casts = tuple(casts)
        self.switch = switch or FusionSwitch()
        self.original: Any = None
        self.additive: Any = None
        self._attention_backend: Any = None
        self._parallel_config: Any = None

    @property
    def acts_here(self) -> bool:
        """False in threads whose calls are none of ours: there the layer computes what it did before."""
        return self.switch.thread is None or self.switch.thread.here

    def take_over(self, original: Any) -> None:
        """Inherit the backend of the replaced processor; one that adds to the output (IP-Adapter) still adds."""
        self.original = original
        self.additive = original if is_ip_adapter_processor(original) else None
        self._attention_backend = getattr(original, "_attention_backend", None)
        self._parallel_config = getattr(original, "_parallel_config", None)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        if not self.acts_here:
            return call_processor(
                self.original, attn, hidden_states, encoder_hidden_states, attention_mask, temb, ip_adapter_masks
            )
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
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        batch = query.shape[0]
        plain = batch if not self.switch.active else batch // 2 if self.switch.guided else 0
        bounds = [plain + (batch - plain) * i // len(self.casts) for i in range(len(self.casts) + 1)]
        rows = [(0, plain, None), *zip(bounds, bounds[1:], self.casts, strict=False)]
        parts = [
            self._attend_rows(attn, query[a:b], key[a:b], value[a:b], None if mask is None else mask[a:b], cast)
            for a, b, cast in rows
            if a < b
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_rows(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cast: Cast | None
    ) -> Tensor:
        if cast is None or cast.regions is None:
            return self._attend_people(attn, query, key, value, mask, () if cast is None else cast.people)
        if query.shape[1] not in cast.regions:
            raise FaceFusionError(
                f"a layer has {query.shape[1]} queries, the masks are for {sorted(cast.regions)}: "
                "this UNet does not halve its latents from level to level, so people cannot be placed in it"
            )
        regions = cast.regions[query.shape[1]]
        parts = [
            self._attend_people(
                attn, query[:, part.queries], key, value, mask, tuple(cast.people[i] for i in part.people)
            )
            for part in regions.parts
        ]
        return torch.cat(parts, dim=1)[:, regions.order]

    def _attend_people(
        self,
        attn: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        people: tuple[PersonKeys, ...],
    ) -> Tensor:
        dispatch = {"backend": self._attention_backend, "parallel_config": self._parallel_config}
        people = tuple(person for person in people if person.seen)
        if not people:
            return dispatch_attention_fn(query, key, value, mask, **dispatch)
        face_key, face_value, bias = join_people(people, key.shape[1], query.shape[1])
        face_key, face_value = split_heads(attn, face_key, face_value, query.dtype)
        return joint_attention(query, key, value, face_key, face_value, bias, mask, **dispatch)


def is_ip_adapter_processor(processor: Any) -> bool:
    """True for processors that add image-prompt attention to the text's, recognised by their weights."""
    return hasattr(processor, "to_k_ip")


def call_processor(
    processor: Any,
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Any,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    ip_adapter_masks: Any,
) -> Tensor:
    """`processor` as the layer itself would call it: not every processor knows the last two arguments."""
    known: dict[str, Any] = {} if temb is None else {"temb": temb}
    if is_ip_adapter_processor(processor):
        known["ip_adapter_masks"] = ip_adapter_masks
    return processor(
        attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **known
    )


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
    if hasattr(processor, "acts_here"):  # ours, perhaps of another copy of this module
        raise FaceFusionError(IN_USE)
    if not isinstance(processor, PLAIN_PROCESSORS) and not is_ip_adapter_processor(processor):
        raise FaceFusionError(
            f"{name} uses {type(processor).__name__}, which Face Fusion cannot be combined with; "
            "unload what installed it, or call `unet.set_attn_processor(AttnProcessor2_0())`"
        )


def check_idle(unet: Any) -> None:
    """Raise [`FaceFusionError`] where a call in this thread would see the faces that another one has in this UNet.

    That is in a callback of a call with faces: in other threads they do not act.
    """
    for layer in (*attention_layers(unet, "attn1").values(), *attention_layers(unet, "attn2").values()):
        if getattr(layer.processor, "acts_here", False):
            raise FaceFusionError(IN_USE)


REPLACED = "replaced_processor"


@contextmanager
def installed_processors(unet: Any, processors: Mapping[str, Any]) -> Iterator[None]:
    """Put `processors` (by layer name) into the UNet and, whatever happens, put the very same old objects back."""
    unet = getattr(unet, "_orig_mod", unet)
    layers = {name: unet.get_submodule(name) for name in processors}
    originals = {name: layer.processor for name, layer in layers.items()}
    for name, original in originals.items():
        check_replaceable(name, original)
    sliced = [
        isinstance(originals[name], SlicedAttnProcessor) and isinstance(processor, FaceFusionAttnProcessor)
        for name, processor in processors.items()
    ]
    if any(sliced):
        logger.warning("attention slicing is off in %d layers while they see faces: more memory is used", sum(sliced))
    try:
        for name, layer in layers.items():
            processors[name].take_over(originals[name])
            layer.set_processor(processors[name])
            if isinstance(
                originals[name], torch.nn.Module
            ):  # with weights (IP-Adapter), which have to move with the UNet
                layer.add_module(REPLACED, originals[name])
        yield
        lost = [name for name, layer in layers.items() if layer.processor is not processors[name]]
    finally:
        for name, layer in layers.items():
            layer._modules.pop(REPLACED, None)
            layer.set_processor(originals[name])
    if lost:
        raise FaceFusionError(
            f"the attention processors of {len(lost)} layers (first: {lost[0]}) were replaced during the call, so the "
            "face was lost; change attention processors before or after a call, not in a callback"
        )
