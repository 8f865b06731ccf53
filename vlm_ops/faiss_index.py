"""The FAISS index of a catalog: made from the images table alone, and searched.

Up to EXACT_LIMIT vectors the search is exact (inner product of normalised vectors, which is their
cosine); beyond it, an inverted file with exact distances inside the lists visited
(Johnson, Douze, Jégou, "Billion-scale similarity search with GPUs", 2017).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from math import isqrt
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.catalog import INDEX_FILE, INDEX_MANIFEST, INDEX_ROWS, CatalogLayout
from schemas.manifests import IndexManifest
from schemas.tables import INDEX_ROW_COLUMNS
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, live_parts, open_table, read_columns

EXACT_LIMIT = 200_000
_TRAINING_VECTORS_PER_LIST = 64
_ROWS_PER_GROUP = 10_000


def factory_for(num_vectors: int, exact_limit: int = EXACT_LIMIT) -> tuple[str, int]:
    """FAISS factory string and nprobe for so many vectors."""
    if num_vectors <= exact_limit:
        return "IDMap2,Flat", 1
    nlist = 4 * isqrt(num_vectors)
    return f"IVF{nlist},Flat", max(1, nlist // 16)


def build_index(
    catalog: CatalogLayout,
    encoder: str,
    encoder_revision: str,
    storage_options: storage.StorageOptions,
    exact_limit: int = EXACT_LIMIT,
) -> IndexManifest:
    """Writes `indexes/<n>` for the current version of the images table.

    Raises:
        ValueError: The table holds no embeddings.
        FileNotFoundError: There is no images table.
    """
    table = open_table(catalog.images, storage_options)
    if table is None:
        raise FileNotFoundError(
            f"no catalog at {catalog.root}: there is no images table; make one with `beamsight build`"
        )
    parts = live_parts(table)
    factory, nprobe = factory_for(sum(part.num_rows for part in parts), exact_limit)
    index: Any = None
    rows: list[pa.Table] = []
    for ids, vectors, part_rows in _embeddings(catalog, parts, storage_options):
        if index is None:
            index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
            if not index.is_trained:
                index.train(_training_sample(catalog, parts, faiss.extract_index_ivf(index).nlist, storage_options))
        index.add_with_ids(vectors, ids)
        rows.append(part_rows)
    if index is None:
        raise ValueError(
            f"the images table of {catalog.root} holds no embeddings; build it with --ops embedding among them"
        )
    number = _reserve_number(catalog, storage_options)
    with storage.replacing(catalog.index_file(number, INDEX_FILE), storage_options) as path:
        faiss.write_index(index, path)
    with storage.replacing(catalog.index_file(number, INDEX_ROWS), storage_options) as path:
        sorted_rows = pa.concat_tables(rows, promote_options="default").sort_by("image_id")
        pq.write_table(sorted_rows, path, row_group_size=_ROWS_PER_GROUP, compression="zstd")
    manifest = IndexManifest(
        number=number,
        table_version=table.version(),
        encoder=encoder,
        encoder_revision=encoder_revision,
        factory=factory,
        ntotal=index.ntotal,
        d=index.d,
        nprobe=nprobe,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    storage.write_bytes(catalog.index_file(number, INDEX_MANIFEST), manifest.to_json().encode(), storage_options)
    return manifest


def newest_manifest(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> IndexManifest | None:
    """Manifest of the newest whole index, or None."""
    for number in sorted(_numbers(catalog, storage_options), reverse=True):
        with contextlib.suppress(FileNotFoundError):
            text = storage.read_bytes(catalog.index_file(number, INDEX_MANIFEST), storage_options)
            return IndexManifest.from_json(text.decode())
    return None


@dataclass(frozen=True)
class OpenIndex:
    """A published index, ready to be searched."""

    manifest: IndexManifest
    faiss_index: Any
    rows: pa.Table

    def search(self, queries: np.ndarray, k: int) -> list[list[dict[str, Any]]]:
        """The k most similar images of each query.

        Args:
            queries: float32[n, d], L2-normalised.

        Returns:
            For each query, rows of INDEX_ROW_COLUMNS with `score`, best first; fewer than k where
            the index holds fewer.
        """
        scores, ids = self.faiss_index.search(np.ascontiguousarray(queries, np.float32), min(k, self.manifest.ntotal))
        found = np.unique(ids[ids >= 0])
        known = self.rows.column("image_id").to_numpy()
        positions = np.searchsorted(known, found)
        by_id = {row["image_id"]: row for row in self.rows.take(pa.array(positions)).to_pylist()}
        return [
            [
                {**by_id[int(i)], "score": float(score)}
                for i, score in zip(ids_of_query, scores_of_query, strict=True)
                if i >= 0
            ]
            for ids_of_query, scores_of_query in zip(ids, scores, strict=True)
        ]


def open_index(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> OpenIndex:
    """The newest whole index of a catalog.

    Raises:
        FileNotFoundError: There is none.
    """
    manifest = newest_manifest(catalog, storage_options)
    if manifest is None:
        raise FileNotFoundError(
            f"no index in {catalog.root}; make a catalog with `beamsight build`, or an index with `beamsight index {catalog.root}`"
        )
    with storage.open_for_reading(catalog.index_file(manifest.number, INDEX_FILE), storage_options) as file:
        index = faiss.read_index(faiss.PyCallbackIOReader(file.read))  # type: ignore[attr-defined]
    if manifest.nprobe > 1:
        faiss.extract_index_ivf(index).nprobe = manifest.nprobe
    with storage.open_for_reading(catalog.index_file(manifest.number, INDEX_ROWS), storage_options) as file:
        rows = pq.read_table(file)
    return OpenIndex(manifest, index, rows)


def _embeddings(
    catalog: CatalogLayout, parts: Sequence[LivePart], storage_options: storage.StorageOptions
) -> Iterator[tuple[np.ndarray, np.ndarray, pa.Table]]:
    """(image ids int64[n], embeddings float32[n, d], index rows) of each part that has any."""
    wanted = [*INDEX_ROW_COLUMNS, "image_embedding"]
    for _, table in read_columns(catalog.images, parts, wanted, storage_options):
        table = table.filter(table.column("image_embedding").is_valid())
        if not table.num_rows:
            continue
        values = table.column("image_embedding").combine_chunks()
        vectors = values.flatten().to_numpy().reshape(len(values), -1)
        ids = table.column("image_id").to_numpy()
        yield ids, np.ascontiguousarray(vectors), table.drop_columns(["image_embedding"])


def _training_sample(
    catalog: CatalogLayout, parts: Sequence[LivePart], nlist: int, storage_options: storage.StorageOptions
) -> np.ndarray:
    """An even sample over all parts; fixed, so that the same table gives the same index."""
    total = max(sum(part.num_rows for part in parts), 1)
    step = max(1, total // (nlist * _TRAINING_VECTORS_PER_LIST))
    return np.concatenate([vectors[::step] for _, vectors, _ in _embeddings(catalog, parts, storage_options)])


def _numbers(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> list[int]:
    fs = storage.filesystem(catalog.indexes, storage_options)
    fs.invalidate_cache()
    try:
        names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(catalog.indexes, detail=False)]
    except FileNotFoundError:
        return []
    return [int(name) for name in names if name.isdigit()]


def _reserve_number(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> int:
    """The next free n. Its directory is made at once, so that of two runs each gets its own (local
    filesystems; object stores have no directories to make)."""
    number = max(_numbers(catalog, storage_options), default=0) + 1
    fs = storage.filesystem(catalog.indexes, storage_options)
    while True:
        try:
            fs.makedirs(f"{catalog.indexes}/{number}", exist_ok=False)
            return number
        except FileExistsError:
            number += 1
