"""The figures of every table: pure functions on arrays, no model and no file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean with the two ends of its confidence interval; `count` is the number of values averaged.

    The ends are NaN where there is nothing to tell an interval from: no value, or a single group.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        known = self.low == self.low
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]" if known else f"{self.mean:.3f}"


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of the angle between the last axes of `a` and `b` (broadcast), in [-1, 1]; 0 where a vector is zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / np.where(norms > 0, norms, 1.0)


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """P(a positive scores above a negative), ties counted half: the Mann-Whitney form of the ROC area.

    Raises ValueError if either side is empty.
    """
    positive, negative = np.ravel(positive), np.ravel(negative)
    if not len(positive) or not len(negative):
        raise ValueError(f"AUC needs both kinds of pairs, got {len(positive)} positive and {len(negative)} negative")
    ordered = np.sort(negative)
    below, up_to = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + up_to).sum() / 2 / (len(positive) * len(negative)))


def verification_auc(embeddings: np.ndarray, identities: np.ndarray) -> float:
    """AUC of same-person against different-people pairs, over all pairs of the (N, D) embeddings."""
    unit = np.asarray(embeddings, np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    first, second = np.triu_indices(len(unit), 1)
    scores = (unit @ unit.T)[first, second]
    same = np.asarray(identities)[first] == np.asarray(identities)[second]
    return auc(scores[same], scores[~same])


def bootstrap_mean(
    values: np.ndarray, groups: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of `values` with a percentile bootstrap interval that resamples whole `groups` (identities).

    Images of one identity are not independent, so identities are drawn, not images. NaN values are left out.
    """
    values, groups = np.asarray(values, np.float64), np.asarray(groups)
    kept = ~np.isnan(values)
    values, groups = values[kept], groups[kept]
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    names, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, values)
    counts = np.bincount(index)
    if len(names) == 1:  # one person tells nothing of how much people differ
        return Estimate(float(values.mean()), float("nan"), float("nan"), len(values))
    picks = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean = values.mean()  # of equal values it differs from those of the draws by rounding
    return Estimate(float(mean), float(min(low, mean)), float(max(high, mean)), len(values))


def normalised_similarity(value: float, floor: float, ceiling: float) -> float:
    """How much of the way from `floor` to `ceiling` `value` has come: 0 at the floor, 1 at the ceiling."""
    return (value - floor) / (ceiling - floor) if ceiling != floor else float("nan")


def bootstrap_normalised(
    value: tuple[np.ndarray, np.ndarray],
    floor: tuple[np.ndarray, np.ndarray],
    ceiling: tuple[np.ndarray, np.ndarray],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Estimate:
    """`normalised_similarity` of three means with a bootstrap interval; each is values (N,) and their groups (N,).

    A draw takes the same whole groups (identities) of all three. Groups that one of them lacks are left out of the
    interval, which has no ends (NaN) where fewer than two are left.
    """
    parts = [(np.asarray(values, np.float64), np.asarray(groups)) for values, groups in (value, floor, ceiling)]
    mean = normalised_similarity(*(float(values.mean()) for values, _ in parts))
    names = sorted(set.intersection(*(set(groups.tolist()) for _, groups in parts)))
    if len(names) < 2:
        return Estimate(mean, float("nan"), float("nan"), len(parts[0][0]))
    picks = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
    means = []
    for values, groups in parts:
        sums = np.array([values[groups == name].sum() for name in names])
        counts = np.array([(groups == name).sum() for name in names])
        means.append(sums[picks].sum(1) / counts[picks].sum(1))
    apart = means[2] - means[1]
    found = np.divide(means[0] - means[1], apart, out=np.full(draws, np.nan), where=apart != 0)
    if np.isnan(found).all():
        return Estimate(mean, float("nan"), float("nan"), len(parts[0][0]))
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(min(low, mean)), float(max(high, mean)), len(parts[0][0]))


def copy_paste_score(generated: np.ndarray, reference: np.ndarray, other: np.ndarray) -> float:
    """Is a generated face nearer to the reference photo than to another photo of the person? In [-1, 1].

    With θ the angle between two embeddings: (θ(generated, other) - θ(generated, reference)) / θ(reference, other).
    1 is the reference itself, -1 the other photo, 0 neither; the copy-paste score of WithAnyone (arXiv 2510.14975).
    """

    def angle(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.arccos(np.clip(cosine_similarity(a, b), -1, 1)))

    score = (angle(generated, other) - angle(generated, reference)) / max(angle(reference, other), 1e-6)
    return float(np.clip(score, -1, 1))  # by the triangle inequality only rounding can take it beyond


def psnr(image: np.ndarray, target: np.ndarray, *, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB of two images in [0, peak]; infinite for equal ones.

    Computed in float64: the difference of two uint8 arrays wraps around and flatters unrelated images by 18 dB.
    """
    error = np.mean((np.asarray(image, np.float64) - np.asarray(target, np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two XYXY boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    overlap = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return float(overlap / union) if union > 0 else 0.0
