"""Catalogs with tags, written without any model: what `export` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.catalog import CatalogLayout, part_name
from schemas.recipes import Recipe
from schemas.samples import digest, image_id
from schemas.tables import images_schema
from schemas.tags import TAGS, TEXT_FIELDS, TagRecipe, TagRecord
from vlm_ops.delta_tables import LivePart, set_live
from vlm_ops.exports.rows import ExportRow
from vlm_ops.states import CatalogState, StateParts, commit_parts, new_record
from vlm_ops.tag_states import TAG_RECORD

RUN_ID = "20261101T120000000-abcdef"
RECIPE = Recipe((), 1_000_000, 1_000_000)
TAG_RECIPE = TagRecipe("IAB Content Taxonomy", "3.1", "0" * 12, None, "", "", None)


def image_row(uri: str, metadata: Mapping[str, Any] | str | None = None, **columns: Any) -> dict[str, Any]:
    """A row of `images`: a JPEG of 800×600 pixels, unless said otherwise. `metadata` as text is written as it is."""
    shard_uri, _, _ = uri.partition("#")
    row = {
        "image_id": image_id(uri), "uri": uri, "shard_uri": shard_uri, "key": uri.rpartition("/")[2].partition(".")[0],
        "width": 800, "height": 600, "format": "JPEG", "num_bytes": 50_000, "content_sha256": "ab" * 32,
        "recipe_id": RECIPE.recipe_id, "run_id": RUN_ID,
        "source_metadata": json.dumps(metadata) if isinstance(metadata, Mapping) else metadata,
    }  # fmt: skip
    return {**row, **columns}


def tag_row(uri: str, **columns: Any) -> dict[str, Any]:
    """A row of `tags`: all that a good one says."""
    name = uri.rpartition("/")[2].partition(".")[0]
    row = {
        "image_id": image_id(uri), "uri": uri, "alt_text": f"Two dogs run through snow, {name}", "title": "Two dogs in the snow",
        "caption": "two dogs run through the snow", "description": "Two dogs run through the snow.",
        "keywords": ["dog", "snow", "winter"], "slug": f"two-dogs-{digest(uri)[:8]}", "language": "en",
        "categories": [{"id": "424", "path": ["Pets", "Dogs"], "score": 0.9, "evidence": ["image"]}],
        "sensitive_topics": [], "suitability": "low", "suitability_evidence": [], "text_share": 0.0, "num_faces": 0,
        "dominant_colors": [{"hex": "#ffffff", "share": 0.7, "name": "white"}], "focus": {"x": 0.5, "y": 0.4},
        "ad_slots": [], "review": "ok", "review_reasons": [], "tag_source": dict.fromkeys(TEXT_FIELDS, "generated"),
        "taxonomy_name": "IAB Content Taxonomy", "taxonomy_version": "3.1", "taxonomy_hash": "0" * 12,
        "tag_recipe_id": "1" * 12, "row_hash": "2" * 16, "run_id": RUN_ID,
    }  # fmt: skip
    return {**row, **columns}


def write_catalog(
    root: Path, images: Sequence[Mapping[str, Any]], tags: Sequence[Mapping[str, Any]] | None, rows_a_part: int = 3
) -> CatalogLayout:
    """A catalog whose parts hold so many images; `tags` in the order of `images`, None for none at all."""
    catalog = CatalogLayout(str(root))
    parts, tag_parts = [], []
    for start in range(0, max(len(images), len(tags or ())), rows_a_part):
        location = f"s{digest(str(start))}"
        if rows := images[start : start + rows_a_part]:
            name = part_name(f"{location}-{'a' * 12}", RECIPE.recipe_id)
            parts.append(_write(root / "images" / name, rows, images_schema()))
        if rows := (tags or ())[start : start + rows_a_part]:
            name = part_name(f"{location}-{'b' * 12}", "1" * 12)
            tag_parts.append(_write(root / "tags" / name, rows, TAGS))
    state = StateParts(tuple(parts), ())
    commit_parts(catalog, CatalogState(), state, new_record(RUN_ID, "build", RECIPE, None, state), {}, images_schema())
    if tags is not None:
        record = TagRecord(RUN_ID, "2026-11-01T12:00:00+00:00", 1, RUN_ID, TAG_RECIPE, len(images), len(tags))
        set_live(catalog.tags, TAGS, tag_parts, RUN_ID, {}, {TAG_RECORD: record.to_json()})
    return catalog


def _write(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> LivePart:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
    return LivePart(path.name, len(rows), path.stat().st_size)


def export_row(
    uri: str = "/data/dog.jpg",
    metadata: Mapping[str, Any] | str | None = None,
    image: Mapping[str, Any] | None = None,
    **tags: Any,
) -> ExportRow:
    """A row as `export` reads it."""
    return ExportRow(tag_row(uri, **tags), image_row(uri, metadata, **(image or {})))
