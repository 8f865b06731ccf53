"""What each kind of evidence is worth for categories, and how likely a score is right: fitted on labelled images.

The weights maximise the likelihood of the true categories; what the evidence of all images has in common is its mean
over them; and a rising curve of a few points, by the pool-adjacent-violators algorithm (Ayer et al. 1955), makes
probabilities of scores. So few numbers cannot learn the labels by heart, and hold for another taxonomy of the same
model too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files

import numpy as np

EVIDENCE = ("image", "labels", "caption", "source_metadata")
# Usual for cosines of image–text models.
_NEUTRAL = {"image": 30.0, "labels": 8.0, "caption": 4.0, "source_metadata": 10.0}
_MIN_IMAGES = 20
_STEPS = 300
_LEARNING_RATE = 0.5
_EDGES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.01)  # of the pools of scores
_LEAST_POOL = 20
_LEAST_SCORE = 0.01  # below it a node is out of the question, and says nothing of what scores mean
_LEAST_MEAN = 1e-5
_EPSILON = 1e-6
_DIGITS = 5


@dataclass(frozen=True)
class CategoryCalibration:
    """Weights and the meaning of scores.

    Attributes:
        model: Name of the model, `spec@revision`, whose vectors these are; empty: of any.
        weights: By kind of evidence.
        means: By kind of evidence float[d], what all images have in common; missing: nothing.
        points: Pairs of score and probability, both rising; between them the log-odds are interpolated, outside them the
            nearest one's shift holds. None: a score is its own probability.
        num_images: That it was made from.
    """

    model: str
    weights: Mapping[str, float]
    means: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    points: tuple[tuple[float, float], ...] = ()
    num_images: int = 0

    @staticmethod
    def neutral(model: str) -> CategoryCalibration:
        """For a model that nobody has calibrated: weights that are usual, and scores as they are."""
        return CategoryCalibration(model, dict(_NEUTRAL))

    @staticmethod
    def of_model(model: str) -> CategoryCalibration:
        """The one that comes with a model, by its name `spec@revision`; neutral where none does."""
        spec = model.partition("@")[0]
        file = files("vlm_ops").joinpath("calibrations", f"{spec}.json")
        if not spec.isidentifier() or not file.is_file():
            return CategoryCalibration.neutral(model)
        found = CategoryCalibration.from_json(file.read_text(encoding="utf-8"), f"the calibration of {spec}")
        return found if found.model == model else CategoryCalibration.neutral(model)

    @property
    def is_fitted(self) -> bool:
        """Whether scores are probabilities that labelled images have shown, or only look like some."""
        return self.num_images > 0

    def mean(self, kind: str, dim: int) -> np.ndarray:
        """float32[dim]."""
        return np.array(self.means[kind], np.float32) if kind in self.means else np.zeros(dim, np.float32)

    def probability(self, scores: np.ndarray) -> np.ndarray:
        """float[...] in [0, 1] -> float32[...] in [0, 1], in the same order."""
        if not self.points:
            return np.asarray(scores, np.float32)
        x, y = log_odds(np.array(self.points, np.float64)).T
        given = log_odds(scores)
        outside = np.minimum(given - x[0], 0) + np.maximum(given - x[-1], 0)
        return sigmoid(np.interp(given, x, y) + outside).astype(np.float32)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str, where: str = "the calibration") -> CategoryCalibration:
        """Raises:
        ValueError: It is none; the message names `where`.
        """
        try:
            found = json.loads(text)
            weights = {kind: float(found["weights"][kind]) for kind in EVIDENCE}
            means = {kind: tuple(map(float, values)) for kind, values in found["means"].items()}
            points = tuple((float(score), float(probability)) for score, probability in found["points"])
            made = CategoryCalibration(str(found["model"]), weights, means, points, int(found["num_images"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where} is no calibration of categories ({error!r}); make one with --calibrate"
            ) from error
        numbers = [*weights.values(), *(value for each in means.values() for value in each)]
        rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in itertools.pairwise(points))
        if not np.isfinite(numbers).all() or not rising or any(not 0 < value < 1 for pair in points for value in pair):
            raise ValueError(
                f"{where} has a weight that is no number, or points that do not rise in (0, 1); calibrate again"
            )
        return made


def fit(
    start: CategoryCalibration,
    spoken: Mapping[str, np.ndarray],
    prompts: np.ndarray,
    members: np.ndarray,
    parents: np.ndarray,
    targets: np.ndarray,
    visible: np.ndarray,
) -> CategoryCalibration:
    """Weights by maximum likelihood, means, and the line through the log-odds.

    Args:
        spoken: By kind of evidence float32[n, d], zero where it is missing; nothing taken off.
        prompts: float32[p, d].
        members: bool[p, m], which prompts are whose.
        parents: int[m].
        targets: bool[n, m], the true nodes, as deep as they are known.
        visible: bool[p].

    Raises:
        ValueError: Of fewer than 20 images anything is known.
    """
    if len(targets) < _MIN_IMAGES:
        raise ValueError(f"{len(targets)} images with a category are too few to calibrate; give at least {_MIN_IMAGES}")
    importance = _importance(targets)
    means, similarities = {}, {}
    for kind, values in spoken.items():
        is_there = np.asarray(values.any(axis=1))
        if not is_there.any():
            continue
        means[kind] = np.average(values[is_there], axis=0, weights=importance[is_there]).round(_DIGITS)
        centred = np.where(is_there[:, None], values - means[kind], 0)
        similarities[kind] = (centred @ prompts.T)[:, visible]
    right = (targets @ members.T.astype(np.float32) > 0)[:, visible]
    weights = _weights(similarities, right, importance, start.weights)
    logits = np.sum([weights[kind] * each for kind, each in similarities.items()], axis=0)
    scores = softmax(logits) @ members[visible].astype(np.float32)
    return CategoryCalibration(
        start.model,
        {kind: round(float(weights.get(kind, start.weights[kind])), 3) for kind in EVIDENCE},
        {kind: tuple(values.tolist()) for kind, values in means.items()},
        _points(scores, targets, parents),
        len(targets),
    )


def _importance(targets: np.ndarray) -> np.ndarray:
    """float64[n], mean 1: every set of categories counts alike, so that the commonest does not decide alone."""
    _, kinds, counts = np.unique(targets, axis=0, return_inverse=True, return_counts=True)
    importance = 1 / np.sqrt(counts[kinds.reshape(-1)])
    return importance / importance.mean()


def _weights(
    similarities: Mapping[str, np.ndarray], right: np.ndarray, importance: np.ndarray, start: Mapping[str, float]
) -> dict[str, float]:
    """Maximises the mean log-likelihood that a right prompt is drawn, by Adam on the logarithms of the weights."""
    kinds = list(similarities)
    logs = np.log([start[kind] for kind in kinds])
    # Calibration images are often of the kind that the embedding was trained on, where nothing else adds to it; on other
    # kinds class names do, so what is no embedding keeps its say.
    least = np.array([logs[i] + (np.log(0.1) if kind == "image" else 0) for i, kind in enumerate(kinds)])
    first, second = np.zeros(len(kinds)), np.zeros(len(kinds))
    for step in range(1, _STEPS + 1):
        logits = np.sum([np.exp(log) * similarities[kind] for log, kind in zip(logs, kinds, strict=True)], axis=0)
        everywhere = softmax(logits)
        among_right = softmax(np.where(right, logits, -1e9))
        gradient = np.array(
            [
                weight * np.average(((among_right - everywhere) * similarities[kind]).sum(1), weights=importance)
                for weight, kind in zip(np.exp(logs), kinds, strict=True)
            ]
        )
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        rate = _LEARNING_RATE * (1 - step / _STEPS)
        logs = logs + rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-9)
        logs = np.clip(logs, least, least + np.log(100))
    return dict(zip(kinds, np.exp(logs).tolist(), strict=True))


def _points(scores: np.ndarray, targets: np.ndarray, parents: np.ndarray) -> tuple[tuple[float, float], ...]:
    """How often a node of a score is right, over all nodes that come into question.

    Right are the true nodes and all above them. What is below a true node is not known and left out.
    """
    above, below = targets.copy(), targets.copy()
    for node in range(len(parents) - 1, -1, -1):
        if parents[node] >= 0:
            above[:, parents[node]] |= above[:, node]
    for node, parent in enumerate(parents):
        if parent >= 0:
            below[:, node] |= below[:, parent]
    counted = (scores >= _LEAST_SCORE) & (above | ~below)
    x, y = scores[counted].astype(np.float64), above[counted]
    # Pools of (sum of scores, number right, number); those with few are joined with the next.
    pools: list[list[float]] = []
    for low, high in itertools.pairwise(_EDGES):
        here = (x >= low) & (x < high)
        pools.append([float(x[here].sum()), float(y[here].sum()), float(here.sum())])
        while len(pools) > 1 and (pools[-2][2] < _LEAST_POOL or _share(pools[-2]) >= _share(pools[-1])):
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    if len(pools) > 1 and pools[-1][2] < _LEAST_POOL:
        last = pools.pop()
        pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    # A score of all but 1 is kept off 1, where log-odds end.
    means = (min(max(pool[0] / pool[2], _LEAST_MEAN), 1 - _LEAST_MEAN) for pool in pools if pool[2])
    shares = (_share(pool) for pool in pools if pool[2])
    return tuple((round(mean, 5), round(share, 5)) for mean, share in zip(means, shares, strict=True))


def _share(pool: Sequence[float]) -> float:
    """Share that is right, as if one more were right and one more wrong: no certainty comes of a few."""
    return (pool[1] + 1) / (pool[2] + 2)


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -60, 60)))


def log_odds(scores: np.ndarray) -> np.ndarray:
    kept = np.clip(scores, _EPSILON, 1 - _EPSILON)
    return np.log(kept / (1 - kept))


def softmax(logits: np.ndarray) -> np.ndarray:
    """float[n, p], rows sum to 1."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)
