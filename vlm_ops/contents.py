"""Images with the same bytes: what is known of them in a shard and in the catalog, so that none is computed twice.

The *known contents* of a catalog are one Arrow IPC file, sorted by digest and mapped into memory: 24 bytes an
image on disk, of which a look-up touches a few pages. What is found there is a hint alone. The stored row is
read, and its full SHA-256 compared, before anything of it is copied.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.samples import Failure, Sample, clean_text, to_json
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, read_columns

logger = logging.getLogger(__name__)

_COLUMNS = ("content_sha256", "image_id", "duplicate_of", "uri")
_UNNAMED = -1
_SCHEMA = pa.schema(
    [
        pa.field("digest", pa.uint64(), nullable=False),
        pa.field("part", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("row", pa.uint32(), nullable=False),
        pa.field("first", pa.int64(), nullable=False),
    ]
)
# The file has a batch for each value of a digest's first bits: what sorting needs beyond the rows shrinks by so much.
_BATCH_BITS = np.uint64(4)
_NUM_BATCHES = 1 << int(_BATCH_BITS)
_NUM_FOOTERS = 32
_NUM_GROUPS = 16
# What a part raises that is gone, or is no longer what the known contents say.
_UNREADABLE = (OSError, pa.ArrowException, KeyError)


class ContentDigest:
    """SHA-256 over what a reading of a shard gave, item by item: the same for an unchanged shard."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, item: Sample | Failure, content_sha256: str | None = None) -> None:
        """Adds an item; the hash of a sample's bytes may be given where it is known."""
        if isinstance(item, Failure):
            told: list[Any] = ["failure", item.uri, item.reason]
        else:
            told = [item.uri, content_sha256 or sha256_of(item.data), item.captions, item.metadata]
        self._hash.update(clean_text(to_json(told)).encode() + b"\n")

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest_of(items: Iterable[Sample | Failure]) -> str:
    """64 hex digits: the `content_digest` that the part of a shard with these samples and failures carries."""
    digest = ContentDigest()
    for item in items:
        digest.add(item)
    return digest.hexdigest()


def sha256_of(data: bytes) -> str:
    """The value of the column `content_sha256`."""
    return hashlib.sha256(data).hexdigest()


