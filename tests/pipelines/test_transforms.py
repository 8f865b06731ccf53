"""The Beam wiring on its own."""

from __future__ import annotations

from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing.test_pipeline import TestPipeline
from apache_beam.testing.util import assert_that, equal_to

from pipelines.transforms import EnrichShards, ListedWork, PublishIndex, PublishRun
from schemas.recipes import Recipe
from schemas.samples import FileRef, ShardRef, digest
from tests.conftest import jpeg, tar_bytes
from vlm_ops.enrich import EnrichConfig
from vlm_ops.models.settings import CPU
from vlm_ops.ops import plan_ops
from vlm_ops.publishing import PublishConfig
from vlm_ops.shards import ReadConfig
from vlm_ops.states import Gone
from vlm_ops.work_lists import write_work_list

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


def shards_of(count: int) -> list[ShardRef]:
    return [ShardRef(f"s3://photos/{number:06}.tar", "tar", digest(str(number)), number) for number in range(count)]


def test_listed_work_comes_as_it_was(tmp_path: Path) -> None:
    pack = ShardRef("/photos", "files", "", 7, (FileRef("/photos/\udcff.jpg", "1", 7),), attempts={"/photos/a.jpg": 2})
    work = write_work_list(str(tmp_path / "work"), [*shards_of(9), pack], {})
    with TestPipeline() as pipeline:
        shards = pipeline | ListedWork(work, ShardRef.from_json, {})
        assert_that(shards | beam.Map(lambda shard: shard), equal_to([*shards_of(9), pack]))


def test_no_work_is_published_too(tmp_path: Path) -> None:
    """A run that only removes has no shards."""
    work = write_work_list(str(tmp_path / "work"), [], {})
    config = PublishConfig(str(tmp_path / "c"), RECIPE, "r", "build", "2026-01-01T00:00:00+00:00", (), Gone(), 0, 0.0)
    with TestPipeline() as pipeline:
        shards = pipeline | ListedWork(work, ShardRef.from_json, {})
        runs = shards | EnrichShards(EnrichConfig(str(tmp_path / "c"), RECIPE, "r", ReadConfig(10**7), settings=CPU))
        assert_that(runs | PublishRun(config) | beam.Map(lambda run: run.num_shards), equal_to([0]))


def test_the_pipeline_does_not_grow_with_the_work(tmp_path: Path) -> None:
    """Its description is sent to a service that limits its size, and to each worker."""
    sizes = []
    for count in (1, 20_000):
        work = write_work_list(str(tmp_path / str(count)), shards_of(count), {})
        pipeline = beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"]))
        config = EnrichConfig(str(tmp_path), RECIPE, "r", ReadConfig(10**7), settings=CPU)
        _ = pipeline | ListedWork(work, ShardRef.from_json, {}) | EnrichShards(config)
        sizes.append(len(pipeline.to_runner_api().SerializeToString()))
    assert sizes[0] < 50_000 and sizes[1] - sizes[0] < 10_000
