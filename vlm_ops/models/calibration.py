"""Scores -> probabilities (Platt, "Probabilistic Outputs for Support Vector Machines", 1999)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Calibration:
    """probability = sigmoid(scale * score + bias), for as many matching as other pairs."""

    scale: float
    bias: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """float[n] -> float[n] in [0, 1], of the same precision."""
        return 1 / (1 + np.exp(-(self.scale * scores + self.bias)))
