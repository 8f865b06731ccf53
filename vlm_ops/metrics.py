"""Metrics as pure functions of scores; each is tested against a naive one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Estimate:
    """A figure with the bounds of its 95 % bootstrap confidence interval."""

    value: float
    low: float
    high: float


def text_to_image_ranks(similarity: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Rank of each caption's own image, 1 is best; ties count against it.

    Args:
        similarity: float[num_captions, num_images].
        owners: int[num_captions], the image that each caption belongs to.

    Returns:
        int[num_captions].
    """
    own = similarity[np.arange(len(owners)), owners]
    return _not_below(similarity, own[:, None]).sum(axis=1)


def image_to_text_ranks(similarity: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Rank of the best of each image's own captions among all captions, 1 is best.

    Own captions do not stand in each other's way; ties with captions of others count against them.
    Images without a caption must not be among the columns.

    Args:
        similarity, owners: As in `text_to_image_ranks`.

    Returns:
        int[num_images].
    """
    num_images = similarity.shape[1]
    mine = owners[:, None] == np.arange(num_images)[None, :]
    best = np.where(mine, similarity, -np.inf).max(axis=0)
    return (_not_below(similarity, best[None, :]) & ~mine).sum(axis=0) + 1


def _not_below(scores: np.ndarray, own: np.ndarray) -> np.ndarray:
    """What counts against an own score: all that is not surely less. A model whose vectors are no numbers finds nothing."""
    return ~(scores < own)


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Share of the queries whose answer is among the first k."""
    return float((ranks <= k).mean())


def top_k_accuracy(scores: np.ndarray, targets: np.ndarray, k: int) -> np.ndarray:
    """Whether the target is among the k best classes of each row; ties count against it.

    Args:
        scores: float[n, num_classes].
        targets: int[n].

    Returns:
        bool[n].
    """
    own = scores[np.arange(len(targets)), targets]
    return _not_below(scores, own[:, None]).sum(axis=1) <= k


def row_cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64[n]: the cosine of each row of float[n, d] and the same row of another."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.einsum("nd,nd->n", first, second, dtype=np.float64) / np.maximum(norms, 1e-12)


def kept_neighbours(similarity: np.ndarray, reference: np.ndarray, k: int) -> np.ndarray:
    """Of the k nearest of each query, the share that is among the k nearest by another similarity, too. What ties with
    the last of these, but for rounding, is among them.

    Args:
        similarity, reference: float[num_queries, n], k < n; what is not to be found has -inf.

    Returns:
        float64[num_queries].
    """
    found = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    last = np.partition(reference, -k, axis=1)[:, -k]
    return (np.take_along_axis(reference, found, axis=1) >= last[:, None] - 1e-6).mean(axis=1)


def area_under_curve(scores: np.ndarray, targets: np.ndarray) -> float:
    """Area under the ROC curve: how often a matching pair scores above another one; ties count half.

    Args:
        scores: float[n].
        targets: n times 0 or 1; both occur.
    """
    order = np.sort(scores[targets == 0])
    positives = scores[targets == 1]
    below, upto = np.searchsorted(order, positives, "left"), np.searchsorted(order, positives, "right")
    return float((below + upto).mean() / (2 * len(order)))


def accuracy(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Share of the pairs on whose right side of one half the probability is.

    Args:
        probabilities: float[n].
        targets: n times 0 or 1.
    """
    return float(((probabilities > 0.5) == (targets == 1)).mean())


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    groups: np.ndarray | None = None,
    num_resamples: int = 500,
    seed: int = 0,
) -> Estimate:
    """A statistic with its 95 % percentile bootstrap interval (Efron 1979).

    Args:
        values: One value an observation.
        groups: int[n], observations that belong together and are resampled together (the captions
            of one image are no independent draws); None: each stands alone.
    """
    groups = np.arange(len(values)) if groups is None else groups
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(num_resamples):
        chosen = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        resampled.append(statistic(values[chosen]))
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Estimate(statistic(values), float(low), float(high))
