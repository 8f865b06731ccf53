"""What a table's log says of its states."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from vlm_ops.delta_tables import current_since


@pytest.mark.parametrize(
    ("day", "expected"),
    [(9, ["8th"]), (8, ["8th", "5th"]), (7, ["8th", "5th"]), (3, ["8th", "5th", "2nd"]), (1, ["8th", "5th", "2nd"])],
)
def test_a_state_is_current_until_the_next_one_is_committed(day: int, expected: list[str]) -> None:
    commits = ["8th", "5th", "2nd"]
    since = datetime(2024, 3, day, tzinfo=UTC)
    assert list(current_since(commits, since, lambda commit: f"2024-03-0{commit[0]}T00:00:00+00:00")) == expected
