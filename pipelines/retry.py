"""`beamsight retry`: what failed, once more."""

from __future__ import annotations

import sys

from pipelines.options import RetryOptions
from pipelines.runs import EXIT_OK, Run, execute
from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.models import resolve_device
from vlm_ops.ops import check_installed
from vlm_ops.planning import PlanConfig, plan_retry
from vlm_ops.publishing import last_refusal
from vlm_ops.shards import ReadConfig
from vlm_ops.states import current_state, no_catalog


def run(options: RetryOptions) -> int:
    """Tries the failures of a catalog again, by its own recipe; what succeeds leaves them.

    Raises:
        FileNotFoundError: There is no catalog.
        ValueError: Another version of the catalog's model is installed, or a mistake in the options.
    """
    resolve_device(options.device)
    catalog = CatalogLayout(storage.normalise(options.catalog))
    state = current_state(catalog, options.storage_options)
    refused = last_refusal(catalog, state.record.run_id if state.record else "", options.storage_options)
    if refused:
        raise ValueError(
            f"the last run of {catalog.root}, {refused.run_id}, published nothing: {refused.failure_rate:.1%} failed; "
            "run its build command again, which tries the failed images again and keeps the good ones "
            f"(inputs: {' '.join(refused.inputs)})"
        )
    if state.record is None:
        raise no_catalog(catalog)
    recipe = state.record.recipe
    check_installed(recipe.ops)
    read = ReadConfig(recipe.max_image_bytes, recipe.image_column, recipe.caption_field, options.storage_options)
    config = PlanConfig(catalog, recipe, read, options.files_per_shard, options.num_workers)
    plan = plan_retry(config, state, options.allowed_schemes)
    if not plan.shards:
        print(f"nothing to retry: no image of the catalog {catalog.root} has failed")
        return EXIT_OK
    return execute(
        Run(
            catalog=catalog,
            recipe=recipe,
            action="retry",
            plan=plan,
            read=read,
            inputs=(),
            prune=False,
            max_failure_rate=None,  # these have failed already: nothing can get worse
            device=options.device,
            batch_size=options.batch_size,
            runner=options.runner,
            num_workers=options.num_workers,
            beam_args=options.beam_args,
        ),
        state,
    )


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("retry", sys.argv[1:]))
