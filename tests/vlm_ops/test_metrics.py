"""Metrics against naive ones, on random scores with ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_ops.metrics import (
    accuracy,
    bootstrap,
    image_to_text_ranks,
    kept_neighbours,
    recall_at,
    row_cosines,
    text_to_image_ranks,
    top_k_accuracy,
)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Similarities of few distinct values (so that there are ties), and at least a caption an image."""
    num_images = draw(st.integers(1, 6))
    owners = np.array([*range(num_images), *draw(st.lists(st.integers(0, num_images - 1), max_size=8))])
    values = draw(st.lists(st.integers(-3, 3), min_size=len(owners) * num_images, max_size=len(owners) * num_images))
    return np.array(values, float).reshape(len(owners), num_images), owners


@settings(deadline=None)
@given(scored())
def test_ranks_equal_the_naive_ones(case: tuple[np.ndarray, np.ndarray]) -> None:
    similarity, owners = case
    for caption, rank in enumerate(text_to_image_ranks(similarity, owners)):
        own = similarity[caption, owners[caption]]
        better = [i for i in range(similarity.shape[1]) if i != owners[caption] and similarity[caption, i] >= own]
        assert rank == len(better) + 1
    for image, rank in enumerate(image_to_text_ranks(similarity, owners)):
        best = max(similarity[c, image] for c in range(len(owners)) if owners[c] == image)
        better = [c for c in range(len(owners)) if owners[c] != image and similarity[c, image] >= best]
        assert rank == len(better) + 1


@settings(deadline=None)
@given(scored(), st.integers(1, 4))
def test_top_k_equals_the_naive_one(case: tuple[np.ndarray, np.ndarray], k: int) -> None:
    scores, targets = case
    for row, target, hit in zip(scores, targets, top_k_accuracy(scores, targets, k), strict=True):
        assert hit == (sum(score >= row[target] for score in row) <= k)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]), st.booleans()), min_size=1))
def test_accuracy_equals_the_naive_one(pairs: list[tuple[float, bool]]) -> None:
    probabilities, targets = (np.array(each, float) for each in zip(*pairs, strict=True))
    right = [(probability > 0.5) == target for probability, target in pairs]
    assert accuracy(probabilities, targets) == pytest.approx(sum(right) / len(right))


def test_a_constant_model_finds_nothing_first() -> None:
    similarity, owners = np.zeros((10, 5)), np.repeat(np.arange(5), 2)
    assert recall_at(text_to_image_ranks(similarity, owners), 1) == 0
    assert recall_at(image_to_text_ranks(similarity, owners), 5) == 0


def test_a_perfect_model_finds_everything_first() -> None:
    owners = np.repeat(np.arange(5), 2)
    similarity = np.eye(5)[owners]
    assert recall_at(text_to_image_ranks(similarity, owners), 1) == 1
    assert recall_at(image_to_text_ranks(similarity, owners), 1) == 1


def test_bootstrap_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap(values, lambda each: float(each.mean()))
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap(values, lambda each: float(each.mean())) == found


def test_observations_of_a_group_are_drawn_together() -> None:
    values = np.repeat([0.0, 1.0] * 10, 20)  # twenty groups of twenty equal values
    alone = bootstrap(values, lambda each: float(each.mean()))
    together = bootstrap(values, lambda each: float(each.mean()), np.repeat(np.arange(20), 20))
    assert together.high - together.low > 3 * (alone.high - alone.low)


def test_what_is_no_number_is_found_last() -> None:
    nothing = np.full((4, 3), np.nan)
    owners = np.array([0, 1, 2, 2])
    assert text_to_image_ranks(nothing, owners).tolist() == [3, 3, 3, 3]
    assert image_to_text_ranks(nothing, owners).tolist() == [4, 4, 3]
    assert not top_k_accuracy(nothing, np.array([0, 1, 2, 0]), 2).any()


@settings(deadline=None)
@given(scored(), st.integers(1, 4), st.integers(0, 5))
def test_kept_neighbours_equal_the_naive_ones(case: tuple[np.ndarray, np.ndarray], k: int, seed: int) -> None:
    reference, _ = case
    if k >= reference.shape[1]:
        return
    similarity = np.random.default_rng(seed).permuted(reference, axis=1) + np.linspace(0, 0.1, reference.shape[1])
    for row, kept in enumerate(kept_neighbours(similarity, reference, k)):
        found = sorted(range(reference.shape[1]), key=lambda i: -similarity[row, i])[:k]
        worst = sorted(reference[row])[-k]
        assert kept == sum(reference[row, i] >= worst for i in found) / k


def test_neighbours_that_stay() -> None:
    similarity = np.array([[-np.inf, 0.9, 0.8, 0.1, 0.0]] * 2)
    assert kept_neighbours(similarity, similarity, 2).tolist() == [1, 1]
    assert kept_neighbours(similarity, np.array([[-np.inf, 0.1, 0.9, 0.8, 0.0]] * 2), 2).tolist() == [0.5, 0.5]


def test_cosines_of_rows() -> None:
    first, second = np.float32([[3, 0], [1, 1], [0, 0]]), np.float32([[0.5, 0], [1, 0], [1, 0]])
    np.testing.assert_allclose(row_cosines(first, second), [1, 0.5**0.5, 0])
