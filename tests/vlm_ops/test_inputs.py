"""Patterns -> shards and files: each input once, told apart by suffix and content, with what stands beside it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.samples import Failure, FileRef, Sample
from tests.conftest import encode, jpeg, photo, png, tar_bytes
from vlm_ops.inputs import InputConfig, Listing, list_inputs, pack, sniff
from vlm_ops.shards import ReadConfig, read_image, read_shard

TAR = tar_bytes([("a.jpg", jpeg(1))])


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def found(*patterns: str | Path, **options: object) -> Listing:
    return list_inputs(InputConfig(tuple(str(pattern) for pattern in patterns), **options))  # type: ignore[arg-type]


def names(listing: Listing, folder: Path) -> list[str]:
    """Of all files and shards, relative to a folder."""
    uris = [file.uri for files in listing.files.values() for file in files]
    return [os.path.relpath(uri, folder) for uri in (*uris, *(shard.uri for shard in listing.shards))]


def refs_of(listing: Listing) -> list[FileRef]:
    (refs,) = listing.files.values()
    return refs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(
        tmp_path / "in",
        {
            "b.jpg": jpeg(0),
            "a.PNG": png(1),
            "sub/c.webp": encode(photo(2), "WEBP"),
            "d.tar": TAR,
            "e.tar.gz": tar_bytes([("a.jpg", jpeg(1))], "w:gz"),
            "f.tgz": tar_bytes([("a.jpg", jpeg(1))], "w:gz"),
            "metadata.csv": b"uri\nelsewhere.jpg\n",
            "README.md": b"# no input",
            "b.txt": b"a dog",
            "_SUCCESS": b"",
        },
    )


# --- folders, globs, braces ----------------------------------------------------------------------


def test_a_folder_is_searched(folder: Path) -> None:
    listing = found(folder)
    assert names(listing, folder) == ["a.PNG", "b.jpg", "sub/c.webp", "d.tar", "e.tar.gz", "f.tgz"]
    assert [shard.format for shard in listing.shards] == ["tar"] * 3 and listing.num_files == 3
    assert list(listing.files) == [str(folder)]
    assert {ref.uri: ref.num_bytes for ref in refs_of(listing)}[f"{folder}/b.jpg"] == len(jpeg(0))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("b.jpg", ["b.jpg"]),
        ("*.jpg", ["b.jpg"]),
        ("*.[jP]*", ["a.PNG", "b.jpg"]),
        ("**/*.webp", ["sub/c.webp"]),
        ("?.t*", ["d.tar", "e.tar.gz", "f.tgz"]),
        ("{d.tar,sub}", ["sub/c.webp", "d.tar"]),
        ("{a..b}.{jpg,PNG}", None),
        ("sub/", ["sub/c.webp"]),
    ],
)
def test_patterns(folder: Path, pattern: str, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(FileNotFoundError, match=re.escape(f"no input matches '{folder}/a.jpg'")):
            found(f"{folder}/{pattern}")
    else:
        assert names(found(f"{folder}/{pattern}"), folder) == expected


def test_numbered_shards_by_braces(tmp_path: Path) -> None:
    fill(tmp_path, {f"{number:05}.tar": TAR for number in range(8, 13)})
    assert names(found(f"{tmp_path}/{{00009..00011}}.tar"), tmp_path) == ["00009.tar", "00010.tar", "00011.tar"]


def test_a_mix_lists_everything_once(folder: Path) -> None:
    everything = names(found(folder), folder)
    patterns = [folder, f"{folder}/*.jpg", f"file://{folder}/b.jpg", f"{folder}/d.tar", f"{folder}/sub/../b.jpg"]
    listing = found(*patterns)
    assert sorted(names(listing, folder)) == sorted(everything)
    assert listing.num_files == 3 and len(listing.shards) == 3


def test_names_with_glob_and_brace_characters_are_taken_as_they_are(tmp_path: Path) -> None:
    fill(tmp_path, {"a[1].jpg": jpeg(0), "{b}.jpg": jpeg(1)})
    assert names(found(tmp_path / "a[1].jpg", tmp_path / "{b}.jpg"), tmp_path) == ["a[1].jpg", "{b}.jpg"]


@pytest.mark.parametrize("pattern", ["nothing", "*.nothing", "**/*.nothing", "sub*"])
def test_a_pattern_without_a_match_is_named(folder: Path, pattern: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"no input matches '{folder}/{pattern}'")):
        found(folder, f"{folder}/{pattern}")


def test_unbalanced_braces(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the brace pattern '.*/\{a,b\.jpg': Unbalanced braces"):
        found(f"{folder}/{{a,b.jpg")


@pytest.mark.parametrize("pattern", ["", "*.jpg", "**/*.jpg"])
def test_hidden_files_are_no_inputs(tmp_path: Path, pattern: str) -> None:
    base = tmp_path / ".cache" / "in"  # a hidden folder above the pattern hides nothing
    fill(base, {"a.jpg": jpeg(0), "._a.jpg": b"fork", ".git/b.jpg": jpeg(1), ".DS_Store": b""})
    assert names(found(f"{base}/{pattern}"), base) == ["a.jpg"]


def test_hidden_files_that_are_named_are_inputs(tmp_path: Path) -> None:
    fill(tmp_path, {".a.jpg": jpeg(0), ".b/c.jpg": jpeg(1)})
    assert names(found(tmp_path / ".a.jpg", tmp_path / ".b"), tmp_path) == [".a.jpg", ".b/c.jpg"]
    assert names(found(tmp_path / ".*.jpg"), tmp_path) == [".a.jpg"]


def test_unknown_schemes() -> None:
    with pytest.raises(ValueError, match="cannot open 'nope://a/b.jpg'.*nope"):
        found("nope://a/b.jpg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "webdataset"}, "unknown input format 'webdataset'; use one of auto, tar, parquet, list, image"),
        ({"files_per_shard": 0}, "files_per_shard must be at least 1, got 0"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputConfig(("a",), **options)


def test_files_in_memory() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe({"/inputs-test/a.jpg": jpeg(0), "/inputs-test/a.txt": b"a dog", "/inputs-test/b.tar": TAR})
    try:
        for pattern in ("memory://inputs-test", "memory://inputs-test/*"):
            listing = found(pattern)
            assert len(listing.shards) == 1 and listing.num_files == 1
            shards = (*listing.shards, *pack(listing.files))
            samples = [sample for shard in shards for sample in read_shard(shard, ReadConfig(10**6))]
            assert [(sample.data, sample.captions) for sample in samples if isinstance(sample, Sample)] == [
                (jpeg(1), ()),
                (jpeg(0), ("a dog",)),
            ]
    finally:
        fs.rm("/inputs-test", recursive=True)


# --- formats -------------------------------------------------------------------------------------


def test_files_without_a_suffix_are_told_by_their_content(tmp_path: Path) -> None:
    fill(tmp_path, {"photo": jpeg(0), "tar": TAR, "gzip": tar_bytes([], "w:gz"), "LICENSE": b"Be free."})
    pq.write_table(pa.table({"image": [jpeg(0)]}), tmp_path / "parquet")
    listing = found(tmp_path)
    assert names(listing, tmp_path) == ["photo", "gzip", "parquet", "tar"]
    assert [shard.format for shard in listing.shards] == ["tar", "parquet", "tar"]


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_are_told_by_their_first_bytes(format_: str) -> None:
    assert sniff(encode(photo(0), format_)) == "image"


@pytest.mark.parametrize(
    ("start", "format_"), [(b' \n{"uri": "a.jpg"}', "list"), (b"PAR1", "parquet"), (b"", None), (b"hello", None)]
)
def test_other_first_bytes(start: bytes, format_: str | None) -> None:
    assert sniff(start) == format_


def test_a_named_file_of_no_known_format(folder: Path) -> None:
    message = r"cannot tell the format of '.*README.md' by suffix or content; force it with --input_format"
    with pytest.raises(ValueError, match=message):
        found(folder / "README.md")


def test_a_format_can_be_forced(tmp_path: Path) -> None:
    fill(tmp_path, {"a.bin": TAR, "b.jpg": b"anything", "list.json": b'{"uri": "b.jpg"}', "list.txt": b'{"uri": "c"}'})
    assert [shard.format for shard in found(tmp_path / "a.bin", format="tar").shards] == ["tar"]
    assert [shard.format for shard in found(tmp_path / "a.bin", format="parquet").shards] == ["parquet"]
    assert names(found(tmp_path / "a.bin", format="image"), tmp_path) == ["a.bin"]
    assert names(found(tmp_path / "list.json", tmp_path / "list.txt", format="list"), tmp_path) == ["b.jpg", "c"]


# --- sidecars, versions, packs -------------------------------------------------------------------


def sidecars(listing: Listing, folder: Path) -> dict[str, list[str]]:
    return {Path(ref.uri).name: [os.path.relpath(uri, folder) for uri in ref.sidecars] for ref in refs_of(listing)}


@pytest.mark.parametrize("pattern", ["", "*.jpg", "a.jpg", "{a,b}.jpg"])
def test_what_stands_beside_an_image_is_found(tmp_path: Path, pattern: str) -> None:
    fill(tmp_path, {"a.jpg": jpeg(0), "a.json": b"{}", "a.txt": b"a dog", "b.jpg": jpeg(1), "c.txt": b"no image"})
    expected = {"a.jpg": ["a.json", "a.txt"], "b.jpg": []}
    listing = found(f"{tmp_path}/{pattern}")
    assert sidecars(listing, tmp_path) == {
        name: beside for name, beside in expected.items() if pattern != "a.jpg" or name == "a.jpg"
    }


def test_versions_and_ids_follow_the_content(tmp_path: Path) -> None:
    fill(tmp_path, {"a.tar": TAR, "b.jpg": jpeg(0)})
    first, again = found(tmp_path), found(tmp_path)
    assert first == again
    fill(tmp_path, {"a.tar": TAR + bytes(512), "b.jpg": jpeg(1, 200, 200)})
    changed = found(tmp_path)
    for old, new in ((first.shards[0], changed.shards[0]), (pack(first.files)[0], pack(changed.files)[0])):
        assert old.location_id == new.location_id and old.shard_id != new.shard_id
    assert refs_of(first)[0].version != refs_of(changed)[0].version


@pytest.mark.parametrize(
    ("num_files", "files_per_shard", "sizes"),
    [(0, 10, []), (1, 10, [1]), (10, 10, [10]), (11, 10, [5, 6]), (25, 10, [8, 8, 9]), (3, 1, [1, 1, 1])],
)
def test_packs_are_evenly_filled(num_files: int, files_per_shard: int, sizes: list[int]) -> None:
    refs = [FileRef(f"/in/{number:03}.jpg", "v", number) for number in range(num_files)]
    packs = pack({"/in": refs} if refs else {}, files_per_shard)
    assert [len(shard.files) for shard in packs] == sizes
    assert [ref for shard in packs for ref in shard.files] == refs
    assert sum(shard.num_bytes for shard in packs) == sum(range(num_files))
    assert len({shard.location_id for shard in packs}) == len(packs)
    assert all(shard.format == "files" and shard.uri == "/in" for shard in packs)


def test_folders_are_packed_apart() -> None:
    packs = pack({"/a": [FileRef("/a/1.jpg")], "/b": [FileRef("/b/1.jpg")]})
    assert [shard.uri for shard in packs] == ["/a", "/b"]


# --- lists ---------------------------------------------------------------------------------------

RECORDS = [{"uri": "a.jpg", "caption": "a dog", "n": 1, "id": 0}, {"uri": "sub/b.jpg", "caption": "", "n": 2, "id": 7}]


def write_list(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        lines = [list(records[0]), *([str(value) for value in record.values()] for record in records)]
        path.write_text("".join(delimiter.join(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_lists_name_images(tmp_path: Path, suffix: str) -> None:
    path = write_list(tmp_path / f"list{suffix}", RECORDS)
    listing = found(path)
    assert list(listing.files) == [str(path)] and not listing.shards
    a, b = refs_of(listing)
    assert (a.uri, a.key, a.captions) == (f"{tmp_path}/a.jpg", "0", ("a dog",))
    assert (b.uri, b.key, b.captions) == (f"{tmp_path}/sub/b.jpg", "7", ())
    assert str(json.loads(b.metadata or "")["n"]) == "2" and not a.error and a.version != b.version


def test_lists_inside_a_folder_are_passed_over(tmp_path: Path) -> None:
    for suffix in (".jsonl", ".csv", ".parquet"):
        write_list(tmp_path / f"list{suffix}", RECORDS)
    (tmp_path / "photo.jpg").write_bytes(jpeg(0))
    listing = found(tmp_path)
    assert listing.num_files == 1 and listing.passed_over == {".jsonl": 1, ".csv": 1, ".parquet": 1}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.jpg", "{folder}/lists/a.jpg"),
        ("./x/a.jpg", "{folder}/lists/x/a.jpg"),
        ("../a.jpg", "{folder}/a.jpg"),
        ("/abs/a.jpg", "/abs/a.jpg"),
        ("file:///abs/a.jpg", "/abs/a.jpg"),
        (" a.jpg ", "{folder}/lists/a.jpg"),
    ],
)
def test_paths_are_relative_to_their_list(tmp_path: Path, value: str, expected: str) -> None:
    fill(tmp_path, {"lists/list.jsonl": json.dumps({"uri": value}).encode()})
    (ref,) = refs_of(found(tmp_path / "lists/list.jsonl"))
    assert ref.uri == expected.format(folder=tmp_path) and not ref.error


def test_paths_are_relative_to_their_list_on_any_filesystem() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/inputs-test/lists/list.jsonl", b'{"uri": "../a.jpg"}\n{"uri": "b.jpg"}\n{"uri": "/etc/passwd"}')
    try:
        refs = refs_of(found("memory://inputs-test/lists/list.jsonl"))
        assert [ref.uri for ref in refs if not ref.error] == [
            "memory:///inputs-test/a.jpg",
            "memory:///inputs-test/lists/b.jpg",
        ]
        assert [ref.error and ref.error[0] for ref in refs if ref.error] == ["scheme_not_allowed"]
    finally:
        fs.rm("/inputs-test", recursive=True)


def test_schemes_are_those_allowed(tmp_path: Path) -> None:
    path = fill(tmp_path, {"list.jsonl": b'{"uri": "s3://b/a.jpg"}\n{"uri": "b.jpg"}\n{"uri": "zip::http://x/y"}'})
    path /= "list.jsonl"
    by_uri = {ref.uri: ref.error for ref in refs_of(found(path))}
    assert by_uri["s3://b/a.jpg"] == (
        "scheme_not_allowed",
        "line 1: s3:// is not allowed here; allow it with --allowed_schemes s3",
    )
    assert by_uri[f"{tmp_path}/b.jpg"] is None
    assert by_uri["zip::http://x/y"] is not None
    by_uri = {ref.uri: ref.error for ref in refs_of(found(path, allowed_schemes=("s3",)))}
    assert by_uri["s3://b/a.jpg"] is None
    error = by_uri[f"{tmp_path}/b.jpg"]
    assert error is not None and "line 2: file:// is not allowed here" in error[1]


def test_bad_lines_travel_with_their_error(tmp_path: Path) -> None:
    lines = [
        '{"uri": "a.jpg"}', "", '{"uri": ', '["a.jpg"]', '{"n": 1}', '{"uri": 3}', '{"uri": " "}', "\udcff\udcfe",
        "[" * 100_000, '{"uri": "a.jpg", "n": "second time"}',
    ]  # fmt: skip
    path = tmp_path / "list.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    good, *bad = sorted(refs_of(found(path)), key=lambda ref: ref.error is not None)
    assert (good.uri, good.metadata) == (f"{tmp_path}/a.jpg", None)
    errors = {ref.uri.partition("#")[2]: ref.error for ref in bad}
    assert set(errors) == set("345678") | {"9"}
    assert {error[0] for error in errors.values() if error} == {"bad_record"}
    messages = {line: error[1] for line, error in errors.items() if error}
    assert messages["3"].startswith("line 3: not JSON: Expecting value")
    assert messages["4"] == "line 4: a JSON object was expected, not list"
    assert messages["5"].startswith("line 5: no image URI (one of uri, url, ")
    # Written down like any other failure, and the good line's missing file with them.
    (shard,) = pack(found(path).files)
    failures = list(read_shard(shard, ReadConfig(10**6)))
    reasons = sorted(failure.reason for failure in failures if isinstance(failure, Failure))
    assert reasons == ["bad_record"] * 7 + ["missing_file"]


@pytest.mark.parametrize("name", ["list.jsonl", "list.csv", "list.tsv"])
def test_empty_lists(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"the list .*/{name} has no entry; give one that names images"):
        found(fill(tmp_path, {name: b""}) / name)


def test_an_empty_list_beside_others_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, {"a.jpg": b"x", "empty.jsonl": b"", "full.jsonl": b'{"url": "a.jpg"}'})
    assert found(tmp_path / "*.jsonl").num_files == 1
    assert caplog.messages == [f"lists without an entry: {tmp_path / 'empty.jsonl'}"]


def test_a_scheme_that_nothing_can_open_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--allowed_schemes ftpx: cannot be opened: Protocol not known: ftpx"):
        found(fill(tmp_path, {"a.jpg": b"x"}), allowed_schemes=("file", "ftpx"))


def test_a_damaged_row_group_of_a_parquet_list_costs_its_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    uris = [f"{number}{'x' * 100}.jpg" for number in range(6)]
    pq.write_table(pa.table({"url": uris}), path, row_group_size=2, use_dictionary=False, compression="none")
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    refs = found(path).files[str(path)]
    assert [Path(ref.uri).name for ref in refs if not ref.error] == [uris[i] for i in (0, 1, 4, 5)]
    assert [ref.error[1][:36] for ref in refs if ref.error] == [
        "line 3: row group 1 is damaged: Coul", "line 4: row group 1 is damaged: Coul",
    ]  # fmt: skip


def test_the_uri_column_is_found_or_named(tmp_path: Path) -> None:
    path = write_list(tmp_path / "list.csv", [{"Thumb": "t.jpg", "URL": "a.jpg", "file_name": "b.jpg"}])
    assert names(found(path), tmp_path) == ["a.jpg"]
    assert names(found(path, uri_column="Thumb"), tmp_path) == ["t.jpg"]
    path = write_list(tmp_path / "list.jsonl", [{"thumb": "t.jpg", "uri": "a.jpg"}, {"uri": "a.jpg"}])
    assert sorted(ref.error[1] if ref.error else ref.uri for ref in refs_of(found(path, uri_column="thumb"))) == [
        f"{tmp_path}/t.jpg",
        "line 2: no image URI (thumb)",
    ]


@pytest.mark.parametrize(
    ("uri_column", "wanted"), [("photo", "--uri_column 'photo'"), (None, "column named one of uri, url, ")]
)
def test_a_csv_without_its_uri_column(tmp_path: Path, uri_column: str | None, wanted: str) -> None:
    path = write_list(tmp_path / "list.csv", [{"thumb": "t.jpg", "n": 1}])
    with pytest.raises(ValueError, match=rf"list\.csv: there is no {wanted}.*; its columns are thumb, n$"):
        found(path, uri_column=uri_column)


def test_a_stray_quotation_mark_does_not_end_a_csv(tmp_path: Path) -> None:
    rows = [f"{number}.jpg,{'x' * 80}" for number in range(3000)]
    rows[5] = '5.jpg,"' + "x" * 80
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["uri,note", *rows]))
    refs = refs_of(found(path))
    errors = [ref.error for ref in refs if ref.error]
    assert (
        len(errors) == 1 and errors[0][0] == "bad_record" and "not CSV: field larger than field limit" in errors[0][1]
    )
    assert {f"{tmp_path}/4.jpg", f"{tmp_path}/2999.jpg"} <= {ref.uri for ref in refs}


def test_a_csv_whose_first_line_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"list\.csv: not CSV: field larger than field limit"):
        found(fill(tmp_path, {"list.csv": b"x" * 200_000}) / "list.csv")


def test_csv_rows_with_too_much_or_too_little(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbfuri,caption\r\na.jpg,a dog,and more\r\n\r\nb.jpg\r\n,nothing\r\n"
    refs = refs_of(found(fill(tmp_path, {"list.csv": data}) / "list.csv"))
    assert [(os.path.relpath(ref.uri, tmp_path), ref.captions, ref.metadata) for ref in refs if not ref.error] == [
        ("a.jpg", ("a dog",), '{"_rest": ["and more"]}'),
        ("b.jpg", (), None),
    ]
    assert [ref.error and ref.error[0] for ref in refs if ref.error] == ["bad_record"]


def test_metadata_of_lists_is_valid_json(tmp_path: Path) -> None:
    line = b'{"uri": "a.jpg", "nan": NaN, "deep": {"inf": [Infinity, 1]}, "kept": "\\ud83d\\ude00"}'
    (ref,) = refs_of(found(fill(tmp_path, {"list.jsonl": line}) / "list.jsonl"))
    assert json.loads(ref.metadata or "", parse_constant=pytest.fail) == {"deep": {"inf": [None, 1]}, "kept": "😀"}


def test_a_changed_line_is_a_changed_file(tmp_path: Path) -> None:
    versions = []
    for caption in ("a dog", "a cat", "a dog"):
        path = write_list(tmp_path / "list.jsonl", [{"uri": "a.jpg", "caption": caption}])
        versions.append(refs_of(found(path))[0].version)
    assert versions[0] == versions[2] != versions[1]


def test_parquet_of_images_or_of_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [jpeg(0)], "url": ["a.jpg"]}), tmp_path / "images.parquet")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "neither.parquet")
    fill(tmp_path, {"broken.parquet": b"no Parquet"})
    listing = found(tmp_path / "images.parquet", tmp_path / "neither.parquet", tmp_path / "broken.parquet")
    # What holds neither is a shard too: its reader tells.
    assert [shard.format for shard in listing.shards] == ["parquet"] * 3 and not listing.files
    message = r"--image_column 'url' is no column of bytes; there are: image, url"
    with pytest.raises(ValueError, match=message):
        found(tmp_path / "images.parquet", image_column="url")


# --- S3 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[dict]:
    """Storage options of an S3 server on 127.0.0.1 with a bucket of photos."""
    server_of = pytest.importorskip("moto.server", reason="needs moto[server]")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_of.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
    fs = fsspec.filesystem("s3", **options)
    fs.mkdir("photos")
    fs.pipe(
        {
            "photos/in/a.jpg": jpeg(0),
            "photos/in/a.txt": b"a dog",
            "photos/in/empty": b"",
            "photos/in/shard.tar": tar_bytes([("x.jpg", jpeg(1)), ("y.jpg", jpeg(2))]),
            "photos/lists/list.jsonl": b'{"uri": "../in/a.jpg"}\n{"uri": "s3://photos/gone.jpg"}\n'
            b'{"uri": "s3://Not a bucket!/a.jpg"}\n{"uri": "s3://photos"}',
        }
    )
    yield options
    server.stop()


def test_s3(s3: dict) -> None:
    config = ReadConfig(10**6, storage_options=s3)
    for pattern in ("s3://photos/in", "s3://photos/in/*.{jpg,tar}"):
        listing = found(pattern, storage_options=s3)
        shards = (*listing.shards, *pack(listing.files))
        samples = [item for shard in shards for item in read_shard(shard, config) if isinstance(item, Sample)]
        assert {sample.uri: (sample.data, sample.captions) for sample in samples} == {
            "s3://photos/in/a.jpg": (jpeg(0), ("a dog",)),
            "s3://photos/in/shard.tar#x.jpg": (jpeg(1), ()),
            "s3://photos/in/shard.tar#y.jpg": (jpeg(2), ()),
        }
        for sample in samples:
            assert read_image(sample.uri, sample.shard_uri, sample.byte_offset, len(sample.data), config) == sample.data
    version = listing.shards[0].version
    fsspec.filesystem("s3", **s3).pipe("photos/in/shard.tar", TAR)
    assert found("s3://photos/in/shard.tar", storage_options=s3).shards[0].version != version
    with pytest.raises(FileNotFoundError, match="no input matches 's3://photos/nothing'"):
        found("s3://photos/nothing", storage_options=s3)


def test_lists_on_s3(s3: dict) -> None:
    (shard,) = pack(found("s3://photos/lists/list.jsonl", storage_options=s3).files)
    outcome = {
        item.uri: item.reason if isinstance(item, Failure) else item.data
        for item in read_shard(shard, ReadConfig(10**6, storage_options=s3))
    }
    assert outcome == {
        "s3://photos/in/a.jpg": jpeg(0),
        "s3://photos/gone.jpg": "missing_file",
        "s3://Not a bucket!/a.jpg": "unreadable_file",
        "s3://photos": "unreadable_file",
    }
