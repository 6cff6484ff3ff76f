"""A second attention over the face whose result is added to that over the text: IP-Adapter's form on any keys."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ...face_attention import FaceFusionAttnProcessor
from ...joint_attention import PersonKeys, split_heads


def face_attention(
    query: Tensor, face_key: Tensor, face_value: Tensor, bias: Tensor | None = None, **dispatch: Any
) -> Tensor:
    """softmax(M + Q K_f^T / sqrt(d)) V_f, and zero where M hides all keys: such a row has no face.

    Args:
        query: `(B, N_h, heads, d)`.
        face_key, face_value: `(B or 1, K_f, heads, d)`.
        bias: M, `(B or 1, 1, 1, K_f)`, `None` for zero.
        dispatch: `backend` and `parallel_config` of diffusers' `dispatch_attention_fn`.

    Returns:
        `(B, N_h, heads, d)`.
    """
    key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (face_key, face_value))
    if bias is None:
        return dispatch_attention_fn(query, key, value, **dispatch)
    seen = torch.isfinite(bias).any(-1, keepdim=True)  # a softmax over nothing but -inf is NaN, and so its gradient
    bias = torch.where(seen, bias, 0.0).to(query.dtype)
    return dispatch_attention_fn(query, key, value, attn_mask=bias, **dispatch) * seen


class AddedFaceAttnProcessor(FaceFusionAttnProcessor):
    """softmax(Q K_c^T / sqrt(d)) V_c + scale · softmax(M + Q K_f^T / sqrt(d)) V_f, summed over the people seen.

    M holds the weights of several references. A bias for the number of face tokens would change nothing here.
    """

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
        attended = dispatch_attention_fn(query, key, value, mask, **dispatch)
        for person in people:
            if person.scale > 0:
                face_key, face_value = split_heads(attn, person.key, person.value, query.dtype)
                face = face_attention(query, face_key, face_value, person.reference_bias, **dispatch)
                attended = attended + person.scale * face
        return attended
