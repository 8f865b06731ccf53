"""The FAISS index of a catalog: made from the images' parts alone, and searched.

Up to EXACT_LIMIT vectors the search is exact (inner product of normalised vectors, which is their
cosine); beyond it, an inverted file with exact distances inside the lists visited
(Johnson, Douze, Jégou, "Billion-scale similarity search with GPUs", 2017).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isqrt
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.catalog import INDEX_FILE, INDEX_MANIFEST, INDEX_ROWS, CatalogLayout
from schemas.manifests import IndexManifest
from schemas.recipes import OpSpec
from schemas.tables import INDEX_ROW_COLUMNS
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, read_columns
from vlm_ops.states import newest_commit, no_catalog

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
    run_id: str,
    parts: Sequence[LivePart],
    encoder: OpSpec,
    storage_options: storage.StorageOptions,
    exact_limit: int = EXACT_LIMIT,
) -> IndexManifest | None:
    """Writes `indexes/<run id>` of the images in some parts. Nobody sees it before a commit names it.

    Args:
        encoder: The op that made the embeddings.

    Returns:
        What it says of itself; None where the parts hold no embeddings.
    """
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
        return None
    with storage.replacing(catalog.index_file(run_id, INDEX_FILE), storage_options) as path:
        faiss.write_index(index, path)
    manifest = IndexManifest(
        run_id=run_id,
        encoder=encoder.model or "",
        encoder_revision=encoder.revision or "",
        factory=factory,
        ntotal=index.ntotal,
        d=index.d,
        nprobe=nprobe,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    del index
    with storage.replacing(catalog.index_file(run_id, INDEX_ROWS), storage_options) as path:
        _write_sorted(rows, path)
    storage.write_bytes(catalog.index_file(run_id, INDEX_MANIFEST), manifest.to_json().encode(), storage_options)
    return manifest


def read_index_manifest(catalog: CatalogLayout, run_id: str, storage_options: storage.StorageOptions) -> IndexManifest:
    """What the index that a run made says of itself.

    Raises:
        FileNotFoundError: It is not there any more.
    """
    try:
        text = storage.read_bytes(catalog.index_file(run_id, INDEX_MANIFEST), storage_options).decode()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the index {catalog.indexes}/{run_id} is not there; make it anew with `beamsight index {catalog.root}`"
        ) from error
    return IndexManifest.from_json(text)


@dataclass(frozen=True)
class OpenIndex:
    """A published index, ready to be searched."""

    manifest: IndexManifest
    faiss_index: Any
    rows: pa.Table

    def search(self, queries: np.ndarray, k: int, among: np.ndarray | None = None) -> list[list[dict[str, Any]]]:
        """The k most similar images of each query.

        Args:
            queries: float32[n, d], L2-normalised.
            among: int64[m], the image ids to choose from; None chooses from all.

        Returns:
            For each query, rows of INDEX_ROW_COLUMNS with `score`, best first; fewer than k where
            there are fewer to choose from.
        """
        scores, ids = self._nearest(np.ascontiguousarray(queries, np.float32), k, among)
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

    def _nearest(self, queries: np.ndarray, k: int, among: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32[n, k'], ids int64[n, k']), -1 where there are no more."""
        if among is None:
            return self.faiss_index.search(queries, min(k, self.manifest.ntotal))
        k = min(k, len(among))
        if not k:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        selector = faiss.IDSelectorBatch(np.ascontiguousarray(among, np.int64))
        if self.manifest.nprobe == 1:
            return self.faiss_index.search(queries, k, params=faiss.SearchParameters(sel=selector))  # type: ignore[call-arg]
        lists = faiss.extract_index_ivf(self.faiss_index)
        for nprobe in (lists.nprobe, lists.nlist):  # few images may all be in lists that are not visited
            params = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)  # type: ignore[call-arg]
            scores, ids = self.faiss_index.search(queries, k, params=params)
            if (ids >= 0).all():
                break
        return scores, ids


def open_index(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> OpenIndex:
    """The index of a catalog's current state.

    Raises:
        FileNotFoundError: There is none.
    """
    commit = newest_commit(catalog, storage_options)
    if commit is None:
        raise no_catalog(catalog)
    run_id = commit.record.index
    if run_id is None:
        raise FileNotFoundError(
            f"no index in {catalog.root}: it has {commit.record.num_images} images, without embeddings (--ops embedding makes them)"
        )
    manifest = read_index_manifest(catalog, run_id, storage_options)
    with storage.open_for_reading(catalog.index_file(run_id, INDEX_FILE), storage_options) as file:
        index = faiss.read_index(faiss.PyCallbackIOReader(file.read))  # type: ignore[attr-defined]
    if manifest.nprobe > 1:
        faiss.extract_index_ivf(index).nprobe = manifest.nprobe
    with storage.open_for_reading(catalog.index_file(run_id, INDEX_ROWS), storage_options) as file:
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


def _write_sorted(rows: list[pa.Table], path: str) -> None:
    """Writes rows by their id, a group at a time: a sorted copy of all would double the memory."""
    table = pa.concat_tables(rows, promote_options="default")
    order = pc.sort_indices(table.column("image_id"))
    with pq.ParquetWriter(path, table.schema, compression="zstd") as parquet:
        for start in range(0, max(len(order), 1), _ROWS_PER_GROUP):
            parquet.write_table(table.take(order.slice(start, _ROWS_PER_GROUP)))
