"""What is known of an image, from its row of `images`."""

from __future__ import annotations

import pytest

from vlm_ops.image_evidence import metadata_of


@pytest.mark.parametrize("text", [None, "", "no JSON", "[1]", '"text"', "null"])
def test_metadata_that_is_no_object_says_nothing(text: str | None) -> None:
    assert metadata_of(text) == {}


def test_metadata_that_would_break_what_is_written() -> None:
    half, whole = r'{"sku": "a\ud800b", "page": "\ud83d\ude00"}', {"sku": "a?b", "page": "😀"}
    assert metadata_of(half) == whole
    deep = "[" * 100_000
    assert metadata_of(f'{{"sku": {deep}') == {}
    digits = "9" * 5_000
    assert metadata_of(f'{{"sku": {digits}}}') == {}
