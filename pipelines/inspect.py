"""`beamsight inspect`: what is in a catalog."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

from pipelines.options import InspectOptions
from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.delta_tables import read_columns
from vlm_ops.faiss_index import read_index_manifest
from vlm_ops.states import existing_state
from vlm_ops.tag_statistics import describe_tags, tag_lines


def run(options: InspectOptions) -> int:
    """Prints a description.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    description = describe(CatalogLayout(storage.normalise(options.catalog)), options.storage_options)
    print(json.dumps(description, ensure_ascii=False) if options.json else as_text(description))
    return 0


def describe(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> dict[str, Any]:
    """Images, failures by reason, recipe, index, runs, size on disk.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    state = existing_state(catalog, storage_options)
    assert state.record is not None
    recipe, index = state.record.recipe, None
    failures: Counter[str] = Counter()
    for _, rows in read_columns(catalog.failures, state.failures, ["reason"], storage_options):
        failures.update(rows.column("reason").to_pylist())
    if state.record.index:
        index = vars(read_index_manifest(catalog, state.record.index, storage_options))
    return {
        "catalog": catalog.root,
        "images": state.record.num_images,
        "parts": len(state.images),
        "failures": dict(failures.most_common()),
        "recipe": {
            "recipe_id": recipe.recipe_id,
            "ops": {op.name: op.told if op.model else op.revision for op in recipe.ops},
            "max_image_bytes": recipe.max_image_bytes,
            "max_image_pixels": recipe.max_image_pixels,
            "schema_version": recipe.schema_version,
        },
        "run": {"run_id": state.record.run_id, "action": state.record.action, "committed_at": state.record.committed_at},
        "index": index,
        "tags": describe_tags(catalog, state.images, storage_options),
        "bytes": {name: _size(uri, storage_options) for name, uri in (
            ("images", catalog.images), ("failures", catalog.failures), ("tags", catalog.tags), ("indexes", catalog.indexes), ("runs", catalog.runs),
        )},
    }  # fmt: skip


def as_text(description: dict[str, Any]) -> str:
    """The description for a person."""
    failures = ", ".join(f"{reason} {count}" for reason, count in description["failures"].items()) or "none"
    recipe, index, run = description["recipe"], description["index"], description["run"]
    ops = ", ".join(f"{name} ({model})" if model else name for name, model in recipe["ops"].items())
    index_line = "none"
    if index:
        index_line = f"{index['run_id']}: {index['ntotal']} vectors of {index['d']} dimensions, {index['factory']}"
        index_line += f"\nencoder    {index['encoder']}@{index['encoder_revision']}"
    sizes = ", ".join(f"{name} {_megabytes(size)}" for name, size in description["bytes"].items())
    lines = [
        f"catalog    {description['catalog']}",
        f"images     {description['images']} (parts: {description['parts']})",
        f"failures   {failures}",
        f"recipe     {recipe['recipe_id']}: {ops}",
        f"index      {index_line}",
        f"size       {_megabytes(sum(description['bytes'].values()))} ({sizes})",
        f"last run   {run['run_id']} ({run['action']}, {run['committed_at']}); all of them: beamsight history {description['catalog']}",
    ]
    return "\n".join([*lines, *tag_lines(description["tags"], description["catalog"])])


def _size(uri: str, storage_options: storage.StorageOptions) -> int:
    fs = storage.filesystem(uri, storage_options)
    return int(fs.du(uri)) if fs.exists(uri) else 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("inspect", sys.argv[1:]))
