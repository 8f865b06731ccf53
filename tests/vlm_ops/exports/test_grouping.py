from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.vlm_ops.exports.texts import TEXTS
from vlm_ops.exports.grouping import grouped


@given(st.lists(st.tuples(TEXTS, TEXTS, st.integers())))
def test_groups_are_those_of_a_dictionary(items: list[tuple[str, str, int]]) -> None:
    expected: dict[str, list[tuple[str, int]]] = {}
    for key, place, value in items:
        expected.setdefault(key, []).append((place, value))
    actual = {key: list(values) for key, values in grouped(items)}
    # SQLite compares texts as UTF-8, whose order is that of the code points.
    assert actual == {
        key: [value for _, value in sorted(rows, key=lambda row: row[0])] for key, rows in expected.items()
    }
    assert list(actual) == sorted(expected)


def test_a_group_need_not_be_read() -> None:
    assert [key for key, _ in grouped([("b", "", 1), ("a", "", 2), ("a", "", 3)])] == ["a", "b"]
