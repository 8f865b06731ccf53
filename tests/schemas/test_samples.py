"""Identities are stable and depend on what they should; the list of reasons is closed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.samples import (
    HARMLESS_REASONS,
    REASONS,
    Failure,
    FileRef,
    SampleError,
    ShardRef,
    clean_text,
    image_id,
    to_json,
)

TAR = ShardRef("s3://photos/0.tar", "tar", "etag1", 100)
PACK = ShardRef("/photos", "files", "", 20, (FileRef("/photos/a.jpg", "v1", 10), FileRef("/photos/b.jpg", "v1", 10)))


def test_sample_errors_carry_a_reason_of_the_list() -> None:
    error = SampleError("empty_file", "zero bytes")
    assert (error.reason, error.message, str(error)) == ("empty_file", "zero bytes", "zero bytes")
    with pytest.raises(ValueError, match="unknown failure reason 'tired'; known: .*'empty_file'"):
        SampleError("tired", "no")


def test_harmless_reasons_cost_no_image() -> None:
    assert set(REASONS) > HARMLESS_REASONS
    costly = {reason for reason in REASONS if Failure("u", "s", "read", reason, "m").loses_image}
    assert costly == set(REASONS) - HARMLESS_REASONS
    assert "bad_sidecar" not in costly and "corrupt_image" in costly


def test_image_ids_are_pinned() -> None:
    # Catalogs are keyed by these numbers: they must never change.
    assert image_id("s3://photos/0.tar#a.jpg") == 5596919678144473399
    assert image_id("/photos/ä.jpg") == 1111289027518293519
    many = {image_id(f"/photos/{number}.jpg") for number in range(2000)}
    assert len(many) == 2000 and min(many) >= 0 and max(many) < 2**63


def test_names_that_are_not_utf8_have_an_id() -> None:
    name = b"/photos/\xff.jpg".decode("utf-8", "surrogateescape")
    assert clean_text(name) == "/photos/\\udcff.jpg"
    assert image_id(name) == image_id(clean_text(name))
    assert replace(TAR, uri=name).location_id.startswith("s")


names = st.text(st.characters())  # lone surrogates too, as in names that are not UTF-8
files = st.builds(
    FileRef,
    uri=names,
    version=names,
    num_bytes=st.integers(0, 2**62),
    sidecars=st.lists(names).map(tuple),
    key=st.none() | names,
    captions=st.lists(names).map(tuple),
    metadata=st.none() | names,
    error=st.none() | st.tuples(names, names),
    entry=names,
)
shards = st.builds(
    ShardRef,
    uri=names,
    format=st.sampled_from(["tar", "parquet", "files"]),
    version=names,
    num_bytes=st.integers(0, 2**62),
    files=st.lists(files, max_size=4).map(tuple),
    revision=names,
    attempts=st.dictionaries(names, st.integers(1, 9), max_size=3),
)


@given(shards)
def test_references_travel_as_lines(shard: ShardRef) -> None:
    line = shard.to_json()
    assert ShardRef.from_json(line) == shard and line.isascii() and "\n" not in line


def test_location_ids_name_the_place_and_shard_ids_its_content() -> None:
    changed = replace(TAR, version="etag2", num_bytes=101)
    assert changed.location_id == TAR.location_id and changed.shard_id != TAR.shard_id
    assert replace(TAR, uri="s3://photos/1.tar").location_id != TAR.location_id
    assert TAR.shard_id.startswith(TAR.location_id + "-") and TAR.location_id.startswith("s")
    assert TAR.shard_id == ShardRef(TAR.uri, TAR.format, TAR.version, TAR.num_bytes).shard_id


@pytest.mark.parametrize(
    "change", [{"version": "v2"}, {"sidecars": ("/photos/a.json",)}, {"metadata": '{"x":1}'}, {"captions": ("a dog",)}]
)
def test_a_changed_file_changes_the_content_of_its_pack(change: dict) -> None:
    changed = replace(PACK, files=(replace(PACK.files[0], **change), PACK.files[1]))
    assert PACK.location_id.startswith("p")
    assert changed.location_id == PACK.location_id
    assert changed.shard_id != PACK.shard_id


def test_packs_of_other_files_stand_elsewhere() -> None:
    assert replace(PACK, files=PACK.files[:1]).location_id != PACK.location_id


def test_json_is_canonical() -> None:
    assert to_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'
    assert json.loads(to_json(TAR))["uri"] == TAR.uri
