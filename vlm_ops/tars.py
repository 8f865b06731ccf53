"""Tar archives, read front to back, whatever state they are in.

Python's `tarfile` ends in silence at a damaged header and at a cut between two members, so the
walk over the blocks is done here, on top of its header parser (`TarInfo.frombuf`): after a damaged
header the walk goes on at the next valid one, also where bytes were lost or put in between, and the
end is checked.

Zero blocks are the end of an archive, and also what a download that stopped, a crash or a bad disk
leaves in place of data. An end is two blocks, filled up to a whole record; more zeros than that, or an
end where no record ends, are damage. Zeros that look exactly like an end cannot be told from one.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
# Types without data behind the header, whatever size it tells; all others, unknown ones too, have some.
_WITHOUT_DATA = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip
_HEADERS_OF_NEXT = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
_MAX_HEADER_BYTES = 1 << 20  # a long name or a pax header is never larger
_PAX_LENGTH = re.compile(rb"([0-9]{1,7}) ")
# Sizes of the records that programs fill with zeros behind the end: tar's own 20 blocks, and powers of two.
_RECORDS = (20 * BLOCK, *(BLOCK << power for power in range(12)))
_MAGIC, _MAGIC_AT = b"ustar", 257  # of all headers but those of the 1970s
_SPARSE_MAP_ENDS = 504  # where a block of GNU's sparse map tells whether another one follows


@dataclass(frozen=True)
class Member:
    """One archive member; the name of a directory ends with a slash. `data` is None for what is not a
    regular file, or exceeds `max_bytes`."""

    name: str
    offset: int
    size: int
    is_regular: bool
    data: bytes | None


@dataclass(frozen=True)
class Damage:
    """A place where the archive is not what it should be. `reason` is a failure reason.

    `total_bytes` is the size of the archive, where it was not known until a member ran out of it: read
    again with it, the archive may give members behind one that only claimed to be so large.
    """

    reason: str
    offset: int
    message: str
    total_bytes: int | None = None


class _Reader:
    """Counts what is read, and turns a short read into None."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.offset = 0
        self.put_back = b""

    def read_up_to(self, size: int) -> bytes:
        data, self.put_back = self.put_back[:size], self.put_back[size:]
        if len(data) < size:
            data += self.file.read(size - len(data))
        self.offset += len(data)
        return data

    def read(self, size: int) -> bytes | None:
        data = self.read_up_to(size)
        return data if len(data) == size else None

    def skip(self, size: int) -> bool:
        while size > 0:
            data = self.read_up_to(min(size, 1 << 20))
            size -= len(data)
            if not data:
                return False
        return True

    def unread(self, data: bytes) -> None:
        self.put_back = data + self.put_back
        self.offset -= len(data)


def iter_members(file: BinaryIO, max_bytes: int, total_bytes: int | None = None) -> Iterator[Member | Damage]:
    """Members and damages of a tar stream, in order.

    Args:
        file: The archive, uncompressed, at its beginning. Never sought.
        max_bytes: Larger members are passed over (their `data` is None).
        total_bytes: Size of the archive where known: a member that claims to end behind it has a
            damaged header, unless it is the last one and was cut.

    Yields:
        A Member for each file, link or directory; a Damage for each damaged stretch, and one at
        the end where the archive stops before its end-of-archive blocks (an `unreadable_shard`
        where there was no member at all).
    """
    reader = _Reader(file)
    override: dict[str, str] = {}
    damage: Damage | None = None  # where the walk lost its way, as told if it never finds it again
    num_members = 0
    archive_start: int | None = 0  # of several in one file; None behind damage, where sizes tell nothing
    zeros: int | None = None  # where the zero blocks begin that were read last
    passed: tuple[bytes, ...] = ()  # the last member's data, among which the next header may be, if bytes were lost
    while True:
        start = reader.offset
        block = reader.read(BLOCK)
        if block is None:
            break
        if not block.strip(b"\0"):
            zeros = start if zeros is None else zeros
            continue
        if zeros is not None:  # concatenated archives have members behind the zero blocks
            if start - zeros > BLOCK and _is_end(archive_start, zeros, start):
                archive_start = start
            else:
                damage, archive_start = damage or _lost_at(zeros), None
            zeros = None
        header = _parse(block)
        if header is None or _claims_too_much(header, override, reader.offset, total_bytes):
            damage = damage or _lost_at(start, header)
            override = {}  # a long name is that of the next member alone, and that one is lost
            archive_start = None
            _go_to_header(passed, block, reader)
            passed = ()
            continue
        if damage:
            yield Damage("damaged_shard", damage.offset, f"damaged between byte {damage.offset} and byte {start}")
            damage = None
        if header.type in _HEADERS_OF_NEXT:
            told = _read_header_of_next(header, reader)
            if told is None:
                break
            override |= told
            continue
        is_sparse = header.type == tarfile.GNUTYPE_SPARSE or any(name.startswith("GNU.sparse.") for name in override)
        name = override.get("GNU.sparse.name") or override.get("path") or header.name
        if header.type == tarfile.DIRTYPE:
            name = name.rstrip("/") + "/"  # the header's parser takes it off
        size = _size(header, override)
        override = {}
        if header.type == tarfile.GNUTYPE_SPARSE and not _skip_sparse_map(block, reader):
            break
        is_regular = header.type in _REGULAR and not is_sparse
        data, offset = None, reader.offset
        if is_regular and size <= max_bytes:
            data = reader.read(size)
            whole = data is not None
        else:
            whole = reader.skip(size)
        if not whole:
            reason = "truncated_shard" if num_members else "unreadable_shard"
            message = f"ends inside member {name!r}, which starts at byte {offset}"
            yield Damage(reason, offset, message, reader.offset if total_bytes is None else None)
            return
        num_members += 1
        yield Member(name, offset, size, is_regular, data)
        # The last member's padding may be missing without any loss; the missing end is noticed below.
        padding = reader.read(-size % BLOCK)
        if padding is None:
            break
        passed = (data, padding) if data else ()
    if zeros is None:
        message = f"ends at byte {reader.offset} without end-of-archive blocks"
        damage = damage or Damage("truncated_shard", reader.offset, message)
    elif not damage and not _is_end(archive_start, zeros, reader.offset):
        message = f"ends with {reader.offset - zeros} zero bytes from byte {zeros}, which are no end of an archive"
        damage = Damage("truncated_shard", zeros, message)
    if damage:
        yield damage if num_members else replace(damage, reason="unreadable_shard")


