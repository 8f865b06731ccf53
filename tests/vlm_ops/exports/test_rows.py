from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.tagged_catalogs import image_row, tag_row, write_catalog
from vlm_ops.delta_tables import live_parts, open_table
from vlm_ops.exports.rows import OUTDATED, LeftOut, NothingToExportError, RowSource, leaving_out
from vlm_ops.states import existing_state

URIS = tuple(f"/data/{number}.jpg" for number in range(8))


def source(root: Path, images: list[dict], tags: list[dict], review: str = "include") -> RowSource:
    catalog = write_catalog(root, images, tags)
    parts = tuple(live_parts(open_table(catalog.tags, {})))
    return RowSource(catalog, existing_state(catalog, {}).images, parts, review)


def test_tags_stand_with_their_image_whatever_the_order(tmp_path: Path) -> None:
    images = [image_row(uri, width=100 + number) for number, uri in enumerate(URIS)]
    tags = [tag_row(uri) for part in (URIS[:3], URIS[3:6], URIS[6:]) for uri in reversed(part)]
    rows = source(tmp_path, images, tags)
    done: list[int] = []
    actual = {row.uri: row.image["width"] for row in rows.rows(("slug",), ("width",), LeftOut(), done.append)}
    assert actual == {uri: 100 + number for number, uri in enumerate(URIS)}
    assert sum(done) == rows.num_rows == 8 and len(done) == 3
    assert set(rows.shard_uris()) == set(URIS)


def test_only_the_columns_asked_for_are_read(tmp_path: Path) -> None:
    rows = source(tmp_path, [image_row(URIS[0])], [tag_row(URIS[0])])
    (row,) = rows.rows(("slug",), ("width",), LeftOut())
    assert set(row.tags) == {"image_id", "uri", "review", "slug"}
    assert set(row.image) == {"image_id", "shard_uri", "width"}
    (row,) = rows.rows(None, (), LeftOut())
    assert row.tags["keywords"] == ["dog", "snow", "winter"]


def test_an_image_that_is_gone_is_left_out(tmp_path: Path) -> None:
    rows = source(tmp_path, [image_row(uri) for uri in URIS[:3]], [tag_row(uri) for uri in (*URIS[:2], *URIS[4:])])
    left_out = LeftOut()
    assert [row.uri for row in rows.rows(None, (), left_out)] == list(URIS[:2])
    assert left_out.counts == {OUTDATED: 4}
    assert rows.num_untagged(left_out) == 1


@pytest.mark.parametrize(("review", "expected", "reasons"), [
    ("include", [0, 1, 2, 3], {}),
    ("exclude", [0, 2, 3], {"needs review": 1}),
    ("only", [1], {"needs no review": 3}),
])  # fmt: skip
def test_review(tmp_path: Path, review: str, expected: list[int], reasons: dict[str, int]) -> None:
    reviews = ("ok", "needs_review", None, "ok")
    tags = [tag_row(uri, review=each) for uri, each in zip(URIS, reviews, strict=False)]
    rows = source(tmp_path, [image_row(uri) for uri in URIS[:4]], tags, review)
    left_out = LeftOut()
    assert sorted(row.uri for row in rows.rows((), (), left_out)) == [URIS[number] for number in expected]
    assert left_out.counts == reasons


def test_columns_that_an_older_part_lacks_are_not_there(tmp_path: Path) -> None:
    rows = source(tmp_path, [image_row(URIS[0])], [tag_row(URIS[0])])
    for folder, name, column in (("tags", rows.tags[0].name, "rights"), ("images", rows.images[0].name, "width")):
        table = pq.read_table(tmp_path / folder / name)
        pq.write_table(table.drop_columns([column]), tmp_path / folder / name)
    (row,) = rows.rows(None, ("width", "height"), LeftOut())
    assert row.rights == {} and row.image.get("width") is None and row.image["height"] == 600


def test_what_is_left_out_is_written_with_its_reasons(tmp_path: Path) -> None:
    path = tmp_path / "left_out.jsonl"
    with leaving_out(str(path), {}) as left_out:
        left_out.add(7, "/data/ü.jpg", "too small", "too large")
        left_out.add(8, "/data/b.jpg", "too small")
        assert not path.exists()
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"image_id": 7, "uri": "/data/ü.jpg", "reasons": ["too small", "too large"]},
        {"image_id": 8, "uri": "/data/b.jpg", "reasons": ["too small"]},
    ]
    assert str(left_out) == "too small (2), too large (1)"
    with pytest.raises(NothingToExportError, match=r"nothing to export: too small \(2\), too large \(1\)"):
        raise left_out.nothing_left()
    with pytest.raises(NothingToExportError, match="nothing to export: no image has tags"):
        raise LeftOut().nothing_left()
