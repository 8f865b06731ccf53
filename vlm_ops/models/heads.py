"""Two small heads that align the images of one frozen model with the texts of another.

They are what `beamsight train dual-encoder` trains; everything below them stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

# The base's own image–text embedding has norm 1; scaled, it weighs as much as standardised features.
_EMBEDDING_SCALE = 10.0


@dataclass(frozen=True)
class HeadsConfig:
    """Shapes of the heads.

    Attributes:
        feature_dim: Of the base's features.
        base_embedding_dim: Of the base's own image–text embedding.
        text_dim: Of the base's text embedding, and of the aligned space.
        hidden_dim: Of the image head; the text head has twice `text_dim`.
        dropout: In the image head, while training.
    """

    feature_dim: int
    base_embedding_dim: int
    text_dim: int
    hidden_dim: int = 1024
    dropout: float = 0.5


class ImageHead(nn.Module):
    """(features float32[n, feature_dim], embeddings float32[n, base_embedding_dim]) -> float32[n, text_dim],
    L2-normalised: a linear skip plus one hidden layer, on standardised features."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        width = config.feature_dim + config.base_embedding_dim
        self.register_buffer("mean", torch.zeros(config.feature_dim))
        self.register_buffer("std", torch.ones(config.feature_dim))
        self.dropout = nn.Dropout(config.dropout)
        self.skip = nn.Linear(width, config.text_dim)
        self.hidden = nn.Linear(width, config.hidden_dim)
        self.out = nn.Linear(config.hidden_dim, config.text_dim)

    def standardise_by(self, features: torch.Tensor) -> None:
        """Takes mean and standard deviation from the training features."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0) + 1e-3)

    def forward(self, features: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        x = torch.cat([(features - self.mean) / self.std, _EMBEDDING_SCALE * embeddings], dim=1)
        x = self.dropout(x)
        return F.normalize(self.skip(x) + self.out(self.dropout(F.gelu(self.hidden(x)))), dim=1)


class TextHead(nn.Module):
    """float32[n, text_dim] -> float32[n, text_dim], L2-normalised. Begins as the identity, so that what the
    text model knows is the starting point."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        d = config.text_dim
        self.linear = nn.Linear(d, d, bias=False)
        self.hidden = nn.Linear(d, 2 * d)
        self.out = nn.Linear(2 * d, d)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, texts: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.linear(texts) + self.out(F.gelu(self.hidden(texts))), dim=1)
