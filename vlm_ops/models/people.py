"""Whether a picture shows people, so that no caption invents them.

Most captions that a writer has learnt from speak of people, so that it sees them wherever it knows nothing else: on a
shelf of lemons, for one. A linear classifier of the image's features has no such habit.
"""

from __future__ import annotations

import torch
from torch import nn

from vlm_ops.models.standardised import Standardised


class PeopleEvidence(Standardised):
    """features float32[n, feature_dim] -> float32[n]; above 0 where people may be named."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.linear = nn.Linear(feature_dim, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(self.standardised(features))[:, 0]
