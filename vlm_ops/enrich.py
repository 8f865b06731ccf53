"""One shard, from its bytes to its part file: read -> batch -> decode -> ops -> rows -> part.

An `Enricher` is loaded once a process and serves all its threads. A batch is decoded and run by one
thread of its pool, several batches at a time, so that one big shard fills all cores as well as
many small ones do, and so that one thread's decoding overlaps with another's model.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from schemas.catalog import CatalogLayout
from schemas.recipes import Recipe
from schemas.samples import Failure, Sample, SampleError, ShardRef, clean_text, image_id
from vlm_ops.images import ImageFacts, decode, preprocess
from vlm_ops.models import resolve_device
from vlm_ops.ops import ImageBatch, Op, load_ops, schema_of
from vlm_ops.parts import PartSummary, read_summary, writing_part
from vlm_ops.preprocessing import Preprocessing
from vlm_ops.shards import ReadConfig, read_shard

_BATCH_SIZE = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True)
class EnrichConfig:
    """Everything a worker needs; travels pickled.

    Attributes:
        catalog: The catalog's root URI.
        recipe: What to compute.
        run_id: Goes into the rows.
        read: How to read shards.
        device: `auto`, `cpu` or `cuda`.
        batch_size: Images a batch; None chooses by the device.
        num_threads: Batches at work at once in a process.
    """

    catalog: str
    recipe: Recipe
    run_id: str
    read: ReadConfig
    device: str = "auto"
    batch_size: int | None = None
    num_threads: int = 2


@dataclass
class _BatchResult:
    columns: list[tuple[dict[str, pa.Array], int]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    stage_sec: dict[str, float] = field(default_factory=dict)


class Enricher:
    """Models, ops and threads of one process."""

    def __init__(self, config: EnrichConfig) -> None:
        device = resolve_device(config.device)
        self.config = config
        self.batch_size = config.batch_size or _BATCH_SIZE[device]
        self.ops = load_ops(config.recipe.ops, device)
        self.preprocessings = tuple(dict.fromkeys(op.preprocessing for op in self.ops))
        self.schema = schema_of(config.recipe.ops)
        # Resizing is parallel over images already; torch's own threads would only compete.
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(config.num_threads, "enrich")
        # Bounds the encoded images that wait in memory, over all shards of the process.
        self._slots = threading.BoundedSemaphore(2 * config.num_threads)

    def enrich(
        self, shard: ShardRef, advance: Callable[[int, int], None] = lambda images, num_bytes: None
    ) -> PartSummary:
        """Computes a shard and writes its part; or finds the part that an earlier run has written.

        Args:
            advance: Called with (images, encoded bytes) after each batch.
        """
        config = self.config
        catalog, options = CatalogLayout(config.catalog), config.read.storage_options
        name = shard.part_name(config.recipe.recipe_id)
        if found := read_summary(catalog, name, options):
            return PartSummary(**{**vars(found), "is_reused": True})
        stage_sec: dict[str, float] = {}
        with writing_part(
            catalog, shard, self.schema, config.recipe.recipe_id, config.run_id, stage_sec, options
        ) as part:
            samples = _without_failures(_timed(read_shard(shard, config.read), stage_sec, "read"), part.fail)
            for batch, result in self._in_order(_batched(samples, self.batch_size)):
                started = time.perf_counter()
                for columns, num_rows in result.columns:
                    part.write(columns, num_rows)
                part.fail(result.failures)
                for stage, seconds in result.stage_sec.items():
                    stage_sec[stage] = stage_sec.get(stage, 0.0) + seconds
                stage_sec["write"] = stage_sec.get("write", 0.0) + time.perf_counter() - started
                advance(len(batch), sum(len(sample.data) for sample in batch))
        written = read_summary(catalog, name, options)
        assert written is not None
        return written

    def _in_order(self, batches: Iterable[list[Sample]]) -> Iterator[tuple[list[Sample], _BatchResult]]:
        """Runs batches on the pool; gives results in the order of the batches."""
        pending: deque[tuple[list[Sample], Future[_BatchResult]]] = deque()
        for batch in batches:
            self._slots.acquire()
            pending.append((batch, self._pool.submit(self._run_batch, batch)))
            while pending and (pending[0][1].done() or len(pending) > 2 * self.config.num_threads):
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()

    def _run_batch(self, samples: list[Sample]) -> _BatchResult:
        try:
            batch, failures = decode_batch(samples, self.preprocessings, self.config.recipe.max_image_pixels)
            result = _BatchResult(failures=failures, stage_sec=batch.stage_sec)
            self._run_ops(batch, result)
            return result
        finally:
            self._slots.release()

    def _run_ops(self, batch: ImageBatch, result: _BatchResult) -> None:
        """Fills `result`. A batch that fails is run again by halves, until the poisonous image stands alone."""
        if not len(batch):
            return
        stage = ""
        try:
            columns = identity_columns(batch.samples)
            for op in self.ops:
                stage = op.name
                columns |= _timed_op(op, batch)
        except Exception as error:  # whatever a model raises: an image must not stop a night's run
            if len(batch) > 1:
                middle = len(batch) // 2
                self._run_ops(batch.part(0, middle), result)
                self._run_ops(batch.part(middle, len(batch)), result)
                return
            sample = batch.samples[0]
            message = f"{type(error).__name__}: {error}"[:1000]
            result.failures.append(_failure_of(sample, stage, "model_error", message))
            return
        result.columns.append((columns, len(batch)))


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
            prepared.append(preprocess(image.pixels, each).numpy())
    stacked = {each: np.stack(prepared) for each, prepared in pixels.items() if prepared}
    return ImageBatch(kept, facts, stacked, {"decode": time.perf_counter() - started}), failures


def identity_columns(samples: Sequence[Sample]) -> dict[str, pa.Array]:
    """The columns that the reader fills."""
    return {
        "image_id": pa.array([image_id(sample.uri) for sample in samples], pa.int64()),
        "uri": pa.array([clean_text(sample.uri) for sample in samples], pa.string()),
        "shard_uri": pa.array([clean_text(sample.shard_uri) for sample in samples], pa.string()),
        "key": pa.array([clean_text(sample.key) for sample in samples], pa.string()),
        "byte_offset": pa.array([sample.byte_offset for sample in samples], pa.int64()),
        "source_version": pa.array([sample.version for sample in samples], pa.string()),
        "source_captions": pa.array(
            [[clean_text(c) for c in sample.captions] for sample in samples], pa.list_(pa.string())
        ),
        "source_metadata": pa.array(
            [sample.metadata and clean_text(sample.metadata) for sample in samples], pa.string()
        ),
    }


def _failure_of(sample: Sample, stage: str, reason: str, message: str) -> Failure:
    return Failure(sample.uri, sample.shard_uri, stage, reason, message, sample.key, sample.byte_offset, sample.version)


def _without_failures(items: Iterable[Sample | Failure], fail: Callable[[Iterable[Failure]], None]) -> Iterator[Sample]:
    for item in items:
        if isinstance(item, Failure):
            fail([item])
        else:
            yield item


def _batched(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(itertools.islice(iterator, batch_size)):
        yield batch


def _timed(items: Iterator[Sample | Failure], stage_sec: dict[str, float], stage: str) -> Iterator[Sample | Failure]:
    while True:
        started = time.perf_counter()
        item = next(items, None)
        stage_sec[stage] = stage_sec.get(stage, 0.0) + time.perf_counter() - started
        if item is None:
            return
        yield item


def _timed_op(op: Op, batch: ImageBatch) -> dict[str, pa.Array]:
    """Runs an op, and books its own seconds apart from those of a model that it shares."""
    started, model_sec = time.perf_counter(), batch.stage_sec.get("model", 0.0)
    columns = op(batch)
    own = time.perf_counter() - started - (batch.stage_sec.get("model", 0.0) - model_sec)
    batch.stage_sec[op.name] = batch.stage_sec.get(op.name, 0.0) + own
    return columns
