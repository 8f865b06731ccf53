"""Part files: the result of one shard, whole or not there at all.

A shard's rows go to `images/part-<shard id>-<recipe id>.parquet`, its failures (if any) to a file
in `failures/` of the same name and a suffix of its own. The images part is written last and only once, so that its
presence says that the shard is done; its footer carries the summary, so that a later run need not compute it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.catalog import CatalogLayout, part_name
from schemas.samples import Failure, ShardRef, clean_text
from schemas.tables import FAILURES
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart

_SUMMARY = b"beamsight.part"
_Summary = TypeVar("_Summary", bound=Any)
# Small, so that a single row is cheap to copy: reading a group takes 1.6 ms, where 1024 rows take 22; the file
# grows by 0.8 %, reading it whole takes a tenth longer.
_ROWS_PER_GROUP = 128
_NUM_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class PartSummary:
    """What a part holds; what the commit and the run's report need to know of a shard.

    Attributes:
        name: File name of the part.
        num_images: Its rows.
        num_failures: Failures by reason.
        num_failed_images: Failures that cost an image.
        is_unreadable: Whether nothing could be read from the shard.
        stage_sec: Thread-seconds by stage.
        source_num_bytes: Size of what was read.
        num_bytes: Size of the images part.
        failures_name: File name of the failures part; empty where there is none.
        failures_num_bytes: Its size.
        examples: Its first failures, as text.
        num_copied: Rows copied from an image with the same bytes, and not computed.
        content_digest: Of the samples that were read, as `contents.digest_of` makes it.
        run_id: The run that made it; empty where an old part does not say.
    """

    name: str
    num_images: int
    num_failures: dict[str, int]
    num_failed_images: int
    is_unreadable: bool
    stage_sec: dict[str, float] = field(default_factory=dict)
    source_num_bytes: int = 0
    num_bytes: int = 0
    failures_name: str = ""
    failures_num_bytes: int = 0
    examples: tuple[str, ...] = ()
    num_copied: int = 0
    content_digest: str = ""
    run_id: str = ""

    @property
    def images(self) -> LivePart:
        """The images part, as the table is told of it."""
        return LivePart(self.name, self.num_images, self.num_bytes)

    @property
    def failures(self) -> LivePart | None:
        """The failures part likewise; None where there is none."""
        if not self.failures_name:
            return None
        return LivePart(self.failures_name, sum(self.num_failures.values()), self.failures_num_bytes)


class PartWriter:
    """Collects the rows and failures of one shard. Use through `writing_part`."""

    def __init__(self, parquet: pq.ParquetWriter, recipe_id: str, run_id: str) -> None:
        self._parquet = parquet
        self._schema = parquet.schema
        self._provenance = {"recipe_id": recipe_id, "run_id": run_id}
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0
        self.num_images = 0
        self.num_copied = 0
        self.content_digest = ""
        self.failures: list[Failure] = []

    def write(self, columns: Mapping[str, pa.Array], num_rows: int) -> None:
        """Adds rows; columns that are not given are null."""
        arrays = [self._column(field, columns, num_rows) for field in self._schema]
        self._waiting.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._num_waiting += num_rows
        self.num_images += num_rows
        if self._num_waiting >= _ROWS_PER_GROUP:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            self._parquet.write_table(pa.Table.from_batches(self._waiting), row_group_size=_ROWS_PER_GROUP)
        self._waiting, self._num_waiting = [], 0

    def fail(self, failures: Iterable[Failure]) -> None:
        self.failures.extend(failures)

    def _column(self, field_: pa.Field, columns: Mapping[str, pa.Array], num_rows: int) -> pa.Array:
        if field_.name in self._provenance:
            return pa.repeat(pa.scalar(self._provenance[field_.name]), num_rows)
        if field_.name in columns:
            return columns[field_.name].cast(field_.type)
        return pa.nulls(num_rows, field_.type)


@contextlib.contextmanager
def writing_part(
    catalog: CatalogLayout,
    shard: ShardRef,
    schema: pa.Schema,
    recipe_id: str,
    run_id: str,
    stage_sec: dict[str, float],
    storage_options: storage.StorageOptions,
) -> Iterator[PartWriter]:
    """Yields a writer; when the block ends without an error, both files appear.

    Of two writers of one part the first one wins: what is committed never changes its bytes.
    """
    name = shard.part_name(recipe_id)
    with (
        storage.replacing(f"{catalog.images}/{name}", storage_options, only_if_absent=True) as path,
        pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=_dictionary_columns(schema)) as parquet,
    ):
        writer = PartWriter(parquet, recipe_id, run_id)
        yield writer
        writer.flush()
        failures = [_failure_row(failure, shard) for failure in writer.failures]
        provenance = {"recipe_id": recipe_id, "run_id": run_id}
        failed = _write_failures(catalog, shard.shard_id, [row | provenance for row in failures], storage_options)
        summary = PartSummary(
            name=name,
            num_images=writer.num_images,
            num_failures=dict(Counter(failure.reason for failure in writer.failures)),
            num_failed_images=sum(failure.loses_image for failure in writer.failures),
            is_unreadable=any(failure.reason == "unreadable_shard" for failure in writer.failures),
            stage_sec=stage_sec,
            source_num_bytes=shard.num_bytes,
            failures_name=failed.name if failed else "",
            failures_num_bytes=failed.num_bytes if failed else 0,
            examples=tuple(_as_text(failure) for failure in writer.failures[:_NUM_EXAMPLES]),
            num_copied=writer.num_copied,
            content_digest=writer.content_digest,
            run_id=run_id,
        )
        store_summary(parquet, summary)


def read_summary(catalog: CatalogLayout, name: str, storage_options: storage.StorageOptions) -> PartSummary | None:
    """Summary of a part, or None where there is no such part."""
    return stored_summary(PartSummary, f"{catalog.images}/{name}", storage_options)


def stored_summary(kind: type[_Summary], uri: str, storage_options: storage.StorageOptions) -> _Summary | None:
    """What a part of any table says of itself in its footer, and its size; None where there is no such part.

    Args:
        kind: The dataclass that was put there; what an older version said besides is left out.
    """
    fs = storage.filesystem(uri, storage_options)
    if not fs.exists(uri):
        return None
    with fs.open(uri, "rb") as file:
        stored = (pq.read_metadata(file).metadata or {}).get(_SUMMARY)
    if stored is None:
        return None
    names = {each.name for each in fields(kind)}
    values = {name: value for name, value in json.loads(stored).items() if name in names}
    return kind(**{**values, "num_bytes": fs.size(uri)})


def store_summary(parquet: pq.ParquetWriter, summary: Any) -> None:
    """Puts a dataclass into the footer of a part that is being written."""
    parquet.add_key_value_metadata({_SUMMARY.decode(): json.dumps(asdict(summary))})


def has_failures_part(catalog: CatalogLayout, summary: PartSummary, storage_options: storage.StorageOptions) -> bool:
    """Whether the failures that a part speaks of are there, if it speaks of any."""
    return not summary.failures_name or storage.exists(f"{catalog.failures}/{summary.failures_name}", storage_options)


def rewritten(
    uri: str, part: LivePart, change: Callable[[pa.Table], pa.Table], storage_options: storage.StorageOptions
) -> LivePart:
    """A copy of a part, changed, under a name of its own for the same place, version and recipe; with the part's summary."""
    with storage.open_for_reading(f"{uri}/{part.name}", storage_options) as file:
        parquet = pq.ParquetFile(file)
        rows = change(parquet.read())
        summary = (parquet.metadata.metadata or {}).get(_SUMMARY)
    assert part.shard_id is not None and part.recipe_id is not None
    name = part_name(part.shard_id, part.recipe_id, uuid.uuid4().hex[:8])
    with storage.replacing(f"{uri}/{name}", storage_options) as path:
        columns = _dictionary_columns(rows.schema)
        with pq.ParquetWriter(path, rows.schema, compression="zstd", use_dictionary=columns) as copy:
            copy.write_table(rows, row_group_size=_ROWS_PER_GROUP)
            if summary is not None:
                copy.add_key_value_metadata({_SUMMARY.decode(): summary.decode()})
        return LivePart(name, rows.num_rows, os.path.getsize(path))


