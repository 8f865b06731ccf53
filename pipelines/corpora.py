"""Images of any inputs, encoded by a model once and kept in the user's cache: what `evaluate` measures,
`score` scores and `train` learns from.

They go through the same readers, decoders and ops as in `build`, into part files of the same kind, so
that a run that was killed goes on where it stopped, and a second one computes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.options import ReadingOptions, input_config, model_choice, model_settings, read_config, recipe_of
from pipelines.progress import Progress
from schemas.catalog import CatalogLayout
from schemas.recipes import Recipe
from schemas.tables import INDEX_ROW_COLUMNS
from vlm_ops.delta_tables import read_columns
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.inputs import list_inputs, pack
from vlm_ops.models.onnx_engine import cache_dir
from vlm_ops.ops import plan_ops

logger = logging.getLogger(__name__)

_BESIDE = ("source_captions", "source_metadata")


def encode_corpus(
    options: ReadingOptions,
    patterns: Sequence[str],
    ops: Sequence[str],
    columns: Sequence[str],
    folder: str = "corpora",
) -> tuple[pa.Table, Recipe]:
    """One row an image of the patterns, in their order: what an index keeps of it, what stood beside
    it, and the named columns of the ops; and the recipe that made them.

    Args:
        folder: Of the user's cache, where the parts are kept.

    Raises:
        ValueError: The model cannot serve an op, or no image could be read.
        FileNotFoundError: A pattern matches nothing.
    """
    recipe = recipe_of(options, plan_ops(ops, model_choice(options)))
    listing = list_inputs(input_config(options, patterns))
    shards = [*listing.shards, *pack(listing.files, options.files_per_shard)]
    catalog = CatalogLayout(str(cache_dir() / folder))
    read = read_config(options)
    enricher = Enricher(
        EnrichConfig(
            catalog.root, recipe, "corpus", read, model_settings(options), options.batch_size, options.num_threads
        )
    )
    columns = list(dict.fromkeys([*INDEX_ROW_COLUMNS, *_BESIDE, *columns]))
    tables, num_failed = [], 0
    with Progress("corpus", shards, title="images") as progress:
        for shard in shards:
            summary = enricher.enrich(shard, lambda images, size, shard=shard: progress.advance(shard, images, size))  # type: ignore[misc]
            progress.finish(shard, summary.num_images)
            num_failed += summary.num_failed_images
            tables += [table for _, table in read_columns(catalog.images, [summary.images], columns, {})]
    if num_failed:
        logger.warning("%d images failed and are left out", num_failed)
    table = pa.concat_tables(tables)
    if not table.num_rows:
        raise ValueError(f"no image of {' '.join(patterns)} could be read")
    return table, recipe


def with_captions(table: pa.Table, patterns: Sequence[str]) -> pa.Table:
    """The rows of images that came with captions.

    Raises:
        ValueError: There are none.
    """
    kept = table.filter(pc.greater(pc.list_value_length(table["source_captions"]), 0))
    if not kept.num_rows:
        raise ValueError(f"no image of {' '.join(patterns)} has a caption; name their field with --caption_field")
    return kept


def matrix(table: pa.Table, column: str) -> np.ndarray:
    """A column of vectors as float32[n, d], in memory of its own (torch wants to be able to write)."""
    values = table.column(column).combine_chunks()
    return values.flatten().to_numpy().reshape(len(values), -1).copy()
