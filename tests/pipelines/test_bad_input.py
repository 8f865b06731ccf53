"""Bad input through the real command: what is good has its row, what is bad its reason, and the run ends.

First each kind of damage that the readers know, then damage at random.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
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
    fixed = ["--model", "python:tests.toys", "--ops", "quality", "--device", "cpu", "--num_threads", "1"]
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


# --- damage at random ----------------------------------------------------------------------------

# None of these is as small as what may fill the end of a tar: zeros in its place are always seen.
BIG = [jpeg(number, 560, 420) for number in range(5)]
KEYS = [f"k{number}" for number in range(5)]
TAR_NAMES = st.sampled_from(["../../up.jpg", "/abs.jpg", "ö b.jpeg", "k0.jpg", "k4.jpg", "n" * 120 + ".png"])
URLS = [f"listed/{key}.jpg" for key in KEYS]
LIST = [json.dumps({"url": url, "caption": f"of {url}"}).encode() for url in URLS]
TABLE = parquet(
    {"image": BIG, "key": KEYS, "text": [f"of {key}" for key in KEYS]},
    row_group_size=2, use_dictionary=False, compression="none",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A change of bytes at a place, given as a share of the whole or, at some of them, exactly."""

    kind: str
    share: float
    size: int
    filling: bytes

    def __call__(self, data: bytes, places: Sequence[int] = ()) -> bytes:
        start = int(self.share * len(data))
        if places and self.size % 3 == 0:  # also exactly where something begins
            start = places[int(self.share * len(places))] % (len(data) + 1)
        end = start + self.size
        if self.kind == "flip":
            return data[:start] + bytes(byte ^ self.filling[0] for byte in data[start : start + 1]) + data[start + 1 :]
        if self.kind == "zero":
            return data[:start] + bytes(len(data[start:end])) + data[end:]
        if self.kind == "insert":
            return data[:start] + self.filling + data[start:]
        if self.kind == "delete":
            return data[:start] + data[end:]
        if self.kind == "double":
            return data[:end] + data[start:end] + data[end:]
        return data[:start]


CHANGE = st.builds(
    Change,
    kind=st.sampled_from(["flip", "zero", "insert", "delete", "double", "cut"]),
    share=st.floats(0, 1, exclude_max=True),
    size=st.integers(1, 700) | st.sampled_from([BLOCK, 3 * BLOCK, 20_000, 10**6]),
    filling=st.binary(min_size=1, max_size=40).filter(lambda filling: filling[0] != 0) | st.just(b"\xff" * BLOCK),
)
CHANGES = st.lists(CHANGE, max_size=2)


@dataclass(frozen=True)
class Night:
    """What is done to the five inputs of a run, and how many failures it may have."""

    order: Sequence[int]
    renamed: Mapping[int, str]
    tar: Sequence[Change]
    gzip: Sequence[Change]
    parquet: Sequence[Change]
    list: Sequence[Change]
    files: Mapping[int, Sequence[Change]]
    max_failure_rate: float


NIGHT = st.builds(
    Night,
    order=st.permutations(range(5)),
    renamed=st.dictionaries(st.integers(0, 4), TAR_NAMES, max_size=2),
    tar=CHANGES,
    gzip=CHANGES,
    parquet=CHANGES,
    list=CHANGES,
    files=st.dictionaries(st.integers(0, 4), CHANGES, max_size=3),
    max_failure_rate=st.sampled_from([0.0, 0.2, 1.0, 1.0]),
)
# What says where an image lies, or when it was read.
PLACE = (
    "uri", "image_id", "shard_uri", "byte_offset", "key", "source_version", "source_captions", "source_metadata", "run_id",
)  # fmt: skip


def test_good_members_survive_any_damage(tmp_path_factory: pytest.TempPathFactory, good_rows: dict) -> None:
    spend_nights(20, True, tmp_path_factory, good_rows)


