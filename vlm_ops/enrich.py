"""One shard, from its bytes to its part file: read -> batch -> decode -> ops -> rows -> part.

An `Enricher` is loaded once a process and serves all its threads. A batch is decoded and run by one
thread of its pool, several batches at a time, so that one big shard fills all cores as well as
many small ones do, and so that one thread's decoding overlaps with another's model.

Images with the same bytes are computed once: later ones of a shard copy the first one's row, and those
that the catalog knows copy the stored one. What is copied takes no place in a batch.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch

from schemas.catalog import CatalogLayout
from schemas.recipes import Recipe
from schemas.samples import Failure, Sample, SampleError, ShardRef, clean_text, image_id, to_json
from vlm_ops import storage
from vlm_ops.batch_limits import BatchLimits, is_out_of_memory, release_cached_memory
from vlm_ops.contents import ContentDigest, KnownContents, ShardRows, StoredRows, sha256_of
from vlm_ops.cores import usable_cores
from vlm_ops.images import ImageFacts, decode, preprocess
from vlm_ops.models.settings import ModelSettings, resolve_device
from vlm_ops.ops import ImageBatch, Op, load_ops, reader_columns, schema_of, wanted_pixels
from vlm_ops.parts import PartSummary, PartWriter, has_failures_part, read_summary, writing_part
from vlm_ops.preprocessing import Preprocessing
from vlm_ops.shards import ReadConfig, read_shard

_BATCH_SIZE = {"cpu": 16, "cuda": 128}
# Rows that are copied wait in a batch for those that are computed; not more of them than this.
_MAX_ROWS_PER_BATCH = 1024

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class EnrichConfig:
    """Everything a worker needs; travels pickled.

    Attributes:
        catalog: The catalog's root URI.
        recipe: What to compute.
        run_id: Goes into the rows.
        read: How to read shards.
        settings: Where models run; what they compute, the recipe says.
        batch_size: Images a batch; None chooses by the device.
        num_threads: Batches at work at once in a process; None: as many as the machine at work has cores.
        known_contents: URI of what the catalog knows already (`contents.write_known_contents`), to be copied
            instead of computed; None computes all.
    """

    catalog: str
    recipe: Recipe
    run_id: str
    read: ReadConfig
    settings: ModelSettings = field(default_factory=ModelSettings)
    batch_size: int | None = None
    num_threads: int | None = None
    known_contents: str | None = None


@dataclass(frozen=True)
class ReadImage:
    """A sample that was read, on its way to a row.

    Attributes:
        sample: Its `data` is dropped as soon as nothing is computed from it.
        num_bytes: Size of the encoded image.
        content_sha256: Of the encoded image.
        key: Of equal keys, the ops make equal rows.
        is_repeated: Whether an earlier image of the shard has the same key.
        stored: The row that the catalog has for the key, if any: one row of the ops' columns.
        known_first: The image that the catalog has first with these bytes; None where it is not known, or leaves.
    """

    sample: Sample
    num_bytes: int
    content_sha256: str
    key: bytes
    is_repeated: bool = False
    stored: pa.RecordBatch | None = None
    known_first: int | None = None

    @property
    def is_computed(self) -> bool:
        return not self.is_repeated and self.stored is None

    def without_data(self) -> ReadImage:
        return replace(self, sample=replace(self.sample, data=b""))


@dataclass
class _BatchResult:
    rows: list[pa.RecordBatch] = field(default_factory=list)
    failures: dict[str, Failure] = field(default_factory=dict)
    stage_sec: dict[str, float] = field(default_factory=dict)


class _OpError(Exception):
    """What an op raised."""

    def __init__(self, op: str, cause: Exception) -> None:
        super().__init__(op)
        self.op = op
        self.is_out_of_memory = is_out_of_memory(cause)
        told = "out of memory, even for this image alone: " if self.is_out_of_memory else ""
        self.message = f"{told}{type(cause).__name__}: {cause}"[:1000]


class Enricher:
    """Models, ops and threads of one process."""

    def __init__(self, config: EnrichConfig) -> None:
        device = resolve_device(config.settings.device)
        # Resizing is parallel over images already; torch's own threads would only compete. Said before models are
        # loaded: what is compiled is compiled for a number of threads.
        torch.set_num_threads(1)
        self.config = config
        self.batch_size = config.batch_size or _BATCH_SIZE[device.partition(":")[0]]
        self.ops = load_ops(config.recipe.ops, config.settings)
        self.preprocessings = wanted_pixels(self.ops)
        self.schema = schema_of(config.recipe.ops)
        filled = {column.name for op in self.ops for column in op.columns}
        self._op_schema = pa.schema([column for column in self.schema if column.name in filled])
        self._reader_columns = reader_columns(self.ops)
        self._groups = _by_model(config.recipe, self.ops)
        self._limits = BatchLimits()
        self._known: KnownContents | None = None
        if config.known_contents is not None:
            self._known = KnownContents.open(config.known_contents, config.read.storage_options)
            columns = ["content_sha256", "recipe_id", *self._reader_columns, *self._op_schema.names]
            self._stored = StoredRows(CatalogLayout(config.catalog).images, columns, config.read.storage_options)
        self._num_threads = config.num_threads or usable_cores()
        self._pool = ThreadPoolExecutor(self._num_threads, "enrich")
        # Bounds the encoded images that wait in memory, over all shards of the process.
        self._slots = threading.BoundedSemaphore(2 * self._num_threads)

    def enrich(
        self, shard: ShardRef, advance: Callable[[int, int], None] = lambda images, num_bytes: None
    ) -> PartSummary:
        """Computes a shard and writes its part; or finds the part that is there: an earlier run has written it, or this one
        before the runner handed the shard out again.

        Args:
            advance: Called with (images, encoded bytes) after each batch.
        """
        config = self.config
        catalog, options = CatalogLayout(config.catalog), config.read.storage_options
        name = shard.part_name(config.recipe.recipe_id)
        if found := read_summary(catalog, name, options):
            if has_failures_part(catalog, found, options):
                return found
            storage.remove(f"{catalog.images}/{name}", options)  # half of it is gone, so it is computed again
        stage_sec: dict[str, float] = {}
        with (
            writing_part(
                catalog, shard, self.schema, config.recipe.recipe_id, config.run_id, stage_sec, options
            ) as part,
            ShardRows() as done,
        ):
            images = self._identified(self._read(shard, part, stage_sec), done, stage_sec)
            names: dict[str, int] = {}
            for batch, result in self._in_order(_batched(images, self.batch_size)):
                started = time.perf_counter()
                self._write(batch, result, done, names, part)
                for stage, seconds in result.stage_sec.items():
                    stage_sec[stage] = stage_sec.get(stage, 0.0) + seconds
                stage_sec["write"] = stage_sec.get("write", 0.0) + time.perf_counter() - started
                advance(len(batch), sum(image.num_bytes for image in batch))
        written = read_summary(catalog, name, options)
        assert written is not None
        return written

    def _read(self, shard: ShardRef, part: PartWriter, stage_sec: dict[str, float]) -> Iterator[ReadImage]:
        """The shard's images; what could not be read goes to the part's failures."""
        digest = ContentDigest()
        items = read_shard(shard, self.config.read)
        images = (item if isinstance(item, Failure) else identify(item, self._reader_columns) for item in items)
        for image in _timed(images, stage_sec, "read"):
            if isinstance(image, Failure):
                digest.add(image)
                part.fail([image])
            else:
                digest.add(image.sample, image.content_sha256)
                yield image
        part.content_digest = digest.hexdigest()

    def _identified(
        self, images: Iterable[ReadImage], done: ShardRows, stage_sec: dict[str, float]
    ) -> Iterator[ReadImage]:
        """Tells of each image whether it is computed, or what it copies."""
        iterator = iter(images)
        while window := list(itertools.islice(iterator, self.batch_size)):
            window = [replace(image, is_repeated=not done.claim(image.key)) for image in window]
            if self._known is not None:
                started = time.perf_counter()
                window = self._with_stored_rows(window, self._known)
                stage_sec["copy"] = stage_sec.get("copy", 0.0) + time.perf_counter() - started
            for image in window:
                yield image if image.is_computed else image.without_data()

    def _with_stored_rows(self, images: list[ReadImage], known: KnownContents) -> list[ReadImage]:
        """Finds what the catalog has of them; a stored row is trusted once its bytes' hash, recipe and reader agree."""
        found = known.lookup([image.content_sha256 for image in images])
        places = [(i, place) for i, place in enumerate(found) if place is not None and not images[i].is_repeated]
        rows = self._stored.read([place for _, place in places])
        for (i, place), row in zip(places, rows, strict=True):
            image = images[i]
            if row is None or row["content_sha256"][0].as_py() != image.content_sha256:
                continue
            first = place.first if place.first >= 0 else None
            images[i] = image = replace(image, known_first=first)
            if row["recipe_id"][0].as_py() != self.config.recipe.recipe_id:
                continue
            if _key(image.content_sha256, [row[name][0].as_py() for name in self._reader_columns]) == image.key:
                images[i] = replace(image, stored=_conformed(row, self._op_schema))
        return images

    def _in_order(self, batches: Iterable[list[ReadImage]]) -> Iterator[tuple[list[ReadImage], _BatchResult]]:
        """Runs batches on the pool; gives results in the order of the batches."""
        pending: deque[tuple[list[ReadImage], Future[_BatchResult]]] = deque()
        for batch in batches:
            self._slots.acquire()
            pending.append((batch, self._pool.submit(self._run_batch, batch)))
            while pending and (pending[0][1].done() or len(pending) > 2 * self._num_threads):
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()

    def _write(
        self, batch: list[ReadImage], result: _BatchResult, done: ShardRows, names: dict[str, int], part: PartWriter
    ) -> None:
        """Writes the rows of a batch, computed and copied, in its order.

        Args:
            done: What the shard's images have become; this batch's are added.
            names: The first image of each content; likewise.
        """
        computed = (rows.slice(row, 1) for rows in result.rows for row in range(rows.num_rows))
        own: dict[bytes, pa.RecordBatch] = {}
        for image in batch:
            if failure := result.failures.get(image.sample.uri):
                done.add_failure(image.key, failure)
            elif not image.is_repeated:
                own[image.key] = next(computed) if image.stored is None else image.stored
        own_rows = _concatenated(own.values(), self._op_schema)
        done.add(list(own), own_rows)
        images: list[ReadImage] = []
        rows: list[pa.RecordBatch] = []
        duplicate_of: list[int | None] = []
        for image in batch:
            row = own[image.key] if image.key in own else done.get(image.key)
            if isinstance(row, Failure):
                part.fail([_failure_of(image.sample, row.stage, row.reason, row.message)])
                continue
            images.append(image)
            rows.append(row)
            own_id = image_id(image.sample.uri)
            first = names.setdefault(image.content_sha256, own_id if image.known_first is None else image.known_first)
            duplicate_of.append(first if first != own_id else None)
        if not images:
            return
        part.num_copied += sum(not image.is_computed for image in images)
        filled = own_rows if len(images) == len(own) else _concatenated(rows, self._op_schema)
        columns = identity_columns(images) | {"duplicate_of": pa.array(duplicate_of, pa.int64())}
        columns |= dict(zip(self._op_schema.names, filled.columns, strict=True))
        part.write(columns, len(images))

    def _run_batch(self, images: list[ReadImage]) -> _BatchResult:
        """Decodes and runs those of a batch that are computed."""
        try:
            samples = [image.sample for image in images if image.is_computed]
            if not samples:
                return _BatchResult()
            batch, failures = decode_batch(samples, self.preprocessings, self.config.recipe.max_image_pixels)
            result = _BatchResult(failures={failure.uri: failure for failure in failures}, stage_sec=batch.stage_sec)
            self._run_ops(batch, result)
            return result
        finally:
            self._slots.release()

    def _run_ops(self, batch: ImageBatch, result: _BatchResult) -> None:
        """Fills `result`. A batch that fails is run again by halves, until the poisonous image stands alone."""
        if not len(batch):
            return
        columns: dict[str, pa.Array] = {}
        try:
            for name, ops in self._groups.items():
                columns |= self._run_group(name, ops, batch)
            result.rows.append(_record_batch(columns, self._op_schema, len(batch)))
            return
        except _OpError as error:  # whatever a model raises: an image must not stop a night's run
            failure = _failure_of(batch.samples[0], error.op, "model_error", error.message)
        # Here and not above: as long as the error lives, so do the tensors of the failed call.
        if len(batch) == 1:
            result.failures[failure.uri] = failure
            return
        middle = len(batch) // 2
        self._run_ops(batch.part(0, middle), result)
        self._run_ops(batch.part(middle, len(batch)), result)

    def _run_group(self, name: str, ops: Sequence[Op], batch: ImageBatch) -> dict[str, pa.Array]:
        """Runs ops that share a model, in pieces as large as memory allows."""
        pieces: list[dict[str, pa.Array]] = []
        start = 0
        while start < len(batch):
            size = self._limits.size(name, len(batch) - start)
            piece = batch if size == len(batch) else batch.part(start, start + size)
            try:
                with self._limits.running():
                    pieces.append(_run(ops, piece))
                start += size
                continue
            except _OpError as error:
                if not error.is_out_of_memory:
                    raise
            # Here and not above, for the same reason.
            release_cached_memory()
            if size > 1:
                self._limits.halve(name, size)
                continue
            # Other threads' batches may have taken the memory: the image fails only where it does not fit by itself.
            with self._limits.running(alone=True):
                release_cached_memory()
                pieces.append(_run(ops, piece))
            start += size
        if len(pieces) == 1:
            return pieces[0]
        return {
            column.name: pa.concat_arrays([piece[column.name].cast(column.type) for piece in pieces])
            for column in self._op_schema
            if column.name in pieces[0]
        }


