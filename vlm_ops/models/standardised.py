"""What every network on pooled features begins with: features on one scale, whatever model they come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_LEAST_STD = 1e-3  # is added: a feature that never varies is not blown up


class Standardised(nn.Module):
    """A module that keeps the mean and standard deviation of its training features, float32[feature_dim] each.

    Args:
        args: For the next class of a module that has two bases.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, feature_dim: int, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("mean", torch.zeros(feature_dim))
        self.register_buffer("std", torch.ones(feature_dim))

    def standardise_by(self, features: torch.Tensor) -> None:
        """Takes mean and standard deviation from the training features float32[n, feature_dim]."""
        self.mean.copy_(features.mean(0))
        if len(features) > 1:  # one image says nothing of how images differ
            self.std.copy_(features.std(0) + _LEAST_STD)

    def standardised(self, features: torch.Tensor) -> torch.Tensor:
        """float32[n, feature_dim] -> float32[n, feature_dim], of mean 0 and standard deviation 1 over the training
        images."""
        return (features - self.mean) / self.std
