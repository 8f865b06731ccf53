"""Images of classes that are made without photos: the classifier takes them for what they are meant to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.toys import NAMES, ToyImageBackbone, ToyTextModel, describe
from vlm_ops.sentences import class_sentence
from vlm_ops.training.pseudo_images import make_pseudo_images

TEXTS = ToyTextModel(describe("python:tests.toys"))


class Classifier:
    """Forty classes on two hundred features that rise and fall together, all of them positive."""

    def __init__(self, has_embedding: bool = False) -> None:
        rng = np.random.default_rng(0)
        mixing = rng.normal(size=(200, 200)) / 15
        self.photos = np.maximum(1 + rng.normal(size=(2000, 200)) @ mixing, 0).astype(np.float32)
        self.class_weights = torch.from_numpy(rng.normal(size=(40, 200)).astype(np.float32))
        self.class_names = [f"class {number}" for number in range(40)]
        self.has_embedding = has_embedding

    def of_features(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        made = {"labels": (features @ self.class_weights.T).softmax(1)}
        return {**made, "embedding": features[:, :4]} if self.has_embedding else made


def test_they_are_of_their_own_class() -> None:
    backbone = Classifier()
    pseudo = make_pseudo_images(backbone.photos, backbone, TEXTS)  # type: ignore[arg-type]
    assert pseudo.features.shape == (40, 200) and pseudo.features.dtype == np.float32
    labels = backbone.of_features(torch.from_numpy(pseudo.features))["labels"].argmax(1)
    assert (labels == torch.arange(40)).float().mean() > 0.9
    # Where photos have nothing, they have nothing either.
    assert (pseudo.features >= backbone.photos.min(0)).all()
    assert pseudo.embedding is None


def test_they_carry_texts_and_the_embedding_of_the_base() -> None:
    backbone = Classifier(has_embedding=True)
    pseudo = make_pseudo_images(backbone.photos, backbone, TEXTS)  # type: ignore[arg-type]
    np.testing.assert_array_equal(pseudo.embedding, pseudo.features[:, :4])
    np.testing.assert_array_equal(pseudo.name_vectors, TEXTS.encode_texts(backbone.class_names))
    np.testing.assert_array_equal(
        pseudo.sentence_vectors, TEXTS.encode_texts([class_sentence(name) for name in backbone.class_names])
    )


def test_inputs_are_drawn_with_noise() -> None:
    photos = np.random.default_rng(0).uniform(0, 255, (500, 3)).astype(np.float32)
    pseudo = make_pseudo_images(photos, ToyImageBackbone(), TEXTS)
    assert pseudo.names == list(NAMES)
    rows = np.array([2, 0])
    exact = pseudo.image_inputs(rows, 0.0, np.random.default_rng(0))
    np.testing.assert_array_equal(exact["features"], pseudo.features[rows])
    np.testing.assert_array_equal(exact["embedding"], pseudo.embedding[rows])
    rng = np.random.default_rng(0)
    drawn = np.stack([pseudo.image_inputs(rows, 0.1, rng)["features"].numpy() for _ in range(400)])
    np.testing.assert_allclose(drawn.mean(0), pseudo.features[rows], atol=2)
    assert drawn.std(0) == pytest.approx(np.broadcast_to(0.1 * photos.std(0), (2, 3)), rel=0.15)
    assert drawn.dtype == np.float32
