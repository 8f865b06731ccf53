"""Rows of `tags` with what `images` knows of the same image, read part by part.

A part of `tags` belongs to the part of `images` of the same place, so that no more than these two are held.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, read_columns
from vlm_ops.image_evidence import metadata_of

NEEDS_REVIEW = "needs review"
OUTDATED = "changed or gone since it was tagged"
_BATCH_SIZE = 1024


@dataclass(frozen=True)
class ExportRow:
    """An image that is to be exported.

    Attributes:
        tags: Its row of `tags`; columns that an older part lacks are not there.
        image: Columns of its row of `images`.
    """

    tags: Mapping[str, Any]
    image: Mapping[str, Any]

    @property
    def image_id(self) -> int:
        return self.tags["image_id"]

    @property
    def uri(self) -> str:
        return self.tags["uri"]

    @property
    def shard_uri(self) -> str:
        return self.image["shard_uri"]

    @property
    def member(self) -> str:
        """Name inside the shard; empty for a single file."""
        return self.uri[len(self.shard_uri) + 1 :]

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What came with the image; empty where nothing did."""
        return metadata_of(self.image.get("source_metadata"))

    @property
    def rights(self) -> Mapping[str, str]:
        """Those of `rights` that are known."""
        return {name: text for name, text in (self.tags.get("rights") or {}).items() if text}


class NothingToExportError(ValueError):
    """No image is left, and what would be written would not be valid without one."""


@dataclass
class LeftOut:
    """Images that are not exported, and why: counted, and written as JSON lines where a file is given."""

    file: TextIO | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, image_id: int, uri: str, *reasons: str, details: Sequence[str] = ()) -> None:
        """Adds an image. `details` say more than can be counted."""
        self.counts.update(reasons)
        if self.file is not None:
            line = {"image_id": image_id, "uri": uri, "reasons": [*reasons, *details]}
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def nothing_left(self) -> NothingToExportError:
        """What to raise where no image is left to be exported."""
        remedy = "; --review include exports what needs review, too" if self.counts[NEEDS_REVIEW] else ""
        return NothingToExportError(f"nothing to export: {str(self) or 'no image has tags'}{remedy}")

    def __str__(self) -> str:
        return ", ".join(f"{reason} ({count})" for reason, count in self.counts.most_common())


@contextlib.contextmanager
def leaving_out(uri: str | None, storage_options: storage.StorageOptions) -> Iterator[LeftOut]:
    """What is left out in the block; at its end it is in the file, if one is named."""
    if uri is None:
        yield LeftOut()
        return
    with storage.replacing(uri, storage_options) as path, open(path, "w", encoding="utf-8") as file:
        yield LeftOut(file)


@dataclass(frozen=True)
class RowSource:
    """Where rows are read, and which of them.

    Attributes:
        images: Live parts of the images.
        tags: Live parts of the tags.
        review: What becomes of rows that a person should look at: `include`, `exclude` or `only`.
    """

    catalog: CatalogLayout
    images: tuple[LivePart, ...]
    tags: tuple[LivePart, ...]
    review: str
    storage_options: storage.StorageOptions = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.tags)

    def num_untagged(self, left_out: LeftOut) -> int:
        """How many images have no tags, or none that are true, once all rows were read."""
        return sum(part.num_rows for part in self.images) - self.num_rows + left_out.counts[OUTDATED]

    def rows(
        self,
        tag_columns: Sequence[str] | None,
        image_columns: Sequence[str],
        left_out: LeftOut,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Iterator[ExportRow]:
        """The rows, in the order of the parts.

        Args:
            tag_columns: What is read of the tags; None for all.
            image_columns: What is read of the images, besides where they are.
            advance: Called with the number of rows of each batch.
        """
        places: dict[str | None, list[LivePart]] = defaultdict(list)
        for part in self.images:
            places[part.location_id].append(part)
        columns = ["image_id", "shard_uri", *image_columns]
        for part in self.tags:
            found = [rows for _, rows in self._read_images(places[part.location_id], columns)]
            images = pa.concat_tables(found, promote_options="default").combine_chunks() if found else None
            for tags in self._batches(part, tag_columns):
                yield from self._joined(tags, images, left_out)
                advance(tags.num_rows)

    def shard_uris(self) -> Iterator[str]:
        """Where the images are: each part's files, once."""
        for _, rows in self._read_images(self.images, ["shard_uri"]):
            yield from pc.unique(rows.column("shard_uri")).to_pylist()

    def _read_images(self, parts: Sequence[LivePart], columns: Sequence[str]) -> Iterator[tuple[LivePart, pa.Table]]:
        return read_columns(self.catalog.images, parts, columns, self.storage_options)

    def _batches(self, part: LivePart, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
        with storage.open_for_reading(f"{self.catalog.tags}/{part.name}", self.storage_options) as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            wanted = {*(names if columns is None else columns), "image_id", "uri", "review"}
            yield from parquet.iter_batches(_BATCH_SIZE, columns=[name for name in names if name in wanted])

    def _joined(self, tags: pa.RecordBatch, images: pa.Table | None, left_out: LeftOut) -> Iterator[ExportRow]:
        ids = tags.column("image_id")
        known = images.column("image_id") if images is not None else pa.array([], ids.type)
        places = pc.index_in(ids, value_set=known)
        found = images.take(places).to_pylist() if images is not None else [{"image_id": None}] * len(ids)
        for row, image in zip(tags.to_pylist(), found, strict=True):
            needs_review = row.get("review") == "needs_review"
            if image["image_id"] is None:
                left_out.add(row["image_id"], row["uri"], OUTDATED)
            elif needs_review and self.review == "exclude":
                left_out.add(row["image_id"], row["uri"], NEEDS_REVIEW)
            elif not needs_review and self.review == "only":
                left_out.add(row["image_id"], row["uri"], "needs no review")
            else:
                yield ExportRow(row, image)
