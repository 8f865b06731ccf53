"""One run over a plan: the pipeline of `build` and `retry`, what it says at the end, and its exit code."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import apache_beam as beam
from apache_beam.utils.shared import Shared

from pipelines.dataflow_jobs import LostJobError
from pipelines.jobs import run_to_end
from pipelines.options import BuildOptions, RetryOptions, model_settings
from pipelines.progress import Progress, watching
from pipelines.runners import beam_options
from pipelines.transforms import EnrichShards, ListedWork, PublishRun
from schemas.catalog import RUN_CONTENTS, RUN_MANIFEST, RUN_REPORT, RUN_WORK, CatalogLayout
from schemas.manifests import RunManifest
from schemas.recipes import Recipe
from schemas.samples import ShardRef
from vlm_ops import storage
from vlm_ops.contents import write_known_contents
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.pages import write_run_report
from vlm_ops.planning import Plan, rows_leaving
from vlm_ops.publishing import PublishConfig
from vlm_ops.run_manifests import new_run_id, read_manifest
from vlm_ops.shards import ReadConfig
from vlm_ops.states import CatalogState
from vlm_ops.work_lists import write_work_list

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_TOO_MANY_FAILURES = 0, 3


@dataclass(frozen=True)
class Run:
    """What is to be done, where, and how.

    Attributes:
        options: Where and how: device, batch size, runner, workers and flags of Beam.
        action: `build` or `retry`.
        inputs: What a person named as inputs.
        prune: Whether what the plan found gone leaves the catalog.
        max_failure_rate: As in PublishConfig.
    """

    options: BuildOptions | RetryOptions
    catalog: CatalogLayout
    recipe: Recipe
    action: str
    plan: Plan
    read: ReadConfig
    inputs: tuple[str, ...]
    prune: bool
    max_failure_rate: float | None


def execute(run: Run, state: CatalogState) -> int:
    """Computes, publishes, and says what happened.

    Args:
        state: What the catalog holds now.

    Returns:
        The exit code: 0, or 3 when too many images failed and nothing was published.
    """
    how, options = run.options, dict(run.read.storage_options)
    run_id = new_run_id()
    started = time.perf_counter()
    known = _write_known_contents(run, state, run_id)
    work = write_work_list(run.catalog.run_file(run_id, RUN_WORK), run.plan.shards, options)
    enrich = EnrichConfig(
        run.catalog.root, run.recipe, run_id, run.read, model_settings(how), how.batch_size, how.num_threads, known
    )
    publish = PublishConfig(
        catalog=run.catalog.root,
        recipe=run.recipe,
        run_id=run_id,
        action=run.action,
        started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        inputs=run.inputs,
        gone=run.plan.leaving(run.prune),
        sequence=state.sequence,
        max_failure_rate=run.max_failure_rate,
        storage_options=options,
    )
    enricher = Shared()
    is_running_on = False
    try:
        pipeline = beam.Pipeline(options=beam_options(run.action, how))
        shards = pipeline | "Shards" >> ListedWork(work, ShardRef.from_json, options)
        _ = shards | "Enrich" >> EnrichShards(enrich, enricher) | "Publish" >> PublishRun(publish)
        # A model that cannot be loaded is a mistake of the command, and known before any work where that is done here.
        _loaded = enricher.acquire(lambda: Enricher(enrich)) if how.runner == "local" and run.plan.shards else None
        with _progress(run, run_id):
            is_running_on = run_to_end(pipeline) is None
    except LostJobError:
        is_running_on = True
        raise
    finally:
        for uri in (known, work.uri):
            if uri and not is_running_on:
                storage.remove(uri, options)
    if is_running_on:
        return EXIT_OK
    try:
        manifest = read_manifest(run.catalog, run_id, options)
    except FileNotFoundError as error:
        place = run.catalog.run_file(run_id, RUN_MANIFEST)
        raise RuntimeError(
            f"the job has ended well, but {place} is not there: did its workers write elsewhere?"
        ) from error
    write_run_report(run.catalog, manifest, options)
    if manifest.status == "refused":
        print(refusal(manifest, run.catalog, run.max_failure_rate), file=sys.stderr)
        return EXIT_TOO_MANY_FAILURES
    print(summary(manifest, run.catalog, time.perf_counter() - started))
    return EXIT_OK


def _progress(run: Run, run_id: str) -> AbstractContextManager[Any]:
    """Of images, where they are computed in this process; elsewhere of shards, by their parts."""
    if run.options.runner == "local":
        return Progress(run_id, run.plan.shards, title=run.action)
    names = [shard.part_name(run.recipe.recipe_id) for shard in run.plan.shards]
    images, options = run.catalog.images, run.read.storage_options
    return watching(run.action, dict.fromkeys(names, 1), lambda: storage.names_in(images, options), "shard")


def refusal(manifest: RunManifest, catalog: CatalogLayout, max_failure_rate: float | None) -> str:
    """What a person is told when too many images failed."""
    lost = f", {manifest.num_lost_images} lost with damaged shards" if manifest.num_lost_images else ""
    return (
        f"beamsight: nothing was published: {manifest.failure_rate:.1%} failed "
        f"({manifest.num_failed_images} failed{lost}, {manifest.num_images} good), more than --max_failure_rate {max_failure_rate:g}\n"
        f"  reasons: {manifest.reasons}\n"
        + "".join(f"  {example}\n" for example in manifest.examples)
        + "  Mend the input, or allow more with --max_failure_rate, and run the same command again: what is good is kept, "
        "what failed is tried again.\n"
        f"  report: {catalog.run_file(manifest.run_id, RUN_REPORT)}"
    )


def summary(manifest: RunManifest, catalog: CatalogLayout, wall_sec: float) -> str:
    """What a person is told at the end."""
    parts = [f"shards: {manifest.num_shards}"]
    if manifest.num_shards_reused:
        parts[0] += f", {manifest.num_shards_reused} of them finished by an earlier run"
    if manifest.num_images_copied:
        parts.append(f"copied from the same bytes: {manifest.num_images_copied}")
    lines = [
        f"catalog    {catalog.root}",
        f"images     {manifest.num_images} ({'; '.join(parts)})",
        f"changes    {manifest.num_added} added, {manifest.num_changed} changed, {manifest.num_removed} removed",
        f"failures   {manifest.reasons}",
    ]
    if manifest.num_images_computed:
        rate = manifest.num_images_computed / max(wall_sec, 1e-6)
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in manifest.stages)
        lines += [f"speed      {rate:.1f} images/s, {wall_sec:.1f} s", f"stages     {stages} (thread-seconds)"]
    return "\n".join([*lines, f"report     {catalog.run_file(manifest.run_id, RUN_REPORT)}"])


def _write_known_contents(run: Run, state: CatalogState, run_id: str) -> str | None:
    """The file in which workers look for images whose bytes the catalog has already; None where there can be none."""
    live = [part for part in state.images if part.recipe_id == run.recipe.recipe_id]
    parts = [*live, *run.plan.uncommitted]
    if not run.plan.shards or not any(part.num_rows for part in parts):
        return None
    uri = run.catalog.run_file(run_id, RUN_CONTENTS)
    logger.info(
        "bytes that are known are copied: reading the hashes of %d images", sum(part.num_rows for part in parts)
    )
    write_known_contents(uri, run.catalog.images, parts, run.read.storage_options, rows_leaving(run.plan, run.prune))
    return uri
