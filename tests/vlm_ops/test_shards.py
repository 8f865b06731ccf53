"""Parquet and single files: every usable image comes out, everything else is told. Tars: test_tars.py."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from schemas.samples import Failure, FileRef, Sample, ShardRef
from tests.conftest import jpeg, png, tar_bytes
from vlm_ops import shards
from vlm_ops.shards import ReadConfig, SampleError, find_image_column, read_image, read_shard, what_stands_beside

CONFIG = ReadConfig(10**6)
PHOTOS = [jpeg(seed) for seed in range(6)]
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def split(items: Iterator[Sample | Failure]) -> tuple[list[Sample], list[Failure]]:
    everything = list(items)
    samples = [item for item in everything if isinstance(item, Sample)]
    return samples, [item for item in everything if isinstance(item, Failure)]


def reasons(failures: list[Failure]) -> list[str]:
    return [failure.reason for failure in failures]


# --- Parquet -------------------------------------------------------------------------------------


def write(path: Path, columns: dict[str, pa.Array | list], **options: object) -> ShardRef:
    pq.write_table(pa.table(columns), path, **options)
    return ShardRef(str(path), "parquet", "v", path.stat().st_size)


def images(type_: pa.DataType | None = None) -> pa.Array:
    if type_ == HF_IMAGE:
        return pa.array([{"bytes": data, "path": f"d/{i}.jpg"} for i, data in enumerate(PHOTOS)], type_)
    return pa.array(PHOTOS, type_)


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary(), HF_IMAGE], ids=str)
def test_images_of_a_parquet_column(tmp_path: Path, type_: pa.DataType) -> None:
    shard = write(tmp_path / "a.parquet", {"n": range(6), "picture": images(type_), "caption": list("abcdef")})
    samples, failures = split(read_shard(shard, CONFIG))
    assert [sample.data for sample in samples] == PHOTOS and not failures
    assert [sample.uri for sample in samples] == [f"{shard.uri}#{row}" for row in range(6)]
    assert [sample.key for sample in samples] == list("012345")
    assert (samples[2].captions, samples[2].metadata, samples[2].byte_offset) == (("c",), '{"n": 2}', None)
    assert read_image(samples[4].uri, shard.uri, None, None, CONFIG) == PHOTOS[4]


def test_the_image_column_goes_by_its_name_or_is_forced(tmp_path: Path) -> None:
    columns = {"mask": [b"mask"] * 6, "image": images(), "image_id": list("uvwxyz")}
    shard = write(tmp_path / "a.parquet", columns)
    samples, _ = split(read_shard(shard, CONFIG))
    assert [sample.data for sample in samples] == PHOTOS and [sample.key for sample in samples] == list("uvwxyz")
    assert samples[0].metadata == '{"image_id": "u"}'
    samples, _ = split(read_shard(shard, replace(CONFIG, image_column="mask")))
    assert [sample.data for sample in samples] == [b"mask"] * 6


def test_columns_that_hold_no_bytes_are_no_image_columns() -> None:
    schema = pa.schema([("image", pa.string()), ("struct", pa.struct([("bytes", pa.string())])), ("raw", pa.binary())])
    assert find_image_column(schema) == "raw"
    assert find_image_column(schema, "image") is None
    assert find_image_column(pa.schema([("image", pa.string())])) is None


@pytest.mark.parametrize("wanted", [None, "picture"])
def test_a_missing_image_column(tmp_path: Path, wanted: str | None) -> None:
    shard = write(tmp_path / "a.parquet", {"image": ["no bytes"], "n": [1]})
    samples, failures = split(read_shard(shard, replace(CONFIG, image_column=wanted)))
    assert not samples and reasons(failures) == ["unreadable_shard"]
    assert failures[0].message == "no column with image bytes among ['image', 'n']"


@pytest.mark.parametrize("type_", [pa.binary(), HF_IMAGE], ids=str)
def test_rows_without_a_usable_image(tmp_path: Path, type_: pa.DataType) -> None:
    values = images(type_).to_pylist()
    values[1] = None
    values[3] = {"bytes": None, "path": "d/3.jpg"} if type_ == HF_IMAGE else None
    values[4] = {"bytes": bytes(10**6 + 1), "path": "d/4.jpg"} if type_ == HF_IMAGE else bytes(10**6 + 1)
    shard = write(tmp_path / "a.parquet", {"image": pa.array(values, type_)})
    samples, failures = split(read_shard(shard, CONFIG))
    assert [sample.key for sample in samples] == ["0", "2", "5"]
    assert [(failure.key, failure.reason) for failure in failures] == [
        ("1", "bad_record"),
        ("3", "bad_record"),
        ("4", "too_many_bytes"),
    ]
    assert failures[0].message == "row 1: column 'image' is null"
    assert failures[2].message == "1000001 bytes; the limit is 1000000 (--max_image_bytes)"


def test_zero_rows(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.parquet", {"image": pa.array([], pa.binary())})
    assert list(read_shard(shard, CONFIG)) == []


def test_captions_come_from_their_column(tmp_path: Path) -> None:
    columns = {"image": images(), "sentences": [["a dog ", " "]] * 6, "title": ["Rex"] * 6}
    shard = write(tmp_path / "a.parquet", columns)
    (first, *_), _ = split(read_shard(shard, CONFIG))
    assert (first.captions, first.metadata) == (("a dog",), '{"title": "Rex"}')
    (first, *_), _ = split(read_shard(shard, replace(CONFIG, caption_field="title")))
    assert first.captions == ("Rex",) and json.loads(first.metadata or "") == {"sentences": ["a dog ", " "]}


def test_metadata_is_valid_json_whatever_the_columns_hold(tmp_path: Path) -> None:
    nested = {"depth": [float("nan"), 1.5, float("inf")], "raw": b"\xff", "deeper": {"raw": [b"\xff"], "kept": 2}}
    columns = {
        "image": images(),
        "nan": [float("nan")] * 6,
        "inf": [float("inf")] * 6,
        "null": pa.nulls(6, pa.int64()),
        "bytes": [b"\xff"] * 6,
        "day": [date(2026, 2, 3)] * 6,
        "nested": [nested] * 6,
        "mask": pa.array([{"bytes": b"\xff", "path": "m.png"}] * 6, HF_IMAGE),
    }
    (first, *_), failures = split(read_shard(write(tmp_path / "a.parquet", columns), CONFIG))
    assert not failures and first.data == PHOTOS[0]
    assert parse_strictly(first.metadata or "") == {
        "day": "2026-02-03",
        "nested": {"depth": [None, 1.5, None], "deeper": {"raw": [None], "kept": 2}},
        "mask": {"path": "m.png"},
    }


def parse_strictly(text: str) -> dict:
    """JSON as its standard has it: Python's parser takes NaN and Infinity too."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_metadata_nested_too_deeply_is_left_out() -> None:
    deep: dict = {}
    for _ in range(5000):
        deep = {"deeper": deep}
    beside = what_stands_beside({"deep": deep, "kept": 1}, None)
    assert parse_strictly(beside.metadata or "")["kept"] == 1 and len(beside.metadata or "") < 1000


