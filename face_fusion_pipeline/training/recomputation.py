"""Gradient checkpointing for a UNet with faces: what is computed again in the backward pass sees the same faces.

The faces are in the attention layers only while the forward pass runs. So each block remembers them and puts them back
while it is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..face_attention import attention_layers
from ..face_ownership import installed_processors
from .kernels import plain_attention


def enable_recomputation(unet: Any) -> None:
    """Trade time for memory: activations inside the blocks are not kept but computed again for the gradients."""

    def run(block: Any, *args: Any) -> Any:
        layers = attention_layers(unet, "attn2")
        faces = {
            name: layer.processor
            for name, layer in layers.items()
            if getattr(layer.processor, "is_face_fusion_processor", False)
        }
        plain = not torch.backends.cuda.flash_sdp_enabled()  # as it is computed now, so again
        return checkpoint(
            block.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _with(unet, faces, plain))
        )

    unet.enable_gradient_checkpointing(run)


@contextmanager
def _with(unet: Any, faces: dict[str, Any], plain: bool) -> Iterator[None]:
    with installed_processors(unet, faces), plain_attention(plain):
        yield
