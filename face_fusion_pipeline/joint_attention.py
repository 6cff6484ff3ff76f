"""Joint attention over text and faces, Eq. 1 to 6: pure functions, and the keys of one person at one layer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor

from .face_errors import InvalidScaleError


KeysAndValues = dict[str, tuple[Tensor, Tensor]]  # layer name -> keys and values (..., tokens, inner)


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


class PersonKeys:
    """The face of one person at one layer.

    Args:
        key, value: `(B or 1, n_refs, N_f, inner)`.
        log_weights: `(B or 1, n_refs)` from [`reference_log_weights`].
        scale: strength of this face at this layer; at 0 nobody sees it.
        token_count_bias: see [`constant_bias`].
        places: number of queries -> bool `(B, N_h)`, which of them see this face; None for all. This is the dense
            mask of Eq. 7, for batches in which it differs from row to row (training); see also `LayerPeople`.
        cells: bool `(h_f, w_f)`, which cells of a reference the N_f keys are; None for all of a square. Attention does
            not ask for it, those who draw it do.
        context: these are tokens of a context rather than a face; who has some does not see the one of everybody.
        replaces_text: they take the text's place instead of joining it.
        embedded: they are tokens of an embedding, and so of no cell of a reference.
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
        *,
        context: bool = False,
        replaces_text: bool = False,
        embedded: bool = False,
    ) -> None:
        self.places, self.cells, self.embedded = places, cells, embedded or context
        self.context, self.replaces_text = context, replaces_text
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
