"""The Beam wiring on its own."""

from __future__ import annotations

from pathlib import Path

import apache_beam as beam
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to

from pipelines.transforms import EnrichShards, PublishIndex, PublishRun
from schemas.recipes import Recipe
from schemas.samples import ShardRef
from tests.conftest import jpeg, tar_bytes
from vlm_ops.enrich import EnrichConfig
from vlm_ops.models.settings import CPU
from vlm_ops.ops import plan_ops
from vlm_ops.publishing import PublishConfig
from vlm_ops.shards import ReadConfig
from vlm_ops.states import Gone

RECIPE = Recipe(plan_ops(["embedding"], "python:tests.toys"), 10**7, 10**7)


def test_shards_become_parts_a_run_and_an_index(tmp_path: Path) -> None:
    shards = []
    for number in range(3):
        data = tar_bytes([(f"{i}.jpg", jpeg(i)) for i in range(number + 1)])
        (tmp_path / f"{number}.tar").write_bytes(data)
        shards.append(ShardRef(str(tmp_path / f"{number}.tar"), "tar", "1", len(data)))
    catalog = str(tmp_path / "catalog")
    enrich = EnrichConfig(catalog, RECIPE, "r", ReadConfig(10**7), settings=CPU)
    publish = PublishConfig(catalog, RECIPE, "r", "build", "2026-01-01T00:00:00+00:00", ("in",), Gone(), 0, 0.0)
    with TestPipeline() as pipeline:
        parts = pipeline | beam.Create(shards) | EnrichShards(enrich)
        runs = parts | PublishRun(publish)
        indexes = runs | "again" >> beam.Map(lambda run: run.run_id + "-again") | PublishIndex(catalog, {})
        assert_that(parts | beam.Map(lambda part: part.num_images), equal_to([1, 2, 3]), label="parts")
        assert_that(
            runs | beam.Map(lambda run: (run.status, run.num_images)), equal_to([("committed", 6)]), label="runs"
        )
        assert_that(indexes | "ntotal" >> beam.Map(lambda index: index.ntotal), equal_to([6]), label="indexes")
