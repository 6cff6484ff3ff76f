"""Which of torch's kernels a training computes with: the quick ones, of those whose gradients are right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def training_kernels() -> Iterator[None]:
    """cuDNN as training wants it, and afterwards as it was."""
    searched, attends = torch.backends.cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cudnn.benchmark = True  # shapes do not change: the quickest convolutions are worth a search
    torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients of masked attention can be NaN (pytorch #196678)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = searched
        torch.backends.cuda.enable_cudnn_sdp(attends)


def plain_attention_on_cpu(latents: Tensor) -> AbstractContextManager[None]:
    """On a CPU the fused attention takes up to twice the time of plain products, in training at 256 tokens.

    At 4096 it is the other way round, for the products no longer fit into the cache.
    """
    small = latents.shape[-1] * latents.shape[-2] <= 1024
    return plain_attention(small and not torch.cuda.is_available())


@contextmanager
def plain_attention(chosen: bool = True) -> Iterator[None]:
    """Attention by plain products if that is `chosen`."""
    if not chosen:
        yield
        return
    reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # in spite of its name also for CPUs
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(reduced)
