"""The catalog's Delta tables: what is live in them, and how other parts become live.

Delta Lake (https://delta.io) is Parquet files plus a transaction log; the parts are written first,
by the workers, and one log entry makes them visible and takes out those they replace.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from schemas.catalog import PartName, parse_part_name
from vlm_ops import storage

_APPLICATION = "beamsight"
_NEWEST_ENTRIES = 8  # what is looked for in a log is nearly always among these
# Object storage answers slowly, and a part is a few requests: so many are read ahead, if they have no more rows than this.
_NUM_AHEAD = 32
_MAX_ROWS_AHEAD = 65_536
_Entry = TypeVar("_Entry")


class CommitConflictError(RuntimeError):
    """Another run has committed to the catalog at the same time."""


@dataclass(frozen=True)
class LivePart:
    """A file of the current version of a table."""

    name: str
    num_rows: int
    num_bytes: int

    @cached_property
    def _parsed(self) -> PartName | None:
        return parse_part_name(self.name)

    @property
    def recipe_id(self) -> str | None:
        return self._parsed.recipe_id if self._parsed else None

    @property
    def shard_id(self) -> str | None:
        return self._parsed.shard_id if self._parsed else None

    @property
    def location_id(self) -> str | None:
        return self._parsed.location_id if self._parsed else None

    @property
    def is_packed(self) -> bool:
        return self._parsed is not None and self._parsed.is_packed


def open_table(uri: str, storage_options: storage.StorageOptions, version: int | None = None) -> DeltaTable | None:
    """The table, or None where there is none yet.

    Raises:
        ValueError: Its bucket is not there, or forbidden.
        OSError: Its storage does not answer.
    """
    try:
        return _open(uri, storage_options, version)
    except OSError as error:
        raise storage.unreachable(uri, error) from error


def _open(uri: str, storage_options: storage.StorageOptions, version: int | None = None) -> DeltaTable | None:
    options = storage.delta_options(uri, storage_options)
    try:
        return storage.persistent(DeltaTable)(uri, version=version, storage_options=options)
    except TableNotFoundError:
        return None


def live_parts(table: DeltaTable | None) -> list[LivePart]:
    """Files of the table's version, by name."""
    if table is None:
        return []
    actions = pa.table(table.get_add_actions(flatten=True))
    columns = [actions.column(name).to_pylist() for name in ("path", "num_records", "size_bytes")]
    parts = [LivePart(name, num_rows or 0, num_bytes) for name, num_rows, num_bytes in zip(*columns, strict=True)]
    return sorted(parts, key=lambda part: part.name)


