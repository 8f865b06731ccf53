"""Keeps `duplicate_of` true: where the first of some equal images leaves, or gets other bytes, another one is the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.delta_tables import LivePart, read_columns
from vlm_ops.parts import rewritten


@dataclass(frozen=True)
class _Image:
    part: str
    row: int
    image_id: int
    content_sha256: str
    duplicate_of: int | None


def with_true_firsts(
    catalog: CatalogLayout, parts: Sequence[LivePart], storage_options: storage.StorageOptions
) -> tuple[LivePart, ...]:
    """The parts; those in which `duplicate_of` names an image that is not there, has other bytes, or is a copy itself, are
    replaced by copies that name the first one: an original where there is one, else the first of the copies.

    Reads one column of all parts, and three more where there are copies. Memory goes with the number of copies.
    """
    copies: list[int] = []
    for _, rows in read_columns(catalog.images, parts, ["duplicate_of"], storage_options):
        copies += rows.column("duplicate_of").drop_null().to_pylist() if rows.num_columns else []
    if not copies:
        return tuple(parts)
    found = _images(catalog, parts, "image_id", pa.array(set(copies), pa.int64()), storage_options, and_copies=True)
    by_id = {image.image_id: image for image in found}
    wrong = [image for image in found if image.duplicate_of is not None and not _is_true(image, by_id)]
    if not wrong:
        return tuple(parts)
    contents = pa.array({image.content_sha256 for image in wrong}, pa.string())
    firsts: dict[str, _Image] = {}
    same = _images(catalog, parts, "content_sha256", contents, storage_options)
    for image in sorted(same, key=lambda image: image.duplicate_of is not None):  # stable: originals, then in order
        firsts.setdefault(image.content_sha256, image)
    changes: dict[str, dict[int, int | None]] = {}
    for image in same:
        first = firsts[image.content_sha256]
        named = None if image == first else first.image_id
        if image.duplicate_of is not None and image.duplicate_of != named:
            changes.setdefault(image.part, {})[image.row] = named
    return tuple(
        rewritten(catalog.images, part, lambda rows, part=part: _renamed(rows, changes[part.name]), storage_options)  # type: ignore[misc]
        if part.name in changes
        else part
        for part in parts
    )


def _is_true(image: _Image, by_id: dict[int, _Image]) -> bool:
    first = by_id.get(image.duplicate_of or 0)
    return first is not None and first.duplicate_of is None and first.content_sha256 == image.content_sha256


def _images(
    catalog: CatalogLayout,
    parts: Sequence[LivePart],
    column: str,
    values: pa.Array,
    storage_options: storage.StorageOptions,
    and_copies: bool = False,
) -> list[_Image]:
    """The images with one of some values in a column, and all copies where they are wanted too; in order."""
    columns = ["image_id", "content_sha256", "duplicate_of"]
    images: list[_Image] = []
    for part, rows in read_columns(catalog.images, parts, columns, storage_options):
        if "duplicate_of" not in rows.column_names:  # written before the column was
            continue
        wanted = pc.is_in(rows.column(column), values)
        if and_copies:
            wanted = pc.or_(wanted, rows.column("duplicate_of").is_valid())
        numbers = np.flatnonzero(wanted.to_numpy())
        for number, row in zip(numbers.tolist(), rows.take(pa.array(numbers)).to_pylist(), strict=True):
            images.append(_Image(part.name, number, row["image_id"], row["content_sha256"], row["duplicate_of"]))
    return images


def _renamed(rows: pa.Table, changes: dict[int, int | None]) -> pa.Table:
    """The rows with other values of `duplicate_of`, by row number."""
    values = rows.column("duplicate_of").to_pylist()
    for number, named in changes.items():
        values[number] = named
    return rows.set_column(
        rows.schema.get_field_index("duplicate_of"),
        rows.schema.field("duplicate_of"),
        pa.array(values, pa.int64()),
    )
