from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import duckdb
import pandas as pd
from hypothesis import HealthCheck, given, settings

from tests.tagged_catalogs import export_row
from tests.vlm_ops.exports.texts import ANY_TEXT, NASTY
from vlm_ops.exports import csv_file
from vlm_ops.exports.records import RECORD
from vlm_ops.exports.targets import Target

# https://www.rfc-editor.org/rfc/rfc4180#section-2, with all of Unicode as text
RFC_4180 = re.compile(r'(("([^"]|"")*"|[^",\r\n]*)(,("([^"]|"")*"|[^",\r\n]*))*\r\n)+')


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))


def shown(text: str) -> str:
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "", text)


def test_libraries_read_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "tags.csv"
    texts = [text for text in NASTY if len(text) < 100]
    rows = [export_row(f"/data/{number}.jpg", title=text) for number, text in enumerate(texts)]
    assert csv_file.write(rows, Target(str(path))) == {"images": len(texts)}
    assert RFC_4180.fullmatch(path.read_bytes().decode())
    (expected,) = ([row["title"] for row in rows_of(path)],)
    by_duckdb = duckdb.sql(
        f"SELECT * FROM read_csv('{path}', header=true, all_varchar=true, strict_mode=true, quote='\"', escape='\"')"
    )
    assert by_duckdb.columns == RECORD.names
    assert [title or "" for (title,) in by_duckdb.select("title").fetchall()] == expected
    by_pandas = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert list(by_pandas.columns) == RECORD.names
    assert by_pandas["image_id"].tolist() == [str(row.image_id) for row in rows]
    assert [json.loads(each) for each in by_pandas["keywords"]] == [["dog", "snow", "winter"]] * len(texts)
    assert json.loads(by_pandas["categories"][0])[0]["score"] == 0.9
    assert by_pandas["alt_reason"].tolist() == [""] * len(texts)
    for text, title in zip(texts, expected, strict=True):
        assert title in (shown(text), "'" + shown(text))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY_TEXT)
def test_no_cell_is_a_formula(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.csv"
    row = export_row(title=text, description=text, keywords=[text], slug=text)
    csv_file.write([row], Target(str(path)))
    assert RFC_4180.fullmatch(path.read_bytes().decode())
    (cells,) = rows_of(path)
    assert not any(cell.startswith(tuple("=+-@\t\r\n＝＋－＠")) for cell in cells.values())
    assert json.loads(cells["keywords"]) == [text]
    csv_file.write([row], Target(str(path)), is_raw=True)
    assert rows_of(path)[0]["title"] == shown(text)


def test_numbers_may_be_negative(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    csv_file.write([export_row(text_share=-0.5)], Target(str(path)))
    assert rows_of(path)[0]["text_share"] == "-0.5"
