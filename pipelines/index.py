"""`beamsight index`: a new index from the catalog's table alone."""

from __future__ import annotations

import sys

import apache_beam as beam

from pipelines.options import IndexOptions
from pipelines.runners import beam_options, run_to_end
from pipelines.transforms import IndexConfig, WriteIndex
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
    embedding = recipe.op("embedding")
    if embedding is None or embedding.model is None or embedding.revision is None:
        raise ValueError(f"the catalog {catalog.root} holds no embeddings; build it with --ops embedding among them")
    config = IndexConfig(catalog.root, embedding.model, embedding.revision, options.storage_options)
    pipeline = beam.Pipeline(options=beam_options(options.runner, options.num_workers, options.beam_args))
    _ = pipeline | beam.Create([None]) | WriteIndex(config)
    run_to_end(pipeline)
    manifest = newest_manifest(catalog, options.storage_options)
    assert manifest is not None
    print(
        f"index      {catalog.indexes}/{manifest.number}: {manifest.ntotal} vectors of {manifest.d} dimensions, {manifest.factory}"
    )
    return 0


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("index", sys.argv[1:]))
