"""`beamsight build`: from images to a catalog that can be searched.

Plan (launcher): list the inputs, leave out what the catalog has. Work (runner): a part file a shard.
Publish (runner, once): one transaction, one index.
"""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone

import apache_beam as beam

from pipelines.options import BuildOptions, input_config, read_config, recipe_of
from pipelines.progress import Progress
from pipelines.runners import beam_options, run_to_end
from pipelines.transforms import EnrichShards, PublishRun, WriteIndex, index_config, write_index
from schemas.catalog import RUN_REPORT, CatalogLayout, part_name
from schemas.manifests import RunManifest
from schemas.recipes import Recipe
from schemas.samples import ShardRef, clean_text
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, live_parts, open_table, read_columns
from vlm_ops.enrich import EnrichConfig
from vlm_ops.faiss_index import newest_manifest
from vlm_ops.inputs import Listing, list_inputs, pack
from vlm_ops.models import resolve_device
from vlm_ops.ops import default_ops, plan_ops
from vlm_ops.pages import write_run_report
from vlm_ops.publishing import PublishConfig, read_manifest

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_TOO_MANY_FAILURES = 0, 3


@dataclass(frozen=True)
class BuildPlan:
    """What there is to do.

    Attributes:
        recipe: What is computed for every image.
        shards: The work.
        num_kept: Shards and single files that the catalog has already.
    """

    recipe: Recipe
    shards: tuple[ShardRef, ...]
    num_kept: int


def run(options: BuildOptions) -> int:
    """Runs a build.

    Returns:
        The exit code: 0, or 3 when too many images failed and nothing was published.

    Raises:
        ValueError, FileNotFoundError: A mistake in the options, found before any work.
    """
    resolve_device(options.device)
    catalog = CatalogLayout(storage.normalise(options.catalog))
    storage.check_writable(catalog.root, options.storage_options)
    plan = plan_build(options, catalog)
    run_id = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    if not plan.shards:
        return _finish_up_to_date(options, catalog, plan)
    num_files = sum(len(shard.files) for shard in plan.shards)
    num_shards = sum(shard.format != "files" for shard in plan.shards)
    logger.info(
        "run %s: to do: %d shard files, %d single files; kept: %d", run_id, num_shards, num_files, plan.num_kept
    )
    started = time.perf_counter()
    with Progress(run_id, plan.shards):
        _run_pipeline(options, catalog, plan, run_id)
    manifest = read_manifest(catalog, run_id, options.storage_options)
    if manifest.status == "refused":
        print(refusal(manifest, options.max_failure_rate), file=sys.stderr)
        return EXIT_TOO_MANY_FAILURES
    write_run_report(catalog, manifest, options.storage_options)
    print(summary(manifest, catalog, time.perf_counter() - started))
    return EXIT_OK


def plan_build(options: BuildOptions, catalog: CatalogLayout) -> BuildPlan:
    """Checks the options against the inputs and the catalog, and finds the work.

    Raises:
        ValueError: An op, model or format is wrong, or the catalog has another recipe.
        FileNotFoundError: A pattern matches nothing.
    """
    recipe = recipe_of(options, plan_ops(options.ops or default_ops(options.model), options.model))
    listing = list_inputs(input_config(options, options.input))
    live = live_parts(open_table(catalog.images, options.storage_options))
    live_failures = live_parts(open_table(catalog.failures, options.storage_options))
    _check_recipe(recipe, live, listing, catalog, options)
    live_names = {part.name for part in live}
    shards = [shard for shard in listing.shards if part_name(shard.shard_id, recipe.recipe_id) not in live_names]
    known = _known_files(catalog, live, live_failures, recipe, options) if listing.files else set()
    new_files = {
        place: [file for file in files if (clean_text(file.uri), file.version) not in known]
        for place, files in listing.files.items()
    }
    packs = pack(new_files, options.files_per_shard)
    num_kept = len(listing.shards) - len(shards) + listing.num_files - sum(len(files) for files in new_files.values())
    return BuildPlan(recipe, (*shards, *packs), num_kept)