def decode_batch(
    samples: Sequence[Sample], preprocessings: Sequence[Preprocessing], max_pixels: int
) -> tuple[ImageBatch, list[Failure]]:
    """Decodes each sample once, and prepares its pixels for all ops."""
    started = time.perf_counter()
    shorter_side = max((each.shorter_side for each in preprocessings), default=None)
    kept: list[Sample] = []
    facts: list[ImageFacts] = []
    failures: list[Failure] = []
    pixels: dict[Preprocessing, list[np.ndarray]] = {each: [] for each in preprocessings}
    for sample in samples:
        try:
            image = decode(sample.data, max_pixels, shorter_side)
        except SampleError as error:
            failures.append(_failure_of(sample, "decode", error.reason, error.message))
            continue
        kept.append(sample)
        facts.append(image.facts)
        for each, prepared in pixels.items():
            prepared.append(preprocess(image.pixels, each, image.facts).numpy())
    stacked = {each: _stacked(prepared) for each, prepared in pixels.items() if prepared}
    return ImageBatch(kept, facts, stacked, {"decode": time.perf_counter() - started}), failures


def _stacked(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """uint8[3, h, w] of several sizes -> uint8[n, 3, height, width] of the largest, each in the upper left corner."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    if all(picture.shape == (3, height, width) for picture in pictures):
        return np.stack(pictures)
    stacked = np.zeros((len(pictures), 3, height, width), np.uint8)
    for row, picture in zip(stacked, pictures, strict=True):
        row[:, : picture.shape[1], : picture.shape[2]] = picture
    return stacked


def identify(sample: Sample, reader_columns: Sequence[str] = ()) -> ReadImage:
    """Identifies a sample's content.

    Args:
        reader_columns: The columns of the reader on which the ops depend besides the image's bytes.
    """
    sha256 = sha256_of(sample.data)
    image = ReadImage(sample, len(sample.data), sha256, b"")
    beside = identity_columns([image]) if reader_columns else {}
    return replace(image, key=_key(sha256, [beside[name][0].as_py() for name in reader_columns]))


def identity_columns(images: Sequence[ReadImage]) -> dict[str, pa.Array]:
    """The columns that the reader fills, but for `duplicate_of`."""
    samples = [image.sample for image in images]
    return {
        "image_id": pa.array([image_id(sample.uri) for sample in samples], pa.int64()),
        "uri": pa.array([clean_text(sample.uri) for sample in samples], pa.string()),
        "shard_uri": pa.array([clean_text(sample.shard_uri) for sample in samples], pa.string()),
        "key": pa.array([clean_text(sample.key) for sample in samples], pa.string()),
        "byte_offset": pa.array([sample.byte_offset for sample in samples], pa.int64()),
        "source_version": pa.array([sample.version for sample in samples], pa.string()),
        "num_bytes": pa.array([image.num_bytes for image in images], pa.int64()),
        "content_sha256": pa.array([image.content_sha256 for image in images], pa.string()),
        "source_captions": pa.array(
            [[clean_text(c) for c in sample.captions] for sample in samples], pa.list_(pa.string())
        ),
        "source_metadata": pa.array(
            [sample.metadata and clean_text(sample.metadata) for sample in samples], pa.string()
        ),
    }


def _failure_of(sample: Sample, stage: str, reason: str, message: str) -> Failure:
    return Failure(sample.uri, sample.shard_uri, stage, reason, message, sample.key, sample.byte_offset, sample.version)


def _key(content_sha256: str, beside: Sequence[object]) -> bytes:
    digest = bytes.fromhex(content_sha256)
    return hashlib.sha256(digest + to_json(beside).encode()).digest() if beside else digest


def _by_model(recipe: Recipe, ops: Sequence[Op]) -> dict[str, list[Op]]:
    """The ops that share a model, by their names; each of the others for itself."""
    groups: dict[str, list[Op]] = {}
    for spec, op in zip(recipe.ops, ops, strict=True):
        groups.setdefault(f"model {spec.model}" if spec.model else f"op {spec.name}", []).append(op)
    return {", ".join(op.name for op in members): members for members in groups.values()}


def _batched(images: Iterable[ReadImage], batch_size: int) -> Iterator[list[ReadImage]]:
    """Batches in which `batch_size` images are computed, whatever else is copied in between."""
    batch: list[ReadImage] = []
    num_computed = 0
    for image in images:
        batch.append(image)
        num_computed += image.is_computed
        if num_computed == batch_size or len(batch) == _MAX_ROWS_PER_BATCH:
            yield batch
            batch, num_computed = [], 0
    if batch:
        yield batch


def _timed(items: Iterator[_Item], stage_sec: dict[str, float], stage: str) -> Iterator[_Item]:
    while True:
        started = time.perf_counter()
        item = next(items, None)
        stage_sec[stage] = stage_sec.get(stage, 0.0) + time.perf_counter() - started
        if item is None:
            return
        yield item


def _run(ops: Iterable[Op], batch: ImageBatch) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    for op in ops:
        try:
            columns |= _timed_op(op, batch)
        except Exception as error:
            raise _OpError(op.name, error) from error
    return columns


def _record_batch(columns: Mapping[str, pa.Array], schema: pa.Schema, num_rows: int) -> pa.RecordBatch:
    """The columns of a schema; those that are not given are null."""
    arrays = [
        columns[field.name].cast(field.type) if field.name in columns else pa.nulls(num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _conformed(rows: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return _record_batch({name: rows[name] for name in schema.names}, schema, rows.num_rows)


def _concatenated(rows: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    return pa.concat_batches([_record_batch({}, schema, 0), *rows])


def _timed_op(op: Op, batch: ImageBatch) -> dict[str, pa.Array]:
    """Runs an op, and books its own seconds apart from those of a model that it shares."""
    started, booked = time.perf_counter(), sum(batch.stage_sec.values())
    columns = op(batch)
    batch.book(op.name, time.perf_counter() - started - (sum(batch.stage_sec.values()) - booked))
    return columns
