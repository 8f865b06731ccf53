"""Every column documents itself, and further columns find their place."""

from __future__ import annotations

import pyarrow as pa
import pytest

from schemas.samples import Failure
from schemas.tables import FAILURES, INDEX_ROW_COLUMNS, RESULTS, column, images_schema, op_columns

SCHEMAS = {"images": images_schema(), "failures": FAILURES, "results": RESULTS}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))
def test_every_column_tells_its_producer_unit_and_meaning(schema: pa.Schema) -> None:
    assert len(set(schema.names)) == len(schema.names)
    for field in schema:
        assert set(field.metadata) == {b"producer", b"unit", b"doc"}
        assert all(field.metadata.values()), field.name


def test_required_columns() -> None:
    required = [field.name for field in images_schema() if not field.nullable]
    assert required == ["image_id", "uri", "shard_uri", "key", "recipe_id", "run_id"]


def test_ops_find_their_columns() -> None:
    assert [field.name for field in op_columns("embedding")] == ["image_embedding"]
    assert {"width", "height", "phash"} <= {field.name for field in op_columns("quality")}
    with pytest.raises(ValueError, match="no column of the images table is made by op 'horoscope'"):
        op_columns("horoscope")


def test_further_columns_come_last() -> None:
    extra = column("sharpness", pa.float32(), "blur", "[0, 1]", "How sharp.")
    schema = images_schema([extra, *op_columns("quality")])
    assert schema.names == [*images_schema().names, "sharpness"]
    assert schema.field("sharpness").metadata[b"producer"] == b"blur"


@pytest.mark.parametrize("names", [["uri"], ["sharpness", "sharpness"]])
def test_a_column_is_declared_once(names: list[str]) -> None:
    extra = [column(name, pa.string(), "blur", "text", "Twice.") for name in names]
    with pytest.raises(ValueError, match=f"column '{names[0]}' is declared twice; rename it in the op"):
        images_schema(extra)


def test_tables_hold_what_flows_into_them() -> None:
    assert set(INDEX_ROW_COLUMNS) <= set(images_schema().names)
    told = set(vars(Failure("u", "s", "read", "empty_file", "m"))) - {"version"}
    assert told <= set(FAILURES.names)
