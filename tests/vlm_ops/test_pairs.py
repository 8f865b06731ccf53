"""Wrong pairs are wrong, and drawn evenly."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_ops.pairs import NO_IMAGE, other_images


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=6), st.integers(0, 3))
def test_other_images_have_no_such_caption(captions: list[list[int]], seed: int) -> None:
    """An image may have none, or one twice."""
    pairs = np.array([(image, text) for image, own in enumerate(captions) for text in own], np.int64).reshape(-1, 2)
    others = other_images(pairs[:, 0], pairs[:, 1], len(captions), seed)
    for text, other in zip(pairs[:, 1], others, strict=True):
        assert text not in captions[other] if other != NO_IMAGE else all(text in own for own in captions)


def test_they_are_drawn_evenly() -> None:
    owners, captions = np.repeat(np.arange(4), 300), np.arange(1200)
    others = other_images(owners, captions, 4)
    counts = np.bincount((others - owners) % 4)
    assert counts[0] == 0 and (counts[1:] > 300).all()
    assert (other_images(owners, captions, 4) == others).all() and (
        other_images(owners, captions, 4, 1) != others
    ).any()
