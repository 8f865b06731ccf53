"""The states of a catalog: what its readers see now, what they saw before, and what comes next.

A state is a version of the images table. Its commit names the version of the failures table and the index
that belong to it, so that one entry of one log makes all of it visible at once, and takes all of it back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from schemas.catalog import CatalogLayout
from schemas.manifests import CommitRecord
from schemas.recipes import Recipe
from schemas.tables import FAILURES
from vlm_ops import storage
from vlm_ops.delta_tables import (
    LivePart,
    has_committed,
    live_parts,
    log_entries,
    open_table,
    read_columns,
    sequence_of,
    set_live,
)
from vlm_ops.parts import PartSummary, rewritten

_RECORD = "beamsight"


@dataclass(frozen=True)
class Commit:
    """A state by its name: version of the images table, and what its commit says of itself."""

    version: int
    record: CommitRecord


@dataclass(frozen=True)
class CatalogState:
    """What the readers of a catalog see.

    Attributes:
        commit: Its commit; None for a catalog that is not there yet.
        images: Live parts of the images table.
        failures: Live parts of the failures table.
        sequence: How many commits led here; the next one is refused where there was another meanwhile.
    """

    commit: Commit | None = None
    images: tuple[LivePart, ...] = ()
    failures: tuple[LivePart, ...] = ()
    sequence: int = 0

    @property
    def record(self) -> CommitRecord | None:
        return self.commit.record if self.commit else None


@dataclass(frozen=True)
class Gone:
    """What is not among the inputs any more: places of shards, and URIs of single files."""

    location_ids: frozenset[str] = frozenset()
    uris: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.location_ids or self.uris)


@dataclass(frozen=True)
class StateParts:
    """The parts that a state is to have."""

    images: tuple[LivePart, ...]
    failures: tuple[LivePart, ...]


@dataclass(frozen=True)
class Changes:
    """How many images one state has and another one has not, or has otherwise."""

    num_added: int = 0
    num_changed: int = 0
    num_removed: int = 0


def newest_commit(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> Commit | None:
    """The commit whose state readers see; None where there is no catalog."""
    table = open_table(catalog.images, storage_options)
    return next(_commits(table), None) if table else None


def commits(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> list[Commit]:
    """All commits, newest first.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    table = open_table(catalog.images, storage_options)
    if table is None:
        raise no_catalog(catalog)
    return list(_commits(table))


