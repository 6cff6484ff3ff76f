"""Do the pictures of a method look like photos at all? The distance of two sets of CLIP embeddings.

CMMD of "Rethinking FID" (arXiv 2401.09603): 1000 × the squared maximum mean discrepancy with a Gaussian kernel of
width 10 between image embeddings of unit length. Unlike FID it takes few pictures and no Inception network.
"""

from __future__ import annotations

import numpy as np

from .metrics import Estimate


WIDTH, SCALE = 10.0, 1000.0


def cmmd(
    pictures: np.ndarray,
    groups: np.ndarray,
    photos: np.ndarray,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """CMMD of pictures (N, D) to photos (M, D), with a bootstrap interval that draws whole `groups` (N,) of pictures.

    Unbiased: pairs of a photo with itself and of pictures of one group are left out, so that equal distributions give
    0 on average, and single values below it. NaN where there are fewer than two groups or photos.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2 or len(photos) < 2:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    picks = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    times = np.stack([np.bincount(pick, minlength=len(names)) for pick in picks])[:, index].astype(np.float64)
    weights = np.concatenate([np.ones((1, len(pictures))), times])  # the first one is the set as it is
    weights /= weights.sum(1, keepdims=True)
    apart = (index[:, None] != index[None]).astype(np.float64)
    pairs = ((weights @ apart) * weights).sum(1)
    pairs[pairs == 0] = np.nan  # a draw of one group alone
    own = ((weights @ (_kernel(pictures, pictures) * apart)) * weights).sum(1) / pairs
    count = len(photos)
    theirs = (_kernel(photos, photos).sum() - count) / (count * (count - 1))
    values = SCALE * (own + theirs - 2 * weights @ _kernel(pictures, photos).mean(1))
    low, high = np.nanquantile(values[1:], [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values[0]), float(low), float(high), len(pictures))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.exp(-squares / (2 * WIDTH**2))
