"""`beamsight rollback`: table, failures and index as they were after a run, together."""

from __future__ import annotations

import sys

from pipelines.options import RollbackOptions
from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.cleaning import has_all_files, stored_files
from vlm_ops.run_manifests import new_run_id
from vlm_ops.states import (
    StateParts,
    commit_parts,
    commits,
    count_changes,
    existing_state,
    new_record,
    state_of,
)


def run(options: RollbackOptions) -> int:
    """Commits the state of an earlier run once more.

    Raises:
        FileNotFoundError: There is no catalog.
        ValueError: There is no such run, or `clean` has deleted some of its files.
        CommitConflictError: Another run committed at the same time.
    """
    catalog = CatalogLayout(storage.normalise(options.catalog))
    state = existing_state(catalog, options.storage_options)
    assert state.commit is not None
    history = commits(catalog, options.storage_options)
    wanted = next((each for each in history if each.record.run_id == options.run_id), None)
    if wanted is None:
        known = ", ".join(each.record.run_id for each in history[:5])
        raise ValueError(
            f"{catalog.root} has no run {options.run_id!r} that changed it; the newest are {known} (`beamsight history --last 1000` lists more)"
        )
    if wanted.version == state.commit.version:
        print(f"nothing to do: {catalog.root} is as run {options.run_id} left it")
        return 0
    target = state_of(catalog, wanted, options.storage_options)
    if not has_all_files(target, stored_files(catalog, options.storage_options)):
        raise ValueError(
            f"the catalog {catalog.root} cannot go back to run {options.run_id}: `beamsight clean` has deleted some of its files; "
            "`beamsight history` shows the runs that it can go back to"
        )
    parts = StateParts(target.images, target.failures)
    changes = count_changes(catalog, state.images, target.images, options.storage_options)
    told = wanted.record
    record = new_record(new_run_id(), "rollback", told.recipe, told.index, parts, changes, options.run_id)
    commit_parts(catalog, state, parts, record, options.storage_options)
    print(
        f"catalog    {catalog.root} is as run {options.run_id} left it: {record.num_images} images, index {told.index or 'none'}\n"
        f"changes    {changes.num_added} added, {changes.num_changed} changed, {changes.num_removed} removed\n"
        f"undo       beamsight rollback {catalog.root} {state.commit.record.run_id}"
    )
    return 0


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("rollback", sys.argv[1:]))
