"""What JSONL and CSV say of an image: all its tags, and where it is."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from schemas.tables import column, images_schema
from schemas.tags import TAGS
from vlm_ops.exports.addresses import Addresses
from vlm_ops.exports.escaping import plain
from vlm_ops.exports.rows import ExportRow

_FACTS = ("key", "width", "height", "format", "num_bytes", "content_sha256")
TAG_COLUMNS = None  # all
IMAGE_COLUMNS = (*_FACTS, "source_metadata")

RECORD = pa.schema(
    [
        *TAGS,
        *(images_schema().field(name) for name in _FACTS),
        column("image_url", pa.string(), "export", "URL", "Where the image is served, where that is known."),
        column("page_url", pa.string(), "export", "URL", "The page that shows it, where that is known."),
    ]
)


def _holds_numbers(type_: pa.DataType) -> bool:
    if pa.types.is_list(type_):
        return _holds_numbers(type_.value_type)
    if pa.types.is_struct(type_):
        return any(_holds_numbers(each.type) for each in type_)
    return pa.types.is_floating(type_)


_NAMES = tuple(RECORD.names)
_WITH_NUMBERS = tuple(each.name for each in RECORD if _holds_numbers(each.type))


def record(row: ExportRow, addresses: Addresses) -> dict[str, Any]:
    """A value for every column of RECORD, as JSON can say it."""
    values = {**row.image, **row.tags, "image_url": addresses.image_url(row), "page_url": addresses.page(row)}
    values |= {name: plain(values.get(name)) for name in _WITH_NUMBERS}
    return {name: values.get(name) for name in _NAMES}
