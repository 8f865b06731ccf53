"""What the reward of a written caption is made of."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_ops.caption_metrics import CiderD
from vlm_ops.training.data import CaptionedImages
from vlm_ops.training.rewards import CaptionReward, nearest

SENTENCES = ("a dog runs", "a dog plays outside", "two cats sleep", "cats sleep on a bed", "a bird sings")


def images(with_vectors: bool = True) -> CaptionedImages:
    """A hundred dogs, cats and birds each; an image has one of its kind's sentences."""
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(3), 100)
    vectors = np.eye(8, dtype=np.float32)[kinds] + 0.1 * rng.normal(size=(300, 8)).astype(np.float32)
    captions = [[min(2 * kind + number % 2, 4)] for number, kind in enumerate(kinds)]
    return CaptionedImages({"features" if with_vectors else "pixels": vectors}, captions, SENTENCES)


@pytest.mark.parametrize("count", [1, 5])
def test_neighbours_are_the_others_with_the_largest_cosine(count: int) -> None:
    vectors = np.random.default_rng(1).normal(size=(300, 6)).astype(np.float32)
    found = nearest(vectors, count)
    normed = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in range(300):
        others = sorted(set(range(300)) - {row}, key=lambda other: -float(normed[row] @ normed[other]))
        assert set(found[row]) == set(others[:count])


def test_what_similar_images_are_told_of_is_worth_something() -> None:
    own, neighbours, others = CaptionReward(images())([SENTENCES[0], SENTENCES[1], SENTENCES[4]], [0, 0, 0])
    assert own > neighbours > 2 * others


def test_without_vectors_the_own_captions_alone_count() -> None:
    data = images(with_vectors=False)
    rewards = CaptionReward(data)([SENTENCES[0], SENTENCES[1]], [0, 0])
    expected = CiderD([[data.sentences[row] for row in rows] for rows in data.captions]).score(SENTENCES[:2], [0, 0])
    np.testing.assert_array_equal(rewards, expected)