def read_columns(
    uri: str, parts: Iterable[LivePart], columns: Sequence[str], storage_options: storage.StorageOptions
) -> Iterator[tuple[LivePart, pa.Table]]:
    """Columns of each part, one part at a time, in order; columns that an older part lacks are left out."""
    fs = storage.filesystem(uri, storage_options)

    def read(part: LivePart) -> pa.Table:
        with fs.open(f"{uri}/{part.name}", "rb") as file:
            parquet = pq.ParquetFile(file)
            names = set(parquet.schema_arrow.names)
            return parquet.read(columns=[name for name in columns if name in names])

    if storage.is_local(uri):
        yield from ((part, read(part)) for part in parts)
        return
    parts = list(parts)
    num_rows = max((part.num_rows for part in parts), default=0)
    yield from storage.read_ahead(read, parts, min(_NUM_AHEAD, _MAX_ROWS_AHEAD // max(num_rows, 1) + 1))


def set_live(
    uri: str,
    schema: pa.Schema | None,
    parts: Sequence[LivePart],
    run_id: str,
    storage_options: storage.StorageOptions,
    metadata: Mapping[str, str] | None = None,
    expected: int | None = None,
) -> int:
    """Makes exactly these parts live, in one transaction.

    Args:
        schema: Of the parts; None where the table has all their columns already.
        run_id: Goes into the log.
        metadata: Goes into the log too. With it there is a log entry even where no part changes.
        expected: The sequence number (`sequence_of`) that the table must still have.

    Returns:
        The table's version.

    Raises:
        CommitConflictError: Another run changed the table meanwhile.
        OSError: Its storage does not answer.
    """
    try:
        return storage.persistent(_set_live)(uri, schema, parts, run_id, storage_options, metadata, expected)
    except CommitFailedError as error:
        raise conflict(uri, str(error).splitlines()[0]) from error
    except OSError as error:
        raise storage.unreachable(uri, error) from error


def _set_live(
    uri: str,
    schema: pa.Schema | None,
    parts: Sequence[LivePart],
    run_id: str,
    storage_options: storage.StorageOptions,
    metadata: Mapping[str, str] | None,
    expected: int | None,
) -> int:
    """Doing it twice does nothing more: the answer to a commit may be lost, and then it is tried again."""
    table = _open(uri, storage_options)
    if table is None:
        assert schema is not None
        table = _create(uri, schema, storage_options)
    live = live_parts(table)
    names, live_names = {part.name for part in parts}, {part.name for part in live}
    if names == live_names and has_committed(table, run_id):
        return _version_of(table, run_id)
    sequence = sequence_of(table)
    if expected is not None and sequence != expected:
        raise CommitFailedError(f"{sequence} commits instead of {expected}")
    if schema is not None:
        _add_missing_columns(table, schema)
    added = [part for part in parts if part.name not in live_names]
    removed = [part for part in live if part.name not in names]
    if not added and not removed and metadata is None:
        return table.version()
    now = int(time.time() * 1000)
    actions: list[AddAction | RemoveAction] = [
        AddAction(part.name, part.num_bytes, {}, now, True, json.dumps({"numRecords": part.num_rows})) for part in added
    ]
    actions += [RemoveAction(part.name, True, now, part.num_bytes, {}) for part in removed]
    # Delta lets two appends pass; two commits of the same number of one application it does not.
    transactions = [Transaction(_APPLICATION, sequence + 1), Transaction(run_id, 1)]
    properties = CommitProperties(custom_metadata={"run_id": run_id, **(metadata or {})}, app_transactions=transactions)
    try:
        table.create_write_transaction(actions, "append", table.schema(), commit_properties=properties)
    except CommitFailedError:
        table.update_incremental()
        if not has_committed(table, run_id):  # else it is this very commit that it met
            raise
    return _version_of(table, run_id)


def _version_of(table: DeltaTable, run_id: str) -> int:
    storage.persistent(table.update_incremental)()
    return next(each["version"] for each in log_entries(table) if each.get("run_id") == run_id)


def log_entries(table: DeltaTable) -> Iterator[dict[str, Any]]:
    """Entries of the table's log, newest first. An entry is a file: of a long log only as many are read as are asked for."""
    newest = storage.persistent(table.history)(_NEWEST_ENTRIES)
    yield from newest
    if len(newest) == _NEWEST_ENTRIES:
        yield from storage.persistent(table.history)()[_NEWEST_ENTRIES:]


def current_since(
    entries: Iterable[_Entry], since: datetime, committed_at: Callable[[_Entry], str]
) -> Iterator[_Entry]:
    """Of commits, newest first, those whose state readers may have seen at or after a moment."""
    superseded_at: datetime | None = None
    for entry in entries:
        if superseded_at is None or superseded_at >= since:
            yield entry
        superseded_at = datetime.fromisoformat(committed_at(entry))


def conflict(uri: str, detail: str) -> CommitConflictError:
    return CommitConflictError(
        f"another run changed {uri} while this one was at work; run the same command again: what was computed is kept ({detail})"
    )


def sequence_of(table: DeltaTable | None) -> int:
    """How many commits of this project the table has seen."""
    return (table.transaction_version(_APPLICATION) or 0) if table else 0


def has_committed(table: DeltaTable, run_id: str) -> bool:
    """Whether one of the table's commits is a run's."""
    return table.transaction_version(run_id) is not None


def _create(uri: str, schema: pa.Schema, storage_options: storage.StorageOptions) -> DeltaTable:
    """The log is kept: it is the catalog's history, and `clean` decides how far back one can go."""
    return DeltaTable.create(
        uri,
        schema,
        mode="ignore",
        configuration={"delta.logRetentionDuration": "interval 36500 days"},
        storage_options=storage.delta_options(uri, storage_options),
    )


def _add_missing_columns(table: DeltaTable, schema: pa.Schema) -> None:
    """An op that is new to the catalog brings new columns."""
    present = {field.name for field in table.schema().fields}
    missing = [field for field in schema if field.name not in present]
    if missing:
        from deltalake import Schema

        table.alter.add_columns(Schema.from_arrow(pa.schema(missing)).fields)
