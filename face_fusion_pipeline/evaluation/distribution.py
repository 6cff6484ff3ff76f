"""Do the pictures of a method look like true ones as a whole? Distances of two sets of features.

Both are squared maximum mean discrepancies and take few pictures. CMMD of "Rethinking FID" (arXiv 2401.09603): 1000 ×
that with a Gaussian kernel of width 10 between CLIP embeddings of unit length. KID of "Demystifying MMD GANs" (arXiv
1801.01401): 1000 × that with the kernel (x·y / D + 1)³, between whatever features it is given.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .metrics import Estimate


WIDTH, SCALE = 10.0, 1000.0

_Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


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
    single = (np.arange(len(photos)), np.zeros((len(groups), len(photos)), bool))
    return _discrepancy(_gaussian, pictures, groups, photos, *single, level=level, draws=draws, seed=seed)


def kid(
    pictures: np.ndarray,
    groups: np.ndarray,
    renders: np.ndarray,
    render_groups: np.ndarray,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """KID of features of pictures (N, D) to those of true renders (M, D), of people named by `groups` (N,) and (M,).

    Features are brought to unit length, so that no single one outweighs all others, then moved and scaled, all alike,
    so that the true ones have the mean 0 and on average the variance 1. Unbiased and with an interval as `cmmd`; pairs
    of one person are left out everywhere, so that likeness to the person's own render counts for nothing.
    """
    groups, render_groups = np.asarray(groups), np.asarray(render_groups)
    pictures, renders = (f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-12) for f in (pictures, renders))
    mean, spread = renders.mean(0), max(float(np.sqrt(renders.var(0).mean())), 1e-6)
    x, y = (pictures - mean) / spread, (renders - mean) / spread
    same = groups[:, None] == render_groups[None]
    return _discrepancy(_cubic, x, groups, y, render_groups, same, level=level, draws=draws, seed=seed)


def _discrepancy(
    kernel: _Kernel,
    pictures: np.ndarray,
    groups: np.ndarray,
    others: np.ndarray,
    other_groups: np.ndarray,
    same: np.ndarray,
    *,
    level: float,
    draws: int,
    seed: int,
) -> Estimate:
    """1000 × MMD² without the pairs of one group, nor those of a picture and another where `same` (N, M) says so."""
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    foreign = np.asarray(other_groups)[:, None] != np.asarray(other_groups)[None]
    if len(names) < 2 or not foreign.any():
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    picks = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    times = np.stack([np.bincount(pick, minlength=len(names)) for pick in picks])[:, index].astype(np.float64)
    weights = np.concatenate([np.ones((1, len(pictures))), times])  # the first one is the set as it is
    weights /= weights.sum(1, keepdims=True)
    apart = (index[:, None] != index[None]).astype(np.float64)
    pairs = ((weights @ apart) * weights).sum(1)
    pairs[pairs == 0] = np.nan  # a draw of one group alone
    own = ((weights @ (kernel(pictures, pictures) * apart)) * weights).sum(1) / pairs
    theirs = kernel(others, others)[foreign].mean()
    across = weights @ (kernel(pictures, others) * ~same).sum(1) / (weights @ (~same).sum(1))
    values = SCALE * (own + theirs - 2 * across)
    low, high = np.nanquantile(values[1:], [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values[0]), float(low), float(high), len(pictures))


def _gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.exp(-squares / (2 * WIDTH**2))


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return (a @ b.T / a.shape[1] + 1) ** 3
