"""The end of a run of `tag`: compare near duplicates, and make all of it visible in one transaction."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.catalog import RUN_METRICS, CatalogLayout
from schemas.samples import to_json
from schemas.tags import TAGS, TagRecipe, TagRecord
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, conflict, live_parts, open_table, read_columns, set_live
from vlm_ops.near_duplicates import contradicted, hash_bytes
from vlm_ops.parts import rewritten
from vlm_ops.states import check_parts_are_there
from vlm_ops.tag_parts import TagSummary, plan_tags
from vlm_ops.tag_states import TAG_RECORD, TagState, tag_state
from vlm_ops.tagging import NEAR_DUPLICATE, review

_COMPARED = ("image_id", "categories", "suitability", "review_reasons")


@dataclass(frozen=True)
class TagPublishConfig:
    """What the commit needs to know; travels pickled.

    Attributes:
        sequence: Of the state of the tags that the run was planned from.
        revision: That of the plan.
        images_version: Version of the images table that was tagged.
        images_run_id: The run that committed it.
    """

    catalog: str
    recipe: TagRecipe
    run_id: str
    sequence: int
    images_version: int
    images_run_id: str
    revision: str = ""
    storage_options: dict[str, Any] = field(default_factory=dict)


def publish_tags(config: TagPublishConfig, summaries: Sequence[TagSummary]) -> TagRecord:
    """Makes the parts that were made and those that stay the whole table. Doing it twice does nothing more: a runner tries
    again what it has not heard the end of.

    Raises:
        CommitConflictError: Another run tagged at the same time.
    """
    catalog, options = CatalogLayout(config.catalog), config.storage_options
    state = tag_state(catalog, options)
    if state.record and state.record.run_id == config.run_id:
        record = state.record
    else:
        record = _publish(catalog, config, state, summaries)
    metrics = {
        "images": record.num_images,
        "images_tagged": record.num_tagged,
        "images_kept": record.num_images - record.num_tagged,
        "parts_reused": sum(summary.run_id != config.run_id for summary in summaries),
        "stage_sec": _seconds([summary for summary in summaries if summary.run_id == config.run_id]),
    }
    storage.write_bytes(catalog.run_file(config.run_id, RUN_METRICS), to_json(metrics).encode(), options)
    return record


def _publish(
    catalog: CatalogLayout, config: TagPublishConfig, state: TagState, summaries: Sequence[TagSummary]
) -> TagRecord:
    options = config.storage_options
    if state.sequence != config.sequence:
        raise conflict(catalog.tags, f"{state.sequence - config.sequence} commits since this run began")
    images = live_parts(open_table(catalog.images, options, config.images_version))
    plan = plan_tags(images, state.parts, config.recipe, config.revision)  # once more: it is too large to be sent
    made = [summary.part for summary in sorted(summaries, key=lambda summary: summary.name)]
    parts = with_true_contradictions(catalog, [*plan.kept, *made], plan.names, options)
    check_parts_are_there(catalog.tags, parts, state.parts, options)
    record = TagRecord(
        run_id=config.run_id,
        committed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        images_version=config.images_version,
        images_run_id=config.images_run_id,
        recipe=config.recipe,
        num_images=sum(part.num_rows for part in parts),
        num_tagged=sum(summary.num_rows - summary.num_kept for summary in summaries),
    )
    set_live(catalog.tags, TAGS, parts, config.run_id, options, {TAG_RECORD: record.to_json()}, config.sequence)
    return record


def _seconds(summaries: Sequence[TagSummary]) -> dict[str, float]:
    """Thread-seconds by stage."""
    total: Counter[str] = Counter()
    for summary in summaries:
        total.update(summary.stage_sec)
    return {stage: round(seconds, 3) for stage, seconds in total.items()}


def with_true_contradictions(
    catalog: CatalogLayout,
    parts: Sequence[LivePart],
    images_of: Mapping[str, str],
    storage_options: storage.StorageOptions,
) -> tuple[LivePart, ...]:
    """The parts; those that do not say truly which images nearly equal one with other tags are replaced by copies that do.

    Reads some columns of all parts. Memory: some 100 bytes an image.

    Args:
        images_of: For each part of the tags, the part of the images that it belongs to.
    """
    ids, tags, hashes = [], [], []
    told: list[list[str | None]] = []
    codes: dict[Any, int] = {}
    images = [LivePart(images_of[part.name], part.num_rows, 0) for part in parts]
    hashed = read_columns(catalog.images, images, ["image_id", "phash"], storage_options)
    tagged = read_columns(catalog.tags, parts, _COMPARED, storage_options)
    for (_, rows), (_, hashed_rows) in zip(tagged, hashed, strict=True):
        told.append([_near_duplicate(reasons) for reasons in rows["review_reasons"].to_pylist()])
        ids.append(rows["image_id"].to_numpy())
        hashes.append(_hashes(hashed_rows, ids[-1]))
        for categories, suitability in zip(
            rows["categories"].to_pylist(), rows["suitability"].to_pylist(), strict=True
        ):
            key = (categories[0]["id"] if categories else None, suitability)
            tags.append(codes.setdefault(key, len(codes)))
    if not ids:
        return tuple(parts)
    all_ids = np.concatenate(ids)
    others = iter(contradicted(np.concatenate(hashes), np.array(tags, np.int64)))
    changed = []
    for part, old in zip(parts, told, strict=True):
        true = [
            f"{NEAR_DUPLICATE}: {all_ids[other]}" if other >= 0 else None
            for other in itertools.islice(others, len(old))
        ]
        is_true = true == old
        changed.append(
            part if is_true else rewritten(catalog.tags, part, partial(_told, reasons=true), storage_options)
        )
    return tuple(changed)


def _hashes(rows: pa.Table, ids: np.ndarray) -> np.ndarray:
    """uint8[n, 8]: perceptual hashes of some images of a part, in their order."""
    if "phash" not in rows.column_names:
        return hash_bytes([None] * len(ids))
    known = dict(zip(rows["image_id"].to_pylist(), rows["phash"].to_pylist(), strict=True))
    return hash_bytes([known.get(image_id) for image_id in ids.tolist()])


def _near_duplicate(reasons: Sequence[str]) -> str | None:
    return next((reason for reason in reasons if reason.startswith(NEAR_DUPLICATE)), None)


def _told(rows: pa.Table, reasons: Sequence[str | None]) -> pa.Table:
    """Rows with these reasons in place of what they said of near duplicates."""
    reviews = []
    for old, reason in zip(rows["review_reasons"].to_pylist(), reasons, strict=True):
        others = [each for each in old if not each.startswith(NEAR_DUPLICATE)]
        reviews.append(review([*others, reason] if reason else others))
    for name in ("review", "review_reasons"):
        column = rows.schema.get_field_index(name)
        rows = rows.set_column(
            column, rows.schema.field(name), pa.array([each[name] for each in reviews], rows.schema.field(name).type)
        )
    return rows
