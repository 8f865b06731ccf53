"""What a table's log says of its states, and what its parts hold."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vlm_ops.delta_tables import LivePart, current_since, read_columns


@pytest.mark.parametrize(
    ("day", "expected"),
    [(9, ["8th"]), (8, ["8th", "5th"]), (7, ["8th", "5th"]), (3, ["8th", "5th", "2nd"]), (1, ["8th", "5th", "2nd"])],
)
def test_a_state_is_current_until_the_next_one_is_committed(day: int, expected: list[str]) -> None:
    commits = ["8th", "5th", "2nd"]
    since = datetime(2024, 3, day, tzinfo=UTC)
    assert list(current_since(commits, since, lambda commit: f"2024-03-0{commit[0]}T00:00:00+00:00")) == expected


@pytest.fixture
def many_parts(tmp_path: Path) -> Iterator[tuple[str, list[LivePart]]]:
    """Parts of one row in storage that is not local; every tenth lacks a column."""
    parts = []
    for number in range(100):
        columns = {"number": [number], "text": [str(number)]} if number % 10 else {"number": [number]}
        pq.write_table(pa.table(columns), tmp_path / "part")
        MemoryFileSystem().pipe_file(f"/read-columns/part{number}", (tmp_path / "part").read_bytes())
        parts.append(LivePart(f"part{number}", 1, 0))
    yield "memory://read-columns", parts
    MemoryFileSystem().rm("/read-columns", recursive=True)


def test_parts_that_are_read_ahead_come_in_their_order(many_parts: tuple[str, list[LivePart]]) -> None:
    uri, parts = many_parts
    read = [(part, table.to_pylist()) for part, table in read_columns(uri, iter(parts), ["number", "text"], {})]
    assert [part for part, _ in read] == parts
    assert [rows for _, rows in read] == [
        [{"number": number, "text": str(number)} if number % 10 else {"number": number}] for number in range(100)
    ]


def test_who_has_read_enough_leaves_no_thread_behind(many_parts: tuple[str, list[LivePart]]) -> None:
    uri, parts = many_parts
    before = threading.active_count()
    tables = read_columns(uri, parts, ["number"], {})
    next(tables)
    assert threading.active_count() > before
    tables.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name.startswith("read"):
            thread.join(5)
    assert threading.active_count() == before


def test_a_part_that_is_gone_is_told_where_it_is_met(many_parts: tuple[str, list[LivePart]]) -> None:
    uri, parts = many_parts
    MemoryFileSystem().rm_file("/read-columns/part50")
    read = []
    with pytest.raises(FileNotFoundError):
        read.extend(part.name for part, _ in read_columns(uri, parts, ["number"], {}))
    assert "part50" not in read