def damaged(tmp_path: Path, column: str, from_end: bool) -> ShardRef:
    """Six photos in three row groups; in the middle one, a page of a column is overwritten."""
    columns = {"image": images(), "word": [f"{i}" * 200 for i in range(6)]}
    shard = write(tmp_path / "a.parquet", columns, row_group_size=2, use_dictionary=False, compression="none")
    group = pq.ParquetFile(shard.uri).metadata.row_group(1)
    chunk = next(group.column(i) for i in range(2) if group.column(i).path_in_schema == column)
    start = chunk.data_page_offset + (chunk.total_compressed_size - 60 if from_end else 0)
    data = bytearray(Path(shard.uri).read_bytes())
    data[start : start + 40] = b"\xff" * 40
    Path(shard.uri).write_bytes(data)
    return shard


@pytest.mark.parametrize("column", ["image", "word"])
def test_a_damaged_page_costs_its_row_group_alone(tmp_path: Path, column: str) -> None:
    samples, failures = split(read_shard(damaged(tmp_path, column, from_end=False), CONFIG))
    assert [sample.data for sample in samples] == [PHOTOS[i] for i in (0, 1, 4, 5)]
    assert [sample.key for sample in samples] == ["0", "1", "4", "5"]
    assert reasons(failures) == ["damaged_shard"]
    assert failures[0].message.startswith("row group 1 (rows 2 to 3): ")


def test_text_that_is_not_utf8_costs_its_row_group_alone(tmp_path: Path) -> None:
    samples, failures = split(read_shard(damaged(tmp_path, "word", from_end=True), CONFIG))
    assert [sample.key for sample in samples] == ["0", "1", "4", "5"]
    assert reasons(failures) == ["damaged_shard"] and "can't decode byte 0xff" in failures[0].message


