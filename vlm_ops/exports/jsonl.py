"""JSON lines: an object an image, with all columns of the tags; what is not known is null. https://jsonlines.org"""

from __future__ import annotations

import json
from collections.abc import Iterable

from vlm_ops.exports.files import text_file
from vlm_ops.exports.records import IMAGE_COLUMNS, TAG_COLUMNS, record
from vlm_ops.exports.rows import ExportRow
from vlm_ops.exports.targets import Target, Written

__all__ = ["IMAGE_COLUMNS", "TAG_COLUMNS", "write"]


def write(rows: Iterable[ExportRow], target: Target) -> Written:
    """Writes the file."""
    num_images = 0
    with text_file(target.uri, target.storage_options) as file:
        for row in rows:
            file.write(json.dumps(record(row, target.addresses), ensure_ascii=False, allow_nan=False) + "\n")
            num_images += 1
    return {"images": num_images}
