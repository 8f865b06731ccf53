"""What a run has to do: inputs against what the catalog has, or failures that are tried again.

A shard is known by its place and version, a single file by its URI and version. Nothing is computed here, and
nothing is read but what the catalog says of itself; only where bytes are to be compared, the inputs are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.catalog import CatalogLayout, parse_part_name
from schemas.manifests import RunManifest
from schemas.recipes import Recipe
from schemas.samples import HARMLESS_REASONS, FileRef, Sample, ShardRef, clean_text, digest
from vlm_ops import storage
from vlm_ops.contents import digest_of, sha256_of
from vlm_ops.delta_tables import LivePart, read_columns
from vlm_ops.inputs import NUM_REQUESTS, Listing, allowed, in_present_version, pack
from vlm_ops.parts import PartSummary, has_failures_part, read_summary
from vlm_ops.shards import ReadConfig, read_shard
from vlm_ops.states import CatalogState, Gone

logger = logging.getLogger(__name__)

Advance = Callable[[int], None]


@dataclass(frozen=True)
class PlanConfig:
    """What plans are made for.

    Attributes:
        read: How inputs are read.
        files_per_shard: Single files that make one unit of work.
        num_threads: How many inputs are read at a time, where bytes are compared.
    """

    catalog: CatalogLayout
    recipe: Recipe
    read: ReadConfig
    files_per_shard: int
    num_threads: int = 2


@dataclass(frozen=True)
class Counts:
    """So many shard files, and so many single files."""

    shards: int = 0
    files: int = 0

    def __str__(self) -> str:
        return f"{self.shards} shard file{'s' * (self.shards != 1)}, {self.files} single file{'s' * (self.files != 1)}"


@dataclass(frozen=True)
class Plan:
    """What there is to do.

    Attributes:
        shards: The work.
        new: Inputs that the catalog has not.
        changed: Inputs that it has otherwise: in another version, with other bytes, or by another recipe.
        kept: Inputs that it has as they are.
        stale: Failures of list lines that are not in their list any more.
        gone: What the catalog has and the inputs have not.
        num_gone: Images of `gone`.
        num_recomputed: Images of the catalog that another recipe made.
        uncommitted: Parts of a run that was not published; images whose bytes are in them are not computed again.
    """

    shards: tuple[ShardRef, ...] = ()
    new: Counts = field(default_factory=Counts)
    changed: Counts = field(default_factory=Counts)
    kept: Counts = field(default_factory=Counts)
    stale: Gone = field(default_factory=Gone)
    gone: Gone = field(default_factory=Gone)
    num_gone: int = 0
    num_recomputed: int = 0
    uncommitted: tuple[LivePart, ...] = field(default=(), repr=False)

    def leaving(self, prune: bool) -> Gone:
        """What is taken out of the catalog."""
        return Gone(self.gone.location_ids, (*self.gone.uris, *self.stale.uris)) if prune else self.stale

    @property
    def num_bytes(self) -> int:
        """Size of what there is to read, as far as it is known."""
        return sum(shard.num_bytes for shard in self.shards)


def plan_inputs(config: PlanConfig, state: CatalogState, listing: Listing) -> Plan:
    """What there is to do for these inputs, going by their versions."""
    recipe_id = config.recipe.recipe_id
    live = [part for part in (*state.images, *state.failures) if not part.is_packed]
    known_shards = {part.shard_id for part in live if part.recipe_id == recipe_id}
    known_places = {part.location_id for part in live}
    todo = [shard for shard in listing.shards if shard.shard_id not in known_shards]
    num_changed = sum(shard.location_id in known_places for shard in todo)

    known = _known_files(config, state)
    files = {place: [file for file in files if not known.has(file)] for place, files in listing.files.items()}
    num_files = sum(map(len, files.values()))
    changed_files = sum(clean_text(file.uri) in known.versions for each in files.values() for file in each)

    listed = {clean_text(file.uri) for each in listing.files.values() for file in each}
    places = {shard.location_id for shard in listing.shards}
    gone_places = frozenset(part.location_id for part in live if part.location_id and part.location_id not in places)
    lists = {clean_text(place) for place in listing.files}
    unlisted = [uri for uri in known.versions if uri not in listed]
    stale = {uri for uri in unlisted if uri in known.failed and uri.rpartition("#")[0] in lists}
    gone_uris = tuple(uri for uri in unlisted if uri not in stale)
    num_gone = sum(part.num_rows for part in state.images if not part.is_packed and part.location_id in gone_places)
    return Plan(
        shards=(*todo, *pack(files, config.files_per_shard)),
        new=Counts(len(todo) - num_changed, num_files - changed_files),
        changed=Counts(num_changed, changed_files),
        kept=Counts(len(listing.shards) - len(todo), listing.num_files - num_files),
        stale=Gone(uris=tuple(stale)),
        gone=Gone(gone_places, gone_uris),
        num_gone=num_gone + sum(uri not in known.failed for uri in gone_uris),
        num_recomputed=sum(part.num_rows for part in state.images if part.recipe_id != recipe_id),
    )


def kept_inputs(listing: Listing, plan: Plan) -> tuple[list[ShardRef], list[tuple[str, FileRef]]]:
    """The inputs that a plan leaves as they are: shard files, and single files with their places."""
    todo = {shard.shard_id for shard in plan.shards}
    planned = {file.uri for shard in plan.shards for file in shard.files}
    shards = [shard for shard in listing.shards if shard.shard_id not in todo]
    return shards, [(place, file) for place, each in listing.files.items() for file in each if file.uri not in planned]


def with_changed_bytes(
    config: PlanConfig, state: CatalogState, listing: Listing, plan: Plan, advance: Advance = lambda num_bytes: None
) -> Plan:
    """A plan, and with it the inputs whose version has not changed, but whose bytes have (or what stands beside them).

    Reads all inputs that the plan keeps.

    Args:
        advance: Called with the size of each input that has been read.
    """
    shards, files = kept_inputs(listing, plan)
    parts = {part.shard_id: part for part in state.images}
    rows = _rows_of_files(config, state)
    with ThreadPoolExecutor(config.num_threads) as pool:
        digests = pool.map(lambda shard: _digest_of_shard(shard, config, advance), shards)
        changed = [
            replace(shard, revision=now[:8])
            for shard, now in zip(shards, digests, strict=True)
            if now != _digest_of_part(parts.get(shard.shard_id), config)
        ]
        digests = pool.map(lambda each: _digest_of_file(each[0], each[1], config, advance), files)
        changed_files: dict[str, list[FileRef]] = {}
        contents: dict[str, str] = {}
        for (place, file), now in zip(files, digests, strict=True):
            known = rows.get(clean_text(file.uri))
            if now and known and now != known:  # what has failed in this version is left to `retry`
                changed_files.setdefault(place, []).append(file)
                contents[file.uri] = now
    packs = [
        replace(each, revision=digest(*(contents[file.uri] for file in each.files))[:8])
        for each in pack(changed_files, config.files_per_shard)
    ]
    found = Counts(len(changed), len(contents))
    return replace(
        plan,
        shards=(*plan.shards, *changed, *packs),
        changed=Counts(plan.changed.shards + found.shards, plan.changed.files + found.files),
        kept=Counts(plan.kept.shards - found.shards, plan.kept.files - found.files),
    )


def with_refused_parts(config: PlanConfig, plan: Plan, refused: Sequence[RunManifest]) -> Plan:
    """A plan that goes on where refused runs stopped: what is good in their parts is used, what failed is tried again.

    Args:
        refused: Newest first.
    """
    made: dict[str, tuple[str, str]] = {}  # of each shard the newest part, and the run that refused it
    for manifest in reversed(refused):
        made |= {
            parsed.shard_id: (name, manifest.run_id) for name in manifest.parts if (parsed := parse_part_name(name))
        }
    if not made:
        return plan

    def read(shard: ShardRef) -> tuple[str, str, PartSummary | None]:
        name, run_id = made.get(shard.shard_id, ("", ""))
        return name, run_id, read_summary(config.catalog, name, config.read.storage_options) if name else None

    shards, uncommitted = [], []
    for shard, (name, run_id, summary) in storage.read_ahead(read, plan.shards, NUM_REQUESTS):
        parsed = parse_part_name(name)
        if summary and parsed and parsed.recipe_id == config.recipe.recipe_id:
            if summary.num_failed_images:
                uncommitted.append(summary.images)
                shard = _again(shard, _attempts(config, summary), run_id)
            else:
                shard = replace(shard, revision=parsed.revision)
        shards.append(shard)
    return replace(plan, shards=tuple(shards), uncommitted=tuple(uncommitted))


def plan_retry(config: PlanConfig, state: CatalogState, allowed_schemes: Sequence[str] = ()) -> Plan:
    """The shards and files that lost images, once more. Shards that have changed since, or are not there, are left
    to `build`, and told.

    Args:
        allowed_schemes: List entries of these schemes are tried although their list did not allow them.
    """
    assert state.record is not None
    columns = ["uri", "reason", "attempts", "source"]
    shards: dict[str, dict[str, int]] = {}
    formats: dict[str, str] = {}
    files: dict[str, list[FileRef]] = {}
    attempts: dict[str, int] = {}
    for _, rows in read_columns(config.catalog.failures, state.failures, columns, config.read.storage_options):
        for row in rows.to_pylist():
            source = json.loads(row.get("source") or "{}")
            if row["reason"] in HARMLESS_REASONS or not source:
                continue
            if source["format"] != "files":
                formats[source["uri"]] = source["format"]
                shards.setdefault(source["uri"], {})[row["uri"]] = row["attempts"]
                continue
            file = FileRef.from_dict(source["file"])
            if file.error and storage.scheme_of(file.uri) in allowed_schemes:
                file = allowed(file)
            files.setdefault(source["uri"], []).append(file)
            attempts[row["uri"]] = row["attempts"]
    after = state.record.run_id
    known = {part.shard_id for part in state.images}
    now = {uri: _shard_now(uri, formats[uri], config) for uri in sorted(shards)}
    todo = [_again(shard, shards[uri], after) for uri, shard in now.items() if shard and shard.shard_id in known]
    if len(todo) < len(shards):
        logger.warning(
            "%d shards are not there, or have changed since they failed, and are left to `beamsight build`: %s",
            len(shards) - len(todo), ", ".join([uri for uri, shard in now.items() if not shard or shard.shard_id not in known][:5]),
        )  # fmt: skip
    num_shards = len(todo)
    for packed in pack(
        {place: in_present_version(each, config.read.storage_options) for place, each in files.items()},
        config.files_per_shard,
    ):
        tried = {uri: attempts[uri] for file in packed.files if (uri := clean_text(file.uri)) in attempts}
        todo.append(_again(packed, tried, after))
    return Plan(tuple(todo), changed=Counts(num_shards, sum(map(len, files.values()))))


def rows_leaving(plan: Plan, prune: bool) -> Callable[[LivePart, pa.Table], np.ndarray]:
    """Tells which rows of a live part are replaced or removed by a plan: bool[n] for its column `uri`."""
    gone = plan.leaving(prune)
    places = {shard.location_id for shard in plan.shards} | gone.location_ids
    uris = {clean_text(file.uri) for shard in plan.shards for file in shard.files} | set(gone.uris)
    wanted = pa.array(sorted(uris), pa.string())

    def is_leaving(part: LivePart, rows: pa.Table) -> np.ndarray:
        if not part.is_packed:
            return np.full(rows.num_rows, part.location_id in places)
        return pc.is_in(rows.column("uri"), wanted).to_numpy(zero_copy_only=False)

    return is_leaving


# --- what the catalog has of single files ---------------------------------------------------------


@dataclass(frozen=True)
class _KnownFiles:
    """Versions of the single files of a catalog by URI; those of other recipes are None. `failed`: those without a row."""

    versions: dict[str, str | None]
    failed: set[str]

    def has(self, file: FileRef) -> bool:
        known = self.versions.get(clean_text(file.uri))
        if file.error and known is not None and known.startswith(allowed(file).entry):
            return True  # it was let in before: a flag that is forgotten once takes no image away
        return known == file.version


def _known_files(config: PlanConfig, state: CatalogState) -> _KnownFiles:
    versions: dict[str, str | None] = {}
    with_row: set[str] = set()
    for uri, parts in ((config.catalog.images, state.images), (config.catalog.failures, state.failures)):
        packed = [part for part in parts if part.is_packed]
        for part, rows in read_columns(uri, packed, ["uri", "source_version"], config.read.storage_options):
            is_mine = part.recipe_id == config.recipe.recipe_id
            uris = rows.column("uri").to_pylist()
            with_row.update(uris if uri == config.catalog.images else ())
            for each, version in zip(uris, rows.column("source_version").to_pylist(), strict=True):
                versions[each] = version if is_mine else None
    return _KnownFiles(versions, versions.keys() - with_row)


def _rows_of_files(config: PlanConfig, state: CatalogState) -> dict[str, str]:
    """What `_digest_of_file` gives for each single file that has a row."""
    columns = ["uri", "content_sha256", "source_captions", "source_metadata"]
    packed = [part for part in state.images if part.is_packed]
    told: dict[str, str] = {}
    for _, rows in read_columns(config.catalog.images, packed, columns, config.read.storage_options):
        for row in rows.to_pylist():
            told[row["uri"]] = _digest_of_row(
                row["content_sha256"] or "", row["source_metadata"], row["source_captions"] or ()
            )
    return told


def _digest_of_row(content_sha256: str, metadata: str | None, captions: Sequence[str]) -> str:
    """A hash of a single file and of what stands beside it."""
    return digest(content_sha256, metadata or "", *captions)


# --- reading inputs to compare their bytes --------------------------------------------------------


def _digest_of_file(place: str, file: FileRef, config: PlanConfig, advance: Advance) -> str:
    """`_digest_of_row` of a single file as it is now; empty where it cannot be read."""
    told = ""
    for item in read_shard(ShardRef(place, "files", "", 0, (file,)), config.read):
        if isinstance(item, Sample):
            told = _digest_of_row(sha256_of(item.data), item.metadata, item.captions)
    advance(file.num_bytes)
    return told


def _digest_of_shard(shard: ShardRef, config: PlanConfig, advance: Advance) -> str:
    told = digest_of(read_shard(shard, config.read))
    advance(shard.num_bytes)
    return told


def _digest_of_part(part: LivePart | None, config: PlanConfig) -> str | None:
    summary = read_summary(config.catalog, part.name, config.read.storage_options) if part else None
    return summary.content_digest if summary else None


# --- trying again ---------------------------------------------------------------------------------


def _again(shard: ShardRef, attempts: Mapping[str, int], after_run_id: str) -> ShardRef:
    """The shard as one that is read once more. The part has a name of its own, which goes by the run whose outcome is
    not to be the last word: killed and run again, it is found; after another outcome, it is not."""
    return replace(shard, revision=digest("after", after_run_id)[:8], attempts=dict(attempts))


def _attempts(config: PlanConfig, summary: PartSummary) -> dict[str, int]:
    """How often the images have been tried that failed in an uncommitted part."""
    part = summary.failures
    if part is None or not has_failures_part(config.catalog, summary, config.read.storage_options):
        return {}
    columns = ["uri", "attempts"]
    ((_, rows),) = read_columns(config.catalog.failures, [part], columns, config.read.storage_options)
    return dict(zip(rows.column("uri").to_pylist(), rows.column("attempts").to_pylist(), strict=True))


def _shard_now(uri: str, format_: str, config: PlanConfig) -> ShardRef | None:
    """A shard file in its present version; None where it is gone."""
    fs = storage.filesystem(uri, config.read.storage_options)
    fs.invalidate_cache()
    try:
        info: Mapping[str, Any] = fs.info(uri)
    except FileNotFoundError:
        return None
    return ShardRef(uri, format_, storage.version_of(info), int(info.get("size") or 0))
