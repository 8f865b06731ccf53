"""Rows brought together by a key, such as the images of a page, without holding them in memory.

They are sorted on disk, by SQLite.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any


def grouped(items: Iterable[tuple[str, str, Any]]) -> Iterator[tuple[str, Iterator[Any]]]:
    """Groups of (key, place in the group, value), by key, each in the order of its places; values are JSON."""
    with (
        tempfile.TemporaryDirectory(prefix="beamsight-") as folder,
        contextlib.closing(sqlite3.connect(os.path.join(folder, "rows"), isolation_level=None)) as database,
    ):
        # Nobody needs the file after a crash.
        database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; CREATE TABLE items (key, place, value); BEGIN"
        )
        rows = ((key, place, json.dumps(value)) for key, place, value in items)
        database.executemany("INSERT INTO items VALUES (?, ?, ?)", rows)
        found = database.execute("SELECT key, value FROM items ORDER BY key, place, rowid")
        for key, group in itertools.groupby(found, lambda row: row[0]):
            yield key, (json.loads(value) for _, value in group)
