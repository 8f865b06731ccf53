"""Galleries: self-contained, and nothing in them is taken for HTML."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from PIL import Image

from tests.conftest import jpeg
from vlm_ops.pages import Section, card, render_gallery, thumbnail

EVIL = '<script>alert("x")</script>'


def row(uri: str, **changes: object) -> dict:
    values = {
        "uri": uri,
        "shard_uri": uri,
        "byte_offset": None,
        "num_bytes": None,
        "key": "k",
        "labels": None,
        "caption": None,
    }
    return values | changes


def test_everything_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg(0))
    label = [{"name": EVIL, "score": 0.5}]
    page = render_gallery(
        EVIL,
        [(EVIL, EVIL)],
        [Section(EVIL, [card(row(str(path), key=EVIL, labels=label, caption=EVIL), {})])],
        [(EVIL, 1)],
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 7
    assert 'src="data:image/jpeg;base64,' in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_picture_that_is_gone_says_so(tmp_path: Path) -> None:
    gone = card(row(str(tmp_path / "gone.jpg"), score=0.25), {})
    assert gone.picture is None and "cannot be shown" in gone.missing and gone.score == "0.250"
    assert "cannot be shown" in render_gallery("t", [], [Section("s", [gone])])


def test_no_results() -> None:
    assert "no results" in render_gallery("t", [], [Section("s", [])])


def test_thumbnails_are_small_and_keep_their_shape() -> None:
    uri = thumbnail(jpeg(0, 3000, 1500))
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert picture.size == (256, 128)
    assert len(uri) < 40_000
