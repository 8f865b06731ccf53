"""The dual encoder that `beamsight train dual-encoder` trains: two small heads that align the images of one
model with the texts of the same or another, and the models below them where these are fine-tuned too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vlm_ops.models.standardised import Standardised

# The base's own image–text embedding has norm 1; scaled, it weighs as much as standardised features.
_EMBEDDING_SCALE = 10.0
_TEMPERATURE = 0.07  # of the soft maximum: of 0.03, 0.05 and 0.07 the best on flickr8k/dev
_TEXT_SHARE = 0.7  # all of a text's crowding costs zero-shot labels, which are few and far from the bank
_MAX_CROWDING = 0.3  # more than any vector's, from the mean
_SCALE = 0.5  # what the crowding of the other side weighs in a vector


@dataclass(frozen=True)
class HeadsConfig:
    """Shapes of the heads.

    Attributes:
        feature_dim: Of the base's features.
        base_embedding_dim: Of the base's own image–text embedding; 0 where it has none.
        text_dim: Of the base's text embedding, and of the aligned space.
        hidden_dim: Of the image head; the text head has twice `text_dim`.
        dropout: In the image head, while training.
        caption_bank, image_bank: How many captions and images crowding is measured by.
    """

    feature_dim: int
    base_embedding_dim: int
    text_dim: int
    hidden_dim: int = 1024
    dropout: float = 0.5
    caption_bank: int = 2048
    image_bank: int = 1024


class ImageHead(Standardised):
    """(features float32[n, feature_dim], embedding float32[n, base_embedding_dim] or None) -> float32[n, text_dim],
    L2-normalised: a linear skip plus one hidden layer, on standardised features."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config.feature_dim)
        width = config.feature_dim + config.base_embedding_dim
        self.dropout = nn.Dropout(config.dropout)
        self.skip = nn.Linear(width, config.text_dim)
        self.hidden = nn.Linear(width, config.hidden_dim)
        self.out = nn.Linear(config.hidden_dim, config.text_dim)

    def forward(self, features: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        x = self.standardised(features)
        if embedding is not None:
            x = torch.cat([x, _EMBEDDING_SCALE * embedding], dim=1)
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


class Bank(nn.Module):
    """How crowded the vectors of a bank are around others: the soft maximum of their cosines."""

    vectors: torch.Tensor
    mean: torch.Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(size, dim))
        self.register_buffer("mean", torch.zeros(()))

    def fill(self, vectors: torch.Tensor, others: torch.Tensor, seed: int = 0) -> None:
        """Takes some of the vectors float32[m, dim], and centres the crowding on that around others float32[n, dim]."""
        chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))
        # Of a small corpus, all of them in turn.
        chosen = chosen[torch.arange(len(self.vectors)) % len(vectors)].to(vectors.device)
        self.vectors.copy_(vectors[chosen])
        self.mean.copy_(self._of(others).mean())

    def forward(self, others: torch.Tensor) -> torch.Tensor:
        """float32[n, dim] -> float32[n, 1], 0 in the mean."""
        return (self._of(others) - self.mean).clamp(-_MAX_CROWDING, _MAX_CROWDING)[:, None]

    def _of(self, others: torch.Tensor) -> torch.Tensor:
        return _TEMPERATURE * torch.logsumexp(others @ self.vectors.T / _TEMPERATURE, dim=1)


class Crowding(nn.Module):
    """Takes off a similarity how crowded the captions are around the image, and the images around the caption.

    In many dimensions some vectors are near to everything, and stand in the way of better answers; banks of training
    captions and images measure that (Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation", CVPR
    2022). The difference is a dot product again, of vectors with four more dimensions, so that an index needs to know
    nothing of it.
    """

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.of_captions = Bank(config.caption_bank, config.text_dim)
        self.of_images = Bank(config.image_bank, config.text_dim)

    def measure_by(self, images: torch.Tensor, captions: torch.Tensor) -> None:
        """Fills both banks with vectors of the training data, float32[n, text_dim] each."""
        self.of_captions.fill(captions, images)
        self.of_images.fill(images, captions)

    def images(self, vectors: torch.Tensor) -> torch.Tensor:
        """float32[n, text_dim], L2-normalised -> float32[n, text_dim + 4], L2-normalised."""
        crowding, rest = _with_rest(self.of_captions(vectors))
        scale = torch.full_like(crowding, _SCALE)
        return F.normalize(torch.cat([vectors, -crowding, scale, rest, torch.zeros_like(rest)], dim=1), dim=1)

    def texts(self, vectors: torch.Tensor) -> torch.Tensor:
        """float32[n, text_dim], L2-normalised -> float32[n, text_dim + 4], L2-normalised."""
        crowding, rest = _with_rest(_TEXT_SHARE * self.of_images(vectors))
        scale = torch.full_like(crowding, _SCALE)
        return F.normalize(torch.cat([vectors, scale, -crowding, torch.zeros_like(rest), rest], dim=1), dim=1)


def _with_rest(crowding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number that stands for a crowding, and one that gives all vectors the same length."""
    number = crowding / _SCALE
    return number, ((_MAX_CROWDING / _SCALE) ** 2 - number**2).clamp(min=0).sqrt()


class DualEncoder(nn.Module):
    """Both heads, over the outputs of frozen models or over fine-tuned ones.

    Args:
        image_backbone, text_backbone: The models below, where they are fine-tuned.
    """

    def __init__(self, config: HeadsConfig, image_backbone: Any = None, text_backbone: Any = None) -> None:
        super().__init__()
        self.image = ImageHead(config)
        self.text = TextHead(config)
        self.crowding = Crowding(config)
        self.image_backbone = image_backbone
        self.text_backbone = text_backbone

    def project_images(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`pixels`, or `features` (and `embedding`) -> float32[n, text_dim], as the loss compares them."""
        if self.image_backbone is not None:
            inputs = self.image_backbone(inputs["pixels"])
        return self.image(inputs["features"], inputs.get("embedding"))

    def project_texts(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`ids` and `mask`, or `vectors` -> float32[n, text_dim], as the loss compares them."""
        vectors = inputs["vectors"] if self.text_backbone is None else self.text_backbone(inputs["ids"], inputs["mask"])
        return self.text(vectors)

    def encode_images(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """As `project_images` -> float32[n, text_dim + 4], L2-normalised, with their crowding."""
        return self.crowding.images(self.project_images(inputs))

    def encode_texts(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """As `project_texts` -> float32[n, text_dim + 4], L2-normalised."""
        return self.crowding.texts(self.project_texts(inputs))
