"""The matcher that `beamsight train matcher` trains: image features and a text's vector, side by side, into
one logit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlm_ops.models.standardised import Standardised


@dataclass(frozen=True)
class MatcherConfig:
    """Shapes of the matcher.

    Attributes:
        feature_dim: Of the image model's features.
        text_dim: Of the text model's vectors.
        width: Of each side before they are joined, and of the layer after.
        dropout: While training.
    """

    feature_dim: int
    text_dim: int
    width: int = 512
    dropout: float = 0.3


class Matcher(Standardised):
    """(image, text) pairs -> logits of their matching.

    Args:
        image_backbone, text_backbone: The models below, where they are fine-tuned.
    """

    def __init__(self, config: MatcherConfig, image_backbone: Any = None, text_backbone: Any = None) -> None:
        super().__init__(config.feature_dim)
        self.from_image = nn.Linear(config.feature_dim, config.width)
        self.from_text = nn.Linear(config.text_dim, config.width)
        self.norm = nn.LayerNorm(2 * config.width)
        self.hidden = nn.Linear(2 * config.width, 2 * config.width)
        self.middle = nn.Linear(2 * config.width, config.width)
        self.out = nn.Linear(config.width, 1)
        self.dropout = nn.Dropout(config.dropout)
        self.image_backbone = image_backbone
        self.text_backbone = text_backbone
        self._text_scale = config.text_dim**0.5  # vectors have norm 1; this gives each number size 1

    def image_vectors(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`pixels`, or `features` -> float32[n, width]."""
        features = (
            inputs["features"] if self.image_backbone is None else self.image_backbone(inputs["pixels"])["features"]
        )
        return self.from_image(self.dropout(self.standardised(features)))

    def text_vectors(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`ids` and `mask`, or `vectors` -> float32[m, width]."""
        vectors = inputs["vectors"] if self.text_backbone is None else self.text_backbone(inputs["ids"], inputs["mask"])
        return self.from_text(self.dropout(self._text_scale * vectors))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """float32[n, width] of images and of texts, pair by pair -> logits float32[n]."""
        x = self.norm(torch.cat([images, texts], dim=1))
        x = self.dropout(F.gelu(self.hidden(x)))
        return self.out(self.dropout(F.gelu(self.middle(x))))[:, 0]
