"""Training with faces: a UNet that attends to those of a batch, with gradients to the weights that project them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..face_attention import FaceFusionAttnProcessor, LayerPeople
from ..face_ownership import installed_processors
from ..joint_attention import PersonKeys, reference_log_weights


def face_keys(
    adapter: Any,
    identity_tokens: Mapping[str, Tensor],
    face_mask: Tensor | None = None,
    weights: Tensor | None = None,
    scale: float = 1.0,
    token_count_bias: bool | None = None,
    places: Mapping[int, Tensor] | None = None,
) -> dict[str, PersonKeys]:
    """What layers see of the faces of a batch, projected by `adapter`; the arguments are those of [`face_fused_unet`].

    Args:
        adapter: also anything else that makes keys and values of tokens.
    """
    if token_count_bias is None:
        token_count_bias = bool(getattr(adapter, "module", adapter).metadata.token_count_bias)
    tokens = next(iter(identity_tokens.values()))
    if weights is None:
        weights = torch.ones(tokens.shape[1])
    drop = None if face_mask is None else ~face_mask.bool().to(tokens.device)
    log_weights = reference_log_weights(weights.float(), drop)
    log_weights = None if log_weights is None else log_weights.to(tokens.device)
    return {
        name: PersonKeys(key, value, log_weights, scale, token_count_bias, places)
        for name, (key, value) in adapter(identity_tokens).items()
    }


@contextmanager
def face_fused_unet(
    unet: Any,
    adapter: Any,
    identity_tokens: Mapping[str, Tensor],
    face_mask: Tensor | None = None,
    weights: Tensor | None = None,
    scale: float = 1.0,
    token_count_bias: bool | None = None,
    places: Mapping[int, Tensor] | None = None,
    further: Mapping[str, PersonKeys] | None = None,
) -> Iterator[None]:
    """Within the block, `unet(...)` attends to the faces; gradients reach `adapter` (Eq. 2-6).

    Run `backward` inside the block too if gradient checkpointing recomputes the forward pass.

    Args:
        adapter: a `FaceFusionAdapter`, also wrapped (DistributedDataParallel): its forward is called once.
        identity_tokens: layer name -> `(B, n_refs, N_f, C)`, see `reference_pass.capture_hidden_states`.
        face_mask: bool `(B,)`, False drops the face of that sample (masked, never zeroed).
        weights: `(n_refs,)` or `(B, n_refs)`, default equal.
        scale: strength > 0.
        token_count_bias: default as the adapter's metadata.
        places: which queries see the face of their sample, see `PersonKeys`.
        further: keys of the same faces at other layers, such as those of the model's own self-attention.
    """
    keys = face_keys(adapter, identity_tokens, face_mask, weights, scale, token_count_bias, places)
    seen_at = {**keys, **(further or {})}
    processors = {name: FaceFusionAttnProcessor([LayerPeople((seen,))]) for name, seen in seen_at.items()}
    with installed_processors(unet, processors):
        yield
