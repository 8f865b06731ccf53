"""Tar archives, read front to back, whatever state they are in.

Python's `tarfile` ends in silence at a damaged header and at a cut between two members, so the
walk over the blocks is done here, on top of its header parser (`TarInfo.frombuf`): after a damaged
header the walk goes on at the next block that is a valid one, and the end is checked.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX = tarfile.XHDTYPE
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_MAX_HEADER_BYTES = 1 << 20  # a long name or a pax header is never larger


@dataclass(frozen=True)
class Member:
    """One archive member. `data` is None for what is not a regular file, or exceeds `max_bytes`."""

    name: str
    offset: int
    size: int
    is_regular: bool
    data: bytes | None


@dataclass(frozen=True)
class Damage:
    """A place where the archive is not what it should be. `reason` is a failure reason."""

    reason: str
    offset: int
    message: str


class _Reader:
    """Counts what is read, and turns a short read into None."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.offset = 0

    def read(self, size: int) -> bytes | None:
        data = self.file.read(size)
        self.offset += len(data)
        return data if len(data) == size else None

    def skip(self, size: int) -> bool:
        while size > 0:
            data = self.file.read(min(size, 1 << 20))
            self.offset += len(data)
            size -= len(data)
            if not data:
                return False
        return True


def iter_members(file: BinaryIO, max_bytes: int, total_bytes: int | None = None) -> Iterator[Member | Damage]:
    """Members and damages of a tar stream, in order.

    Args:
        file: The archive, uncompressed, at its beginning. Never sought.
        max_bytes: Larger members are passed over (their `data` is None).
        total_bytes: Size of the archive where known: a member that claims to end behind it has a
            damaged header, unless it is the last one and was cut.

    Yields:
        A Member for each file, link or directory; a Damage for each damaged stretch, and one at
        the end where the archive stops before its end-of-archive blocks.
    """
    reader = _Reader(file)
    override: dict[str, str] = {}
    damage: Damage | None = None  # where the walk lost its way, as told if it never finds it again
    ended = False
    while True:
        start = reader.offset
        block = reader.read(BLOCK)
        if block is None:
            break
        if not block.strip(b"\0"):
            ended = True  # concatenated archives have members behind the zero blocks
            continue
        header = _parse(block)
        ended = False
        if header is None or _claims_too_much(header, reader.offset, total_bytes):
            damage = damage or _lost_at(start, header)
            continue
        if damage:
            yield Damage("damaged_shard", damage.offset, f"damaged between byte {damage.offset} and byte {start}")
            damage = None
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, *_PAX_TYPES):
            payload = reader.read(header.size) if header.size <= _MAX_HEADER_BYTES else None
            if payload is None or not reader.skip(-header.size % BLOCK):
                break
            if header.type == tarfile.GNUTYPE_LONGNAME:
                override["path"] = payload.rstrip(b"\0").decode("utf-8", "backslashreplace")
            elif header.type in (_PAX, tarfile.SOLARIS_XHDTYPE):
                override.update(_parse_pax(payload))
            continue
        name = override.get("path", header.name)
        size = int(override["size"]) if override.get("size", "").isdigit() else header.size
        override = {}
        is_regular = header.type in _REGULAR and not header.issparse()
        has_payload = is_regular or header.issparse()
        data, offset = None, reader.offset
        if has_payload:
            if is_regular and size <= max_bytes:
                data = reader.read(size)
                whole = data is not None
            else:
                whole = reader.skip(size)
            if not whole:
                yield Damage("truncated_shard", offset, f"ends inside member {name!r}, which starts at byte {offset}")
                return
        yield Member(name, offset, size, is_regular, data)
        # The last member's padding may be missing without any loss; the missing end is noticed below.
        if has_payload and not reader.skip(-size % BLOCK):
            break
    if damage:
        yield damage
    elif not ended:
        yield Damage("truncated_shard", reader.offset, f"ends at byte {reader.offset} without end-of-archive blocks")


def _parse(block: bytes) -> tarfile.TarInfo | None:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return None
    return header if header.size >= 0 else None


def _claims_too_much(header: tarfile.TarInfo, offset: int, total_bytes: int | None) -> bool:
    """Whether the header claims more than the archive holds: a damaged size, or a cut member.

    Going on block by block is right for both: behind a damaged header further members are found,
    behind a cut none.
    """
    return total_bytes is not None and header.type in _REGULAR and offset + header.size > total_bytes


def _lost_at(start: int, header: tarfile.TarInfo | None) -> Damage:
    if header is None:
        return Damage("damaged_shard", start, f"damaged from byte {start} to its end")
    return Damage("truncated_shard", start, f"ends inside member {header.name!r}, whose header is at byte {start}")


def _parse_pax(payload: bytes) -> dict[str, str]:
    """`<length> <key>=<value>\\n` records; a malformed rest is left out."""
    records: dict[str, str] = {}
    while payload:
        length, _, _ = payload.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(payload):
            break
        record = payload[len(length) + 1 : int(length) - 1]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        payload = payload[int(length) :]
    return records
