"""A page of images with their tags, to be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from schemas.catalog import RUN_REPORT, CatalogLayout
from schemas.tables import INDEX_ROW_COLUMNS
from schemas.tags import TAGS
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, read_columns
from vlm_ops.pages import Card, Section, card, render_gallery

_IMAGES_A_SECTION = 24
_SAMPLED_PARTS = 4


def write_tag_report(
    catalog: CatalogLayout,
    run_id: str,
    images_of: Mapping[str, str],
    parts: Sequence[LivePart],
    facts: Sequence[tuple[str, Any]],
    storage_options: storage.StorageOptions,
) -> None:
    """`runs/<run id>/report.html`: some of the images that a person should look at, and some of the others.

    Args:
        images_of: For each part of the tags, the part of the images that it belongs to.
    """
    sections: dict[str, list[Card]] = {"needs_review": [], "ok": []}
    step = max(len(parts) // _SAMPLED_PARTS, 1)
    sampled = parts[::step][:_SAMPLED_PARTS]
    for part, rows in read_columns(catalog.tags, sampled, TAGS.names, storage_options):
        shown = {name: _spread(rows.filter(pc.equal(rows["review"], name)), len(sampled)) for name in sections}
        images = _images(catalog, images_of[part.name], pa.concat_tables(shown.values()), storage_options)
        for name, table in shown.items():
            sections[name] += [_card(row, images[row["image_id"]], storage_options) for row in table.to_pylist()]
    titles = {"needs_review": "Some that a person should look at", "ok": "Some of the others"}
    page = render_gallery(
        "Beamsight tag", facts, [Section(titles[name], cards) for name, cards in sections.items() if cards]
    )
    storage.write_bytes(catalog.run_file(run_id, RUN_REPORT), page.encode(), storage_options)


def _spread(rows: pa.Table, num_parts: int) -> pa.Table:
    """A few rows, evenly spread."""
    wanted = max(_IMAGES_A_SECTION // num_parts, 1)
    return rows.take(pa.array(range(0, rows.num_rows, max(rows.num_rows // wanted, 1)), pa.int64())).slice(0, wanted)


def _images(
    catalog: CatalogLayout, part: str, rows: pa.Table, storage_options: storage.StorageOptions
) -> dict[int, dict[str, Any]]:
    ((_, images),) = read_columns(catalog.images, [LivePart(part, 0, 0)], INDEX_ROW_COLUMNS, storage_options)
    wanted = images.filter(pc.is_in(images["image_id"], rows["image_id"].combine_chunks()))
    return {row["image_id"]: row for row in wanted.to_pylist()}


def _card(row: Mapping[str, Any], image: dict[str, Any], storage_options: storage.StorageOptions) -> Card:
    return replace(card({**image, "caption": row["title"], "labels": []}, storage_options), details=list(_details(row)))


def _details(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "alt", row["alt_text"] or f"({row['alt_reason']})"
    yield "keywords", ", ".join(row["keywords"])
    for category in row["categories"]:
        yield "category", f"{' > '.join(category['path'])} {category['score']:.2f} ({', '.join(category['evidence'])})"
    yield "suitability", row["suitability"] or "unknown"
    if slots := [slot["slot"] for slot in row["ad_slots"] if slot["eligible"]]:
        yield "may be used as", ", ".join(slots)
    for reason in row["review_reasons"]:
        yield "look:", reason
