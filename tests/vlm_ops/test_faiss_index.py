"""The index against plain numpy, and what is published when."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from schemas.catalog import CatalogLayout
from schemas.manifests import IndexManifest
from schemas.recipes import OpSpec, Recipe
from schemas.samples import ShardRef, image_id
from vlm_ops.faiss_index import EXACT_LIMIT, build_index, factory_for, open_index
from vlm_ops.ops import plan_ops, schema_of, vectors
from vlm_ops.parts import read_summary, writing_part
from vlm_ops.publishing import PublishConfig, publish_index, publish_run
from vlm_ops.states import Gone, current_state

import pyarrow as pa  # isort: skip

RECIPE = Recipe(plan_ops(["embedding"], "python:tests.toys"), 1, 1)
D = 8


def catalog_with(folder: Path, embeddings: np.ndarray, num_parts: int = 3) -> CatalogLayout:
    """A catalog whose images `u0`, `u1`, ... have these embeddings."""
    catalog = CatalogLayout(str(folder / "catalog"))
    summaries = []
    for number, rows in enumerate(np.array_split(np.arange(len(embeddings)), num_parts)):
        shard = ShardRef(f"{number}.tar", "tar", "1", 0)
        with writing_part(catalog, shard, schema_of(RECIPE.ops), RECIPE.recipe_id, "r", {}, {}) as part:
            uris = [f"u{row}" for row in rows]
            columns = {name: pa.array(uris) for name in ("uri", "shard_uri", "key")}
            columns |= {
                "image_id": pa.array([image_id(uri) for uri in uris]),
                "image_embedding": vectors(embeddings[rows]),
            }
            part.write(columns, len(rows))
        summaries.append(read_summary(catalog, shard.part_name(RECIPE.recipe_id), {}))
    config = PublishConfig(catalog.root, RECIPE, "r", "build", "2026-01-01T00:00:00+00:00", (), Gone(), 0, None)
    publish_run(config, summaries)
    return catalog


def index_of(catalog: CatalogLayout, exact_limit: int = EXACT_LIMIT) -> IndexManifest | None:
    encoder = OpSpec("embedding", "toy", "1")
    return build_index(catalog, "r", current_state(catalog, {}).images, encoder, {}, exact_limit)


def unit_vectors(n: int, seed: int = 0, d: int = D) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_exact_search_equals_numpy(tmp_path: Path) -> None:
    embeddings, queries = unit_vectors(200), unit_vectors(5, seed=1)
    catalog = catalog_with(tmp_path, embeddings)
    manifest = index_of(catalog)
    assert manifest and (manifest.ntotal, manifest.d, manifest.factory, manifest.run_id) == (200, D, "IDMap2,Flat", "r")
    found = open_index(catalog, {}).search(queries, 7)
    for query, rows in zip(queries, found, strict=True):
        best = np.argsort(-(embeddings @ query))[:7]
        assert [row["uri"] for row in rows] == [f"u{i}" for i in best]
        np.testing.assert_allclose([row["score"] for row in rows], (embeddings @ query)[best], atol=1e-5)


def test_rows_are_sorted_by_id(tmp_path: Path) -> None:
    catalog = catalog_with(tmp_path, unit_vectors(50))
    index_of(catalog)
    ids = open_index(catalog, {}).rows.column("image_id").to_pylist()
    assert ids == sorted(ids) and len(ids) == 50


def test_fewer_images_than_asked_for(tmp_path: Path) -> None:
    catalog = catalog_with(tmp_path, unit_vectors(3))
    index_of(catalog)
    assert len(open_index(catalog, {}).search(unit_vectors(1), 10)[0]) == 3


def test_inverted_file_beyond_the_exact_limit(tmp_path: Path) -> None:
    embeddings = unit_vectors(5000, d=16)
    catalog = catalog_with(tmp_path, embeddings)
    manifest = index_of(catalog, exact_limit=1000)
    assert manifest and manifest.factory == "IVF280,Flat" and manifest.nprobe == 17
    queries = embeddings[::50]
    found = open_index(catalog, {}).search(queries, 1)
    assert [rows[0]["uri"] for rows in found] == [f"u{i}" for i in range(0, 5000, 50)]


def test_factory_by_size() -> None:
    assert factory_for(200_000) == ("IDMap2,Flat", 1)
    assert factory_for(1_000_000) == ("IVF4000,Flat", 250)


def test_nobody_sees_an_index_before_its_commit(tmp_path: Path) -> None:
    catalog = catalog_with(tmp_path, unit_vectors(5))
    encoder = OpSpec("embedding", "toy", "1")
    assert build_index(catalog, "r2", current_state(catalog, {}).images, encoder, {})
    assert open_index(catalog, {}).manifest.run_id == "r"
    publish_index(catalog, "r3", {})
    assert open_index(catalog, {}).manifest.run_id == "r3"


def test_without_an_index_or_a_catalog(tmp_path: Path) -> None:
    catalog = catalog_with(tmp_path, np.empty((0, D), np.float32))
    with pytest.raises(FileNotFoundError, match="no index in .*0 images, without embeddings"):
        open_index(catalog, {})
    with pytest.raises(ValueError, match="holds no embeddings; build it with --ops embedding"):
        publish_index(catalog, "r2", {})
    with pytest.raises(FileNotFoundError, match="no catalog at .*`beamsight build"):
        open_index(CatalogLayout(str(tmp_path / "nowhere")), {})
