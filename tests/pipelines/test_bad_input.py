"""Bad input through the real command: what is good has its row, what is bad its reason, and the run ends.

First each kind of damage that the readers know, then damage at random.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from PIL import Image

from pipelines.cli import main
from schemas.samples import HARMLESS_REASONS
from tests.conftest import encode, jpeg, photo, png, tar_bytes

PHOTOS = [jpeg(seed) for seed in range(6)]
NAMES = [f"{number}.jpg" for number in range(6)]
MEMBERS = list(zip(NAMES, PHOTOS, strict=True))
TAR = tar_bytes(MEMBERS)
HEADERS = [member.offset for member in tarfile.open(fileobj=io.BytesIO(TAR)).getmembers()]
BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
BODY = TAR[: HEADERS[5] + BLOCK + len(PHOTOS[5]) + -len(PHOTOS[5]) % BLOCK]  # without its end


@dataclass(frozen=True)
class Found:
    """What a run left: rows by the end of their URI, (end of the URI, reason) of its failures, its exit code."""

    exit_code: int
    rows: Mapping[str, dict]
    failures: list[tuple[str, str]]
    messages: list[str] = field(default_factory=list)


def build(folder: Path, *inputs: str, flags: tuple[str, ...] = ()) -> int:
    """Runs the command on files of a folder; the catalog is beside it."""
    patterns = [str(folder / name) for name in inputs]
    catalog = f"{folder}-catalog"
    fixed = ["--model", "python:tests.toys", "--ops", "quality", "--device", "cpu", "--num_workers", "1"]
    return main(["build", "--input", *patterns, "--catalog", catalog, *fixed, *flags])


def look(folder: Path, exit_code: int) -> Found:
    """The tables; where nothing was published, the parts that are kept for the next run."""
    catalog = Path(f"{folder}-catalog")
    tables = []
    for name in ("images", "failures"):
        if exit_code == 0:
            tables.append(DeltaTable(str(catalog / name)).to_pyarrow_table().to_pylist())
        else:
            assert not (catalog / name / "_delta_log").exists()
            parts = sorted((catalog / name).glob("part-*.parquet"))
            tables.append([row for part in parts for row in pq.read_table(part).to_pylist()])
    assert not list(catalog.rglob("*.tmp"))
    images, failed = tables
    rows = {shorten(row["uri"], folder): row for row in images}
    assert len(rows) == len(images)
    failures = sorted((shorten(row["uri"], folder), row["reason"]) for row in failed)
    return Found(exit_code, rows, failures, [row["message"] for row in failed])


def shorten(uri: str, folder: Path) -> str:
    return uri.removeprefix(f"{folder}/")


def run(folder: Path, files: Mapping[str, bytes], *inputs: str, flags: tuple[str, ...] = ()) -> Found:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return look(folder, build(folder, *(inputs or files), flags=flags))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "in"


def check(found: Found, rows: list[str], failures: list[tuple[str, str]]) -> None:
    """The rows and the failures are these, and the exit code is that of the share of images that failed."""
    assert sorted(found.rows) == sorted(rows)
    assert found.failures == sorted(failures)
    num_failed = sum(reason not in HARMLESS_REASONS for _, reason in failures)
    is_unreadable = any(reason == "unreadable_shard" for _, reason in failures)
    refused = is_unreadable or num_failed > 0.05 * (num_failed + len(rows))
    assert found.exit_code == (3 if refused else 0)
    for row in found.rows.values():
        assert len(row["content_sha256"]) == 64 and row["width"] > 0


# --- tars ----------------------------------------------------------------------------------------


def header(name: str, size: int = 0, type_: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, type_, target
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % BLOCK)


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


LARGE = [(f"{number}.jpg", jpeg(number, 800, 600)) for number in range(6)]
LARGE_TAR = tar_bytes(LARGE)
LARGE_HEADERS = [each.offset for each in tarfile.open(fileobj=io.BytesIO(LARGE_TAR)).getmembers()]
LARGE_GZ = gzip.compress(LARGE_TAR, mtime=0)
SHARD = "a.tar"


@pytest.mark.parametrize(
    ("data", "kept", "failures"),
    [
        pytest.param(TAR, range(6), [], id="whole"),
        pytest.param(TAR[: HEADERS[3] + BLOCK + 100], range(3), ["truncated_shard"], id="cut in a member"),
        pytest.param(TAR[: HEADERS[3] + 100], range(3), ["truncated_shard"], id="cut in a header"),
        pytest.param(TAR[: HEADERS[4]], range(4), ["truncated_shard"], id="cut between members"),
        pytest.param(TAR[: HEADERS[5] + BLOCK + len(PHOTOS[5])], range(6), ["truncated_shard"], id="cut in padding"),
        pytest.param(flipped(TAR, HEADERS[2] + 3), (0, 1, 3, 4, 5), ["damaged_shard"], id="damaged header"),
        pytest.param(TAR[:1] + TAR[2:], range(1, 6), ["damaged_shard"], id="a byte lost"),
        pytest.param(TAR[: HEADERS[1]] + b"?" + TAR[HEADERS[1] :], range(6), ["damaged_shard"], id="a byte added"),
        pytest.param(
            LARGE_TAR[: LARGE_HEADERS[2]] + bytes(len(LARGE_TAR) - LARGE_HEADERS[2]),
            range(2), ["truncated_shard"], id="a tail of zeros",
        ),
        pytest.param(
            TAR[: HEADERS[2]] + header("liar.jpg", 10 * 10**9) + TAR[HEADERS[3] :],
            (0, 1, 3, 4, 5), ["damaged_shard"], id="a claim of 10 GB",
        ),
        pytest.param(
            gzip.compress(TAR[: HEADERS[2]] + header("liar.jpg", 10 * 10**9) + TAR[HEADERS[3] :]),
            (0, 1, 3, 4, 5), ["damaged_shard"], id="a claim of 10 GB in gzip",
        ),
        pytest.param(gzip.compress(TAR[: HEADERS[4]]), range(4), ["truncated_shard"], id="cut, then gzipped"),
        pytest.param(LARGE_GZ[:-8], range(6), ["truncated_shard"], id="gzip without its end"),
        pytest.param(LARGE_GZ[:-8] + b"\0" * 8, range(6), ["damaged_shard"], id="gzip with a wrong checksum"),
        pytest.param(LARGE_GZ + b"junk", range(6), ["damaged_shard"], id="junk behind gzip"),
        pytest.param(b"", (), ["unreadable_shard"], id="zero bytes"),
        pytest.param(b"<html>" * 500, (), ["unreadable_shard"], id="HTML"),
        pytest.param(bytes(10**6), (), ["unreadable_shard"], id="zeros alone"),
        pytest.param(b"\x1f\x8b" + b"junk" * 50, (), ["unreadable_shard"], id="no gzip"),
    ],
)  # fmt: skip
def test_damaged_tars(folder: Path, data: bytes, kept: range, failures: list[str]) -> None:
    found = run(folder, {SHARD: data})
    check(found, [f"{SHARD}#{number}.jpg" for number in kept], [(SHARD, reason) for reason in failures])


def test_a_damaged_gzip_keeps_what_stands_before(folder: Path) -> None:
    middle = len(LARGE_GZ) // 2
    found = run(folder, {SHARD: LARGE_GZ[:middle] + b"\xff" * 40 + LARGE_GZ[middle + 40 :]})
    assert found.exit_code == 3 and len(found.rows) >= 2
    assert (SHARD, "damaged_shard") in found.failures


@pytest.mark.parametrize(
    ("data", "rows", "failures"),
    [
        pytest.param(
            tar_bytes([*MEMBERS[:2], ("1.jpg", PHOTOS[2])]), ["0.jpg", "1.jpg"], [("1.jpg", "duplicate_member")],
            id="duplicate names",
        ),
        pytest.param(
            tar_bytes([*MEMBERS[:2], ("0.json", b'{"caption": "late"}'), MEMBERS[2]]), ["0.jpg", "1.jpg", "2.jpg"],
            [("0.json", "scattered_members")], id="members of one key apart",
        ),
        pytest.param(
            header("d/", type_=tarfile.DIRTYPE) + header("d.jpg/", type_=tarfile.DIRTYPE) + BODY + END, NAMES, [],
            id="directories",
        ),
        pytest.param(
            header("s.jpg", type_=tarfile.SYMTYPE, target="/etc/passwd")
            + header("h.jpg", type_=tarfile.LNKTYPE, target="0.jpg") + BODY + END,
            NAMES, [("s.jpg", "unsupported_member"), ("h.jpg", "unsupported_member")], id="links",
        ),
        pytest.param(
            header("s.jpg", 1024, tarfile.GNUTYPE_SPARSE) + bytes(1024) + BODY + END, NAMES, [("s.jpg", "unsupported_member")],
            id="sparse",
        ),
        pytest.param(
            tar_bytes([("/abs.jpg", PHOTOS[0]), ("../../up.jpg", PHOTOS[1]), ("a/../b.jpg", PHOTOS[2])]),
            ["/abs.jpg", "../../up.jpg", "a/../b.jpg"], [], id="absolute and .. names",
        ),
        pytest.param(
            tar_bytes([("0.jpg", PHOTOS[0]), ("0.json", b"{"), ("1.jpg", PHOTOS[1])]), ["0.jpg", "1.jpg"],
            [("0", "bad_sidecar")], id="a bad sidecar",
        ),
    ],
)  # fmt: skip
def test_members_of_tars(folder: Path, data: bytes, rows: list[str], failures: list[tuple[str, str]]) -> None:
    found = run(folder, {SHARD: data})
    check(found, [f"{SHARD}#{name}" for name in rows], [(f"{SHARD}#{name}", reason) for name, reason in failures])
    # Names are only names: nothing of an archive is written anywhere.
    assert [path.name for path in folder.parent.rglob("*.jpg")] == []


# --- Parquet -------------------------------------------------------------------------------------


def parquet(columns: Mapping[str, object], **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def with_damaged_group(columns: Mapping[str, object], group: int) -> bytes:
    """Two rows a group; the first page of the first column of one of them is overwritten."""
    data = bytearray(parquet(columns, row_group_size=2, use_dictionary=False, compression="none"))
    start = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(group).column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "rows", "failures"),
    [
        pytest.param(parquet({"n": [1, 2]}), (), [("", "unreadable_shard")], id="no image column"),
        pytest.param(
            parquet({"image": [PHOTOS[0], None, b"", PHOTOS[1]]}), (0, 3), [("#1", "bad_record"), ("#2", "empty_file")],
            id="null and empty bytes",
        ),
        pytest.param(
            with_damaged_group({"image": PHOTOS}, 1), (0, 1, 4, 5), [("", "damaged_shard")], id="a corrupt row group"
        ),
        pytest.param(parquet({"image": pa.array([], pa.binary())}), (), [], id="zero rows"),
        pytest.param(parquet({"image": PHOTOS})[:-50], (), [("", "unreadable_shard")], id="cut"),
        pytest.param(b"", (), [("", "unreadable_shard")], id="zero bytes"),
        pytest.param(b"PAR1" + b"junk" * 30 + b"PAR1", (), [("", "unreadable_shard")], id="junk"),
    ],
)  # fmt: skip
def test_parquet(folder: Path, data: bytes, rows: tuple[int, ...], failures: list[tuple[str, str]]) -> None:
    found = run(folder, {"a.parquet": data})
    check(found, [f"a.parquet#{row}" for row in rows], [(f"a.parquet{row}", reason) for row, reason in failures])


# --- lists ---------------------------------------------------------------------------------------


def lines(*records: object) -> bytes:
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in records)


GOOD_LINES = [{"url": name} for name in NAMES]


@pytest.mark.parametrize(
    ("name", "data", "failures"),
    [
        pytest.param("l.jsonl", lines(*GOOD_LINES), [], id="whole"),
        pytest.param(
            "l.jsonl", lines(GOOD_LINES[0], b'{"url": ', b"[1]", b"\xff\xfe\0", {"url": None}, {}, *GOOD_LINES[1:]),
            [(f"l.jsonl#{number}", "bad_record") for number in range(2, 7)], id="bad lines",
        ),
        pytest.param("l.csv", b"url,n\n" + "\n".join(NAMES).encode() + b"\n,2\n", [("l.csv#8", "bad_record")], id="CSV"),
        pytest.param(
            "l.jsonl", lines({"url": "ftpx://host/a.jpg"}, {"url": "http://169.254.169.254/x.jpg"}, *GOOD_LINES),
            [("ftpx://host/a.jpg", "scheme_not_allowed"), ("http://169.254.169.254/x.jpg", "scheme_not_allowed")],
            id="unknown and other schemes",
        ),
        pytest.param(
            "l.jsonl", lines({"url": "gone.jpg"}, {"url": "."}, {"url": "a\0b.jpg"}, {"url": "n" * 300}, *GOOD_LINES),
            [("gone.jpg", "missing_file"), ("FOLDER", "unreadable_file"), ("a\0b.jpg", "unreadable_file"),
             ("n" * 300, "unreadable_file")],
            id="missing and impossible files",
        ),
        pytest.param(
            "l.parquet", with_damaged_group({"url": [*NAMES, "lost.jpg", "lost too.jpg"]}, 3),
            [("l.parquet#7", "bad_record"), ("l.parquet#8", "bad_record")], id="a corrupt row group of a Parquet list",
        ),
    ],
)  # fmt: skip
def test_lists(folder: Path, name: str, data: bytes, failures: list[tuple[str, str]]) -> None:
    found = run(folder, {**dict(MEMBERS), name: data}, name)
    check(found, NAMES, [(str(folder) if uri == "FOLDER" else uri, reason) for uri, reason in failures])


@pytest.mark.parametrize(
    ("name", "data", "flags", "message"),
    [
        ("l.jsonl", b"", (), "/l.jsonl has no entry; give one that names images"),
        ("l.csv", b"url,n\n", (), "/l.csv has no entry; give one that names images"),
        ("l.csv", b"a,b\n1,2\n", (), "there is no column named one of uri, url, "),
        ("gone.jsonl", None, (), "no input matches '"),
        ("l.jsonl", lines(*GOOD_LINES), ("--allowed_schemes", "ftpx"), "--allowed_schemes ftpx: cannot be opened: "),
    ],
    ids=["zero bytes", "header alone", "no URI column", "missing", "unknown scheme allowed"],
)
def test_lists_that_are_mistakes(
    folder: Path, name: str, data: bytes | None, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture
) -> None:
    folder.mkdir()
    if data is not None:
        (folder / name).write_bytes(data)
    assert build(folder, name, flags=flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("beamsight build: error: ") and message in error
    assert not Path(f"{folder}-catalog").exists()


def test_an_empty_list_beside_a_good_one(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {**dict(MEMBERS), "empty.jsonl": b"", "full.jsonl": lines(*GOOD_LINES)}
    check(run(folder, files, "*.jsonl"), NAMES, [])
    assert f"lists without an entry: {folder}/empty.jsonl" in caplog.messages


# --- images --------------------------------------------------------------------------------------


def animated(format_: str) -> bytes:
    frames = [photo(seed).convert("P" if format_ == "GIF" else "RGB") for seed in range(3)]
    return encode(frames[0], format_, save_all=True, append_images=frames[1:], duration=50)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(photo(3), "JPEG", exif=exif)


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a hundred kilobytes, black and white, whose RGB pixels would take 2.7 GB."""
    packed = zlib.compress(bytes((1 + side // 8) * side))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    ihdr = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def damaged_scan(data: bytes) -> bytes:
    start = data.rindex(b"\xff\xda") + 20
    return data[:start] + data[start + (len(data) - start) // 2 :]


SIXTEEN_BIT = Image.fromarray(np.arange(96 * 64, dtype=np.uint16).reshape(64, 96) * 10)

IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated.jpg": (lambda: PHOTOS[0][:-300], "truncated_image"),
    "truncated.png": (lambda: png(1)[:-300], "truncated_image"),
    "damaged.jpg": (lambda: damaged_scan(PHOTOS[2]), "corrupt_image"),
    "damaged.png": (lambda: png(1)[:3000] + b"\xff" * 50 + png(1)[3050:], "corrupt_image"),
    "empty.jpg": (lambda: b"", "empty_file"),
    "page.jpg": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image"),
    "zeros.jpg": (lambda: bytes(4096), "not_an_image"),
    "bomb.png": (bomb, "too_many_pixels"),
    "wrong.png": (lambda: PHOTOS[3], "JPEG 96x64"),
    "wrong.jpg": (lambda: png(3), "PNG 96x64"),
    "cmyk.jpg": (lambda: encode(photo(4).convert("CMYK"), "JPEG"), "JPEG 96x64"),
    "sixteen.png": (lambda: encode(SIXTEEN_BIT, "PNG"), "PNG 96x64"),
    "sixteen.tif": (lambda: encode(SIXTEEN_BIT, "TIFF"), "TIFF 96x64"),
    "moving.gif": (lambda: animated("GIF"), "GIF 96x64"),
    "moving.webp": (lambda: animated("WEBP"), "WEBP 96x64"),
    "rotated.jpg": (rotated, "JPEG 64x96"),
}


def test_images(folder: Path) -> None:
    found = run(folder, {name: make() for name, (make, _) in IMAGES.items()})
    good = {name: outcome for name, (_, outcome) in IMAGES.items() if " " in outcome}
    check(found, list(good), [(name, outcome) for name, (_, outcome) in IMAGES.items() if name not in good])
    assert {name: f"{row['format']} {row['width']}x{row['height']}" for name, row in found.rows.items()} == good


def test_bad_images_are_no_better_inside_shards(folder: Path) -> None:
    made = {name: make() for name, (make, _) in IMAGES.items()}
    table = parquet({"image": list(made.values())})
    found = run(folder, {"a.tar": tar_bytes(made.items()), "b.parquet": table})
    good = [name for name, (_, outcome) in IMAGES.items() if " " in outcome]
    bad = {name: outcome for name, (_, outcome) in IMAGES.items() if name not in good}
    number = {name: i for i, name in enumerate(made)}
    rows = [*(f"a.tar#{name}" for name in good), *(f"b.parquet#{number[name]}" for name in good)]
    # Of one name with two suffixes a tar's key is the same, and its images stand apart here.
    apart = [uri for uri, reason in found.failures if reason == "scattered_members"]
    failures = [(f"a.tar#{name}", reason) for name, reason in bad.items()]
    failures += [(f"b.parquet#{number[name]}", reason) for name, reason in bad.items()]
    check(found, rows, failures + [(uri, "scattered_members") for uri in apart])


def test_what_was_refused_is_published_when_more_may_fail(folder: Path) -> None:
    assert run(folder, {SHARD: TAR[: HEADERS[4]]}).exit_code == 3
    found = look(folder, build(folder, SHARD, flags=("--max_failure_rate", "0.3")))
    assert found.exit_code == 0 and len(found.rows) == 4 and found.failures == [(SHARD, "truncated_shard")]
