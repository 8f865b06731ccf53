"""Which images a condition holds for: SQL over what an index keeps of each image, and over its tags.

DuckDB evaluates it, in memory and shut off from files, network and settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from pyarrow.fs import FSSpecHandler, PyFileSystem

from schemas.catalog import CatalogLayout
from schemas.tags import TAGS
from vlm_ops import storage
from vlm_ops.tag_states import tag_state

if TYPE_CHECKING:
    import duckdb


def open_tags(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> pads.Dataset | None:
    """The `tags` table of a catalog, of which only what is asked for is read; None where nothing was tagged yet."""
    state = tag_state(catalog, storage_options)
    if state.record is None:
        return None
    fs = storage.filesystem(catalog.tags, storage_options)
    paths = [fs._strip_protocol(f"{catalog.tags}/{part.name}") for part in state.parts]
    return pads.dataset(paths, schema=TAGS, format="parquet", filesystem=PyFileSystem(FSSpecHandler(fs)))


def matching_ids(
    rows: pa.Table, tags: pads.Dataset | None, where: str, parameters: Mapping[str, Any] | None = None
) -> np.ndarray:
    """int64[n], the `image_id` of the rows for which an SQL condition holds.

    Args:
        rows: What an index keeps of each image.
        tags: Rows of TAGS; their columns win where both have one. None: there are none.
        where: A condition, such as "suitability = 'low' and num_faces = 0"; `$name` stands for a parameter.
        parameters: Values of parameters, by name. They are values, whatever characters they hold.

    Raises:
        ValueError: It is no valid condition.
    """
    import duckdb

    connection = duckdb.connect(config={"enable_external_access": "false", "python_enable_replacements": "false"})
    connection.register("images", rows)
    if tags is not None:
        connection.register("tags", tags)
    connection.execute("SET lock_configuration = true")
    taken = [name for name in rows.column_names if tags is not None and name in TAGS.names and name != "image_id"]
    chosen = f"images.* EXCLUDE ({', '.join(taken)})" if taken else "images.*"
    joined = f"SELECT {chosen}, tags.* EXCLUDE (image_id) FROM images LEFT JOIN tags USING (image_id)"
    source = f"({joined})" if tags is not None else "images"
    query = f"SELECT image_id FROM {source} WHERE (\n{where}\n)"  # a comment in it ends with its line
    try:
        _check_is_condition(connection, where)
        found = connection.execute(query, dict(parameters or {})).fetchnumpy()
    except duckdb.Error as error:
        raise ValueError(f"--where {where!r}: {_told(error, tags)}") from error
    return np.asarray(found["image_id"], np.int64)


def _check_is_condition(connection: duckdb.DuckDBPyConnection, where: str) -> None:
    """Raises:
    ValueError: It is more than one expression: it closes our bracket, say.
    """
    import duckdb

    try:
        statements = connection.extract_statements(f"SELECT {where}\n")
        alone = connection.extract_statements(f"SELECT (\n{where}\n)")
    except duckdb.Error as error:
        raise ValueError(f"--where {where!r} is no SQL condition: {str(error).splitlines()[0]}") from error
    if len(statements) != 1 or len(alone) != 1:
        raise ValueError(
            f"--where {where!r} must be one SQL condition, such as \"suitability = 'low' and num_faces = 0\""
        )


def _told(error: Exception, tags: pads.Dataset | None) -> str:
    text = str(error).splitlines()[0]
    if tags is None and "column" in text.lower():
        return f"{text}; the catalog has no tags yet, which `beamsight tag` makes"
    return text
