"""`beamsight index`: a new index from the catalog's table alone."""

from __future__ import annotations

import sys

import apache_beam as beam

from pipelines.jobs import run_to_end
from pipelines.options import IndexOptions
from pipelines.runners import beam_options
from pipelines.transforms import PublishIndex
from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.faiss_index import read_index_manifest
from vlm_ops.run_manifests import new_run_id
from vlm_ops.states import existing_state


def run(options: IndexOptions) -> int:
    """Makes an index of the catalog's current state, and commits it.

    Raises:
        FileNotFoundError: There is no catalog.
        ValueError: The catalog holds no embeddings.
    """
    catalog = CatalogLayout(storage.normalise(options.catalog))
    record = existing_state(catalog, options.storage_options).record
    if record is None or record.recipe.encoder is None:
        raise ValueError(f"the catalog {catalog.root} holds no embeddings; build it with --ops embedding among them")
    run_id = new_run_id()
    pipeline = beam.Pipeline(options=beam_options("index", options))
    _ = pipeline | beam.Create([run_id]) | PublishIndex(catalog.root, options.storage_options)
    if run_to_end(pipeline) is None:
        return 0
    manifest = read_index_manifest(catalog, run_id, options.storage_options)
    print(
        f"index      {catalog.indexes}/{run_id}: {manifest.ntotal} vectors of {manifest.d} dimensions, {manifest.factory}"
    )
    return 0


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("index", sys.argv[1:]))
