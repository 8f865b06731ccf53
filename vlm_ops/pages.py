"""Pages to look at: self-contained HTML with thumbnails inside, everything escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from schemas.catalog import RUN_REPORT, CatalogLayout
from schemas.manifests import RunManifest
from schemas.recipes import DEFAULT_MAX_IMAGE_BYTES
from schemas.samples import SampleError
from schemas.tables import INDEX_ROW_COLUMNS
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, read_columns
from vlm_ops.images import decode, resize
from vlm_ops.shards import ReadConfig, read_image

_THUMBNAIL_SIDE = 256
_REPORT_IMAGES = 24


@dataclass(frozen=True)
class Card:
    """One picture of a gallery. `picture` is a data URI, or None with the reason in `missing`; `details` are what else
    is said of it, by name."""

    name: str
    uri: str
    labels: str
    caption: str | None
    score: str | None
    picture: str | None
    missing: str
    details: Sequence[tuple[str, str]] = ()

    @property
    def alt(self) -> str:
        return self.caption or self.labels or self.name


@dataclass(frozen=True)
class Section:
    """A row of pictures under a heading; `picture` is the image that was asked with, if one was."""

    title: str
    cards: Sequence[Card]
    picture: str | None = None


def render_gallery(
    title: str,
    facts: Sequence[tuple[str, Any]],
    sections: Sequence[Section],
    table: Sequence[Sequence[Any]] = (),
) -> str:
    """One HTML page that needs no other file."""
    return _template().render(title=title, facts=facts, sections=sections, table=table)


def card(row: Mapping[str, Any], storage_options: storage.StorageOptions) -> Card:
    """A card of a row of INDEX_ROW_COLUMNS, with `score` where it is a result."""
    picture, missing = None, ""
    try:
        config = ReadConfig(DEFAULT_MAX_IMAGE_BYTES, storage_options=storage_options)
        data = read_image(row["uri"], row["shard_uri"], row["byte_offset"], row["num_bytes"], config)
        picture = thumbnail(data)
    except (OSError, SampleError) as error:
        missing = f"cannot be shown: {error}"[:200]
    labels = ", ".join(f"{label['name']} {label['score']:.2f}" for label in (row.get("labels") or [])[:3])
    score = f"{row['score']:.3f}" if "score" in row else None
    return Card(row["key"], row["uri"], labels, row.get("caption"), score, picture, missing)


def thumbnail(data: bytes) -> str:
    """A small JPEG of an encoded image, as a data URI.

    Raises:
        SampleError: The image cannot be decoded.
    """
    pixels = decode(data, shorter_side=_THUMBNAIL_SIDE).pixels
    height, width = pixels.shape[1:]
    scale = min(1.0, _THUMBNAIL_SIDE / max(height, width))
    small = resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(small.permute(1, 2, 0).numpy())).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_run_report(catalog: CatalogLayout, manifest: RunManifest, storage_options: storage.StorageOptions) -> None:
    """`runs/<run id>/report.html`: what happened, and some of the images of the run."""
    rows: list[dict[str, Any]] = []
    parts = [LivePart(name, 0, 0) for name in manifest.sample_parts]
    for _, table in read_columns(catalog.images, parts, INDEX_ROW_COLUMNS, storage_options):
        rows += table.slice(0, _REPORT_IMAGES - len(rows)).to_pylist()
        if len(rows) >= _REPORT_IMAGES:
            break
    facts = [
        ("run", f"{manifest.run_id}, {manifest.status}"),
        ("images", manifest.num_images),
        ("added", manifest.num_added),
        ("changed", manifest.num_changed),
        ("removed", manifest.num_removed),
        ("failed images", manifest.num_failed_images),
        ("seconds", manifest.wall_sec),
        ("recipe", manifest.recipe.recipe_id),
    ]
    table_rows: list[tuple[str, float]] = [(reason, count) for reason, count in sorted(manifest.num_failures.items())]
    table_rows += [(f"{stage} (thread-seconds)", seconds) for stage, seconds in manifest.stages]
    sections = [Section("Some of its images", [card(row, storage_options) for row in rows])]
    page = render_gallery(f"Beamsight {manifest.action}", facts, sections, table_rows)
    storage.write_bytes(catalog.run_file(manifest.run_id, RUN_REPORT), page.encode(), storage_options)


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlm_ops"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("gallery.html.j2")
