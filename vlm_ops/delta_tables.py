"""The catalog's Delta tables: what is live in them, and how a run's parts become live.

Delta Lake (https://delta.io) is Parquet files plus a transaction log; the parts are written first,
by the workers, and one log entry makes them visible and takes out those they replace.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction

from schemas.catalog import CatalogLayout, parse_part_name
from schemas.recipes import Recipe
from schemas.samples import to_json
from schemas.tables import FAILURES
from vlm_ops import storage
from vlm_ops.parts import PartSummary


class CommitConflictError(RuntimeError):
    """Another run has committed to the catalog at the same time."""


@dataclass(frozen=True)
class LivePart:
    """A file of the current version of a table."""

    name: str
    num_rows: int
    num_bytes: int

    @property
    def recipe_id(self) -> str | None:
        parsed = parse_part_name(self.name)
        return parsed.recipe_id if parsed else None

    @property
    def location_id(self) -> str | None:
        parsed = parse_part_name(self.name)
        return parsed.location_id if parsed else None

    @property
    def is_packed(self) -> bool:
        parsed = parse_part_name(self.name)
        return parsed is not None and parsed.is_packed


def open_table(uri: str, storage_options: storage.StorageOptions, version: int | None = None) -> DeltaTable | None:
    """The table, or None where there is none yet."""
    try:
        return DeltaTable(uri, version=version, storage_options=storage.delta_options(uri, storage_options))
    except TableNotFoundError:
        return None


def live_parts(table: DeltaTable | None) -> list[LivePart]:
    """Files of the table's version, by name."""
    if table is None:
        return []
    actions = pa.table(table.get_add_actions(flatten=True)).select(["path", "num_records", "size_bytes"])
    parts = [LivePart(row["path"], row["num_records"] or 0, row["size_bytes"]) for row in actions.to_pylist()]
    return sorted(parts, key=lambda part: part.name)


def read_columns(
    uri: str, parts: Iterable[LivePart], columns: Sequence[str], storage_options: storage.StorageOptions
) -> Iterator[tuple[LivePart, pa.Table]]:
    """Columns of each part, one part at a time; columns that an older part lacks are left out."""
    fs = storage.filesystem(uri, storage_options)
    for part in parts:
        with fs.open(f"{uri}/{part.name}", "rb") as file:
            parquet = pq.ParquetFile(file)
            present = [name for name in columns if name in parquet.schema_arrow.names]
            yield part, parquet.read(columns=present)


def commit_parts(
    catalog: CatalogLayout,
    schema: pa.Schema,
    summaries: Sequence[PartSummary],
    run_id: str,
    recipe: Recipe,
    storage_options: storage.StorageOptions,
) -> int:
    """Makes a run's parts live, and takes out what they replace. Doing it twice does nothing more.

    The failures go first: a run that is killed between the two tables finds its parts unpublished
    and commits them again.

    Returns:
        The version of the images table.

    Raises:
        CommitConflictError: Another run changed the table meanwhile.
    """
    with_failures = [summary for summary in summaries if summary.failures_num_bytes]
    failed = [LivePart(part.name, sum(part.num_failures.values()), part.failures_num_bytes) for part in with_failures]
    names = [summary.name for summary in summaries]
    new_uris = _packed_uris(catalog, names, {part.name for part in failed}, storage_options)
    images = [LivePart(part.name, part.num_images, part.num_bytes) for part in summaries]
    properties = CommitProperties(
        custom_metadata={"run_id": run_id, "recipe": to_json(recipe)}, app_transactions=[Transaction(run_id, 1)]
    )
    changes = _Changes(names, new_uris, run_id, properties, storage_options)
    _commit(catalog.failures, FAILURES, failed, changes)
    return _commit(catalog.images, schema, images, changes)