class ShardRows(AbstractContextManager["ShardRows"]):
    """What a shard's distinct images have become so far: rows of the ops' columns, or failures.

    The rows wait in a temporary file without a name, about as large as the part; memory holds half a
    kilobyte an image. For one thread.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="beamsight-")
        self._schema: pa.Schema | None = None
        self._places: list[tuple[int, int]] = []  # of each batch in the file: offset, size
        self._starts: list[int] = []  # number of its first row
        self._num_rows = 0
        self._rows: dict[bytes, int] = {}  # number of a row; -1 while it is still being computed
        self._failures: dict[bytes, Failure] = {}
        self._last: tuple[int, pa.RecordBatch] | None = None

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def claim(self, key: bytes) -> bool:
        """Whether this is the first time that the key is met."""
        if key in self._rows:
            return False
        self._rows[key] = -1
        return True

    def add(self, keys: Sequence[bytes], rows: pa.RecordBatch) -> None:
        """The rows that these claimed keys have become."""
        if not keys:
            return
        message = rows.serialize()
        self._schema = rows.schema
        self._places.append((self._file.seek(0, os.SEEK_END), message.size))
        self._file.write(message)
        self._starts.append(self._num_rows)
        self._last = (len(self._places) - 1, rows)
        for key in keys:
            self._rows[key] = self._num_rows
            self._num_rows += 1

    def add_failure(self, key: bytes, failure: Failure) -> None:
        self._failures[key] = failure

    def get(self, key: bytes) -> pa.RecordBatch | Failure:
        """The one row, or the failure, that a key has become."""
        if key in self._failures:
            return self._failures[key]
        number = self._rows[key]
        batch = bisect_right(self._starts, number) - 1
        return self._read(batch).slice(number - self._starts[batch], 1)

    def _read(self, batch: int) -> pa.RecordBatch:
        if self._last is None or self._last[0] != batch:
            offset, size = self._places[batch]
            self._file.seek(offset)
            self._last = (batch, pa.ipc.read_record_batch(pa.py_buffer(self._file.read(size)), self._schema))
        return self._last[1]


def write_known_contents(
    uri: str,
    images_uri: str,
    parts: Iterable[LivePart],
    storage_options: storage.StorageOptions,
    is_leaving: Callable[[LivePart, pa.Table], np.ndarray],
) -> int:
    """Writes the known contents of a catalog: for each content, one row that has it.

    Until it is written, 26 bytes an image are held, and a sixteenth of that again.

    Args:
        uri: The file to write.
        images_uri: The images table.
        parts: Its parts; all of one recipe.
        is_leaving: (part, table of `_COLUMNS`) -> bool[n]: rows that are leaving the catalog in this run. What they
            hold may be copied, but `duplicate_of` names none of them.

    Returns:
        How many contents there are.
    """
    names: list[str] = []
    digest, part_number, row = np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, np.uint32)
    first, rank, batch = np.empty(0, np.int64), np.empty(0, np.uint8), np.empty(0, np.uint8)
    for part, table in read_columns(images_uri, parts, _COLUMNS, storage_options):
        if "content_sha256" not in table.column_names:  # written before the column was
            continue
        sha256 = table.column("content_sha256")
        known = np.flatnonzero(sha256.is_valid())
        leaving = np.asarray(is_leaving(part, table), bool)
        is_copy, named = np.zeros(table.num_rows, bool), table.column("image_id").to_numpy()
        if "duplicate_of" in table.column_names:  # a copy names its first, and is not named itself
            copied = table.column("duplicate_of")
            is_copy = copied.is_valid().to_numpy()
            named = pc.coalesce(copied, table.column("image_id")).to_numpy()
        digests = _digests(sha256.drop_null().to_pylist())
        _append(digest, digests)
        _append(batch, _batch_of(digests))
        _append(part_number, np.full(len(known), len(names)))
        _append(row, known)
        _append(first, np.where(leaving, _UNNAMED, named)[known])
        _append(rank, (2 * leaving + is_copy)[known])
        names.append(part.name)
    num_contents = 0
    with storage.replacing(uri, storage_options) as path, pa.ipc.new_file(path, _SCHEMA) as file:
        for number in range(_NUM_BATCHES):
            # Of equal contents the best comes first: a row that stays, then one that is not itself a copy.
            order = np.flatnonzero(batch == number)
            order = order[np.argsort(rank[order], kind="stable")]
            _, best = np.unique(digest[order], return_index=True)
            order = order[best]
            columns = [
                pa.array(digest[order]),
                pa.DictionaryArray.from_arrays(pa.array(part_number[order]), pa.array(names, pa.string())),
                pa.array(row[order]),
                pa.array(first[order]),
            ]
            file.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
            num_contents += len(order)
    return num_contents


@dataclass(frozen=True)
class KnownContent:
    """Where the catalog has a row of an image with (very likely) the same bytes.

    Attributes:
        part: File name of the part.
        row: Which row of it.
        first: The image to name in `duplicate_of`; -1: none.
    """

    part: str
    row: int
    first: int


class KnownContents:
    """The known contents of a catalog, mapped into memory. Safe to use from several threads."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = [_MappedBatch.of(batch) for batch in batches]
        self._names = batches[0].column("part").dictionary

    @classmethod
    def open(cls, uri: str, storage_options: storage.StorageOptions | None = None) -> KnownContents:
        """Maps the file; a remote one is copied to a temporary file first, which has no name any more.

        Raises:
            FileNotFoundError: There is no such file.
        """
        if storage.is_local(uri):
            return cls._map(storage.normalise(uri))
        handle, path = tempfile.mkstemp(prefix="beamsight-")
        os.close(handle)
        try:
            storage.filesystem(uri, storage_options).get_file(uri, path)
            return cls._map(path)
        finally:
            os.unlink(path)

    @classmethod
    def _map(cls, path: str) -> KnownContents:
        file = pa.ipc.open_file(pa.memory_map(path))
        return cls([file.get_batch(number) for number in range(_NUM_BATCHES)])

    def __len__(self) -> int:
        return sum(len(batch.digests) for batch in self._batches)

    def lookup(self, sha256s: Sequence[str]) -> list[KnownContent | None]:
        """For each `content_sha256`, where its row is; None where the catalog does not have it.

        The first 64 bits are compared: whoever copies the row compares the rest.
        """
        wanted = _digests(sha256s)
        return [
            self._find(self._batches[batch], digest) for batch, digest in zip(_batch_of(wanted), wanted, strict=True)
        ]

    def _find(self, batch: _MappedBatch, digest: np.uint64) -> KnownContent | None:
        place = int(np.searchsorted(batch.digests, digest))
        if place == len(batch.digests) or batch.digests[place] != digest:
            return None
        part = self._names[int(batch.parts[place])].as_py()
        return KnownContent(part, int(batch.rows[place]), int(batch.firsts[place]))


