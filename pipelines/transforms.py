"""Every PTransform and DoFn: wiring only. What they do is in `vlm_ops`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from pipelines import progress
from schemas.catalog import CatalogLayout
from schemas.manifests import IndexManifest, RunManifest
from schemas.samples import ShardRef
from schemas.tags import TagRecord
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.parts import PartSummary
from vlm_ops.publishing import PublishConfig, publish_index, publish_run
from vlm_ops.tag_parts import TagSummary, TagWork
from vlm_ops.tag_publishing import TagPublishConfig, publish_tags
from vlm_ops.tagging import TagConfig, tagger_of
from vlm_ops.work_lists import Stretch, WorkList, read_stretch

logger = logging.getLogger(__name__)


@dataclass
class ListedWork(beam.PTransform):
    """What there is to do, out of the file that the launcher has written.

    Input: the beginning of a pipeline. Output: whatever was listed, ShardRef or TagWork, evenly handed out. Failures: storage
    errors raise, so that the runner tries again. Shuffles the lines of the file, and nothing else is shuffled in a run.

    Args:
        work: The list.
        from_json: Makes of a line what it was.
    """

    work: WorkList
    from_json: Callable[[str], Any]
    storage_options: dict[str, Any]

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, begin: beam.pvalue.PBegin) -> beam.PCollection:
        stretches = begin | beam.Create(self.work.stretches)
        lines = stretches | beam.FlatMap(_lines, self.work.uri, self.storage_options).with_output_types(str)
        return lines | beam.Reshuffle() | beam.Map(self.from_json)


@dataclass
class EnrichShards(beam.PTransform):
    """Computes shards and writes a part file for each.

    Input: ShardRef. Output: PartSummary. Failures: rows of the parts; storage errors raise, so that
    the runner tries the shard again. Shuffles nothing.

    Args:
        config: What to compute, and where to.
        shared: What models are loaded by; a launcher that is a worker too may have loaded them.
    """

    config: EnrichConfig
    shared: Shared = field(default_factory=Shared)

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, shards: beam.PCollection) -> beam.PCollection:
        return shards | beam.ParDo(EnrichShardDoFn(self.config, self.shared))


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
        self.shards_reused.inc(int(summary.run_id != run_id))
        yield summary


@dataclass
class PublishRun(beam.PTransform):
    """Indexes and commits all parts of a run at once, or refuses to.

    Input: PartSummary. Output: one RunManifest. Gathers the summaries in one place.

    Args:
        config: The run.
    """

    config: PublishConfig

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, parts: beam.PCollection) -> beam.PCollection:
        return parts | beam.combiners.ToList() | beam.Map(_publish, self.config)


@dataclass
class PublishIndex(beam.PTransform):
    """Makes the index of a catalog anew.

    Input: the run's id. Output: IndexManifest.

    Args:
        catalog: Root URI.
    """

    catalog: str
    storage_options: dict[str, Any]

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, run_ids: beam.PCollection) -> beam.PCollection:
        return run_ids | beam.Map(_index, self.catalog, self.storage_options)


@dataclass
class TagParts(beam.PTransform):
    """Tags parts of the images and writes a part of the tags for each.

    Input: TagWork. Output: TagSummary. Failures: none of single images; storage errors raise, so that the runner
    tries the part again. Shuffles nothing.

    Args:
        config: What to say, and where to.
    """

    config: TagConfig

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, work: beam.PCollection) -> beam.PCollection:
        return work | beam.ParDo(TagPartDoFn(self.config, Shared()))


class TagPartDoFn(beam.DoFn):
    """One part an element. Rules and models are loaded once a process and shared by its threads."""

    def __init__(self, config: TagConfig, shared: Shared) -> None:
        self.config = config
        self.shared = shared
        self.images = Metrics.counter("beamsight", "images_tagged")

    def setup(self) -> None:
        self.tagger = self.shared.acquire(lambda: tagger_of(self.config))

    def process(self, element: TagWork) -> Iterator[TagSummary]:
        summary = self.tagger.tag(element)
        self.images.inc(summary.num_rows)
        yield summary


@dataclass
class PublishTags(beam.PTransform):
    """Commits all parts of the tags at once.

    Input: TagSummary. Output: one TagRecord. Gathers the summaries in one place.

    Args:
        config: The run.
    """

    config: TagPublishConfig

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, parts: beam.PCollection) -> beam.PCollection:
        return parts | beam.combiners.ToList() | beam.Map(_publish_tags, self.config)


def _lines(stretch: Stretch, uri: str, storage_options: dict[str, Any]) -> Iterator[str]:
    return read_stretch(uri, stretch, storage_options)


def _publish(summaries: list[PartSummary], config: PublishConfig) -> RunManifest:
    return publish_run(config, summaries)


def _index(run_id: str, catalog: str, storage_options: dict[str, Any]) -> IndexManifest:
    return publish_index(CatalogLayout(catalog), run_id, storage_options)


def _publish_tags(summaries: list[TagSummary], config: TagPublishConfig) -> TagRecord:
    return publish_tags(config, summaries)
