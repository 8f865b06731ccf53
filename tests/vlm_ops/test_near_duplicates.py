"""Near duplicates with other tags, against comparing each image with each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_ops.near_duplicates import MAX_DISTANCE, contradicted, hash_bytes


def contradicted_plainly(hashes: np.ndarray, tags: np.ndarray) -> list[bool]:
    bits = np.unpackbits(hashes, axis=1).astype(int)
    is_near = (bits[:, None] != bits[None]).sum(-1) <= MAX_DISTANCE
    return (is_near & (tags[:, None] != tags[None])).any(axis=1).tolist()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 4))
def test_agrees_with_comparing_each_with_each(seed: int, num_images: int, num_tags: int) -> None:
    rng = np.random.default_rng(seed)
    originals = rng.integers(0, 256, (max(num_images // 3, 1), 8), dtype=np.uint8)
    bits = np.unpackbits(originals[rng.integers(0, len(originals), num_images)], axis=1)
    flipped = rng.random(bits.shape).argsort(axis=1) < rng.integers(0, 6, (num_images, 1))
    hashes = np.packbits(bits ^ flipped, axis=1)
    tags = rng.integers(0, num_tags, num_images)
    found = contradicted(hashes, tags)
    assert (found >= 0).tolist() == contradicted_plainly(hashes, tags)
    for image in np.flatnonzero(found >= 0):
        assert tags[image] != tags[found[image]]


@pytest.mark.parametrize("digits", [None, "0000000000000000", "8000000000000000", "ffffffffffffffff"])
def test_plain_pictures_resemble_nothing(digits: str | None) -> None:
    assert contradicted(hash_bytes([digits, digits]), np.array([0, 1])).tolist() == [-1, -1]


def test_no_images() -> None:
    assert contradicted(hash_bytes([]), np.array([], np.int64)).tolist() == []


def test_equal_tags_do_not_contradict() -> None:
    assert contradicted(hash_bytes(["00ff00ff00ff00ff"] * 3), np.array([1, 1, 1])).tolist() == [-1, -1, -1]
