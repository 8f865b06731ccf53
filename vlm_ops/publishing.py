"""The end of a run: decide whether its parts may be published, publish them, say what happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from schemas.catalog import RUN_MANIFEST, RUN_METRICS, CatalogLayout
from schemas.manifests import RunManifest
from schemas.recipes import Recipe
from schemas.samples import to_json
from vlm_ops import storage
from vlm_ops.delta_tables import commit_parts
from vlm_ops.ops import schema_of
from vlm_ops.parts import PartSummary

_NUM_EXAMPLES = 10


@dataclass(frozen=True)
class PublishConfig:
    """What the commit needs to know; travels pickled."""

    catalog: str
    recipe: Recipe
    run_id: str
    started_at: str
    inputs: tuple[str, ...]
    max_failure_rate: float
    storage_options: dict[str, object] = field(default_factory=dict)


def failure_rate(summaries: Sequence[PartSummary]) -> float:
    """Share of images that failed, or of shards of which nothing could be read, where that is larger.

    An unreadable shard is one failure, but loses an unknown number of images; so shards count too.
    """
    num_failed = sum(summary.num_failed_images for summary in summaries)
    num_images = sum(summary.num_images for summary in summaries)
    num_unreadable = sum(summary.is_unreadable for summary in summaries)
    of_images = num_failed / max(num_failed + num_images, 1)
    return max(of_images, num_unreadable / max(len(summaries), 1))


def publish_run(config: PublishConfig, summaries: Sequence[PartSummary]) -> RunManifest:
    """Commits the parts of a run, unless too many images failed, and writes the run's manifest.

    Raises:
        CommitConflictError: Another run committed at the same time.
    """
    catalog = CatalogLayout(config.catalog)
    summaries = sorted(summaries, key=lambda summary: summary.name)
    rate = failure_rate(summaries)
    refused = rate > config.max_failure_rate
    table_version = -1
    if not refused:
        schema = schema_of(config.recipe.ops)
        table_version = commit_parts(catalog, schema, summaries, config.run_id, config.recipe, config.storage_options)
    started = datetime.fromisoformat(config.started_at)
    finished = datetime.now(timezone.utc)
    manifest = RunManifest(
        run_id=config.run_id,
        status="refused" if refused else "committed",
        started_at=config.started_at,
        finished_at=finished.isoformat(timespec="seconds"),
        recipe=config.recipe,
        inputs=config.inputs,
        table_version=table_version,
        num_shards=len(summaries),
        num_shards_reused=sum(summary.is_reused for summary in summaries),
        num_images=sum(summary.num_images for summary in summaries),
        num_images_computed=sum(summary.num_images for summary in summaries if not summary.is_reused),
        num_failed_images=sum(summary.num_failed_images for summary in summaries),
        num_failures=dict(_total(summary.num_failures for summary in summaries)),
        failure_rate=rate,
        examples=tuple(text for summary in summaries for text in summary.examples)[:_NUM_EXAMPLES],
        sample_parts=tuple(part.name for part in summaries if part.num_images and not part.is_reused)[:_NUM_EXAMPLES],
        stage_sec=_stages(summaries),
        wall_sec=round((finished - started).total_seconds(), 3),
        beamsight_version=installed_version(),
    )
    metrics = {
        "images": manifest.num_images,
        "images_per_sec": round(manifest.num_images_computed / max(manifest.wall_sec, 1e-3), 2),
        "failed_images": manifest.num_failed_images,
        "failure_rate": manifest.failure_rate,
        "failures": manifest.num_failures,
        "shards": manifest.num_shards,
        "shards_reused": manifest.num_shards_reused,
        "stage_sec": manifest.stage_sec,
        "wall_sec": manifest.wall_sec,
    }
    options = config.storage_options
    storage.write_bytes(catalog.run_file(config.run_id, RUN_METRICS), to_json(metrics).encode(), options)
    storage.write_bytes(catalog.run_file(config.run_id, RUN_MANIFEST), manifest.to_json().encode(), options)
    return manifest


def read_manifest(catalog: CatalogLayout, run_id: str, storage_options: storage.StorageOptions) -> RunManifest:
    return RunManifest.from_json(storage.read_bytes(catalog.run_file(run_id, RUN_MANIFEST), storage_options).decode())


def installed_version() -> str:
    try:
        return version("beamsight")
    except PackageNotFoundError:
        return "not installed"


def _stages(summaries: Sequence[PartSummary]) -> dict[str, float]:
    """Thread-seconds of what this run computed itself."""
    total = _total(summary.stage_sec for summary in summaries if not summary.is_reused)
    return {stage: round(seconds, 3) for stage, seconds in total.items()}


def _total(counts: Iterable[Mapping[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total
