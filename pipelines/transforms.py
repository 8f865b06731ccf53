"""Every PTransform and DoFn: wiring only. What they do is in `vlm_ops`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.utils.shared import Shared

from pipelines import progress
from pipelines.runners import run_to_end
from schemas.catalog import CatalogLayout
from schemas.manifests import IndexManifest, RunManifest
from schemas.recipes import Recipe
from schemas.samples import ShardRef
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.faiss_index import build_index
from vlm_ops.parts import PartSummary
from vlm_ops.publishing import PublishConfig, publish_run

logger = logging.getLogger(__name__)


@dataclass
class EnrichShards(beam.PTransform):
    """Computes shards and writes a part file for each.

    Input: ShardRef. Output: PartSummary. Failures: rows of the parts; storage errors raise, so that
    the runner tries the shard again. Shuffles the references, and nothing else.

    Args:
        config: What to compute, and where to.
    """

    config: EnrichConfig

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        return shards | beam.Reshuffle() | beam.ParDo(EnrichShardDoFn(self.config, Shared()))


class EnrichShardDoFn(beam.DoFn):
    """One shard an element. Models are loaded once a process and shared by its threads."""

    def __init__(self, config: EnrichConfig, shared: Shared) -> None:
        self.config = config
        self.shared = shared
        self.images = Metrics.counter("beamsight", "images")
        self.failed_images = Metrics.counter("beamsight", "failed_images")
        self.shards_reused = Metrics.counter("beamsight", "shards_reused")

    def setup(self) -> None:
        self.enricher = self.shared.acquire(lambda: Enricher(self.config))

    def process(self, element: ShardRef) -> Iterator[PartSummary]:
        run_id = self.config.run_id
        try:
            summary = self.enricher.enrich(element, lambda images, size: progress.report(run_id, element, images, size))
        except Exception as error:
            # The type stays what it is, and the message says where: the runner shows nothing else.
            logger.error("shard %s: %s: %s", element.uri, type(error).__name__, error)
            raise
        progress.report_finished(run_id, element, summary.num_images)
        self.images.inc(summary.num_images)
        self.failed_images.inc(summary.num_failed_images)
        self.shards_reused.inc(int(summary.is_reused))
        yield summary


@dataclass
class PublishRun(beam.PTransform):
    """Commits all parts of a run at once, or refuses to.

    Input: PartSummary. Output: one RunManifest. Gathers the summaries in one place.

    Args:
        config: The run.
    """

    config: PublishConfig

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, parts: beam.PCollection) -> beam.PCollection:
        return parts | beam.combiners.ToList() | beam.Map(_publish, self.config)


@dataclass(frozen=True)
class IndexConfig:
    """Which catalog to index, by which encoder; travels pickled."""

    catalog: str
    encoder: str
    encoder_revision: str
    storage_options: dict[str, Any] = field(default_factory=dict)


@dataclass
class WriteIndex(beam.PTransform):
    """Makes an index of the catalog for each element that says it has been committed.

    Input: RunManifest, or None for a catalog that is there already. Output: IndexManifest.
    """

    config: IndexConfig

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, runs: beam.PCollection) -> beam.PCollection:
        return runs | beam.Filter(_is_committed) | beam.Map(_index, self.config)


def index_config(catalog: str, recipe: Recipe, storage_options: dict[str, Any]) -> IndexConfig | None:
    """How a catalog of this recipe is indexed; None where it holds no embeddings."""
    embedding = recipe.op("embedding")
    if embedding is None or embedding.model is None or embedding.revision is None:
        return None
    return IndexConfig(catalog, embedding.model, embedding.revision, storage_options)


def write_index(config: IndexConfig, options: PipelineOptions) -> None:
    """Indexes a catalog that is there already, in a pipeline of its own."""
    pipeline = beam.Pipeline(options=options)
    _ = pipeline | beam.Create([None]) | WriteIndex(config)
    run_to_end(pipeline)


def _publish(summaries: list[PartSummary], config: PublishConfig) -> RunManifest:
    return publish_run(config, summaries)


def _is_committed(run: RunManifest | None) -> bool:
    return run is None or run.status == "committed"


def _index(run: RunManifest | None, config: IndexConfig) -> IndexManifest:
    return build_index(CatalogLayout(config.catalog), config.encoder, config.encoder_revision, config.storage_options)
