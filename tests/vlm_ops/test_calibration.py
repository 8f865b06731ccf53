"""Probabilities are those of the sigmoid, in the precision that models promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlm_ops.models.calibration import Calibration


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_are_those_of_the_sigmoid(dtype: type) -> None:
    scores = np.array([-3, -0.25, 0, 0.5, 3], dtype)
    found = Calibration(10.0, -2.0)(scores)
    assert found.dtype == dtype and ((found >= 0) & (found <= 1)).all()
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(2 - 10 * each)) for each in scores.tolist()], rel=1e-6)
    assert Calibration(10.0, -2.0)(scores[:0]).shape == (0,)
