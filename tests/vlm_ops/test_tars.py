"""Tars in every state: what is whole is kept, what is damaged is told, and reading always ends."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.samples import Failure, Sample, ShardRef
from tests.conftest import jpeg, tar_bytes
from vlm_ops.shards import ReadConfig, read_image, read_shard
from vlm_ops.tars import BLOCK, Damage, Member, iter_members

CONFIG = ReadConfig(10**7)
PHOTOS = [jpeg(seed) for seed in range(6)]
NAMES = [f"{number:03}.jpg" for number in range(6)]
TAR = tar_bytes(zip(NAMES, PHOTOS, strict=True))
HEADERS = [member.offset for member in tarfile.open(fileobj=io.BytesIO(TAR)).getmembers()]


def read(path: Path, data: bytes, config: ReadConfig = CONFIG) -> tuple[list[Sample], list[Failure]]:
    path.write_bytes(data)
    items = list(read_shard(ShardRef(str(path), "tar", "v", len(data)), config))
    return [i for i in items if isinstance(i, Sample)], [i for i in items if isinstance(i, Failure)]


def contents(samples: list[Sample]) -> dict[str, bytes]:
    return {sample.uri.partition("#")[2]: sample.data for sample in samples}


def photos(*numbers: int) -> dict[str, bytes]:
    return {NAMES[number]: PHOTOS[number] for number in numbers}


def reasons(failures: list[Failure]) -> list[str]:
    return [failure.reason for failure in failures]


def special(*infos: tarfile.TarInfo, format_: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of members without data, then one photo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as archive:
        for info in infos:
            archive.addfile(info)
        photo = tarfile.TarInfo("last.jpg")
        photo.size = len(PHOTOS[0])
        archive.addfile(photo, io.BytesIO(PHOTOS[0]))
    return buffer.getvalue()


def info_of(name: str, type_: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type_, target
    return info


def header(name: str, size: int, type_: bytes = tarfile.REGTYPE, **changes: bytes) -> bytes:
    """A raw header block with a right checksum; `at_<offset>` patches bytes of it."""
    info = info_of(name, type_)
    info.size = size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:BLOCK])
    for place, patch in changes.items():
        start = int(place.removeprefix("at_"))
        block[start : start + len(patch)] = patch
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def member(name: str, data: bytes, **header_options: bytes) -> bytes:
    return header(name, len(data), **header_options) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


# --- whole archives ------------------------------------------------------------------------------


def test_a_plain_tar(tmp_path: Path) -> None:
    samples, failures = read(tmp_path / "a.tar", TAR)
    assert contents(samples) == photos(0, 1, 2, 3, 4, 5) and not failures
    assert [sample.key for sample in samples] == ["000", "001", "002", "003", "004", "005"]
    assert {sample.shard_uri for sample in samples} == {str(tmp_path / "a.tar")}


def test_byte_offsets_point_at_the_image(tmp_path: Path) -> None:
    samples, _ = read(tmp_path / "a.tar", tar_bytes([("d/" + "n" * 120 + "/0.jpg", PHOTOS[0]), *photos(1, 2).items()]))
    data = (tmp_path / "a.tar").read_bytes()
    assert len(samples) == 3
    for sample in samples:
        assert sample.byte_offset is not None
        assert data[sample.byte_offset :].startswith(sample.data)
        assert read_image(sample.uri, sample.shard_uri, sample.byte_offset, len(sample.data), CONFIG) == sample.data


def test_a_gzipped_tar_has_no_offsets_and_is_searched(tmp_path: Path) -> None:
    samples, failures = read(tmp_path / "a.tar.gz", tar_bytes(photos(0, 1).items(), "w:gz"))
    assert contents(samples) == photos(0, 1) and not failures
    assert [sample.byte_offset for sample in samples] == [None, None]
    assert read_image(samples[1].uri, samples[1].shard_uri, None, None, CONFIG) == PHOTOS[1]


def test_concatenated_archives_are_read_on(tmp_path: Path) -> None:
    samples, failures = read(tmp_path / "a.tar", tar_bytes(photos(0).items()) + tar_bytes(photos(1).items()))
    assert contents(samples) == photos(0, 1) and not failures


def test_no_members_but_a_valid_end(tmp_path: Path) -> None:
    assert read(tmp_path / "a.tar", tar_bytes([])) == ([], [])


def test_members_of_one_key_stand_together(tmp_path: Path) -> None:
    members = [
        ("./d/a.jpg", PHOTOS[0]),
        ("./d/a.json", b'{"caption": "a dog", "licence": "cc0"}'),
        ("./d/a.cls", b"7"),
        ("./d/b.png.jpg", PHOTOS[1]),
        ("./d/b.txt", b"ein Hund\n\nzwei Hunde\n"),
        ("README.md", b"no image"),
    ]
    (a, b), failures = read(tmp_path / "a.tar", tar_bytes(members))
    assert not failures
    assert (a.uri.partition("#")[2], a.key, a.captions, a.metadata) == (
        "d/a.jpg",
        "d/a",
        ("a dog",),
        '{"licence": "cc0"}',
    )
    assert (b.key, b.captions, b.metadata) == ("d/b", ("ein Hund", "zwei Hunde"), None)


# --- faults of the packer ------------------------------------------------------------------------


def test_of_duplicate_names_the_first_is_kept(tmp_path: Path) -> None:
    samples, failures = read(
        tmp_path / "a.tar", tar_bytes([("a.jpg", PHOTOS[0]), ("a.jpg", PHOTOS[1]), ("b.jpg", PHOTOS[2])])
    )
    assert contents(samples) == {"a.jpg": PHOTOS[0], "b.jpg": PHOTOS[2]}
    assert reasons(failures) == ["duplicate_member"] and "the first is kept" in failures[0].message
    assert not failures[0].loses_image


def test_members_of_one_key_that_stand_apart(tmp_path: Path) -> None:
    members = [("a.jpg", PHOTOS[0]), ("b.jpg", PHOTOS[1]), ("a.txt", b"too late"), ("c.jpg", PHOTOS[2])]
    samples, failures = read(tmp_path / "a.tar", tar_bytes(members))
    assert [(sample.key, sample.captions) for sample in samples] == [("a", ()), ("b", ()), ("c", ())]
    assert reasons(failures) == ["scattered_members"]
    assert failures[0].uri.endswith("#a.txt") and "must be next to it" in failures[0].message


def test_bad_sidecars_cost_no_image(tmp_path: Path) -> None:
    members = [
        ("a.jpg", PHOTOS[0]), ("a.json", b'{"caption": '), ("a.txt", b"still read"),
        ("b.jpg", PHOTOS[1]), ("b.json", b"[1, 2]"),
        ("c.jpg", PHOTOS[2]), ("c.txt", b"\xff\xfe\xff"),
        ("d.jpg", PHOTOS[3]), ("d.txt", b"x" * 1_100_000),
        ("e.json", b"orphan without an image"),
    ]  # fmt: skip
    samples, failures = read(tmp_path / "a.tar", tar_bytes(members))
    assert [(sample.key, sample.captions) for sample in samples] == [
        ("a", ("still read",)), ("b", ()), ("c", ()), ("d", ())
    ]  # fmt: skip
    assert reasons(failures) == ["bad_sidecar"] * 4
    assert [failure.key for failure in failures] == ["a", "b", "c", "d"]
    assert "an object was expected, not list" in failures[1].message
    assert "1100000 bytes of metadata; the limit is 1048576" in failures[3].message


def test_members_over_the_limit_are_passed_over(tmp_path: Path) -> None:
    data = tar_bytes([("big.jpg", bytes(3_000_000)), ("a.jpg", PHOTOS[0])])
    samples, failures = read(tmp_path / "a.tar", data, ReadConfig(1_000_000))
    assert contents(samples) == {"a.jpg": PHOTOS[0]}
    assert reasons(failures) == ["too_many_bytes"]
    assert failures[0].message == "3000000 bytes; the limit is 1000000 (--max_image_bytes)"
    assert failures[0].byte_offset == BLOCK


# --- members that are no regular files -----------------------------------------------------------


def test_links_are_refused_and_folders_passed_over(tmp_path: Path) -> None:
    data = special(
        info_of("folder", tarfile.DIRTYPE),
        info_of("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        info_of("hard.jpg", tarfile.LNKTYPE, "last.jpg"),
        info_of("pipe.jpg", tarfile.FIFOTYPE),
        info_of("link.txt.tmp", tarfile.SYMTYPE, "nowhere"),
    )
    samples, failures = read(tmp_path / "a.tar", data)
    assert contents(samples) == {"last.jpg": PHOTOS[0]}
    assert reasons(failures) == ["unsupported_member"] * 3
    assert [failure.key for failure in failures] == ["link", "hard", "pipe"]
    assert "not a regular file" in failures[0].message


def test_a_hard_link_that_tells_a_size_has_no_data(tmp_path: Path) -> None:
    link = header("hard.jpg", 5000, tarfile.LNKTYPE)
    samples, failures = read(tmp_path / "a.tar", link + member("a.jpg", PHOTOS[0]) + bytes(2 * BLOCK))
    assert contents(samples) == {"a.jpg": PHOTOS[0]} and reasons(failures) == ["unsupported_member"]


def test_names_are_only_names(tmp_path: Path) -> None:
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    members = [(name, PHOTOS[0]) for name in ("/abs.jpg", "../../up.jpg", "a/../../b.jpg", "~/home.jpg")]
    samples, failures = read(inside / "a.tar", tar_bytes(members))
    assert [sample.uri.partition("#")[2] for sample in samples] == [name for name, _ in members] and not failures
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [inside / "a.tar"]
    assert not Path("/abs.jpg").exists()


def test_hidden_members_are_passed_over(tmp_path: Path) -> None:
    samples, failures = read(tmp_path / "a.tar", tar_bytes([("d/._a.jpg", b"fork"), ("d/a.jpg", PHOTOS[0])]))
    assert contents(samples) == {"d/a.jpg": PHOTOS[0]} and not failures


@pytest.mark.parametrize("extra_blocks", [0, 1, 2])
def test_sparse_members_are_passed_over_whole(tmp_path: Path, extra_blocks: int) -> None:
    # GNU's old sparse format; its data is a tar itself, whose members must not come to light.
    data = tar_bytes([("hidden.jpg", PHOTOS[1])])
    maps = b"".join(bytes(504) + bytes([number + 1 < extra_blocks]) + bytes(7) for number in range(extra_blocks))
    sparse = header(
        "s.jpg", len(data), tarfile.GNUTYPE_SPARSE, at_482=bytes([extra_blocks > 0]), at_483=b"00000200000\0"
    )
    samples, failures = read(
        tmp_path / "a.tar", sparse + maps + padded(data) + member("a.jpg", PHOTOS[0]) + bytes(2 * BLOCK)
    )
    assert contents(samples) == {"a.jpg": PHOTOS[0]}
    assert [(failure.reason, failure.key) for failure in failures] == [("unsupported_member", "s")]


def test_sparse_members_of_pax_archives(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("GNUSparseFile.1/s.jpg")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.jpg"}
        info.size = 1024
        archive.addfile(info, io.BytesIO(b"1\n0\n512\n".ljust(1024, b"\0")))
    samples, failures = read(tmp_path / "a.tar", buffer.getvalue())
    assert not samples and [(failure.reason, failure.key) for failure in failures] == [("unsupported_member", "s")]


def test_data_of_unknown_types_is_passed_over(tmp_path: Path) -> None:
    data = tar_bytes([("hidden.jpg", PHOTOS[1])])
    unknown = header("dump", len(data), b"D") + padded(data)
    samples, failures = read(tmp_path / "a.tar", unknown + member("a.jpg", PHOTOS[0]) + bytes(2 * BLOCK))
    assert contents(samples) == {"a.jpg": PHOTOS[0]} and not failures


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["d/" + "long" * 60 + "/ö.jpg", "日本語/写真.jpg", "e" * 99 + ".jpg"])
def test_long_and_unicode_names(tmp_path: Path, format_: int, name: str) -> None:
    info = tarfile.TarInfo(name)
    samples, failures = read(tmp_path / "a.tar", special(info, format_=format_))
    assert [sample.uri.partition("#")[2] for sample in samples] == [name, "last.jpg"] and not failures


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_names_that_are_not_utf8(tmp_path: Path, format_: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_, encoding="latin-1") as archive:
        for name in ("ä.jpg", "ö" * 90 + "/ü.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(PHOTOS[0])
            archive.addfile(info, io.BytesIO(PHOTOS[0]))
    samples, failures = read(tmp_path / "a.tar", buffer.getvalue())
    assert [sample.uri.partition("#")[2] for sample in samples] == ["\\xe4.jpg", "\\xf6" * 90 + "/\\xfc.jpg"]
    assert not failures and [sample.data for sample in samples] == [PHOTOS[0]] * 2


def test_a_long_name_whose_member_is_lost_goes_to_nobody(tmp_path: Path) -> None:
    data = special(tarfile.TarInfo("x" * 150 + ".jpg"), format_=tarfile.GNU_FORMAT)
    lost = data.rfind(b"x" * 100)  # the member's own header, behind that of the long name
    samples, failures = read(tmp_path / "a.tar", data[:lost] + b"?" + data[lost + 1 :])
    assert contents(samples) == {"last.jpg": PHOTOS[0]}
    assert reasons(failures) == ["damaged_shard"]


@pytest.mark.parametrize(
    "records",
    [b"9" * 5000, b"9" * 5000 + b" size=1\n", b"30 size=" + b"9" * 21 + b"\n", b"0 \n", b"11 size=\xc2\xb2\n"],
)
def test_malformed_pax_records_are_left_out(tmp_path: Path, records: bytes) -> None:
    pax = header("pax", len(records), tarfile.XHDTYPE) + padded(records)
    samples, failures = read(tmp_path / "a.tar", pax + member("a.jpg", PHOTOS[0]) + bytes(2 * BLOCK))
    assert contents(samples) == {"a.jpg": PHOTOS[0]} and not failures


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [HEADERS[3] + BLOCK + 100, HEADERS[3] + BLOCK, HEADERS[3] + 100])
def test_cut_inside_a_member(tmp_path: Path, cut: int) -> None:
    samples, failures = read(tmp_path / "a.tar", TAR[:cut])
    assert contents(samples) == photos(0, 1, 2)
    assert reasons(failures) == ["truncated_shard"]
    assert failures[0].uri == str(tmp_path / "a.tar") and failures[0].loses_image


@pytest.mark.parametrize("size_is_known", [True, False])
def test_the_cut_member_is_named(size_is_known: bool) -> None:
    data = TAR[: HEADERS[3] + BLOCK + 100]
    *members, damage = iter_members(io.BytesIO(data), 10**7, len(data) if size_is_known else None)
    assert len(members) == 3
    assert isinstance(damage, Damage) and damage.reason == "truncated_shard"
    assert damage.message.startswith("ends inside member '003.jpg', ")


def test_cut_between_two_members(tmp_path: Path) -> None:
    data = TAR[: HEADERS[4]]
    assert len(tarfile.open(fileobj=io.BytesIO(data)).getmembers()) == 4, "tarfile is expected to be silent here"
    samples, failures = read(tmp_path / "a.tar", data)
    assert contents(samples) == photos(0, 1, 2, 3)
    assert reasons(failures) == ["truncated_shard"] and failures[0].byte_offset == HEADERS[4]
    assert failures[0].message == f"ends at byte {HEADERS[4]} without end-of-archive blocks"


def test_cut_in_the_last_padding_loses_no_member(tmp_path: Path) -> None:
    samples, failures = read(tmp_path / "a.tar", TAR[: HEADERS[-1] + BLOCK + len(PHOTOS[-1])])
    assert contents(samples) == photos(0, 1, 2, 3, 4, 5)
    assert reasons(failures) == ["truncated_shard"]


@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_damaged_header_costs_its_member_alone(tmp_path: Path, number: int) -> None:
    data = bytearray(TAR)
    data[HEADERS[number] + 3] ^= 0xFF
    samples, failures = read(tmp_path / "a.tar", bytes(data))
    assert contents(samples) == photos(*(other for other in range(6) if other != number))
    (failure,) = failures
    assert failure.reason == "damaged_shard" and failure.byte_offset == HEADERS[number]
    if number < 5:
        assert failure.message == f"damaged between byte {HEADERS[number]} and byte {HEADERS[number + 1]}"
    else:
        assert failure.message == f"damaged from byte {HEADERS[number]} to its end"


def test_a_header_of_zeros_costs_its_member_alone(tmp_path: Path) -> None:
    data = bytearray(TAR)
    data[HEADERS[2] : HEADERS[2] + BLOCK] = bytes(BLOCK)
    samples, failures = read(tmp_path / "a.tar", bytes(data))
    assert contents(samples) == photos(0, 1, 3, 4, 5) and reasons(failures) == ["damaged_shard"]


def test_each_damaged_stretch_is_told(tmp_path: Path) -> None:
    data = bytearray(TAR)
    for number in (1, 4):
        data[HEADERS[number]] ^= 0xFF
    samples, failures = read(tmp_path / "a.tar", bytes(data))
    assert contents(samples) == photos(0, 2, 3, 5)
    assert [failure.byte_offset for failure in failures] == [HEADERS[1], HEADERS[4]]


@pytest.mark.parametrize("type_", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_size_of_ten_gigabytes_in_the_middle(tmp_path: Path, type_: bytes) -> None:
    liar = header("liar.jpg", 10 * 10**9, type_)
    tracemalloc.start()
    samples, failures = read(tmp_path / "a.tar", TAR[: HEADERS[2]] + liar + TAR[HEADERS[3] :], ReadConfig(10**12))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert contents(samples) == photos(0, 1, 3, 4, 5)
    assert [(failure.reason, failure.byte_offset) for failure in failures] == [("damaged_shard", HEADERS[2])]
    assert peak < 50e6


def test_a_false_size_in_a_pax_header_is_no_better(tmp_path: Path) -> None:
    record = b"20 size=10000000000\n"
    liar = header("pax", len(record), tarfile.XHDTYPE) + padded(record) + header("liar.jpg", 0)
    samples, failures = read(tmp_path / "a.tar", TAR[: HEADERS[2]] + liar + TAR[HEADERS[3] :])
    assert contents(samples) == photos(0, 1, 3, 4, 5) and reasons(failures) == ["damaged_shard"]


def test_a_size_of_ten_gigabytes_in_a_gzipped_tar(tmp_path: Path) -> None:
    data = gzip.compress(TAR[: HEADERS[2]] + header("liar.jpg", 10 * 10**9) + TAR[HEADERS[3] :])
    samples, failures = read(tmp_path / "a.tar.gz", data, ReadConfig(10**12))
    assert contents(samples) == photos(0, 1, 3, 4, 5)
    assert [(failure.reason, failure.byte_offset) for failure in failures] == [("damaged_shard", HEADERS[2])]


@pytest.mark.parametrize("number", [1, 5])
def test_a_tail_of_zeros_is_no_end(tmp_path: Path, number: int) -> None:
    large = [(f"{seed}.jpg", jpeg(seed, 800, 600)) for seed in range(6)]
    data = tar_bytes(large)
    start = tarfile.open(fileobj=io.BytesIO(data)).getmembers()[number].offset
    samples, failures = read(tmp_path / "a.tar", data[:start] + bytes(len(data) - start))
    assert contents(samples) == dict(large[:number])
    assert [(failure.reason, failure.byte_offset) for failure in failures] == [("truncated_shard", start)]
    message = f"ends with {len(data) - start} zero bytes from byte {start}, which are no end of an archive"
    assert failures[0].message == message


def test_members_overwritten_with_zeros_are_missed(tmp_path: Path) -> None:
    data = TAR[: HEADERS[2]] + bytes(HEADERS[4] - HEADERS[2]) + TAR[HEADERS[4] :]
    samples, failures = read(tmp_path / "a.tar", data)
    assert contents(samples) == photos(0, 1, 4, 5) and reasons(failures) == ["damaged_shard"]
    assert failures[0].message == f"damaged between byte {HEADERS[2]} and byte {HEADERS[4]}"


@pytest.mark.parametrize("blocking", [1, 2, 20, 64, 128, 2048])
def test_the_end_of_any_writer_is_an_end(tmp_path: Path, blocking: int) -> None:
    bare = TAR[: HEADERS[5] + BLOCK] + padded(PHOTOS[5]) + bytes(2 * BLOCK)
    whole = bare + bytes(-len(bare) % (blocking * BLOCK))
    samples, failures = read(tmp_path / "a.tar", whole + tar_bytes([("last.jpg", PHOTOS[0])]))
    assert contents(samples) == {**photos(0, 1, 2, 3, 4, 5), "last.jpg": PHOTOS[0]} and not failures


@pytest.mark.parametrize("place", [HEADERS[2] + BLOCK + 700, HEADERS[2] + 5, HEADERS[3]])
@pytest.mark.parametrize("shift", [-1800, -301, -1, 1, 300, 511])
def test_bytes_too_many_or_too_few_cost_their_member_alone(tmp_path: Path, place: int, shift: int) -> None:
    data = TAR[:place] + (b"?" * shift if shift > 0 else b"") + TAR[place + max(-shift, 0) :]
    samples, failures = read(tmp_path / "a.tar", data)
    hit = {2} if place < HEADERS[3] else {3} if shift < 0 else set()
    assert photos(*(set(range(6)) - hit)).items() <= contents(samples).items()
    assert reasons(failures) == ["damaged_shard"]


def test_garbage_behind_the_end_is_told(tmp_path: Path) -> None:
    samples, failures = read(tmp_path / "a.tar", TAR + b"garbage!" * BLOCK)
    assert contents(samples) == photos(0, 1, 2, 3, 4, 5)
    assert reasons(failures) == ["damaged_shard"] and failures[0].byte_offset == len(TAR)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends at byte 0 without end-of-archive blocks"),
        (b"hello", "without end-of-archive blocks"),
        (b"<html>not found</html>" * 100, "damaged from byte 0 to its end"),
        (PHOTOS[0], "damaged from byte 0 to its end"),
        (TAR[: BLOCK + 100], "ends inside member '000.jpg'"),
        (b"\x1f\x8b\x08", "gzip: Compressed file ended"),
        (b"\x1f\x8bgarbage instead of gzip", "gzip: "),
    ],
)
def test_a_shard_of_which_nothing_can_be_read(tmp_path: Path, data: bytes, message: str) -> None:
    samples, failures = read(tmp_path / "a.tar", data)
    assert not samples and reasons(failures) == ["unreadable_shard"]
    assert message in failures[0].message


def test_a_shard_that_is_gone(tmp_path: Path) -> None:
    (failure,) = read_shard(ShardRef(str(tmp_path / "gone.tar"), "tar", "v", 1), CONFIG)
    assert isinstance(failure, Failure) and failure.reason == "unreadable_shard"
    assert "not there any more" in failure.message


def test_a_truncated_gzip(tmp_path: Path) -> None:
    data = tar_bytes(zip(NAMES, PHOTOS, strict=True), "w:gz")
    samples, failures = read(tmp_path / "a.tar.gz", data[: len(data) // 2])
    kept = contents(samples)
    assert 0 < len(kept) < 6 and kept.items() <= photos(0, 1, 2, 3, 4, 5).items()
    assert reasons(failures) == ["truncated_shard"] and "gzip: " in failures[0].message


def test_a_damaged_gzip(tmp_path: Path) -> None:
    # Larger than the decompressor's window of input, so that something comes out before the damage.
    large = [(f"{seed}.jpg", jpeg(seed, 400, 300)) for seed in range(10)]
    data = bytearray(tar_bytes(large, "w:gz"))
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    samples, failures = read(tmp_path / "a.tar.gz", bytes(data))
    assert samples and contents(samples[:-1]).items() <= dict(large).items()
    assert "damaged_shard" in reasons(failures) and not set(reasons(failures)) - {"damaged_shard", "truncated_shard"}


# --- anything at all -----------------------------------------------------------------------------

MUTATIONS = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, len(TAR) - 1), st.integers(1, 255)),
    st.tuples(st.just("overwrite"), st.integers(0, len(TAR) - 1), st.binary(min_size=1, max_size=700)),
    st.tuples(st.just("delete"), st.integers(0, len(TAR) - 1), st.integers(1, 3000)),
    st.tuples(st.just("cut"), st.integers(0, len(TAR)), st.none()),
    # Numbers and types of headers, which chance seldom meets.
    st.tuples(
        st.just("header"), st.sampled_from(HEADERS), st.tuples(st.sampled_from(b"0123456SLKxgVD\0"), st.integers(0, 2**66))
    ),
)  # fmt: skip


def mutate(data: bytes, mutation: tuple) -> bytes:
    kind, start, how = mutation
    if kind == "flip":
        return data[:start] + bytes(byte ^ how for byte in data[start : start + 1]) + data[start + 1 :]
    if kind == "overwrite":
        return data[:start] + how[: len(data) - start] + data[start + len(how) :]
    if kind == "delete":
        return data[:start] + data[start + how :]
    if kind == "header":
        type_, size = how
        number = (b"\x80" + size.to_bytes(11, "big")) if size >= 8**11 else b"%011o\0" % size
        return data[:start] + header("new.jpg", 0, at_124=number, at_156=bytes([type_])) + data[start + BLOCK :]
    return data[:start]


@settings(max_examples=300, deadline=None)
@given(mutations=st.lists(MUTATIONS, max_size=3), size_is_known=st.booleans())
def test_reading_ends_and_keeps_what_stands_before_the_damage(mutations: list[tuple], size_is_known: bool) -> None:
    data = TAR
    for mutation in mutations:
        data = mutate(data, mutation)
    items = list(iter_members(io.BytesIO(data), 10**7, len(data) if size_is_known else None))
    if data == TAR:
        assert all(isinstance(item, Member) for item in items)
    same = next((i for i, (a, b) in enumerate(zip(data, TAR, strict=False)) if a != b), min(len(data), len(TAR)))
    untouched = [number for number, start in enumerate(HEADERS) if start + BLOCK + len(PHOTOS[number]) <= same]
    members = [(item.name, item.data) for item in items if isinstance(item, Member)]
    assert members[: len(untouched)] == [(NAMES[number], PHOTOS[number]) for number in untouched]
    if all(kind in ("flip", "overwrite", "cut") for kind, *_ in mutations):  # nothing is lost in silence
        found = {data for _, data in members}
        lost = any(photo not in found for photo in PHOTOS)
        assert not lost or not found <= set(PHOTOS) or any(isinstance(item, Damage) for item in items)
