"""What each kind of evidence is worth for categories, and how likely a score is right: fitted on labelled images.

The weights maximise the likelihood of the true categories, every category counting alike; what they have in common
is the mean over the same images; and one line through the log-odds (Platt 1999) makes probabilities of scores. So few
numbers cannot learn the labels by heart, and hold for another taxonomy of the same model too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files

import numpy as np

EVIDENCE = ("image", "labels", "caption", "source_metadata")
_MIN_IMAGES = 20
_STEPS = 300
_LEARNING_RATE = 0.5
_LEAST_SCORE = 0.01  # below it a node is out of the question, and says nothing of what scores mean
_LEAST_SHARE, _MOST_SHARE = 0.5, 10.0  # of a neutral weight
_EPSILON = 1e-6
_DIGITS = 5


@dataclass(frozen=True)
class CategoryCalibration:
    """Weights and the meaning of scores.

    Attributes:
        model: Name of the model, `spec@revision`, whose vectors these are; empty: of any.
        weights: By kind of evidence.
        means: By kind of evidence float[d], what all images have in common; missing: nothing.
        scale, bias: probability = sigmoid(scale * log-odds of the score + bias).
        num_images: That it was made from.
    """

    model: str
    weights: Mapping[str, float]
    means: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    scale: float = 1.0
    bias: float = 0.0
    num_images: int = 0

    @staticmethod
    def neutral(model: str) -> CategoryCalibration:
        """For a model that nobody has calibrated: what is usual for cosines of image–text models."""
        return CategoryCalibration(model, {"image": 40.0, "labels": 10.0, "caption": 5.0, "source_metadata": 10.0})

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
        return sigmoid(self.scale * log_odds(scores) + self.bias).astype(np.float32)

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
            scale, bias = float(found["scale"]), float(found["bias"])
            made = CategoryCalibration(str(found["model"]), weights, means, scale, bias, int(found["num_images"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where} is no calibration of categories ({error!r}); make one with --calibrate"
            ) from error
        numbers = [*weights.values(), scale, bias, *(value for each in means.values() for value in each)]
        if not np.isfinite(numbers).all() or scale <= 0:
            raise ValueError(
                f"{where} has a weight that is no number, or a scale that is not positive; calibrate again"
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
        is_there = values.any(axis=1)
        if not is_there.any():
            continue
        means[kind] = np.average(values[is_there], axis=0, weights=importance[is_there]).round(_DIGITS)
        centred = np.where(is_there[:, None], values - means[kind], 0)
        similarities[kind] = (centred @ prompts.T)[:, visible]
    right = (targets @ members.T.astype(np.float32) > 0)[:, visible]
    weights = _weights(similarities, right, importance, start.weights)
    logits = sum(weights[kind] * each for kind, each in similarities.items())
    scores = _softmax(logits) @ members[visible].astype(np.float32)
    scale, bias = _line(scores, targets, parents, importance)
    return CategoryCalibration(
        start.model,
        {kind: round(float(weights.get(kind, start.weights[kind])), 3) for kind in EVIDENCE},
        {kind: tuple(values.tolist()) for kind, values in means.items()},
        round(scale, 4),
        round(bias, 4),
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
    # kinds class names do, so no evidence loses its say.
    least, most = logs + np.log(_LEAST_SHARE), logs + np.log(_MOST_SHARE)
    first, second = np.zeros(len(kinds)), np.zeros(len(kinds))
    for step in range(1, _STEPS + 1):
        logits = sum(np.exp(log) * similarities[kind] for log, kind in zip(logs, kinds, strict=True))
        everywhere = _softmax(logits)
        among_right = _softmax(np.where(right, logits, -1e9))
        gradient = np.array(
            [
                weight * np.average(((among_right - everywhere) * similarities[kind]).sum(1), weights=importance)
                for weight, kind in zip(np.exp(logs), kinds, strict=True)
            ]
        )
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        rate = _LEARNING_RATE * (1 - step / _STEPS)
        logs = logs + rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-9)
        logs = np.clip(logs, least, most)
    return dict(zip(kinds, np.exp(logs).tolist(), strict=True))


def _line(scores: np.ndarray, targets: np.ndarray, parents: np.ndarray, importance: np.ndarray) -> tuple[float, float]:
    """Scale and bias, by Newton's method, over all nodes that come into question.

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
    x = log_odds(scores[counted])
    y = above[counted].astype(float)
    weights = np.broadcast_to(importance[:, None], scores.shape)[counted]
    # Platt's targets keep a clean separation from a scale without end.
    num_right, num_wrong = y.sum(), len(y) - y.sum()
    y = np.where(y == 1, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))
    inputs, line = np.stack([x, np.ones_like(x)], axis=1), np.array([1.0, 0.0])
    for _ in range(50):
        p = sigmoid(inputs @ line)
        curvature = (inputs * (weights * p * (1 - p))[:, None]).T @ inputs + 1e-3 * np.eye(2)
        line = line + np.linalg.solve(curvature, inputs.T @ (weights * (y - p)) - 1e-3 * (line - [1.0, 0.0]))
    return max(float(line[0]), 0.05), float(line[1])


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -60, 60)))


def log_odds(scores: np.ndarray) -> np.ndarray:
    kept = np.clip(scores, _EPSILON, 1 - _EPSILON)
    return np.log(kept / (1 - kept))


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)
