"""CSV as RFC 4180 has it: UTF-8 without a mark, CRLF, a header, quotes doubled. Nested columns are JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from typing import Any

from vlm_ops.exports.escaping import csv_text
from vlm_ops.exports.files import text_file
from vlm_ops.exports.records import IMAGE_COLUMNS, RECORD, TAG_COLUMNS, record
from vlm_ops.exports.rows import ExportRow
from vlm_ops.exports.targets import Target, Written

__all__ = ["IMAGE_COLUMNS", "TAG_COLUMNS", "write"]


def write(rows: Iterable[ExportRow], target: Target, is_raw: bool = False) -> Written:
    """Writes the file.

    Args:
        is_raw: Texts are written as they are, also where a spreadsheet would run them as a formula.
    """
    num_images = 0
    with text_file(target.uri, target.storage_options) as file:
        writer = csv.writer(file, lineterminator="\r\n")
        writer.writerow(RECORD.names)
        for row in rows:
            writer.writerow([_cell(value, is_raw) for value in record(row, target.addresses).values()])
            num_images += 1
    return {"images": num_images}


def _cell(value: Any, is_raw: bool) -> Any:
    if isinstance(value, str):
        return csv_text(value, is_raw)
    return json.dumps(value, ensure_ascii=False, allow_nan=False) if isinstance(value, (list, dict)) else value
