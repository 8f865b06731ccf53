"""What no kept state of a catalog needs, and its removal.

A state is kept while readers may still want it: the current one, and all that were current at some time
since a moment. Files that are younger than that moment are kept too, since a run may be about to publish them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from schemas.catalog import CatalogLayout, is_data_file
from vlm_ops import storage
from vlm_ops.delta_tables import current_since
from vlm_ops.states import CatalogState, commits, state_of
from vlm_ops.tag_states import tag_parts_since

_FOLDERS = ("images", "failures", "tags", "indexes", "runs")


@dataclass(frozen=True)
class StoredFile:
    """A file of a catalog: its path below the root, its size in bytes, and when it was written."""

    path: str
    num_bytes: int
    written_at: datetime


def stored_files(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> dict[str, StoredFile]:
    """Parts, indexes, and what killed runs left, by path; neither logs, nor reports, nor files of somebody else."""
    with storage.named(catalog.root):
        return _stored_files(catalog, storage_options)


def _stored_files(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> dict[str, StoredFile]:
    fs = storage.filesystem(catalog.root, storage_options)
    fs.invalidate_cache()
    root = fs._strip_protocol(catalog.root).rstrip("/")
    found: dict[str, StoredFile] = {}
    for folder in _FOLDERS:
        for name, info in fs.find(f"{root}/{folder}", detail=True).items():
            path = name[len(root) + 1 :]
            if is_data_file(path):
                found[path] = StoredFile(path, int(info.get("size") or 0), _written_at(info))
    return found


def needed_files(state: CatalogState) -> set[str]:
    """Paths of the files of a state; of its index the directory, ending in a slash."""
    needed = {f"images/{part.name}" for part in state.images} | {f"failures/{part.name}" for part in state.failures}
    if state.record and state.record.index:
        needed.add(f"indexes/{state.record.index}/")
    return needed


def has_all_files(state: CatalogState, files: Iterable[str]) -> bool:
    """Whether all files of a state are among these paths."""
    return needed_files(state) <= {*files, *(_directory(path) for path in files)}


def unneeded_files(
    catalog: CatalogLayout, since: datetime, storage_options: storage.StorageOptions
) -> list[StoredFile]:
    """What no state needs that was current at or after a moment, and that is older than it.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    files = stored_files(catalog, storage_options)
    needed: set[str] = set()
    for commit in current_since(commits(catalog, storage_options), since, lambda commit: commit.record.committed_at):
        needed |= needed_files(state_of(catalog, commit, storage_options))
    needed |= {f"tags/{name}" for name in tag_parts_since(catalog, since, storage_options)}
    return [
        file
        for path, file in sorted(files.items())
        if path not in needed and _directory(path) not in needed and file.written_at < since
    ]


def remove(catalog: CatalogLayout, files: Iterable[StoredFile], storage_options: storage.StorageOptions) -> None:
    """Removes files; the images first, since a part says that its failures are there."""
    by_folder: dict[str, list[str]] = {folder: [] for folder in _FOLDERS}
    for file in files:
        by_folder[file.path.partition("/")[0]].append(f"{catalog.root}/{file.path}")
    for uris in by_folder.values():
        storage.remove_all(uris, storage_options)


def _directory(path: str) -> str:
    return path.rpartition("/")[0] + "/"


def _written_at(info: Mapping[str, Any]) -> datetime:
    """When a listed file was written; now, where its storage does not tell."""
    told = info.get("mtime") or info.get("LastModified") or info.get("updated") or info.get("created")
    if isinstance(told, (int, float)):
        return datetime.fromtimestamp(told, UTC)
    if isinstance(told, str):
        told = datetime.fromisoformat(told.replace("Z", "+00:00"))
    if isinstance(told, datetime):
        return told if told.tzinfo else told.replace(tzinfo=UTC)
    return datetime.now(UTC)
