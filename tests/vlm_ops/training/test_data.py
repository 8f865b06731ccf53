"""Images with captions: what is drawn of them, and which pairs belong together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toys import ToyImageBackbone
from vlm_ops.training.data import CaptionedImages, caption_owners, features_at_the_start, labelled_pairs


def images(captions: Sequence[Sequence[int]], seed: int = 0) -> CaptionedImages:
    features = np.random.default_rng(seed).normal(size=(len(captions), 3)).astype(np.float32)
    sentences = [f"sentence {row}" for row in range(1 + max(max(each) for each in captions))]
    return CaptionedImages({"features": features}, captions, sentences)


CAPTIONS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), min_size=1, max_size=6)


@settings(deadline=None, max_examples=100)
@given(CAPTIONS, st.integers(0, 3))
def test_labelled_pairs_are_what_their_labels_say(captions: list[list[int]], seed: int) -> None:
    data = images(captions)
    if len({frozenset(each) for each in captions}) == 1 or all(
        set(row) <= set(other) for row in captions for other in captions
    ):
        with pytest.raises(ValueError, match="all images have the same captions"):
            labelled_pairs(data, seed)
        return
    rows, sentences, targets = labelled_pairs(data, seed)
    own = [(image, text) for image, texts in enumerate(captions) for text in texts]
    matching = [(r, s) for r, s, t in zip(rows.tolist(), sentences.tolist(), targets.tolist(), strict=True) if t]
    assert matching == own
    others = [(r, s) for r, s, t in zip(rows.tolist(), sentences.tolist(), targets.tolist(), strict=True) if not t]
    assert others and all(text not in captions[image] for image, text in others)
    # Only captions that all images share have no other image.
    shared = set.intersection(*map(set, captions))
    assert len(others) == sum(text not in shared for _, text in own)


def test_labelled_pairs_are_the_same_each_time() -> None:
    data = images([[0, 1], [2], [3, 4], [5]])
    first, second = labelled_pairs(data), labelled_pairs(data)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_caption_owners() -> None:
    owners, rows = caption_owners(images([[3, 1], [0], [1, 2]]))
    assert owners.tolist() == [0, 0, 1, 2, 2] and rows.tolist() == [3, 1, 0, 1, 2]


def test_captions_are_drawn_without_repetition() -> None:
    data = images([[0, 1, 2, 3], [4]])
    rng = np.random.default_rng(0)
    drawn = [data.draw_captions(np.array([1, 0]), 2, rng) for _ in range(40)]
    assert all(each[0].tolist() == [4] and len(set(each[1].tolist())) == 2 for each in drawn)
    assert {row for each in drawn for row in each[1].tolist()} == {0, 1, 2, 3}


def test_images_are_mirrored_by_chance_and_whole() -> None:
    plain = {
        "features": np.arange(20, dtype=np.float32)[:, None],
        "grid": np.arange(20, dtype=np.float16)[:, None, None],
    }
    mirrored = {name: -1 - values for name, values in plain.items()}
    data = CaptionedImages(plain, [[0]] * 20, ["a"], mirrored=mirrored)
    rows = np.arange(19, -1, -1)
    inputs = data.drawn_inputs(rows, np.random.default_rng(0))
    turned = inputs["features"][:, 0].numpy() < 0
    assert 4 < turned.sum() < 16
    expected = np.where(turned, -1 - rows, rows)
    assert inputs["features"][:, 0].tolist() == inputs["grid"][:, 0, 0].tolist() == expected.tolist()
    assert data.images["features"].min() == 0  # nothing was written into the data
    without = CaptionedImages(plain, [[0]] * 20, ["a"])
    assert without.drawn_inputs(rows, np.random.default_rng(0))["features"][:, 0].tolist() == rows.tolist()


def test_the_fingerprint_is_that_of_the_data() -> None:
    data = images([[0], [1], [1, 0]])
    assert data.fingerprint == images([[0], [1], [1, 0]]).fingerprint
    others = [
        images([[0], [1], [0, 1]], seed=1),
        images([[0], [1, 0], [1]]),
        images([[0], [1]]),
        CaptionedImages(data.images, data.captions, ["sentence 0", "another"]),
        CaptionedImages({"embedding": data.images["features"]}, data.captions, data.sentences),
    ]
    assert len({data.fingerprint, *(each.fingerprint for each in others)}) == 6


def test_images_without_captions_are_refused() -> None:
    for captions in ([[0], []], []):
        with pytest.raises(ValueError, match="every image needs a caption, and there must be an image"):
            CaptionedImages({"features": np.zeros((len(captions), 3), np.float32)}, captions, ["a"])


def test_features_for_standardising() -> None:
    frozen = images([[0], [1]])
    assert torch.equal(features_at_the_start(frozen, None, "cpu"), torch.from_numpy(frozen.images["features"]))
    pixels = np.random.default_rng(0).integers(0, 256, (300, 3, 8, 8), np.uint8)
    data = CaptionedImages({"pixels": pixels}, [[0]] * 300, ["a"])
    backbone = ToyImageBackbone()
    features = features_at_the_start(data, backbone, "cpu")
    assert features.shape == (256, 3) and not features.requires_grad
    torch.testing.assert_close(features[[0, -1]], torch.from_numpy(pixels[[0, -1]]).float().mean((2, 3)))
