"""Paths of a catalog, and the names of parts there and back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schemas.catalog import (
    INDEX_MANIFEST,
    RUN_REPORT,
    CatalogLayout,
    PartName,
    is_data_file,
    parse_part_name,
    part_name,
)
from schemas.samples import FileRef, ShardRef

RECIPE_ID = "0123456789ab"


def test_layout() -> None:
    catalog = CatalogLayout("s3://photos/catalog")
    assert catalog.images == "s3://photos/catalog/images"
    assert catalog.failures == "s3://photos/catalog/failures"
    assert catalog.index_file("r1", INDEX_MANIFEST) == "s3://photos/catalog/indexes/r1/manifest.json"
    assert catalog.run_file("r1", RUN_REPORT) == "s3://photos/catalog/runs/r1/report.html"


@pytest.mark.parametrize(
    ("shard", "is_packed"),
    [
        (ShardRef("/a.tar", "tar", "v", 1), False),
        (ShardRef("/a.parquet", "parquet", "v", 1), False),
        (ShardRef("/a", "files", "", 1, (FileRef("/a/b.jpg"),)), True),
    ],
)
def test_part_names_there_and_back(shard: ShardRef, is_packed: bool) -> None:
    parsed = parse_part_name(part_name(shard.shard_id, RECIPE_ID))
    assert parsed is not None and parsed.is_packed is is_packed
    assert parsed.location_id == shard.location_id and parsed.recipe_id == RECIPE_ID
    assert shard.shard_id == parsed.shard_id == f"{parsed.location_id}-{parsed.content_id}"
    revised = parse_part_name(replace(shard, revision="0a1b2c3d").part_name(RECIPE_ID))
    assert revised == replace(parsed, revision="0a1b2c3d") and revised.shard_id == parsed.shard_id


@pytest.mark.parametrize(
    "name",
    ["", "part-0.parquet", f"part-x{'0' * 16}-{'0' * 12}-{RECIPE_ID}.parquet", f".part-s{'0' * 16}.parquet.tmp"],
)
def test_foreign_names_are_nobodys_parts(name: str) -> None:
    assert parse_part_name(name) is None


def test_what_a_part_name_tells() -> None:
    name = f"part-s{'0' * 16}-{'1' * 12}-{RECIPE_ID}.parquet"
    assert parse_part_name(name) == PartName(f"s{'0' * 16}", "1" * 12, RECIPE_ID)


@pytest.mark.parametrize("name", ["contents.arrow", "work.jsonl.gz"])
def test_what_a_killed_run_leaves_may_be_deleted(name: str) -> None:
    run = "runs/20261123T144022360-56a9d1"
    assert is_data_file(f"{run}/{name}") and is_data_file(f"{run}/.{name}.0123abcd.tmp")
    assert not is_data_file(f"{run}/manifest.json") and not is_data_file(f"runs/of-somebody/{name}")
