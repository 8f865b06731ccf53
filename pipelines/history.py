"""`beamsight history`: the runs that changed a catalog."""

from __future__ import annotations

import json
import sys
from typing import Any

from pipelines.options import HistoryOptions
from schemas.catalog import CatalogLayout
from schemas.manifests import RunManifest
from vlm_ops import storage
from vlm_ops.cleaning import has_all_files, stored_files
from vlm_ops.run_manifests import refused_runs
from vlm_ops.states import Commit, commits, state_of

_COLUMNS = (
    "run", "when", "action", "images", "added", "changed", "removed", "failures", "recipe", "index", "can_go_back",
)  # fmt: skip


def run(options: HistoryOptions) -> int:
    """Prints one line a run, newest first.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    catalog = CatalogLayout(storage.normalise(options.catalog))
    rows = describe(catalog, options.last, options.storage_options)
    if options.json:
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        print(as_table(rows))
    return 0


def describe(catalog: CatalogLayout, last: int, storage_options: storage.StorageOptions) -> list[dict[str, Any]]:
    """One dictionary a run, the newest first; runs that published nothing are among them.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    files = stored_files(catalog, storage_options)
    rows = [
        _of_commit(each, has_all_files(state_of(catalog, each, storage_options), files))
        for each in commits(catalog, storage_options)[:last]
    ]
    rows += [_of_refusal(each) for each in refused_runs(catalog, storage_options, last)]
    return sorted(rows, key=lambda row: row["run"], reverse=True)[:last]


def as_table(rows: list[dict[str, Any]]) -> str:
    """The history for a person."""
    lines = [[name.replace("_", " ") for name in _COLUMNS], *([_cell(row, name) for name in _COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    if name == "can_go_back":
        return "yes" if value else "no"
    return f"{value} to {row['of_run']}" if name == "action" and row["of_run"] else str(value)


def _of_commit(commit: Commit, can_go_back: bool) -> dict[str, Any]:
    record = commit.record
    return {
        "run": record.run_id, "when": record.committed_at, "action": record.action, "of_run": record.of_run,
        "images": record.num_images, "added": record.num_added, "changed": record.num_changed, "removed": record.num_removed,
        "failures": record.num_failures, "recipe": record.recipe.recipe_id, "index": record.index, "can_go_back": can_go_back,
    }  # fmt: skip


def _of_refusal(manifest: RunManifest) -> dict[str, Any]:
    return {
        "run": manifest.run_id, "when": manifest.finished_at, "action": "refused", "of_run": None,
        "images": None, "added": 0, "changed": 0, "removed": 0,
        "failures": manifest.num_failed_images, "recipe": manifest.recipe.recipe_id, "index": None, "can_go_back": False,
    }  # fmt: skip


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("history", sys.argv[1:]))
