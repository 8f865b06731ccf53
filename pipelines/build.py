"""`beamsight build`: from images to a catalog that can be searched.

Plan (launcher): list the inputs, leave out what the catalog has. Work (runner): a part file a shard.
Publish (runner, once): one index and one transaction, which is what readers see.
"""

from __future__ import annotations

import logging
import sys

from pipelines.options import BuildOptions, input_config, model_choice, read_config, recipe_of
from pipelines.progress import counting
from pipelines.runs import EXIT_OK, Run, execute
from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.cores import usable_cores
from vlm_ops.inputs import Listing, list_inputs
from vlm_ops.ops import plan_ops
from vlm_ops.planning import Plan, PlanConfig, kept_inputs, plan_inputs, with_changed_bytes, with_refused_parts
from vlm_ops.run_manifests import refused_runs, seconds_per_byte
from vlm_ops.states import CatalogState, current_state

logger = logging.getLogger(__name__)


def run(options: BuildOptions) -> int:
    """Runs a build, or says what it would do.

    Returns:
        The exit code: 0, or 3 when too many images failed and nothing was published.

    Raises:
        ValueError, FileNotFoundError: A mistake in the options, found before any work.
    """
    models = model_choice(options)
    catalog = CatalogLayout(storage.normalise(options.catalog))
    storage.check_writable(catalog.root, options.storage_options)
    recipe = recipe_of(options, plan_ops(options.ops or ("default",), models))
    if recipe.encoder is None and options.ops is None:
        logger.warning(
            "%s makes no embeddings, so the catalog cannot be searched; --embedding_model names one that does",
            options.model,
        )
    listing = list_inputs(input_config(options, options.input))
    _check_inputs(listing, catalog, options)
    state = current_state(catalog, options.storage_options)
    config = PlanConfig(
        catalog, recipe, read_config(options), options.files_per_shard, options.num_threads or usable_cores()
    )
    plan = plan_inputs(config, state, listing)
    _check_recipe(config, state, plan, options)
    if options.verify_content:
        plan = _with_changed_bytes(config, state, listing, plan)
    if plan.shards:
        plan = with_refused_parts(config, plan, refused_runs(catalog, options.storage_options))
    if options.dry_run:
        print(describe(plan, config, state, options))
        return EXIT_OK
    if not plan.shards and not plan.leaving(options.prune):
        num_kept = plan.kept.shards + plan.kept.files
        print(f"nothing to do: the catalog {catalog.root} has all {num_kept} inputs (shards and single files)")
        return EXIT_OK
    logger.info("new: %s; changed: %s; kept: %s", plan.new, plan.changed, plan.kept)
    if plan.num_gone:
        fate = "are removed" if options.prune else "stay (--prune removes them)"
        logger.info("%d images of the catalog are not among these inputs, and %s", plan.num_gone, fate)
    return execute(
        Run(
            options=options,
            catalog=catalog,
            recipe=recipe,
            action="build",
            plan=plan,
            read=config.read,
            inputs=options.input,
            prune=options.prune,
            max_failure_rate=options.max_failure_rate,
        ),
        state,
    )


def describe(plan: Plan, config: PlanConfig, state: CatalogState, options: BuildOptions) -> str:
    """What a build would do, for a person."""
    recipe = config.recipe.recipe_id
    if plan.num_recomputed and state.record:
        recipe += (
            f" instead of {state.record.recipe.recipe_id}: {'; '.join(state.record.recipe.differences(config.recipe))}"
        )
    gone = f"{plan.num_gone} images" + (
        "" if options.prune or not plan.num_gone else " are not among the inputs; they stay without --prune"
    )
    lines = [
        f"catalog    {config.catalog.root}",
        f"recipe     {recipe}",
        f"new        {plan.new}",
        f"changed    {plan.changed}"
        + (f" ({plan.num_recomputed} images by another recipe)" if plan.num_recomputed else ""),
        f"removed    {gone}",
        f"kept       {plan.kept}",
    ]
    pace = seconds_per_byte(config.catalog, config.recipe, config.read.storage_options)
    if not plan.shards:
        time_needed = "nothing to compute"
    elif pace is None or not plan.num_bytes:
        time_needed = f"not known before a first run ({plan.num_bytes / 1e6:.1f} MB to read)"
    else:
        time_needed = f"about {_duration(pace * plan.num_bytes)} ({plan.num_bytes / 1e6:.1f} MB to read)"
    return "\n".join([*lines, f"time       {time_needed}"])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _check_inputs(listing: Listing, catalog: CatalogLayout, options: BuildOptions) -> None:
    """A catalog is no input of itself, and a disk that is not mounted is no reason to forget what was on it."""
    own = tuple(f"{folder}/" for folder in (catalog.images, catalog.failures, catalog.indexes, catalog.runs))
    files = (file.uri for files in listing.files.values() for file in files)
    if inside := next((uri for uri in (*(shard.uri for shard in listing.shards), *files) if uri.startswith(own)), None):
        raise ValueError(
            f"the input {inside} lies inside the catalog {catalog.root}; name another catalog, apart from the inputs"
        )
    if options.prune and listing.empty_patterns:
        raise ValueError(
            f"--prune would remove all that the catalog has of {', '.join(listing.empty_patterns)}, where no input is (any more); "
            "if that is meant, leave it out of --input"
        )


def _check_recipe(config: PlanConfig, state: CatalogState, plan: Plan, options: BuildOptions) -> None:
    """A catalog holds rows of one recipe: vectors of two encoders cannot be searched together. So another recipe
    computes all of them anew, if all of them are among the inputs."""
    if not plan.num_recomputed or state.record is None:
        return
    recipe, root, old = config.recipe, config.catalog.root, state.record.recipe
    why = "; ".join(old.differences(recipe))
    if options.no_recompute:
        raise ValueError(
            f"{root} holds {plan.num_recomputed} images of recipe {old.recipe_id}, but these options make recipe "
            f"{recipe.recipe_id} ({why}); use the old options, leave out --no_recompute to compute the images anew, or name another catalog"
        )
    if plan.num_gone and not options.prune:
        raise ValueError(
            f"these options make recipe {recipe.recipe_id} instead of {old.recipe_id} ({why}), so that all images of {root} "
            f"have to be computed anew, but {plan.num_gone} of them are not among the inputs; give their inputs too, "
            "remove them with --prune, or name another catalog"
        )
    logger.info("another recipe (%s): %d images are computed anew", why, plan.num_recomputed)


def _with_changed_bytes(config: PlanConfig, state: CatalogState, listing: Listing, plan: Plan) -> Plan:
    shards, files = kept_inputs(listing, plan)
    sizes = [shard.num_bytes for shard in shards] + [file.num_bytes for _, file in files]
    logger.info("comparing the bytes of %d inputs with the catalog (%.1f MB)", len(sizes), sum(sizes) / 1e6)
    with counting("compare", sum(sizes), "B") as advance:
        return with_changed_bytes(config, state, listing, plan, advance)


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("build", sys.argv[1:]))
