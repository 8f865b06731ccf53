"""`beamsight inspect`: what is in a catalog."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from pipelines.options import InspectOptions
from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.delta_tables import last_recipe, live_parts, open_table, read_columns
from vlm_ops.faiss_index import newest_manifest


def run(options: InspectOptions) -> int:
    """Prints a description.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    description = describe(CatalogLayout(storage.normalise(options.catalog)), options.storage_options)
    print(json.dumps(description, ensure_ascii=False) if options.json else as_text(description))
    return 0


def describe(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> dict[str, Any]:
    """Images, failures by reason, recipe, versions, index, size on disk.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    recipe = last_recipe(catalog, storage_options)
    table = open_table(catalog.images, storage_options)
    assert table is not None
    parts = live_parts(table)
    failures: Counter[str] = Counter()
    failed = live_parts(open_table(catalog.failures, storage_options))
    for _, rows in read_columns(catalog.failures, failed, ["reason"], storage_options):
        failures.update(rows.column("reason").to_pylist())
    versions = [
        {"version": commit["version"], "timestamp_ms": commit["timestamp"], "run_id": commit["run_id"]}
        for commit in table.history()
        if "run_id" in commit
    ]
    index = newest_manifest(catalog, storage_options)
    return {
        "catalog": catalog.root,
        "images": sum(part.num_rows for part in parts),
        "parts": len(parts),
        "failures": dict(failures.most_common()),
        "recipe": {
            "recipe_id": recipe.recipe_id,
            "ops": {op.name: f"{op.model}@{op.revision}" if op.model else None for op in recipe.ops},
            "max_image_bytes": recipe.max_image_bytes,
            "max_image_pixels": recipe.max_image_pixels,
            "schema_version": recipe.schema_version,
        },
        "versions": versions,
        "index": index and {**vars(index), "is_current": index.table_version == table.version()},
        "bytes": {name: _size(uri, storage_options) for name, uri in (
            ("images", catalog.images), ("failures", catalog.failures), ("indexes", catalog.indexes), ("runs", catalog.runs),
        )},
    }  # fmt: skip


def as_text(description: dict[str, Any]) -> str:
    """The description for a person."""
    failures = ", ".join(f"{reason} {count}" for reason, count in description["failures"].items()) or "none"
    recipe, index = description["recipe"], description["index"]
    ops = ", ".join(f"{name} ({model})" if model else name for name, model in recipe["ops"].items())
    index_line = "none"
    if index:
        state = "current" if index["is_current"] else f"of table version {index['table_version']}, not the current one"
        index_line = (
            f"{index['number']}: {index['ntotal']} vectors of {index['d']} dimensions, {index['factory']}, {state}"
        )
        index_line += f"\nencoder    {index['encoder']}@{index['encoder_revision']}"
    sizes = ", ".join(f"{name} {_megabytes(size)}" for name, size in description["bytes"].items())
    lines = [
        f"catalog    {description['catalog']}",
        f"images     {description['images']} (parts: {description['parts']})",
        f"failures   {failures}",
        f"recipe     {recipe['recipe_id']}: {ops}",
        f"index      {index_line}",
        f"size       {_megabytes(sum(description['bytes'].values()))} ({sizes})",
        "versions   "
        + "\n           ".join(f"{each['version']}  run {each['run_id']}" for each in description["versions"]),
    ]
    return "\n".join(lines)


def _size(uri: str, storage_options: storage.StorageOptions) -> int:
    fs = storage.filesystem(uri, storage_options)
    return int(fs.du(uri)) if fs.exists(uri) else 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("inspect", sys.argv[1:]))