@pytest.mark.slow
def test_good_members_survive_any_damage_at_length(tmp_path_factory: pytest.TempPathFactory, good_rows: dict) -> None:
    spend_nights(400, False, tmp_path_factory, good_rows)


@pytest.fixture(scope="module")
def good_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The rows of the undamaged photos, by content."""
    found = run(
        tmp_path_factory.mktemp("good") / "in", {f"{key}.jpg": data for key, data in zip(KEYS, BIG, strict=True)}
    )
    return {row["content_sha256"]: without_place(row) for row in found.rows.values()}


def without_place(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in PLACE}


def spend_nights(num: int, derandomize: bool, tmp_path_factory: pytest.TempPathFactory, good_rows: dict) -> None:
    # Not made smaller: that takes many runs of the command, and says little more.
    phases = (Phase.generate,)
    checks = list(HealthCheck)

    @settings(
        max_examples=num,
        derandomize=derandomize,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=checks,
    )
    @given(night=NIGHT)
    def spend(night: Night) -> None:
        folder = tmp_path_factory.mktemp("night") / "in"
        check_night(night, folder, good_rows)
        shutil.rmtree(folder.parent)

    spend()


def check_night(night: Night, folder: Path, good_rows: dict[str, dict]) -> None:
    (folder / "listed").mkdir(parents=True)
    (folder / "files").mkdir()
    members = [(night.renamed.get(number, f"k{number}.jpg"), BIG[number]) for number in night.order]
    whole_tar = tar_bytes(members)
    starts = [each.offset for each in tarfile.open(fileobj=io.BytesIO(whole_tar)).getmembers()]
    whole_gz, whole_list = gzip.compress(whole_tar, mtime=0), b"\n".join(LIST) + b"\n"
    damaged = {
        "a.tar": changed(whole_tar, night.tar, starts),
        "b.tar.gz": changed(whole_gz, night.gzip),
        "c.parquet": changed(TABLE, night.parquet, group_starts()),
        "d.jsonl": changed(whole_list, night.list),
    }
    for name, data in damaged.items():
        (folder / name).write_bytes(data)
    files = {}
    for number, key in enumerate(KEYS):
        (folder / "listed" / f"{key}.jpg").write_bytes(BIG[number])
        files[f"files/{key}.jpg"] = changed(BIG[number], night.files.get(number, ()))
        (folder / "files" / f"{key}.jpg").write_bytes(files[f"files/{key}.jpg"])

    found = build_twice(folder, [*damaged, "files"], night.max_failure_rate)

    contents = {uri: row["content_sha256"] for uri, row in found.rows.items()}
    for uri, row in found.rows.items():  # whatever has the bytes of a good photo has its row
        if row["content_sha256"] in good_rows:
            assert without_place(row) == good_rows[row["content_sha256"]]
        if uri.startswith("a.tar#"):
            image = damaged["a.tar"][row["byte_offset"] : row["byte_offset"] + row["num_bytes"]]
            assert sha256(image) == row["content_sha256"]
    failed = [uri for uri, _ in found.failures]

    def has(uri: str, data: bytes) -> bool:
        return contents.get(uri) == sha256(data)

    def is_told(name: str) -> bool:
        return any(uri.split("#")[0] == name for uri in failed)

    names = [name for name, _ in members]
    for position, (name, data) in enumerate(members):
        span = whole_tar[starts[position] : [*starts, len(whole_tar)][position + 1]]
        span = span[: span.index(data) + len(data)]
        is_first = names.index(name) == position and damaged["a.tar"].count(span[:BLOCK]) == 1
        if is_first and span in damaged["a.tar"]:
            assert has(f"a.tar#{name}", data), f"{name} is untouched, and lost"
        assert f"a.tar#{name}" in contents or is_told("a.tar")
        end = starts[position] + len(span)
        if names.index(name) == position and end <= num_decompressed(damaged["b.tar.gz"], whole_tar):
            assert has(f"b.tar.gz#{name}", data)
        assert f"b.tar.gz#{name}" in contents or is_told("b.tar.gz")
    for number, data in enumerate(BIG):
        if is_group_whole(damaged["c.parquet"], number // 2):
            assert has(f"c.parquet#{number}", data)
        assert f"c.parquet#{number}" in contents or is_told("c.parquet")
    for line in damaged["d.jsonl"].split(b"\n"):
        if line in LIST:
            assert has(URLS[LIST.index(line)], BIG[LIST.index(line)])
        elif line.strip():
            told = [uri for uri in failed if not uri.startswith(("a.tar", "b.tar", "c.parquet", "files/"))]
            assert told or names_listed(line) in contents
    for uri, data in files.items():
        if data in BIG:
            assert has(uri, data)
        assert uri in contents or uri in failed


def changed(data: bytes, changes: Iterable[Change], places: Sequence[int] = ()) -> bytes:
    for change in changes:
        data = change(data, places)
    return data


def build_twice(folder: Path, inputs: list[str], max_failure_rate: float) -> Found:
    """The first run is refused exactly if too much fails; a second run that allows it publishes what the first made."""
    exit_code = build(folder, *inputs, flags=("--max_failure_rate", str(max_failure_rate)))
    assert exit_code in (0, 3)
    first = look(folder, exit_code)
    if exit_code == 3:
        assert build(folder, *inputs, flags=("--max_failure_rate", "1")) == 0
    last = look(folder, 0)
    assert (last.rows.keys(), last.failures) == (first.rows.keys(), first.failures)
    num_failed = sum(reason not in HARMLESS_REASONS for _, reason in last.failures)
    num_unreadable = sum(reason == "unreadable_shard" for _, reason in last.failures)
    (metrics, *_) = (json.loads(path.read_text()) for path in Path(f"{folder}-catalog").glob("runs/*/metrics.json"))
    rate = max(num_failed / max(num_failed + len(last.rows), 1), num_unreadable / metrics["shards"])
    assert metrics["failure_rate"] == pytest.approx(rate)
    assert exit_code == (3 if rate > max_failure_rate else 0)
    return last


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def num_decompressed(data: bytes, whole: bytes) -> int:
    """How much of the tar a decompressor gives for sure: as far as the first difference, and not the last buffer."""
    stream, pieces = zlib.decompressobj(wbits=31), []
    try:
        pieces = [stream.decompress(data[start : start + 256]) for start in range(0, len(data), 256)]
    except zlib.error:
        stream = zlib.decompressobj(wbits=31)
        with contextlib.suppress(zlib.error):
            for start in range(len(data)):
                pieces.append(stream.decompress(data[start : start + 1]))
    given = b"".join(pieces)
    if given == whole and stream.eof:
        return len(whole)
    buffer = getattr(gzip, "READ_BUFFER_SIZE", io.DEFAULT_BUFFER_SIZE)
    same = next((place for place, (a, b) in enumerate(zip(given, whole, strict=False)) if a != b), len(given))
    return same - 2 * buffer


def group_ranges() -> list[tuple[int, int]]:
    metadata = pq.ParquetFile(io.BytesIO(TABLE)).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    starts = [group.column(0).data_page_offset for group in groups]
    ends = [group.column(2).data_page_offset + group.column(2).total_compressed_size for group in groups]
    return list(zip(starts, ends, strict=True))


def group_starts() -> list[int]:
    return [*(start for start, _ in group_ranges()), group_ranges()[-1][1], len(TABLE) - 8, len(TABLE)]


def is_group_whole(data: bytes, group: int) -> bool:
    """Whether a row group lies where the footer says, and the footer is the old one."""
    start, end = group_ranges()[group]
    footer = TABLE[group_ranges()[-1][1] :]
    return data[start:end] == TABLE[start:end] and data[:4] == b"PAR1" and data.endswith(footer)


def names_listed(line: bytes) -> str | None:
    with contextlib.suppress(ValueError, AttributeError):
        return json.loads(line.decode("utf-8-sig", "replace")).get("url")
    return None