@dataclass(frozen=True)
class _Written:
    name: str
    num_bytes: int


def _write_failures(
    catalog: CatalogLayout, shard_id: str, rows: list[dict[str, Any]], storage_options: storage.StorageOptions
) -> _Written | None:
    """A file of its own for each attempt at a shard: one that was killed may have left another."""
    if not rows:
        return None
    name = part_name(shard_id, rows[0]["recipe_id"], uuid.uuid4().hex[:8])
    uri = f"{catalog.failures}/{name}"
    with storage.replacing(uri, storage_options) as path:
        pq.write_table(pa.Table.from_pylist(rows, schema=FAILURES), path, compression="zstd")
        return _Written(name, os.path.getsize(path))


def _as_text(failure: Failure) -> str:
    return clean_text(f"{failure.reason}: {failure.uri}: {failure.message}")[:500]


def _failure_row(failure: Failure, shard: ShardRef) -> dict[str, Any]:
    row = {name: clean_text(value) if isinstance(value, str) else value for name, value in asdict(failure).items()}
    source: dict[str, Any] = {"uri": shard.uri, "format": shard.format}
    if file := next((file for file in shard.files if file.uri == failure.uri), None):
        source["file"] = file.to_dict()
    attempts = 1 + shard.attempts.get(row["uri"], 0)
    _, _, member = row["uri"].removeprefix(row["shard_uri"]).partition("#")
    return {
        **row,
        "member": member or None,
        "source_version": row.pop("version"),
        "source": json.dumps(source),
        "attempts": attempts,
    }


def _dictionary_columns(schema: pa.Schema) -> list[str]:
    """Columns that repeat themselves. Dictionaries of vectors and hashes cost time and save nothing."""
    return [name for name in ("shard_uri", "format", "recipe_id", "run_id", "caption_source") if name in schema.names]
