"""What readers of the `tags` table see, and what they saw before."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from schemas.catalog import CatalogLayout
from schemas.tags import TagRecord
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, current_since, live_parts, log_entries, open_table, sequence_of

TAG_RECORD = "beamsight"  # the field of a log entry that holds a TagRecord


@dataclass(frozen=True)
class TagState:
    """What readers of the tags see.

    Attributes:
        record: What its commit says; None where nothing was tagged yet.
        parts: Live parts.
        sequence: How many commits led here.
    """

    record: TagRecord | None = None
    parts: tuple[LivePart, ...] = ()
    sequence: int = 0


def tag_state(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> TagState:
    """What readers of the tags see; an empty state where nothing was tagged yet."""
    table = open_table(catalog.tags, storage_options)
    if table is None:
        return TagState()
    record = next((TagRecord.from_json(each[TAG_RECORD]) for each in log_entries(table) if TAG_RECORD in each), None)
    return TagState(record, tuple(live_parts(table)), sequence_of(table))


def existing_tags(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> TagState:
    """What readers of the tags see.

    Raises:
        FileNotFoundError: Nothing was tagged yet.
    """
    state = tag_state(catalog, storage_options)
    if state.record is None:
        raise FileNotFoundError(f"no tags in {catalog.root}; make them with `beamsight tag {catalog.root}`")
    return state


def tag_parts_since(catalog: CatalogLayout, since: datetime, storage_options: storage.StorageOptions) -> set[str]:
    """Names of the parts of all states of the tags that were current at or after a moment."""
    table = open_table(catalog.tags, storage_options)
    records = (entry for entry in log_entries(table) if TAG_RECORD in entry) if table else ()
    names: set[str] = set()
    for entry in current_since(records, since, lambda entry: TagRecord.from_json(entry[TAG_RECORD]).committed_at):
        version = open_table(catalog.tags, storage_options, entry["version"])
        names |= {part.name for part in live_parts(version)}
    return names