def _check_recipe(
    recipe: Recipe, live: Iterable[LivePart], listing: Listing, catalog: CatalogLayout, options: BuildOptions
) -> None:
    """A catalog holds rows of one recipe: vectors of two encoders cannot be searched together."""
    others = [part for part in live if part.recipe_id != recipe.recipe_id]
    if not others:
        return
    num_images = sum(part.num_rows for part in others)
    if not options.recompute:
        raise ValueError(
            f"{catalog.root} holds {num_images} images of recipe {others[0].recipe_id}, but these options make recipe "
            f"{recipe.recipe_id} (other ops, model, model version, limits or fields); add --recompute to compute them anew, "
            "or name another catalog"
        )
    covered = {shard.location_id for shard in listing.shards}
    uris = {clean_text(file.uri) for files in listing.files.values() for file in files}
    packed = [part for part in others if part.is_packed]
    left = [part for part in others if not part.is_packed and part.location_id not in covered]
    for part, rows in read_columns(catalog.images, packed, ["uri"], options.storage_options):
        left += [part] * (not uris.issuperset(rows.column("uri").to_pylist()))
    if left:
        raise ValueError(
            f"--recompute needs all inputs of {catalog.root}: {len(left)} of its parts come from inputs that are not given, "
            "and would keep the old recipe; give them too, or name another catalog"
        )


def _known_files(
    catalog: CatalogLayout,
    live: Iterable[LivePart],
    live_failures: Iterable[LivePart],
    recipe: Recipe,
    options: BuildOptions,
) -> set[tuple[str, str]]:
    """(uri, version) of the single files that the catalog has, as rows or as failures."""
    known: set[tuple[str, str]] = set()
    for uri, parts in ((catalog.images, live), (catalog.failures, live_failures)):
        mine = [part for part in parts if part.is_packed and part.recipe_id == recipe.recipe_id]
        for _, rows in read_columns(uri, mine, ["uri", "source_version"], options.storage_options):
            known.update(zip(rows.column("uri").to_pylist(), rows.column("source_version").to_pylist(), strict=True))
    return known


def _run_pipeline(options: BuildOptions, catalog: CatalogLayout, plan: BuildPlan, run_id: str) -> None:
    enrich = EnrichConfig(
        catalog.root, plan.recipe, run_id, read_config(options), options.device, options.batch_size, options.num_workers
    )
    started_at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    publish = PublishConfig(
        catalog.root, plan.recipe, run_id, started_at, options.input, options.max_failure_rate, options.storage_options
    )
    pipeline = beam.Pipeline(options=beam_options(options.runner, options.num_workers, options.beam_args))
    runs = (
        pipeline
        | "Shards" >> beam.Create(plan.shards)
        | "Enrich" >> EnrichShards(enrich)
        | "Publish" >> PublishRun(publish)
    )
    if index := index_config(catalog.root, plan.recipe, options.storage_options):
        _ = runs | "Index" >> WriteIndex(index)
    run_to_end(pipeline)


def _finish_up_to_date(options: BuildOptions, catalog: CatalogLayout, plan: BuildPlan) -> int:
    """Nothing to compute. A run that was killed between its commit and its index still lacks the latter."""
    table = open_table(catalog.images, options.storage_options)
    config = index_config(catalog.root, plan.recipe, options.storage_options)
    manifest = newest_manifest(catalog, options.storage_options)
    if table is not None and config and (manifest is None or manifest.table_version < table.version()):
        write_index(config, beam_options(options.runner, options.num_workers, options.beam_args))
    print(f"nothing to do: the catalog {catalog.root} has all {plan.num_kept} inputs (shards and single files)")
    return EXIT_OK


def refusal(manifest: RunManifest, max_failure_rate: float) -> str:
    """What a person is told when too many images failed."""
    return (
        f"beamsight: nothing was published: {manifest.failure_rate:.1%} failed "
        f"({manifest.num_failed_images} failed, {manifest.num_images} good), more than --max_failure_rate {max_failure_rate:g}\n"
        f"  reasons: {manifest.reasons}\n"
        + "".join(f"  {example}\n" for example in manifest.examples)
        + "  Mend the input, or allow more with --max_failure_rate, and run again: what was computed is kept."
    )


def summary(manifest: RunManifest, catalog: CatalogLayout, wall_sec: float) -> str:
    """What a person is told at the end."""
    reused = f", {manifest.num_shards_reused} of them finished by an earlier run" if manifest.num_shards_reused else ""
    lines = [
        f"catalog    {catalog.root}",
        f"images     {manifest.num_images} (shards: {manifest.num_shards}{reused})",
        f"failures   {manifest.reasons}",
    ]
    if manifest.num_images_computed:
        rate = manifest.num_images_computed / max(wall_sec, 1e-6)
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in manifest.stages)
        lines += [f"speed      {rate:.1f} images/s, {wall_sec:.1f} s", f"stages     {stages} (thread-seconds)"]
    return "\n".join([*lines, f"report     {catalog.run_file(manifest.run_id, RUN_REPORT)}"])


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("build", sys.argv[1:]))