def last_recipe(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> Recipe:
    """The recipe of the catalog's newest rows, as its commit recorded it.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    table = open_table(catalog.images, storage_options)
    for commit in table.history() if table else []:
        if "recipe" in commit:
            return Recipe.from_dict(json.loads(commit["recipe"]))
    raise FileNotFoundError(
        f"no catalog at {catalog.root}; make one with `beamsight build --catalog {catalog.root} --input ...`"
    )


@dataclass(frozen=True)
class _Changes:
    """What a commit is about, the same for both tables."""

    computed: Sequence[str]
    new_uris: set[str]
    run_id: str
    properties: CommitProperties
    storage_options: storage.StorageOptions


def _commit(uri: str, schema: pa.Schema, added: Sequence[LivePart], changes: _Changes) -> int:
    storage_options = changes.storage_options
    table = open_table(uri, storage_options)
    if table is None:
        delta_options = storage.delta_options(uri, storage_options)
        table = DeltaTable.create(uri, schema, mode="ignore", storage_options=delta_options)
    if table.transaction_version(changes.run_id) is not None:
        return table.version()
    _add_missing_columns(table, schema)
    live = live_parts(table)
    live_names = {part.name for part in live}
    replaced = _replaced(live, changes.computed)
    rewritten, shrunk = _without_rows(uri, [part for part in live if part not in replaced], changes)
    added = [part for part in added if part.name not in live_names] + shrunk
    removed = replaced + rewritten
    if not added and not removed:
        return table.version()
    now = int(time.time() * 1000)
    actions: list[AddAction | RemoveAction] = [
        AddAction(part.name, part.num_bytes, {}, now, True, json.dumps({"numRecords": part.num_rows})) for part in added
    ]
    actions += [RemoveAction(part.name, True, now, part.num_bytes, {}) for part in removed]
    try:
        table.create_write_transaction(actions, "append", table.schema(), commit_properties=changes.properties)
    except CommitFailedError as error:
        raise CommitConflictError(
            f"another run changed {uri} while this one was committing; run the same command again: "
            f"what was computed is kept ({str(error).splitlines()[0]})"
        ) from error
    table.update_incremental()
    return table.version()


def _replaced(live: Sequence[LivePart], computed: Sequence[str]) -> list[LivePart]:
    """Live parts of the same places as the newly computed ones: other content, or another recipe."""
    locations = {parsed.location_id for name in computed if (parsed := parse_part_name(name))}
    return [part for part in live if part.name not in computed and part.location_id in locations]


def _packed_uris(
    catalog: CatalogLayout, names: Sequence[str], with_failures: set[str], storage_options: storage.StorageOptions
) -> set[str]:
    """URIs of the single files among the newly computed: their older rows are in packs of other files."""
    packed = [part for name in names if (part := LivePart(name, 0, 0)).is_packed]
    tables = [read_columns(catalog.images, packed, ["uri"], storage_options)]
    tables.append(
        read_columns(catalog.failures, [p for p in packed if p.name in with_failures], ["uri"], storage_options)
    )
    return {uri for read in tables for _, rows in read for uri in rows.column("uri").to_pylist()}


def _without_rows(uri: str, live: Sequence[LivePart], changes: _Changes) -> tuple[list[LivePart], list[LivePart]]:
    """Copies of the packed parts that hold some of the new URIs, without those rows: (old, new) parts."""
    if not changes.new_uris:
        return [], []
    storage_options = changes.storage_options
    others = [part for part in live if part.name not in changes.computed and part.is_packed]
    old, new = [], []
    unwanted = pa.array(sorted(changes.new_uris), pa.string())
    for part, rows in read_columns(uri, others, ["uri"], storage_options):
        if not pc.any(pc.is_in(rows.column("uri"), unwanted)).as_py():
            continue
        old.append(part)
        with storage.open_for_reading(f"{uri}/{part.name}", storage_options) as file:
            whole = pq.read_table(file)
        kept = whole.filter(pc.invert(pc.is_in(whole.column("uri"), unwanted)))
        if kept.num_rows:
            new.append(_write_copy(uri, part.name, kept, storage_options))
    return old, new


def _write_copy(uri: str, name: str, rows: pa.Table, storage_options: storage.StorageOptions) -> LivePart:
    """A part of the same place and recipe with another content id."""
    parsed = parse_part_name(name)
    assert parsed is not None
    copy = f"part-{parsed.location_id}-{uuid.uuid4().hex[:12]}-{parsed.recipe_id}.parquet"
    with storage.replacing(f"{uri}/{copy}", storage_options) as path:
        pq.write_table(rows, path, compression="zstd")
    return LivePart(copy, rows.num_rows, int(storage.filesystem(uri, storage_options).size(f"{uri}/{copy}")))


def _add_missing_columns(table: DeltaTable, schema: pa.Schema) -> None:
    """An op that is new to the catalog brings new columns."""
    present = {field.name for field in table.schema().fields}
    missing = [field for field in schema if field.name not in present]
    if missing:
        from deltalake import Schema

        table.alter.add_columns(Schema.from_arrow(pa.schema(missing)).fields)