def with_other_numbers(tmp_path: Path, num_rows: bytes, new: bytes) -> ShardRef:
    """Three photos in one row group; a number in its footer is replaced. Thrift writes 3 as 06."""
    shard = write(tmp_path / "a.parquet", {"image": pa.array(PHOTOS[:3], pa.binary())}, compression="none")
    data = Path(shard.uri).read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert data.count(num_rows, footer) == 1
    Path(shard.uri).write_bytes(data[:footer] + data[footer:].replace(num_rows, new))
    return shard


def test_rows_that_a_damaged_footer_hides_are_missed(tmp_path: Path) -> None:
    # Field 3 of the file's metadata, an int64 (0x16), is followed by the list of row groups (0x19 0x1c).
    shard = with_other_numbers(tmp_path, b"\x16\x06\x19\x1c", b"\x16\x0a\x19\x1c")
    samples, failures = split(read_shard(shard, CONFIG))
    assert len(samples) == 3 and reasons(failures) == ["damaged_shard"]
    assert failures[0].message == "its row groups hold 3 rows, and its footer tells of 5"


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"x" * 500 + b"PAR1", b"<html>" * 50], ids=len)
def test_what_is_not_parquet(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    samples, failures = split(read_shard(ShardRef(str(path), "parquet", "v", len(data)), CONFIG))
    assert not samples and reasons(failures) == ["unreadable_shard"]
    assert failures[0].message.startswith("not Parquet: ")


def test_a_cut_parquet_file(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.parquet", {"image": images()})
    Path(shard.uri).write_bytes(Path(shard.uri).read_bytes()[:-100])
    assert reasons(split(read_shard(shard, CONFIG))[1]) == ["unreadable_shard"]


def test_storage_errors_are_no_failed_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shards.storage, "open_for_reading", broken)
    for format_ in ("tar", "parquet"):
        with pytest.raises(OSError, match="Input/output error"):
            list(read_shard(ShardRef(str(tmp_path / "a"), format_, "v", 1), CONFIG))


# --- single files --------------------------------------------------------------------------------


def pack(*files: FileRef) -> ShardRef:
    return ShardRef("/a/list.jsonl", "files", "", 0, files)


def test_a_file_with_what_stands_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.v2.jpg").write_bytes(PHOTOS[0])
    (tmp_path / "a.v2.json").write_text('{"text": "from json", "x": [1, NaN]}')
    (tmp_path / "a.v2.txt").write_bytes(b"\xef\xbb\xbffrom txt\n")
    sidecars = tuple(str(tmp_path / f"a.v2{suffix}") for suffix in (".json", ".txt"))
    uri = str(tmp_path / "a.v2.jpg")
    (sample,) = read_shard(pack(FileRef(uri, "v1", 10, sidecars)), CONFIG)
    assert sample == Sample(
        uri, uri, "a.v2", PHOTOS[0], None, ("from txt", "from json"), '{"x": [1, null]}', version="v1"
    )
    assert read_image(uri, uri, None, None, CONFIG) == PHOTOS[0]


def test_what_a_list_tells_comes_first(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PHOTOS[0])
    ref = FileRef(str(tmp_path / "a.jpg"), "v", key="k", captions=("a dog",), metadata='{"x": 1}')
    (sample,) = read_shard(pack(ref), CONFIG)
    assert isinstance(sample, Sample)
    assert (sample.key, sample.captions, sample.metadata) == ("k", ("a dog",), '{"x": 1}')


def test_bad_sidecars_keep_the_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PHOTOS[0])
    (tmp_path / "a.json").write_text("{nonsense")
    (tmp_path / "big.txt").write_bytes(b"x" * 1_500_000)
    sidecars = tuple(str(tmp_path / name) for name in ("a.json", "big.txt", "gone.txt"))
    config = replace(CONFIG, max_image_bytes=2_000_000)
    (sample,), failures = split(read_shard(pack(FileRef(str(tmp_path / "a.jpg"), "v", 1, sidecars)), config))
    assert sample.data == PHOTOS[0] and sample.captions == () and sample.metadata is None
    assert reasons(failures) == ["bad_sidecar"] * 3 and not any(failure.loses_image for failure in failures)
    messages = " | ".join(failure.message for failure in failures)
    assert ".json beside the image: Expecting property name" in messages
    assert "1500000 bytes of metadata; the limit is 1048576" in messages and "not there: " in messages


