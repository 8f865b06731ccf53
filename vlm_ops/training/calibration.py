"""Finds what turns scores into probabilities (Platt, "Probabilistic Outputs for Support Vector Machines", 1999)."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from vlm_ops.models.calibration import Calibration


def calibrate(scores: np.ndarray, targets: np.ndarray) -> Calibration:
    """Logistic regression of targets (0 or 1) on scores, by L-BFGS."""
    x = torch.from_numpy(scores.astype(np.float64))
    # As the paper smooths them: scores that part perfectly would want an infinite slope.
    num_matching = targets.sum()
    matching, other = (num_matching + 1) / (num_matching + 2), 1 / (len(targets) - num_matching + 2)
    y = torch.from_numpy(np.where(targets == 1, matching, other))
    mean, std = x.mean(), x.std() + 1e-9
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(weight[0] * (x - mean) / std + weight[1], y)
        loss.backward()
        return loss

    optimizer.step(step)
    scale, bias = weight.detach().tolist()
    return Calibration(float(scale / std), float(bias - scale * mean / std))
