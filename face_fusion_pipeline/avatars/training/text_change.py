"""Another text encoder below a trained UNet or ControlNet: its attention to text, re-expressed by least squares.

A UNet reads text states h only through `to_k` and `to_v`, which are linear. With S = argmin ‖H' S − H‖ over the states
H of the old and H' of the new encoder for the same captions, W' = W Sᵀ makes of the new states what W made of the old
ones, as far as a linear map can. What the old states did not tell apart remains to be learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def text_map(old: Tensor, new: Tensor) -> tuple[Tensor, float]:
    """S (C', C) with new · S ≈ old for states (N, C') and (N, C), and the fraction R² of the variance it explains."""
    old, new = old.double(), new.double()
    solution = torch.linalg.lstsq(new, old).solution
    unexplained = (new @ solution - old).square().sum() / (old - old.mean(dim=0)).square().sum()
    return solution, float(1 - unexplained)


@torch.no_grad()
def change_text(network: nn.Module, solution: Tensor) -> None:
    """Fold the map S (C', C) of [`text_map`] into every cross-attention layer, in place."""
    for name, module in network.named_modules():
        if name.endswith("attn2"):
            for linear in (module.to_k, module.to_v):
                weight = linear.weight.double() @ solution.T
                linear.weight = nn.Parameter(weight.to(linear.weight.dtype), linear.weight.requires_grad)
