"""A trained dual encoder: its base, with the embedding of the trained heads in place of the base's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_ops.models import ImageEncoding, ImageModel, ModelInfo, TextModel, load_tokenizer
from vlm_ops.models.backbones import BackboneImageModel, BackboneTextModel
from vlm_ops.models.calibration import Calibration
from vlm_ops.models.directory import OF_BACKBONES, ModelDirectory
from vlm_ops.models.settings import ModelSettings

_EXTRA_DIMS = 4  # in which the crowding stands


def describe(directory: ModelDirectory, spec: str) -> ModelInfo:
    produces = directory.base.produces & OF_BACKBONES | {"embedding", "match"}
    return ModelInfo(spec, directory.revision, produces, map_dim=directory.base.map_dim)


def load_image_model(
    directory: ModelDirectory, info: ModelInfo, settings: ModelSettings, outputs: frozenset[str]
) -> ImageModel:
    # A calibrated cosine is all there is to a match.
    encoded = (outputs - {"match"}) | ({"embedding"} if "match" in outputs else set())
    model = directory.backbone_image_model(info, lambda: image_backbone(directory), settings, encoded)
    if "match" not in outputs:
        return model
    return CosineMatcher(model, text_model(directory, info, settings), Calibration(**directory.config["calibration"]))


def text_model(directory: ModelDirectory, info: ModelInfo, settings: ModelSettings) -> TextModel:
    tokenize = load_tokenizer(directory.text_base.spec)
    return BackboneTextModel(info, tokenize, lambda: text_backbone(directory), settings)


class CosineMatcher:
    """A dual encoder that also says how likely a text describes an image: the calibrated cosine,
    sigmoid(scale * cosine + bias)."""

    def __init__(self, model: BackboneImageModel, texts: TextModel, calibration: Calibration) -> None:
        self.info = model.info
        self.preprocessing = model.preprocessing
        self.label_names = model.label_names
        self.encode_images = model.encode_images
        self.encode_texts = texts.encode_texts
        self._calibration = calibration

    def match(self, encoding: ImageEncoding, rows: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        return self.probability(self.cosines(encoding, rows, texts))

    def cosines(self, encoding: ImageEncoding, rows: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        """float32[m] of texts[i] and image rows[i]."""
        assert encoding.embeddings is not None
        if not len(texts):
            return np.empty(0, np.float32)
        return (encoding.embeddings[list(rows)] * self.encode_texts(texts)).sum(axis=1)

    def probability(self, cosines: np.ndarray) -> np.ndarray:
        """float32[m] in [0, 1]."""
        return self._calibration(cosines).astype(np.float32)


def image_backbone(directory: ModelDirectory) -> Any:
    """The `ImageBackbone` of base and image head."""
    import torch

    from vlm_ops.models.dual_encoder import Crowding, HeadsConfig, ImageHead

    config = HeadsConfig(**directory.config["shapes"])

    class AlignedImageBackbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = directory.base_image_backbone()
            self.head = directory.fill(ImageHead(config), "image")
            self.crowding = directory.fill(Crowding(config), "crowding")
            self.preprocessing = self.base.preprocessing
            self.feature_dim, self.grid_dim = self.base.feature_dim, self.base.grid_dim
            self.embedding_dim = config.text_dim + _EXTRA_DIMS
            if hasattr(self.base, "class_names"):
                self.class_names, self.class_weights = self.base.class_names, self.base.class_weights

        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            return self._aligned(self.base(pixels))

        def of_features(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
            return self._aligned({"features": features, **self.base.of_features(features)})

        def _aligned(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            vectors = self.head(outputs["features"], outputs.get("embedding"))
            return {**outputs, "embedding": self.crowding.images(vectors)}

    return AlignedImageBackbone().eval()


def text_backbone(directory: ModelDirectory) -> Any:
    """The `TextBackbone` of base and text head."""
    import torch

    from vlm_ops.models.dual_encoder import Crowding, HeadsConfig, TextHead

    config = HeadsConfig(**directory.config["shapes"])

    class AlignedTextBackbone(torch.nn.Module):
        text_dim = config.text_dim + _EXTRA_DIMS

        def __init__(self) -> None:
            super().__init__()
            self.base = directory.base_text_backbone()
            self.head = directory.fill(TextHead(config), "text")
            self.crowding = directory.fill(Crowding(config), "crowding")

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.crowding.texts(self.head(self.base(ids, mask)))

    return AlignedTextBackbone().eval()
