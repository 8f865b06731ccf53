from __future__ import annotations

import csv
import io
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree, html

from tests.vlm_ops.exports.texts import ANY_TEXT
from vlm_ops.exports.escaping import csv_text, html_json, one_line, plain, xml_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_TEXT,
    lambda each: st.lists(each) | st.dictionaries(ANY_TEXT, each),
    max_leaves=5,
)


@given(ANY_TEXT)
def test_xml_gives_back_all_that_it_can_hold(text: str) -> None:
    allowed = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "", text)
    root = etree.fromstring(f'<a b="x">{xml_text(text)}</a>'.encode())
    assert (root.text or "") == allowed
    assert len(root) == 0


@given(JSON)
def test_json_stands_in_a_page_whatever_it_says(value: object) -> None:
    text = html_json(value)
    assert json.loads(text) == value
    assert not re.search("[<>&\u2028\u2029]", text)
    if "\x00" not in text:
        page = html.fromstring(
            f'<html><body><script type="application/ld+json">{text}</script><p>after</p></body></html>'
        )
        assert json.loads(page.xpath("string(//script)")) == value
        assert page.xpath("count(//p)") == 1


def test_json_has_no_not_a_number() -> None:
    with pytest.raises(ValueError):
        html_json(math.nan)


@given(ANY_TEXT)
def test_csv_texts_are_no_formulas_and_come_back(text: str) -> None:
    cell = csv_text(text)
    assert not cell.startswith(tuple("=+-@\t\r\n＝＋－＠"))
    raw = csv_text(text, is_raw=True)
    assert raw == re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "", text)
    assert cell in (raw, f"'{raw}")
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\r\n").writerow([cell, "next"])
    assert list(csv.reader(io.StringIO(file.getvalue(), newline=""))) == [[cell, "next"]]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@A1", "\t=1", "\r=1", "＝1", "＋1", "－1", "＠A"])
def test_formulas_are_quoted(text: str) -> None:
    assert csv_text(text) == f"'{text}"


def test_a_control_character_does_not_hide_a_formula() -> None:
    assert csv_text("\x00=1") == "'=1"


@given(ANY_TEXT)
def test_one_line_is_one(text: str) -> None:
    line = one_line(text)
    assert line == line.strip() and len(line.splitlines()) <= 1 and "\t" not in line
    assert bool(line) == bool(xml_text(line))


def test_numbers_are_plain() -> None:
    assert plain({"a": [0.8999999761581421, math.nan, math.inf, 3, None, "x", True]}) == {
        "a": [0.9, None, None, 3, None, "x", True]
    }
