"""What a run has to do, as a file in the catalog of which each worker reads a stretch.

A pipeline that held the references themselves would grow with the corpus, and its description is pickled by the
launcher, staged, and sent to every worker. So it holds places in this file: JSON Lines, compressed stretch by stretch
(which is what gzip calls members: the file as a whole is a .gz like any other).
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from vlm_ops import storage

Stretch = tuple[int, int]  # its first byte, and the one behind its last
_STRETCH_BYTES = 1 << 20  # before compression: some 5,000 shards, or 8 packs of a thousand files


class Work(Protocol):
    """Whatever can be told in a line of JSON."""

    def to_json(self) -> str: ...


@dataclass(frozen=True)
class WorkList:
    """Where the work is; small, and travels pickled."""

    uri: str
    stretches: tuple[Stretch, ...] = ()


def write_work_list(uri: str, work: Iterable[Work], storage_options: storage.StorageOptions) -> WorkList:
    """Writes what there is to do; memory holds a stretch of it."""
    stretches: list[Stretch] = []
    with storage.replacing(uri, storage_options) as path, open(path, "wb") as file:
        for lines in _stretched(each.to_json() for each in work):
            start = file.tell()
            file.write(gzip.compress("".join(f"{line}\n" for line in lines).encode("ascii"), compresslevel=1, mtime=0))
            stretches.append((start, file.tell()))
    return WorkList(uri, tuple(stretches))


def read_stretch(uri: str, stretch: Stretch, storage_options: storage.StorageOptions) -> Iterator[str]:
    """The lines of a stretch."""
    yield from gzip.decompress(storage.read_bytes(uri, storage_options, *stretch)).decode("ascii").splitlines()


def _stretched(lines: Iterable[str]) -> Iterator[list[str]]:
    waiting: list[str] = []
    num_bytes = 0
    for line in lines:
        waiting.append(line)
        num_bytes += len(line)
        if num_bytes >= _STRETCH_BYTES:
            yield waiting
            waiting, num_bytes = [], 0
    if waiting:
        yield waiting
