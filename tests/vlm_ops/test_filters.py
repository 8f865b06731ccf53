"""Conditions on tags: what they find, and what they may not do."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.tags import TAGS
from vlm_ops.filters import matching_ids

ROWS = pa.table({"image_id": pa.array([1, 2, 3], pa.int64()), "uri": ["a", "b", "c"], "width": [10, 20, 30], "caption": ["x", "y", "z"]})  # fmt: skip
TAG_ROWS = [
    {"image_id": 1, "uri": "a", "run_id": "r", "suitability": "low", "num_faces": 0, "title": "O'Neil; --", "caption": "own"},
    {"image_id": 2, "uri": "b", "run_id": "r", "suitability": "high", "num_faces": 2,
     "categories": [{"id": "596", "path": ["Style & Fashion", "Shoes"], "score": 0.9, "evidence": ["image"]}]},
]  # fmt: skip


def ids(where: str, **parameters: str) -> list[int]:
    tags = pads.dataset(pa.Table.from_pylist(TAG_ROWS, schema=TAGS))
    return sorted(matching_ids(ROWS, tags, where, parameters).tolist())


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("suitability = 'low' and num_faces = 0", [1]),
        ("width >= 20", [2, 3]),
        ("suitability is null", [3]),
        ("list_contains(categories[1].path, 'Style & Fashion')", [2]),
        ("caption = 'own'", [1]),
        ("true -- a comment", [1, 2, 3]),
        ("false", []),
    ],
)
def test_conditions(where: str, found: list[int]) -> None:
    assert ids(where) == found


def test_without_tags_the_index_can_be_asked() -> None:
    assert matching_ids(ROWS, None, "width < 20").tolist() == [1]
    with pytest.raises(ValueError, match="suitability.* no tags yet, which `beamsight tag` makes"):
        matching_ids(ROWS, None, "suitability = 'low'")


def test_parameters_are_values_whatever_they_hold() -> None:
    assert ids("title = $title", title="O'Neil; --") == [1]
    assert ids("title = $title", title="x' or true --") == []


@given(st.text())
def test_no_parameter_is_read_as_sql(value: str) -> None:
    assert ids("title = $title", title=value) == ([1] if value == "O'Neil; --" else [])


@pytest.mark.parametrize(
    "where",
    [
        "1 = 1) or (1 = 1",
        "true; drop table images",
        "",
        "colour = 'red'",
        "title = $missing",
        "exists(select * from read_csv('/etc/passwd'))",
        "width in (select width from 'photos.parquet')",
        "getenv('HOME') is not null",
    ],
)
def test_what_is_no_condition_is_refused(where: str) -> None:
    with pytest.raises(ValueError, match="^--where "):
        ids(where)


def test_ids_are_int64() -> None:
    assert matching_ids(ROWS, None, "true").dtype == np.int64
