"""Logistic regression finds the sigmoid that the labels were drawn by."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_ops.models.calibration import Calibration
from vlm_ops.training.calibration import calibrate


@pytest.mark.parametrize(("scale", "bias"), [(6.0, -2.0), (1.5, 0.5), (-3.0, 1.0), (40.0, -10.0)])
def test_a_known_sigmoid_is_found(scale: float, bias: float) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(0.3, 4 / abs(scale), 20_000).astype(np.float32)
    targets = (rng.random(len(scores)) < Calibration(scale, bias)(scores)).astype(float)
    found = calibrate(scores, targets)
    assert found.scale == pytest.approx(scale, rel=0.1) and found.bias == pytest.approx(bias, abs=0.1 * abs(scale))
    np.testing.assert_allclose(found(scores), Calibration(scale, bias)(scores), atol=0.03)


def test_probabilities_hold_in_the_mean() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=5000)
    targets = (rng.random(5000) < 0.3 + 0.4 * (scores > 0)).astype(float)  # no sigmoid at all
    assert calibrate(scores, targets)(scores).mean() == pytest.approx(targets.mean(), abs=1e-3)


def test_scores_that_part_perfectly_give_a_finite_slope() -> None:
    scores = np.array([0.1, 0.2, 0.7, 0.9], np.float32)
    found = calibrate(scores, np.array([0.0, 0.0, 1.0, 1.0]))
    assert np.isfinite([found.scale, found.bias]).all() and found.scale > 0
    assert ((found(scores) > 0.5) == [False, False, True, True]).all()


def test_scores_that_say_nothing() -> None:
    found = calibrate(np.full(10, 0.3, np.float32), np.tile([0.0, 1.0], 5))
    np.testing.assert_allclose(found(np.array([0.3])), 0.5, atol=1e-6)
