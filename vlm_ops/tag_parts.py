"""Which parts of the `tags` table are to be made, and what a made one says of itself.

The table has a part for each part of `images`, named by it and by the recipe of the tags. So what is new or changed is
told by names alone; and where a part of `images` has replaced another one of the same place, rows that are the same
are taken over from the tags of the old one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.catalog import CatalogLayout, part_name
from schemas.samples import digest, to_json
from schemas.tags import TAGS, TagRecipe
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart
from vlm_ops.image_evidence import ROW_COLUMNS, row_hashes
from vlm_ops.parts import store_summary, stored_summary


@dataclass(frozen=True)
class TagWork:
    """A part of the images to be tagged.

    Attributes:
        images_part: Its file name.
        num_rows: Its rows.
        name: File name of the part of the tags that it becomes.
        earlier: Parts of the tags in which equal rows may be.
    """

    images_part: str
    num_rows: int
    name: str
    earlier: tuple[str, ...] = ()

    def to_json(self) -> str:
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> TagWork:
        values = json.loads(text)
        return cls(**{**values, "earlier": tuple(values["earlier"])})


@dataclass(frozen=True)
class TagPlan:
    """What is to be made, and what stays.

    Attributes:
        work: Parts to be made.
        kept: Live parts of the tags that stay as they are.
        names: The part of the images of each part that is made or kept, by the name of the latter.
    """

    work: tuple[TagWork, ...]
    kept: tuple[LivePart, ...]
    names: Mapping[str, str]


def plan_tags(images: Sequence[LivePart], tags: Sequence[LivePart], recipe: TagRecipe, revision: str = "") -> TagPlan:
    """What is left to do for a state of the images.

    Args:
        images: Live parts of the images.
        tags: Live parts of the tags.
        revision: 8 hex digits: all is made anew, under other names. Empty: only what is not there.
    """
    images = [part for part in images if part.num_rows]
    live = {(part.shard_id, part.recipe_id): part for part in tags}
    recipe_id = recipe.recipe_id
    keys = {part.name: (_shard_id(part), recipe_id) for part in images}
    kept = {} if revision else {name: live[key] for name, key in keys.items() if key in live}
    staying = {part.name for part in kept.values()}
    replaced: dict[str | None, list[str]] = {}
    for part in tags:
        if part.recipe_id == recipe_id and part.name not in staying:
            replaced.setdefault(part.location_id, []).append(part.name)
    work = []
    for part in images:
        if part.name in kept:
            continue
        name = part_name(*keys[part.name], revision)
        earlier = () if revision else tuple(replaced.get(part.location_id, ()))
        work.append(TagWork(part.name, part.num_rows, name, earlier))
    names = {part.name: name for name, part in kept.items()} | {each.name: each.images_part for each in work}
    return TagPlan(tuple(work), tuple(kept.values()), names)


def is_tagged(images: Sequence[LivePart], tags: Sequence[LivePart], recipe: TagRecipe) -> bool:
    """Whether the tags are those of these images, all of them and no others."""
    plan = plan_tags(images, tags, recipe)
    return not plan.work and len(plan.kept) == len(tags)


@dataclass(frozen=True)
class TagSummary:
    """What a made part holds.

    Attributes:
        num_kept: Rows taken over from an earlier part.
        stage_sec: Thread-seconds by stage.
        run_id: The run that made it; empty where an old part does not say.
    """

    name: str
    num_rows: int
    num_kept: int
    num_bytes: int = 0
    stage_sec: dict[str, float] = field(default_factory=dict)
    run_id: str = ""

    @property
    def part(self) -> LivePart:
        return LivePart(self.name, self.num_rows, self.num_bytes)


def read_tag_summary(catalog: CatalogLayout, name: str, storage_options: storage.StorageOptions) -> TagSummary | None:
    """Summary of a part, or None where there is no such part."""
    return stored_summary(TagSummary, f"{catalog.tags}/{name}", storage_options)


def num_unknown(catalog: CatalogLayout, work: TagWork, storage_options: storage.StorageOptions) -> int:
    """How many of the rows of a part are not to be taken over from earlier parts."""
    if not work.earlier:
        return work.num_rows
    known = rows_by_image(catalog, work.earlier, storage_options)
    with storage.open_for_reading(f"{catalog.images}/{work.images_part}", storage_options) as file:
        rows = pq.ParquetFile(file).read(columns=["image_id", *ROW_COLUMNS]).combine_chunks()
    (batch,) = rows.to_batches()
    return sum(key not in known for key in zip(batch["image_id"].to_pylist(), row_hashes(batch), strict=True))


def write_tags(
    catalog: CatalogLayout,
    work: TagWork,
    batches: Iterator[tuple[pa.RecordBatch, int]],
    stage_sec: dict[str, float],
    storage_options: storage.StorageOptions,
    run_id: str,
) -> TagSummary:
    """Writes a part, whole or not at all. Of two writers of one part the first one wins: what is committed never changes its bytes.

    Args:
        batches: Rows of TAGS, and how many of them were taken over.
        stage_sec: Filled while the batches are made.
    """
    num_rows = num_kept = 0
    with (
        storage.replacing(f"{catalog.tags}/{work.name}", storage_options, only_if_absent=True) as path,
        pq.ParquetWriter(path, TAGS, compression="zstd") as parquet,
    ):
        for rows, kept in batches:
            parquet.write_batch(rows)
            num_rows, num_kept = num_rows + rows.num_rows, num_kept + kept
        store_summary(parquet, TagSummary(work.name, num_rows, num_kept, stage_sec=stage_sec, run_id=run_id))
    written = read_tag_summary(catalog, work.name, storage_options)
    assert written is not None
    return written


def rows_by_image(
    catalog: CatalogLayout, names: Sequence[str], storage_options: storage.StorageOptions
) -> dict[tuple[int, str], dict[str, Any]]:
    """Rows of some parts, by image and hash of what they were made from; parts that are not there have none."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for name in names:
        uri = f"{catalog.tags}/{name}"
        if not storage.exists(uri, storage_options):  # `clean` may have been at work
            continue
        with storage.open_for_reading(uri, storage_options) as file:
            rows = pq.read_table(file, schema=TAGS).to_pylist()
        found |= {(row["image_id"], row["row_hash"]): row for row in rows}
    return found


def _shard_id(images_part: LivePart) -> str:
    """Place of a part of the images, and its whole name in short."""
    return f"{images_part.location_id}-{digest(images_part.name)[:12]}"
