"""`beamsight retry`: what failed, once more."""

from __future__ import annotations

import logging
import sys

from pipelines.options import RetryOptions, model_settings
from pipelines.runs import EXIT_OK, Run, execute
from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.models.settings import planned
from vlm_ops.ops import check_installed
from vlm_ops.planning import PlanConfig, plan_retry
from vlm_ops.run_manifests import refused_runs
from vlm_ops.shards import ReadConfig
from vlm_ops.states import existing_state

logger = logging.getLogger(__name__)


def run(options: RetryOptions) -> int:
    """Tries the failures of a catalog again, by its own recipe; what succeeds leaves them.

    Raises:
        FileNotFoundError: There is no catalog.
        ValueError: Another version of the catalog's model is installed, or a mistake in the options.
    """
    settings = model_settings(options)
    planned(settings, options.runner == "local")
    catalog = CatalogLayout(storage.normalise(options.catalog))
    state = existing_state(catalog, options.storage_options)
    assert state.record is not None
    recipe = state.record.recipe
    check_installed(recipe.ops, settings)
    read = ReadConfig(recipe.max_image_bytes, recipe.image_column, recipe.caption_field, options.storage_options)
    config = PlanConfig(catalog, recipe, read, options.files_per_shard)
    plan = plan_retry(config, state, options.allowed_schemes)
    refused = [run for run in refused_runs(catalog, options.storage_options, 1) if run.run_id > state.record.run_id]
    if refused:
        logger.warning(
            "the last run, %s, published nothing; what it did is not in the catalog, and its build command, run again, goes on from it",
            refused[0].run_id,
        )
    if not plan.shards:
        print(f"nothing to retry in the catalog {catalog.root}")
        return EXIT_OK
    code = execute(
        Run(
            options=options,
            catalog=catalog,
            recipe=recipe,
            action="retry",
            plan=plan,
            read=read,
            inputs=(),
            prune=False,
            max_failure_rate=None,  # these have failed already, and a retry takes no image away
        ),
        state,
    )
    left = existing_state(catalog, options.storage_options).record
    print(f"left       {left.num_failures if left else 0} failures in the catalog")
    return code


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("retry", sys.argv[1:]))