@dataclass(frozen=True)
class _MappedBatch:
    """The columns of a batch, over the memory of the file."""

    digests: np.ndarray
    parts: np.ndarray
    rows: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> _MappedBatch:
        columns = [batch.column("digest"), batch.column("part").indices, batch.column("row"), batch.column("first")]
        return cls(*(column.to_numpy(zero_copy_only=True) for column in columns))


class StoredRows:
    """Single rows of a catalog's parts, through the few row groups that were read last.

    A corpus in its old order reads each row group once. Safe to use from several threads.

    Args:
        images_uri: The images table.
        columns: The columns wanted.
    """

    def __init__(
        self, images_uri: str, columns: Sequence[str], storage_options: storage.StorageOptions | None = None
    ) -> None:
        self._uri = images_uri
        self._columns = list(columns)
        self._options = storage_options
        self._lock = threading.Lock()
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()
        self._unusable: set[str] = set()

    def read(self, places: Sequence[KnownContent]) -> list[pa.RecordBatch | None]:
        """For each place its row, of one row; None where the part is gone, cannot be read, or lacks row or column."""
        wanted: dict[
            tuple[str, int], list[tuple[int, int]]
        ] = {}  # row group -> (position of the place, row in the group)
        for position, place in enumerate(places):
            if found := self._locate(place):
                group, row = found
                wanted.setdefault((place.part, group), []).append((position, row))
        rows: list[pa.RecordBatch | None] = [None] * len(places)
        for (part, group), members in wanted.items():
            if (table := self._guarded(part, lambda part=part, group=group: self._group(part, group))) is None:  # type: ignore[misc]
                continue
            # A copy of the rows alone: a slice would keep the whole group in memory.
            (batch,) = table.take([row for _, row in members]).combine_chunks().to_batches()
            for i, (position, _) in enumerate(members):
                rows[position] = batch.slice(i, 1)
        return rows

    def _locate(self, place: KnownContent) -> tuple[int, int] | None:
        """(row group, row in it)."""
        footer = self._guarded(place.part, lambda: self._footer(place.part))
        row = place.row
        for group in range(footer.num_row_groups if footer else 0):
            num_rows = footer.row_group(group).num_rows
            if row < num_rows:
                return group, row
            row -= num_rows
        return None

    def _guarded(self, part: str, read: Callable[[], Any]) -> Any:
        if part in self._unusable:
            return None
        try:
            return read()
        except _UNREADABLE as error:
            self._unusable.add(part)
            logger.warning("images are computed again, because %s cannot be read any more: %s", part, error)
            return None

    def _footer(self, part: str) -> pq.FileMetaData:
        return self._cached(self._footers, part, _NUM_FOOTERS, lambda file: pq.read_metadata(file), part)

    def _group(self, part: str, group: int) -> pa.Table:
        footer = self._footer(part)

        def read(file: Any) -> pa.Table:
            parquet = pq.ParquetFile(file, metadata=footer, pre_buffer=True)
            return parquet.read_row_group(group, columns=self._columns, use_threads=False).select(self._columns)

        return self._cached(self._groups, (part, group), _NUM_GROUPS, read, part)

    def _cached(self, cache: OrderedDict[Any, Any], key: Any, limit: int, read: Callable[[Any], Any], part: str) -> Any:
        with self._lock:
            if key in cache:
                cache.move_to_end(key)
                return cache[key]
        fs = storage.filesystem(self._uri, self._options)
        # What is read is known to the byte: reading ahead would fetch megabytes for a row.
        with fs.open(f"{self._uri}/{part}", "rb", cache_type="none") as file:
            value = read(file)
        with self._lock:
            cache[key] = value
            while len(cache) > limit:
                cache.popitem(last=False)
        return value


def _digests(sha256s: Sequence[str]) -> np.ndarray:
    """uint64[n]: the first 8 bytes of each."""
    heads = bytes.fromhex("".join(sha256[:16] for sha256 in sha256s))
    return np.frombuffer(heads, ">u8").astype(np.uint64)


def _batch_of(digests: np.ndarray) -> np.ndarray:
    """uint64[n]: which batch of the file each digest is in."""
    return digests >> (np.uint64(64) - _BATCH_BITS)


def _append(array: np.ndarray, values: np.ndarray) -> None:
    """Grows an array where it lies, so that it is never in memory twice."""
    start = len(array)
    array.resize(start + len(values), refcheck=False)
    array[start:] = values