def current_state(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> CatalogState:
    """What readers see now; an empty state where there is no catalog."""
    commit = newest_commit(catalog, storage_options)
    return state_of(catalog, commit, storage_options) if commit else CatalogState()


def existing_state(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> CatalogState:
    """What readers see now.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    state = current_state(catalog, storage_options)
    if state.commit is None:
        raise no_catalog(catalog)
    return state


def state_before(
    catalog: CatalogLayout, run_id: str, storage_options: storage.StorageOptions
) -> tuple[CatalogState, Commit | None]:
    """The state that a run's commit was made on, and that commit: a runner may try again what had been done. Of a run that
    has not committed, what readers see now, and None."""
    table = open_table(catalog.images, storage_options)
    if table is None or not has_committed(table, run_id):
        return current_state(catalog, storage_options), None
    history = _commits(table)
    own = next(commit for commit in history if commit.record.run_id == run_id)
    before = next(history, None)
    return (state_of(catalog, before, storage_options) if before else CatalogState()), own


def state_of(catalog: CatalogLayout, commit: Commit, storage_options: storage.StorageOptions) -> CatalogState:
    """The parts of a commit."""
    images = open_table(catalog.images, storage_options, commit.version)
    failures = open_table(catalog.failures, storage_options, commit.record.failures_version)
    return CatalogState(commit, tuple(live_parts(images)), tuple(live_parts(failures)), sequence_of(images))


def no_catalog(catalog: CatalogLayout) -> FileNotFoundError:
    return FileNotFoundError(
        f"no catalog at {catalog.root}; make one with `beamsight build --catalog {catalog.root} --input ...`"
    )


def parts_after(
    catalog: CatalogLayout,
    state: CatalogState,
    summaries: Sequence[PartSummary],
    gone: Gone,
    storage_options: storage.StorageOptions,
) -> StateParts:
    """A state with newly computed parts in it, and without what they replace or what is gone.

    A shard's part replaces those of the same place. Single files are replaced one by one: packs that
    hold some of them are copied without their rows.
    """
    images = [summary.images for summary in summaries]
    failures = [part for summary in summaries if (part := summary.failures)]
    uris = {
        *gone.uris,
        *_packed_uris(catalog.images, images, storage_options),
        *_packed_uris(catalog.failures, failures, storage_options),
    }
    unwanted = pa.array(sorted(uris), pa.string())
    # A pack without rows says nothing that its failures do not say.
    new_images = [part for part in images if part.num_rows or not part.is_packed]
    replaced = {part.location_id for part in images} | gone.location_ids
    return StateParts(
        tuple(_merged(catalog.images, state.images, new_images, replaced, unwanted, storage_options)),
        tuple(_merged(catalog.failures, state.failures, failures, replaced, unwanted, storage_options)),
    )


def commit_parts(
    catalog: CatalogLayout,
    state: CatalogState,
    parts: StateParts,
    record: CommitRecord,
    storage_options: storage.StorageOptions,
    schema: pa.Schema | None = None,
) -> Commit:
    """Makes these parts what readers see. Until its last step, the commit of the images, they see the old state.

    Args:
        state: The state that they were made from.
        record: What the log is to say; its `failures_version` is filled in here.
        schema: Of the images; None where the table has it already.

    Raises:
        CommitConflictError: The catalog has another state by now.
    """
    check_state_is_there(catalog, state, parts, storage_options)
    failures_version = set_live(catalog.failures, FAILURES, parts.failures, record.run_id, storage_options)
    told = CommitRecord(**{**vars(record), "failures_version": failures_version})
    metadata = {_RECORD: told.to_json()}
    version = set_live(catalog.images, schema, parts.images, record.run_id, storage_options, metadata, state.sequence)
    return Commit(version, told)


def new_record(
    run_id: str,
    action: str,
    recipe: Recipe,
    index: str | None,
    parts: StateParts,
    changes: Changes = Changes(),
    of_run: str | None = None,
) -> CommitRecord:
    """What a commit of these parts says of itself."""
    return CommitRecord(
        run_id=run_id,
        action=action,
        committed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=recipe,
        index=index,
        failures_version=-1,
        num_images=sum(part.num_rows for part in parts.images),
        num_failures=sum(part.num_rows for part in parts.failures),
        **vars(changes),
        of_run=of_run,
    )


def count_changes(
    catalog: CatalogLayout,
    before: Sequence[LivePart],
    after: Sequence[LivePart],
    storage_options: storage.StorageOptions,
) -> Changes:
    """Images of one list of parts that the other has not, or has with other bytes or another recipe.

    Parts of shards that are just new, or just gone, are not read. Memory: 32 bytes for each image of the others that only
    one list has.
    """
    kept = {part.name for part in before} & {part.name for part in after}
    left = [part for part in before if part.name not in kept]
    come = [part for part in after if part.name not in kept]
    old = _Identities.read(catalog, _with_common_images(left, come), storage_options)
    new = _Identities.read(catalog, _with_common_images(come, left), storage_options)
    in_both, in_old, in_new = np.intersect1d(old.ids, new.ids, assume_unique=True, return_indices=True)
    same = (old.contents[in_old] == new.contents[in_new]) & (old.recipes[in_old] == new.recipes[in_new])
    num_come, num_left = (sum(part.num_rows for part in parts) for parts in (come, left))
    return Changes(num_come - len(in_both), int((~same).sum()), num_left - len(in_both))


def _with_common_images(parts: Sequence[LivePart], others: Sequence[LivePart]) -> list[LivePart]:
    """Parts that may have images in common with others: those of the same shard, and packs, as files move between packs."""
    places, has_packs = {part.location_id for part in others}, any(part.is_packed for part in others)
    return [part for part in parts if part.location_id in places or (part.is_packed and has_packs)]


@dataclass(frozen=True)
class _Identities:
    """image_id int64[n], and the first hex digits of the hashes of its bytes (16) and its recipe (8)."""

    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    contents: np.ndarray = field(default_factory=lambda: np.empty(0, "S16"))
    recipes: np.ndarray = field(default_factory=lambda: np.empty(0, "S8"))

    @classmethod
    def read(
        cls, catalog: CatalogLayout, parts: Iterable[LivePart], storage_options: storage.StorageOptions
    ) -> _Identities:
        columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for part, rows in read_columns(catalog.images, parts, ["image_id", "content_sha256"], storage_options):
            hashes = [(text or "")[:16] for text in rows.column("content_sha256").to_pylist()]
            recipe = np.full(len(hashes), (part.recipe_id or "")[:8], "S8")
            columns.append((rows.column("image_id").to_numpy(), np.array(hashes, "S16"), recipe))
        if not columns:
            return cls()
        ids, contents, recipes = (np.concatenate(each) for each in zip(*columns, strict=True))
        return cls(ids, contents, recipes)


def _commits(table: DeltaTable) -> Iterator[Commit]:
    """Newest first; log entries without a record are changes of the schema."""
    return (
        Commit(each["version"], CommitRecord.from_json(each[_RECORD])) for each in log_entries(table) if _RECORD in each
    )


def _packed_uris(uri: str, parts: Sequence[LivePart], storage_options: storage.StorageOptions) -> Iterator[str]:
    """URIs of the single files in these parts: their older rows are in packs of other files."""
    for _, rows in read_columns(uri, [part for part in parts if part.is_packed], ["uri"], storage_options):
        yield from rows.column("uri").to_pylist()


def _merged(
    uri: str,
    live: Sequence[LivePart],
    new: Sequence[LivePart],
    replaced: Collection[str | None],
    unwanted: pa.Array,
    storage_options: storage.StorageOptions,
) -> Iterator[LivePart]:
    """The new parts, and what is left of the live ones."""
    names = {part.name for part in new}
    yield from new
    left = [part for part in live if part.name not in names and (part.is_packed or part.location_id not in replaced)]
    if not len(unwanted):
        yield from left
        return
    packs = [part for part in left if part.is_packed]  # which come first, by their names
    for part, rows in read_columns(uri, packs, ["uri"], storage_options):
        if not pc.any(pc.is_in(rows.column("uri"), unwanted)).as_py():
            yield part
        elif (copy := _without_rows(uri, part, unwanted, storage_options)).num_rows:
            yield copy
    yield from (part for part in left if not part.is_packed)


def _without_rows(uri: str, part: LivePart, unwanted: pa.Array, storage_options: storage.StorageOptions) -> LivePart:
    """A copy of a packed part without the rows of some URIs."""

    def without(rows: pa.Table) -> pa.Table:
        return rows.filter(pc.invert(pc.is_in(rows.column("uri"), unwanted)))

    return rewritten(uri, part, without, storage_options)


def check_state_is_there(
    catalog: CatalogLayout, state: CatalogState, parts: StateParts, storage_options: storage.StorageOptions
) -> None:
    """Raises:
    RuntimeError: New parts of a state are not there.
    """
    check_parts_are_there(catalog.images, parts.images, state.images, storage_options)
    check_parts_are_there(catalog.failures, parts.failures, state.failures, storage_options)


def check_parts_are_there(
    uri: str, new: Sequence[LivePart], old: Sequence[LivePart], storage_options: storage.StorageOptions
) -> None:
    """What is about to become visible must be there: `clean` may have taken what it found unused.

    Raises:
        RuntimeError: It is not.
    """
    added = {part.name for part in new} - {part.name for part in old}
    if not added:
        return
    missing = added - storage.names_in(uri, storage_options)
    if missing:
        raise RuntimeError(
            f"{len(missing)} parts of this run are not in {uri} any more, such as {min(missing)} (was `beamsight clean` at work?); "
            "run the same command again"
        )
