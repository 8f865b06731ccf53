"""Images of a classifier's classes, made without photos.

Training on captions alone makes a model forget the classes that its captions never name. What the
backbone knows of them stands in its classifier: a class's pseudo-image is the mean feature vector, moved
along the features' covariance in the direction of the class's row of the classifier, which is the most
plausible direction in which that class's score rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlm_ops.models import ClassifyingBackbone, TextModel
from vlm_ops.sentences import class_sentence

# How far to move. At 1 a fifth of the pseudo-images are of their own class by the backbone's judgement,
# at 10 all but three in a thousand.
_STRIDE = 10.0


@dataclass(frozen=True)
class PseudoImages:
    """One image of each class.

    Attributes:
        names: The classes.
        features: float32[k, feature_dim], with their standard deviation over photos float32[feature_dim].
        embedding: float32[k, embedding_dim], the base's own; None where it has none.
        sentence_vectors, name_vectors: float32[k, text_dim] of "a photo of a {class}" and of the bare names.
    """

    names: Sequence[str]
    features: np.ndarray
    feature_std: np.ndarray
    embedding: np.ndarray | None
    sentence_vectors: np.ndarray
    name_vectors: np.ndarray

    def image_inputs(
        self, rows: np.ndarray, noise: float, rng: np.random.Generator, device: str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Tensors of some classes, their features with noise of so many standard deviations."""
        features = self.features[rows]
        features = features + noise * self.feature_std * rng.standard_normal(features.shape, np.float32)
        inputs = {"features": torch.from_numpy(features.astype(np.float32)).to(device)}
        if self.embedding is not None:
            inputs["embedding"] = torch.from_numpy(self.embedding[rows]).to(device)
        return inputs


def make_pseudo_images(photos: np.ndarray, backbone: ClassifyingBackbone, texts: TextModel) -> PseudoImages:
    """Pseudo-images of the backbone's classes.

    Args:
        photos: float32[n, feature_dim], features of real photos.
    """
    weights = backbone.class_weights.numpy().astype(np.float64)
    directions = (weights - weights.mean(0)) @ np.cov(photos.T.astype(np.float64))
    features = photos.mean(0) + _STRIDE * directions
    # Features behind a rectifier are never negative; neither are those of an image.
    features = np.maximum(features, photos.min(0)).astype(np.float32)
    with torch.inference_mode():
        made = backbone.of_features(torch.from_numpy(features))
    names = list(backbone.class_names)
    return PseudoImages(
        names,
        features,
        photos.std(0),
        made["embedding"].numpy() if "embedding" in made else None,
        texts.encode_texts([class_sentence(name) for name in names]),
        texts.encode_texts(names),
    )
