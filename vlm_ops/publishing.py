"""The end of a run: decide whether its parts may be published, publish them, say what happened."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from schemas.catalog import RUN_MANIFEST, RUN_METRICS, CatalogLayout
from schemas.manifests import IndexManifest, RunManifest
from schemas.recipes import Recipe
from schemas.samples import SHARD_DAMAGE, to_json
from vlm_ops import storage
from vlm_ops.delta_tables import conflict
from vlm_ops.duplicates import with_true_firsts
from vlm_ops.faiss_index import build_index, read_index_manifest
from vlm_ops.ops import schema_of
from vlm_ops.parts import PartSummary
from vlm_ops.states import (
    CatalogState,
    Commit,
    Gone,
    StateParts,
    check_state_is_there,
    commit_parts,
    count_changes,
    existing_state,
    new_record,
    parts_after,
    state_before,
)

logger = logging.getLogger(__name__)

_NUM_EXAMPLES = 10


@dataclass(frozen=True)
class PublishConfig:
    """What the commit needs to know; travels pickled.

    Attributes:
        action: `build` or `retry`.
        gone: What leaves the catalog with this run.
        sequence: Of the state that the run was planned from; where the catalog has another one by now, the run
            publishes nothing.
        max_failure_rate: A larger share of failures publishes nothing; None publishes whatever failed.
    """

    catalog: str
    recipe: Recipe
    run_id: str
    action: str
    started_at: str
    inputs: tuple[str, ...]
    gone: Gone
    sequence: int
    max_failure_rate: float | None
    storage_options: dict[str, object] = field(default_factory=dict)


def failure_rate(summaries: Sequence[PartSummary], num_lost: int = 0) -> float:
    """Share of images that failed, or of shards of which nothing could be read, where that is larger.

    An unreadable shard is one failure, but loses an unknown number of images; so shards count too.

    Args:
        num_lost: Images that the catalog has and that a damaged shard gives no more.
    """
    num_failed = num_lost + sum(summary.num_failed_images for summary in summaries)
    num_images = sum(summary.num_images for summary in summaries)
    num_unreadable = sum(summary.is_unreadable for summary in summaries)
    of_images = num_failed / max(num_failed + num_images, 1)
    return max(of_images, num_unreadable / max(len(summaries), 1))


def publish_run(config: PublishConfig, summaries: Sequence[PartSummary]) -> RunManifest:
    """Makes the index of what the catalog is going to hold, commits both at once, and writes the run's
    manifest; or publishes nothing, where too many images failed. Doing it twice does nothing more: a runner tries again
    what it has not heard the end of.

    Raises:
        CommitConflictError: Another run committed at the same time.
    """
    catalog = CatalogLayout(config.catalog)
    state, commit = state_before(catalog, config.run_id, config.storage_options)
    summaries = sorted(summaries, key=lambda summary: summary.name)
    num_fewer = _num_fewer(summaries, state)
    if config.action == "retry":  # takes no image away
        _drop(catalog, [summary.name for summary in summaries if num_fewer[summary.name]], config.storage_options)
        summaries = [summary for summary in summaries if not num_fewer[summary.name]]
    damaged = [summary for summary in summaries if not SHARD_DAMAGE.isdisjoint(summary.num_failures)]
    num_lost = sum(num_fewer[summary.name] for summary in damaged)
    rate = failure_rate(summaries, num_lost)
    is_refused = config.max_failure_rate is not None and rate > config.max_failure_rate
    if commit is None and not is_refused:
        commit = _publish(catalog, config, state, summaries)
    manifest = _manifest(config, summaries, rate, num_lost, commit)
    metrics = {
        "status": manifest.status,
        "images": manifest.num_images,
        "images_copied": manifest.num_images_copied,
        "images_added": manifest.num_added,
        "images_changed": manifest.num_changed,
        "images_removed": manifest.num_removed,
        "images_per_sec": round(manifest.num_images_computed / max(manifest.wall_sec, 1e-3), 2),
        "failed_images": manifest.num_failed_images,
        "lost_images": manifest.num_lost_images,
        "failure_rate": manifest.failure_rate,
        "failures": manifest.num_failures,
        "shards": manifest.num_shards,
        "shards_reused": manifest.num_shards_reused,
        "bytes_read": manifest.num_bytes_read,
        "stage_sec": manifest.stage_sec,
        "wall_sec": manifest.wall_sec,
    }
    options = config.storage_options
    storage.write_bytes(catalog.run_file(config.run_id, RUN_METRICS), to_json(metrics).encode(), options)
    storage.write_bytes(catalog.run_file(config.run_id, RUN_MANIFEST), manifest.to_json().encode(), options)
    return manifest


def publish_index(catalog: CatalogLayout, run_id: str, storage_options: storage.StorageOptions) -> IndexManifest:
    """Makes the index of the catalog's current state anew, and commits it.

    Raises:
        FileNotFoundError: There is no catalog.
        ValueError: The catalog holds no embeddings.
        CommitConflictError: Another run committed at the same time.
    """
    state = existing_state(catalog, storage_options)
    assert state.record is not None
    if state.record.run_id == run_id:  # a runner tries again what has been done
        return read_index_manifest(catalog, run_id, storage_options)
    encoder = state.record.recipe.encoder
    manifest = encoder and build_index(catalog, run_id, state.images, encoder, storage_options)
    if not manifest:
        raise ValueError(f"the catalog {catalog.root} holds no embeddings; build it with --ops embedding among them")
    parts = StateParts(state.images, state.failures)
    record = new_record(run_id, "index", state.record.recipe, run_id, parts)
    commit_parts(catalog, state, parts, record, storage_options)
    return manifest


def _num_fewer(summaries: Sequence[PartSummary], state: CatalogState) -> dict[str, int]:
    """By part, how many images its shard gave fewer than the catalog has of it."""
    before: Counter[str | None] = Counter()
    for part in state.images:
        before[part.location_id] += 0 if part.is_packed else part.num_rows
    return {each.name: max(before[each.images.location_id] - each.num_images, 0) for each in summaries}


def _drop(catalog: CatalogLayout, names: Sequence[str], storage_options: storage.StorageOptions) -> None:
    """Takes back parts of a retry, so that the next one does not find them."""
    if names:
        logger.warning(
            "%d shards gave fewer images than the catalog has of them, and are left as they are: %s",
            len(names),
            names[:5],
        )
    for name in names:
        storage.remove(f"{catalog.images}/{name}", storage_options)


def _publish(
    catalog: CatalogLayout, config: PublishConfig, state: CatalogState, summaries: Sequence[PartSummary]
) -> Commit:
    options = config.storage_options
    if state.sequence != config.sequence:
        raise conflict(catalog.images, f"{state.sequence - config.sequence} commits since this run began")
    parts = parts_after(catalog, state, summaries, config.gone, options)
    check_state_is_there(catalog, state, parts, options)  # for the index; at the commit once more
    parts = replace(parts, images=with_true_firsts(catalog, parts.images, options))
    has_same_images = set(parts.images) == set(state.images)
    if state.commit and has_same_images and set(parts.failures) == set(state.failures):
        return state.commit
    index = state.record.index if state.record else None
    encoder = config.recipe.encoder
    if not has_same_images:
        logger.info("publishing: index and tables of %d images", sum(part.num_rows for part in parts.images))
        made = build_index(catalog, config.run_id, parts.images, encoder, options) if encoder else None
        index = made.run_id if made else None
    changes = count_changes(catalog, state.images, parts.images, options)
    record = new_record(config.run_id, config.action, config.recipe, index, parts, changes)
    return commit_parts(catalog, state, parts, record, options, schema_of(config.recipe.ops))


def _manifest(
    config: PublishConfig, summaries: Sequence[PartSummary], rate: float, num_lost: int, commit: Commit | None
) -> RunManifest:
    started = datetime.fromisoformat(config.started_at)
    finished = datetime.now(UTC)
    computed = [summary for summary in summaries if summary.run_id == config.run_id]
    record = commit.record if commit and commit.record.run_id == config.run_id else None
    return RunManifest(
        run_id=config.run_id,
        action=config.action,
        status="committed" if commit else "refused",
        started_at=config.started_at,
        finished_at=finished.isoformat(timespec="seconds"),
        recipe=config.recipe,
        inputs=config.inputs,
        table_version=commit.version if commit else -1,
        num_shards=len(summaries),
        num_shards_reused=len(summaries) - len(computed),
        num_images=sum(summary.num_images for summary in summaries),
        num_images_computed=sum(summary.num_images - summary.num_copied for summary in computed),
        num_images_copied=sum(summary.num_copied for summary in computed),
        num_failed_images=sum(summary.num_failed_images for summary in summaries),
        num_lost_images=num_lost,
        num_failures=dict(_total(summary.num_failures for summary in summaries)),
        failure_rate=rate,
        examples=tuple(text for summary in summaries for text in summary.examples)[:_NUM_EXAMPLES],
        sample_parts=tuple(part.name for part in computed if part.num_images)[:_NUM_EXAMPLES],
        parts=() if commit else tuple(part.name for part in summaries),
        num_bytes_read=sum(summary.source_num_bytes for summary in computed),
        num_added=record.num_added if record else 0,
        num_changed=record.num_changed if record else 0,
        num_removed=record.num_removed if record else 0,
        stage_sec=_stages(computed),
        wall_sec=round((finished - started).total_seconds(), 3),
        beamsight_version=installed_version(),
    )


def installed_version() -> str:
    try:
        return version("beamsight")
    except PackageNotFoundError:
        return "not installed"


def _stages(computed: Sequence[PartSummary]) -> dict[str, float]:
    """Thread-seconds of what this run computed itself."""
    total = _total(summary.stage_sec for summary in computed)
    return {stage: round(seconds, 3) for stage, seconds in total.items()}


def _total(counts: Iterable[Mapping[str, Any]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total
