"""What is listed comes back as it was, stretch by stretch, from any storage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from schemas.samples import FileRef, ShardRef, digest
from vlm_ops.tag_parts import TagWork
from vlm_ops.work_lists import read_stretch, write_work_list

TEXTS = st.text(st.characters())  # lone surrogates too, as names that are not UTF-8 have them
FILES = st.builds(
    FileRef,
    uri=TEXTS,
    version=TEXTS,
    num_bytes=st.integers(0, 2**60),
    sidecars=st.lists(TEXTS, max_size=2).map(tuple),
    key=st.none() | TEXTS,
    captions=st.lists(TEXTS, max_size=2).map(tuple),
    metadata=st.none() | TEXTS,
    error=st.none() | st.tuples(TEXTS, TEXTS),
    entry=TEXTS,
)
SHARDS = st.builds(
    ShardRef,
    uri=TEXTS,
    format=st.sampled_from(["tar", "parquet", "files"]),
    version=TEXTS,
    num_bytes=st.integers(0, 2**60),
    files=st.lists(FILES, max_size=3).map(tuple),
    revision=TEXTS,
    attempts=st.dictionaries(TEXTS, st.integers(0, 9), max_size=2),
)


@given(SHARDS)
def test_a_reference_is_the_same_after_json(shard: ShardRef) -> None:
    line = shard.to_json()
    assert line.isascii() and "\n" not in line
    back = ShardRef.from_json(line)
    assert back == shard
    assert (back.shard_id, back.location_id) == (shard.shard_id, shard.location_id)


def test_tag_work_is_the_same_after_json() -> None:
    for work in (TagWork("part-a.parquet", 3, "part-b.parquet"), TagWork("a", 0, "b", ("c", "d"))):
        assert TagWork.from_json(work.to_json()) == work


def test_each_reference_is_in_one_stretch(tmp_path: Path) -> None:
    shards = [ShardRef(f"s3://photos/{number}.tar", "tar", digest(str(number)), number) for number in range(20_000)]
    uri = str(tmp_path / "work.jsonl.gz")
    work = write_work_list(uri, shards, {})
    assert work.uri == uri and 2 <= len(work.stretches) <= 10
    assert [start for start, _ in work.stretches] == [0, *(end for _, end in work.stretches[:-1])]
    lines = [line for stretch in work.stretches for line in read_stretch(uri, stretch, {})]
    assert [ShardRef.from_json(line) for line in lines] == shards
    with gzip.open(uri) as file:  # the whole of it is a .gz like any other
        assert [json.loads(line)["uri"] for line in file] == [shard.uri for shard in shards]


@pytest.mark.parametrize("number", [0, 1])
def test_few_references(number: int, tmp_path: Path) -> None:
    uri = str(tmp_path / "work")
    work = write_work_list(uri, [ShardRef("a.tar", "tar", "1", 1)][:number], {})
    assert len(work.stretches) == number
    assert [line for stretch in work.stretches for line in read_stretch(uri, stretch, {})] == [
        '{"uri":"a.tar","format":"tar","version":"1","num_bytes":1,"attempts":{},"files":[]}'
    ][:number]


def test_a_stretch_of_remote_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    local = write_work_list(str(tmp_path / "work"), [ShardRef(f"{i}.tar", "tar", "", 0) for i in range(30_000)], {})
    MemoryFileSystem().pipe_file("/work-list-test", (tmp_path / "work").read_bytes())
    try:
        for stretch in local.stretches:
            assert list(read_stretch("memory://work-list-test", stretch, {})) == list(
                read_stretch(local.uri, stretch, {})
            )
    finally:
        MemoryFileSystem().rm_file("/work-list-test")