def _is_end(archive_start: int | None, zeros: int, end: int) -> bool:
    """Whether zeros are the end blocks of an archive and what fills its last record."""
    if archive_start is None:
        return True
    return any((end - archive_start) % record == 0 and end - zeros < 2 * BLOCK + record for record in _RECORDS)


def _go_to_header(passed: tuple[bytes, ...], block: bytes, reader: _Reader) -> None:
    """Goes on behind a lost block: at the first header that does not begin with a block, where bytes were lost
    or added, or else at the next block."""
    window = b"".join((*passed, block, reader.read_up_to(BLOCK)))
    this_block = sum(map(len, passed))
    next_block = this_block + BLOCK
    start = window.find(_MAGIC, _MAGIC_AT) - _MAGIC_AT
    while 0 <= start < next_block:
        candidate = window[start : start + BLOCK]
        if start != this_block and len(candidate) == BLOCK and _parse(candidate):
            reader.unread(window[start:])
            return
        start = window.find(_MAGIC, start + _MAGIC_AT + 1) - _MAGIC_AT
    reader.unread(window[next_block:])


def _parse(block: bytes) -> tarfile.TarInfo | None:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return None
    return header if header.size >= 0 else None


def _size(header: tarfile.TarInfo, override: dict[str, str]) -> int:
    """Bytes of data behind a member's header."""
    if header.type in _WITHOUT_DATA:
        return 0
    told = override.get("size", "") if header.type not in _HEADERS_OF_NEXT else ""
    return int(told) if re.fullmatch(r"[0-9]{1,20}", told) else header.size


def _claims_too_much(header: tarfile.TarInfo, override: dict[str, str], offset: int, total_bytes: int | None) -> bool:
    """Whether the header claims more than the archive holds: a damaged size, or a cut member.

    Going on block by block is right for both: behind a damaged header further members are found,
    behind a cut none.
    """
    if header.type in _HEADERS_OF_NEXT and header.size > _MAX_HEADER_BYTES:
        return True
    return total_bytes is not None and offset + _size(header, override) > total_bytes


def _read_header_of_next(header: tarfile.TarInfo, reader: _Reader) -> dict[str, str] | None:
    """What a long name or a pax header says of the member behind it; None where it is cut."""
    payload = reader.read(header.size)
    if payload is None or not reader.skip(-header.size % BLOCK):
        return None
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": payload.partition(b"\0")[0].decode("utf-8", "backslashreplace")}
    return _parse_pax(payload) if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) else {}


def _skip_sparse_map(header: bytes, reader: _Reader) -> bool:
    """Passes over the blocks that go on with the sparse map of a header."""
    is_extended = header[482] != 0
    while is_extended:
        block = reader.read(BLOCK)
        if block is None:
            return False
        is_extended = block[_SPARSE_MAP_ENDS] != 0
    return True


def _lost_at(start: int, header: tarfile.TarInfo | None = None) -> Damage:
    if header is None:
        return Damage("damaged_shard", start, f"damaged from byte {start} to its end")
    return Damage("truncated_shard", start, f"ends inside member {header.name!r}, whose header is at byte {start}")


def _parse_pax(payload: bytes) -> dict[str, str]:
    """`<length> <key>=<value>\\n` records; a malformed rest is left out."""
    records: dict[str, str] = {}
    start = 0
    while length := _PAX_LENGTH.match(payload, start):
        end = start + int(length[1])
        if not length.end() < end <= len(payload):
            break
        key, _, value = payload[length.end() : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        start = end
    return records
