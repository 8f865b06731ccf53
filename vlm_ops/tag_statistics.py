"""What the tags of a catalog say, counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, read_columns
from vlm_ops.tag_parts import is_tagged
from vlm_ops.tag_states import tag_state

_NUM_SHOWN = 8


def describe_tags(
    catalog: CatalogLayout, images: Sequence[LivePart], storage_options: storage.StorageOptions
) -> dict[str, Any] | None:
    """What the tags say, counted; None where nothing was tagged yet."""
    state = tag_state(catalog, storage_options)
    if state.record is None:
        return None
    counts: dict[str, Counter[str]] = {
        name: Counter() for name in ("categories", "suitability", "review", "review_reasons")
    }
    num_uncategorised = 0
    columns = [*counts, "image_id"]
    for _, rows in read_columns(catalog.tags, state.parts, columns, storage_options):
        for name in ("suitability", "review"):
            counts[name].update(value or "unknown" for value in rows[name].to_pylist())
        for reasons in rows["review_reasons"].to_pylist():
            counts["review_reasons"].update({_kind(reason) for reason in reasons})
        for categories in rows["categories"].to_pylist():
            num_uncategorised += not categories
            counts["categories"].update(" > ".join(category["path"]) for category in categories[:1])
    recipe = state.record.recipe
    return {
        "images": state.record.num_images,
        "is_current": is_tagged(images, state.parts, recipe),
        "taxonomy": f"{recipe.taxonomy} {recipe.taxonomy_version}",
        "run": {"run_id": state.record.run_id, "committed_at": state.record.committed_at},
        "without_category": num_uncategorised,
        **{name: dict(counter.most_common()) for name, counter in counts.items()},
    }


def _kind(reason: str) -> str:
    """A reason without what is particular to one image."""
    return re.split(r": | \(\d", reason)[0]


def tag_lines(tags: dict[str, Any] | None, catalog: str) -> list[str]:
    """What the tags say, for a person."""
    if tags is None:
        return [f"tags       none; make them with `beamsight tag {catalog}`"]
    total = max(tags["images"], 1)
    stale = "" if tags["is_current"] else f"; the images have changed since: `beamsight tag {catalog}`"

    def shares(counts: dict[str, int]) -> str:
        return ", ".join(f"{name} {count} ({count / total:.0%})" for name, count in list(counts.items())[:_NUM_SHOWN])

    lines = [f"tags       {tags['images']} images, {tags['taxonomy']}, {tags['run']['committed_at']}{stale}"]
    lines += [
        f"category   {name} {count} ({count / total:.0%})"
        for name, count in list(tags["categories"].items())[:_NUM_SHOWN]
    ]
    lines += [
        f"category   none {tags['without_category']} ({tags['without_category'] / total:.0%})",
        f"suitable   {shares(tags['suitability'])}",
        f"review     {shares(tags['review'])}",
    ]
    return lines + [
        f"           {name} {count} ({count / total:.0%})"
        for name, count in list(tags["review_reasons"].items())[:_NUM_SHOWN]
    ]