def test_files_that_cannot_be_read_are_told_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "big.jpg").write_bytes(bytes(10**6 + 1))
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "last.png").write_bytes(png())
    under_a_file = "last.png/a.jpg"
    expected = {
        "gone.jpg": ("missing_file", "not there: "),
        "big.jpg": ("too_many_bytes", r"1000001 bytes; the limit is 1000000 \(--max_image_bytes\)"),
        "folder.jpg": ("unreadable_file", "not a regular file"),
        "pipe.jpg": ("unreadable_file", "not a regular file"),
        "loop.jpg": ("unreadable_file", "symbolic links"),
        under_a_file: ("unreadable_file", "Not a directory"),
        "x" * 300 + ".jpg": ("unreadable_file", "name too long"),
        "zero\0.jpg": ("unreadable_file", "null byte"),
        "lone\ud800.jpg": ("unreadable_file", "surrogates not allowed"),
    }
    refs = [FileRef(f"{tmp_path}/{name}", "v") for name in (*expected, "empty.jpg", "last.png")]
    samples, failures = split(read_shard(pack(*refs), CONFIG))
    # What zero bytes are is for the decoder to say.
    assert [(sample.key, sample.data) for sample in samples] == [("empty", b""), ("last", png())]
    assert len(failures) == len(expected)
    for failure, (name, (reason, message)) in zip(failures, expected.items(), strict=True):
        assert failure.reason == reason and failure.uri == f"{tmp_path}/{name}" and failure.version == "v"
        with pytest.raises(SampleError, match=message):
            raise SampleError(failure.reason, failure.message)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> bytes:  # root may read everything: chmod would not do
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.jpg").write_bytes(PHOTOS[0])
    monkeypatch.setattr(LocalFileSystem, "cat_file", refuse)
    (failure,) = read_shard(pack(FileRef(str(tmp_path / "a.jpg"))), CONFIG)
    assert isinstance(failure, Failure) and failure.reason == "unreadable_file"
    assert "Permission denied" in failure.message


def test_a_listed_size_over_the_limit_is_not_even_opened(tmp_path: Path) -> None:
    (failure,) = read_shard(pack(FileRef(str(tmp_path / "gone.jpg"), "v", 10**6 + 1)), CONFIG)
    assert isinstance(failure, Failure) and failure.reason == "too_many_bytes"


def test_entries_that_came_with_an_error() -> None:
    ref = FileRef("/a/list.jsonl#3", "v", key="k", error=("bad_record", "line 3: not JSON"))
    (failure,) = read_shard(pack(ref), CONFIG)
    assert failure == Failure(ref.uri, "/a/list.jsonl", "read", "bad_record", "line 3: not JSON", "k", version="v")


@pytest.fixture
def web() -> Iterator[str]:
    """A server on 127.0.0.1 that answers `/<status>` with that status and a photo."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path[1:4]))
            self.send_header("Content-Length", str(len(PHOTOS[0])))
            self.end_headers()
            self.wfile.write(PHOTOS[0])

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_dead_links_are_failed_images_and_a_broken_server_is_not(web: str) -> None:
    refs = [FileRef(f"{web}/{status}.jpg", "v") for status in (404, 403, 410, 200)]
    samples, failures = split(read_shard(pack(*refs), CONFIG))
    assert [sample.data for sample in samples] == PHOTOS[:1]
    assert reasons(failures) == ["missing_file", "unreadable_file", "unreadable_file"]
    with pytest.raises(Exception, match="500.*Internal Server Error"):
        list(read_shard(pack(FileRef(f"{web}/500.jpg", "v")), CONFIG))


# --- any filesystem, and back from a catalog -----------------------------------------------------


def test_shards_in_memory() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/shards-test/a.tar", tar_bytes([("a.jpg", PHOTOS[0])]))
    try:
        (sample,) = read_shard(ShardRef("memory:///shards-test/a.tar", "tar", "v", 0), CONFIG)
        assert isinstance(sample, Sample) and sample.data == PHOTOS[0]
        found = read_image(sample.uri, sample.shard_uri, sample.byte_offset, len(PHOTOS[0]), CONFIG)
        assert found == PHOTOS[0]
    finally:
        fs.rm("/shards-test", recursive=True)


def test_an_image_that_its_shard_has_no_more(tmp_path: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(tar_bytes([("a.jpg", PHOTOS[0])], "w:gz"))
    uri = str(tmp_path / "a.tgz")
    with pytest.raises(SampleError, match=r"a\.tgz#b\.jpg is not in its shard any more"):
        read_image(f"{uri}#b.jpg", uri, None, None, CONFIG)
    with pytest.raises(FileNotFoundError, match="gone.tgz"):
        read_image(f"{tmp_path}/gone.tgz#b.jpg", f"{tmp_path}/gone.tgz", None, None, CONFIG)
