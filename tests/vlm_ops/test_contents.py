"""What is known of contents: the best row of each, found without reading the catalog, and never trusted unseen."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.samples import Failure, Sample
from vlm_ops import contents
from vlm_ops.contents import KnownContent, KnownContents, ShardRows, StoredRows, digest_of, write_known_contents
from vlm_ops.delta_tables import LivePart


def sha(content: object) -> str:
    return hashlib.sha256(str(content).encode()).hexdigest()


def part_of(folder: Path, name: str, rows: list[dict], columns: dict[str, pa.DataType] | None = None) -> LivePart:
    types = {
        "image_id": pa.int64(),
        "uri": pa.string(),
        "content_sha256": pa.string(),
        "duplicate_of": pa.int64(),
    } | (columns or {})
    table = pa.Table.from_pylist(rows, schema=pa.schema(types))
    pq.write_table(table, folder / name, row_group_size=3)
    return LivePart(name, len(rows), 0)


def row_of(number: int, content: object, duplicate_of: int | None = None) -> dict:
    return {"image_id": number, "uri": f"u{number}", "content_sha256": sha(content), "duplicate_of": duplicate_of}


def none_leaving(_: LivePart, table: pa.Table) -> np.ndarray:
    return np.zeros(table.num_rows, bool)


def known_of(folder: Path, parts: list[LivePart], is_leaving=none_leaving) -> KnownContents:
    uri = str(folder / "known.arrow")
    num_contents = write_known_contents(uri, str(folder), parts, {}, is_leaving)
    known = KnownContents.open(uri)
    assert len(known) == num_contents
    return known


def test_each_content_has_one_row_and_what_is_new_has_none(tmp_path: Path) -> None:
    parts = [
        part_of(tmp_path, "a", [row_of(1, "x"), row_of(2, "y"), row_of(3, "x", 1)]),
        part_of(tmp_path, "b", [row_of(4, "z"), row_of(5, "y", 2)]),
    ]
    known = known_of(tmp_path, parts)
    assert known.lookup([sha("x"), sha("new"), sha("z"), sha("y"), sha("x")]) == [
        KnownContent("a", 0, 1), None, KnownContent("b", 0, 4), KnownContent("a", 1, 2), KnownContent("a", 0, 1),
    ]  # fmt: skip
    assert len(known) == 3


def test_a_row_that_stays_comes_before_one_that_leaves_and_an_original_before_a_copy(tmp_path: Path) -> None:
    parts = [part_of(tmp_path, "a", [row_of(1, "x", 2), row_of(2, "x"), row_of(3, "y"), row_of(4, "y", 3)])]
    assert known_of(tmp_path, parts).lookup([sha("x"), sha("y")]) == [KnownContent("a", 1, 2), KnownContent("a", 2, 3)]

    def leaves(*ids: int):
        return lambda part, table: np.isin(table["image_id"].to_numpy(), ids)

    assert known_of(tmp_path, parts, leaves(3)).lookup([sha("y")]) == [KnownContent("a", 3, 3)]  # copies are not named
    assert known_of(tmp_path, parts, leaves(3, 4)).lookup([sha("y")]) == [KnownContent("a", 2, -1)]


def test_rows_whose_hash_was_not_kept_are_left_out(tmp_path: Path) -> None:
    parts = [part_of(tmp_path, "a", [{**row_of(1, "x"), "content_sha256": None}, row_of(2, "y")])]
    pq.write_table(pa.table({"image_id": [3], "uri": ["u3"]}), tmp_path / "older")
    old = pa.table({"image_id": [4], "uri": ["u4"], "content_sha256": [sha("z")]})
    pq.write_table(old, tmp_path / "without duplicate_of")
    parts += [LivePart("older", 1, 0), LivePart("without duplicate_of", 1, 0)]
    known = known_of(tmp_path, parts)
    assert known.lookup([sha("x"), sha("y"), sha("z")]) == [
        None, KnownContent("a", 1, 2), KnownContent("without duplicate_of", 0, 4),
    ]  # fmt: skip


def test_an_empty_catalog_knows_nothing(tmp_path: Path) -> None:
    known = known_of(tmp_path, [])
    assert len(known) == 0 and known.lookup([sha("x")]) == [None] and known.lookup([]) == []


def test_known_contents_on_remote_storage_leave_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [part_of(tmp_path, "a", [row_of(i, i) for i in range(50)])]
    uri = "memory://known/contents.arrow"
    write_known_contents(uri, str(tmp_path), parts, {}, none_leaving)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    known = KnownContents.open(uri)
    assert list(scratch.iterdir()) == []
    assert known.lookup([sha(7)]) == [KnownContent("a", 7, 7)]
    with pytest.raises(FileNotFoundError):
        KnownContents.open("memory://known/nothing.arrow")
    assert list(scratch.iterdir()) == []


IMAGES = st.tuples(st.integers(0, 8), st.booleans(), st.booleans())  # content, is a copy, is leaving


@given(st.lists(st.lists(IMAGES, max_size=12), max_size=4))
@settings(max_examples=60, deadline=None)
def test_known_contents_equal_the_naive_search(parts: list[list[tuple[int, bool, bool]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        live, best, leaving, number = [], {}, set(), 0
        for name, images in enumerate(parts):
            rows = []
            for i, (content, is_copy, is_leaving) in enumerate(images):
                number += 1
                rows.append(row_of(number, content, 99 if is_copy else None))
                leaving |= {number} if is_leaving else set()
                first = -1 if is_leaving else 99 if is_copy else number
                found = ((is_leaving, is_copy), KnownContent(f"p{name}", i, first))
                best[content] = min(best.get(content, found), found, key=lambda each: each[0])
            live.append(part_of(Path(folder), f"p{name}", rows))
        known = known_of(Path(folder), live, lambda _, table: np.isin(table["image_id"].to_numpy(), list(leaving)))
        assert known.lookup([sha(content) for content in range(9)]) == [
            best[content][1] if content in best else None for content in range(9)
        ]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        rows = [{**row_of(i, f"{name}{i}"), "labels": [f"{name}{i}"] * (i % 3)} for i in range(10)]
        part_of(tmp_path, name, rows, {"labels": pa.list_(pa.string())})
    return tmp_path


def test_stored_rows_come_in_any_order(stored: Path) -> None:
    rows = StoredRows(str(stored), ["labels", "content_sha256"])
    places = [KnownContent(name, i, -1) for i in (9, 0, 3, 3, 5) for name in ("b", "a")]
    read = rows.read(places)
    assert [row.to_pylist() for row in read] == [
        [{"labels": [f"{each.part}{each.row}"] * (each.row % 3), "content_sha256": sha(f"{each.part}{each.row}")}]
        for each in places
    ]


def test_what_is_not_there_any_more_is_none(stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = StoredRows(str(stored), ["labels"])
    (stored / "b").write_bytes((stored / "b").read_bytes()[:-40])
    places = [
        KnownContent("a", 10, -1),
        KnownContent("gone", 0, -1),
        KnownContent("b", 0, -1),
        KnownContent("a", 9, -1),
    ]
    read = rows.read(places) + rows.read(places)
    assert [row is None for row in read] == [True, True, True, False] * 2
    told = [message for message in caplog.messages if "cannot be read any more" in message]
    assert len(told) == 2 and told[0].startswith("images are computed again, because gone cannot be read any more: ")
    assert StoredRows(str(stored), ["caption"]).read([KnownContent("a", 0, -1)]) == [None]


def test_a_part_that_is_damaged_inside_is_none(stored: Path) -> None:
    data = bytearray((stored / "a").read_bytes())
    data[4:200] = bytes(196)
    (stored / "a").write_bytes(data)
    assert StoredRows(str(stored), ["image_id", "uri"]).read([KnownContent("a", 0, -1)]) == [None]


def test_a_corpus_in_its_old_order_reads_each_row_group_once(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        contents.pq.ParquetFile,
        "read_row_group",
        lambda self, group, **options: (groups.append(group), read_row_group(self, group, **options))[1],
    )
    rows = StoredRows(str(stored), ["labels"])
    for start in range(0, 10, 2):
        assert None not in rows.read([KnownContent("a", start, -1), KnownContent("a", start + 1, -1)])
    assert groups == [0, 1, 2, 3]


def test_few_row_groups_stay_in_memory(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_NUM_GROUPS", 2)
    monkeypatch.setattr(contents, "_NUM_FOOTERS", 1)
    rows = StoredRows(str(stored), ["image_id"])
    for name, i in [("a", 0), ("b", 4), ("a", 9), ("a", 1), ("b", 5)]:
        assert [row.to_pylist() for row in rows.read([KnownContent(name, i, -1)])] == [[{"image_id": i}]]
        assert len(rows._groups) <= 2 and len(rows._footers) == 1


def test_what_a_shard_has_become_is_kept_out_of_memory() -> None:
    failure = Failure("u", "s", "decode", "empty_file", "zero bytes")
    with ShardRows() as rows:
        for start in range(0, 100, 10):
            keys = [bytes([i]) for i in range(start, start + 10)]
            assert all(rows.claim(key) for key in keys)
            rows.add(keys, pa.RecordBatch.from_pylist([{"value": [i, i]} for i in range(start, start + 10)]))
        assert not rows.claim(b"\x07") and rows.claim(b"bad")
        rows.add_failure(b"bad", failure)
        for i in np.random.default_rng(0).permutation(100).tolist():
            assert rows.get(bytes([i])).to_pylist() == [{"value": [i, i]}]
        assert rows.get(b"bad") == failure


SAMPLES = [
    Sample("u1", "s", "k1", b"one", 512, ("a caption",), '{"licence": "none"}'),
    Failure("u2", "s", "read", "too_many_bytes", "9 bytes; the limit is 3"),
    Sample("u3", "s", "k3", b"three"),
]


def test_unchanged_samples_have_the_same_digest() -> None:
    digest = digest_of(SAMPLES)
    assert digest == digest_of(iter(SAMPLES)) and len(digest) == 64
    assert digest_of([replace(SAMPLES[0], byte_offset=1024), *SAMPLES[1:]]) == digest


@pytest.mark.parametrize(
    "items",
    [
        [replace(SAMPLES[0], data=b"two"), *SAMPLES[1:]],
        [replace(SAMPLES[0], uri="other"), *SAMPLES[1:]],
        [replace(SAMPLES[0], captions=("a caption", "another")), *SAMPLES[1:]],
        [replace(SAMPLES[0], metadata=None), *SAMPLES[1:]],
        [SAMPLES[0], replace(SAMPLES[1], reason="corrupt_image"), SAMPLES[2]],
        [SAMPLES[0], SAMPLES[2]],
        [SAMPLES[2], SAMPLES[1], SAMPLES[0]],
        [],
    ],
)
def test_whatever_changes_changes_the_digest(items: list[Sample | Failure]) -> None:
    assert digest_of(items) != digest_of(SAMPLES)


def test_names_that_are_not_utf8_have_a_digest() -> None:
    assert digest_of([Sample("caf\udce9", "s", "k", b"x")]) != digest_of([Sample("caf", "s", "k", b"x")])


def test_known_contents_take_24_bytes_an_image(tmp_path: Path) -> None:
    known_of(tmp_path, [part_of(tmp_path, "a", [row_of(i, i) for i in range(20_000)])])
    assert 24 * 20_000 <= (tmp_path / "known.arrow").stat().st_size < 25 * 20_000
