"""`beamsight index`: a new index from the catalog's table alone."""

from __future__ import annotations

import sys

from pipelines.options import IndexOptions
from pipelines.runners import beam_options
from pipelines.transforms import index_config, write_index
from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.delta_tables import last_recipe
from vlm_ops.faiss_index import newest_manifest


def run(options: IndexOptions) -> int:
    """Makes `indexes/<n+1>`.

    Raises:
        FileNotFoundError: There is no catalog.
        ValueError: The catalog holds no embeddings.
    """
    catalog = CatalogLayout(storage.normalise(options.catalog))
    recipe = last_recipe(catalog, options.storage_options)
    config = index_config(catalog.root, recipe, options.storage_options)
    if config is None:
        raise ValueError(f"the catalog {catalog.root} holds no embeddings; build it with --ops embedding among them")
    write_index(config, beam_options(options.runner, options.num_workers, options.beam_args))
    manifest = newest_manifest(catalog, options.storage_options)
    assert manifest is not None
    print(
        f"index      {catalog.indexes}/{manifest.number}: {manifest.ntotal} vectors of {manifest.d} dimensions, {manifest.factory}"
    )
    return 0


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("index", sys.argv[1:]))
