from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
from hypothesis import HealthCheck, given, settings

from tests.tagged_catalogs import export_row
from tests.vlm_ops.exports.texts import ANY_TEXT, NASTY
from vlm_ops.exports import jsonl
from vlm_ops.exports.addresses import Addresses
from vlm_ops.exports.records import RECORD, record
from vlm_ops.exports.targets import Target


def json_schema(type_: pa.DataType) -> dict[str, Any]:
    """The JSON schema of what a value of an Arrow type may be; each may be null."""
    if pa.types.is_list(type_):
        return {"type": ["array", "null"], "items": json_schema(type_.value_type)}
    if pa.types.is_struct(type_):
        properties = {field.name: json_schema(field.type) for field in type_}
        return {
            "type": ["object", "null"],
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    if pa.types.is_boolean(type_):
        return {"type": ["boolean", "null"]}
    if pa.types.is_integer(type_):
        return {"type": ["integer", "null"]}
    return {"type": ["number" if pa.types.is_floating(type_) else "string", "null"]}


SCHEMA = json_schema(pa.struct(list(RECORD)))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_every_line_is_valid_and_says_all(tmp_path: Path) -> None:
    rows = [
        export_row(f"/data/{number}.jpg", {"page_url": "https://shop.example/p"}, title=text, keywords=[text])
        for number, text in enumerate(NASTY)
    ]
    target = Target(str(tmp_path / "tags.jsonl"), Addresses("https://cdn.example/", uri_prefix="/data/"))
    assert jsonl.write(rows, target) == {"images": len(NASTY)}
    text = (tmp_path / "tags.jsonl").read_bytes().decode()
    lines = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
    assert len(lines) == len(NASTY)
    for line, row, nasty in zip(lines, rows, NASTY, strict=True):
        VALIDATOR.validate(line)
        assert list(line) == RECORD.names
        assert line["title"] == nasty and line["keywords"] == [nasty]
        assert line["image_id"] == row.image_id
        assert line["image_url"] == f"https://cdn.example/{row.uri[6:]}"
        assert line["page_url"] == "https://shop.example/p"
        assert line["categories"][0]["score"] == 0.9
        assert (line["width"], line["height"], line["format"]) == (800, 600, "JPEG")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY_TEXT)
def test_any_text_comes_back(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.jsonl"
    jsonl.write([export_row(title=text)], Target(str(path)))
    data = path.read_bytes()
    assert data.count(b"\n") == 1
    assert json.loads(data)["title"] == text


def test_what_is_not_known_is_null() -> None:
    row = export_row(image={"width": None, "format": None}, rights=None, text_share=float("nan"))
    values = record(row, Addresses())
    VALIDATOR.validate(values)
    for name in ("width", "format", "rights", "text_share", "image_url", "page_url", "alt_reason"):
        assert values[name] is None


def test_no_image_is_an_empty_file(tmp_path: Path) -> None:
    assert jsonl.write([], Target(str(tmp_path / "none.jsonl"))) == {"images": 0}
    assert (tmp_path / "none.jsonl").read_bytes() == b""
