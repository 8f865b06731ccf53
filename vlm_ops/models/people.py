"""Whether a picture shows people, so that no caption invents them.

Most captions that a writer has learnt from speak of people, so that it sees them wherever it knows nothing else: on a
shelf of lemons, for one. A linear classifier of the image's features has no such habit. The surer the writer is of its
sentence, the less of that it needs: of what it has never seen, it writes hesitantly.
"""

from __future__ import annotations

import torch
from torch import nn

from vlm_ops.models.standardised import Standardised


class PeopleEvidence(Standardised):
    """(features float32[n, feature_dim], log_probs float32[n] of sentences about them) -> float32[n]; above 0 where the
    sentences may name people."""

    sentence_mean: torch.Tensor
    sentence_std: torch.Tensor

    def __init__(self, feature_dim: int) -> None:
        super().__init__(feature_dim)
        self.register_buffer("sentence_mean", torch.zeros(()))
        self.register_buffer("sentence_std", torch.ones(()))
        self.linear = nn.Linear(feature_dim, 1)

    def forward(self, features: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        return self.of_images(features) + (log_probs - self.sentence_mean) / self.sentence_std

    def of_images(self, features: torch.Tensor) -> torch.Tensor:
        """float32[n, feature_dim] -> float32[n]: what the features say."""
        return self.linear(self.standardised(features))[:, 0]
