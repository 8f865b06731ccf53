"""For which cards a compiled library has code, read from the library itself: what its packaging says may be wrong
(https://github.com/faiss-wheels/faiss-wheels/issues/151), and `cuobjdump` is seldom there.

nvcc puts the code of each source file into a "fat binary": a header of 16 bytes (magic, version, its own size, size of
all that follows), and behind it, one after another, the code for each architecture with a header of its own (kind, version,
size of this header, size of the code, ..., architecture at byte 28). NVIDIA does not publish this; it is known from
those who read it (https://github.com/n-eiling/cuda-fatbin-decompression, https://github.com/vosen/ZLUDA), and is checked
here against what torch says of its own library.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQ12xI")
_PTX, _CUBIN = 1, 2

Capability = tuple[int, int]


@dataclass(frozen=True, order=True)
class DeviceCode:
    """Code for cards of a compute capability.

    Attributes:
        is_ptx: Whether it is in a language that the driver translates, or in machine instructions.
        only: Where not empty, the letter of code that later cards cannot run: `a` none of them, `f` none of another
            major capability.
    """

    is_ptx: bool
    capability: Capability
    only: str = ""

    def runs_on(self, card: Capability) -> bool:
        """Machine code runs on cards of the same major and the same or a later minor capability, PTX on all later ones
        (https://docs.nvidia.com/cuda/cuda-programming-guide/01-introduction/cuda-platform.html)."""
        if self.only == "a":
            return card == self.capability
        if self.is_ptx and not self.only:
            return card >= self.capability
        return card[0] == self.capability[0] and card[1] >= self.capability[1]

    def __str__(self) -> str:
        return f"{'compute' if self.is_ptx else 'sm'}_{self.capability[0]}{self.capability[1]}{self.only}"


def parse_code(text: str) -> DeviceCode:
    """`sm_90`, `compute_90`, `sm_100a`: the words of nvcc and torch.

    Raises:
        ValueError: It is none of them.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", text)
    if not match:
        raise ValueError(f"{text!r} is no architecture of CUDA")
    return DeviceCode(match[1] == "compute", _capability(int(match[2])), match[3])


def fat_binaries(path: Path) -> list[frozenset[DeviceCode]]:
    """What each fat binary in a library has code for; empty where it has none.

    Raises:
        ValueError: They are of a form that is not known.
    """
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return [codes for codes in _read(data) if codes]


def lacking(binaries: Sequence[Collection[DeviceCode]], card: Capability) -> int:
    """How many of the fat binaries have no code that runs on a card."""
    return sum(not any(code.runs_on(card) for code in codes) for codes in binaries)


def _read(data: mmap.mmap) -> Iterator[frozenset[DeviceCode]]:
    position = data.find(_MAGIC)
    while position >= 0:
        end = position + len(_MAGIC)
        if position + _HEADER.size <= len(data):
            _, version, header_bytes, num_bytes = _HEADER.unpack_from(data, position)
            # The same four bytes may stand anywhere by chance, or as a number in a program that looks for them.
            if version == 1 and header_bytes == _HEADER.size:
                end = position + header_bytes + num_bytes
                yield _codes(data, position + header_bytes, end)
        position = data.find(_MAGIC, end)


def _codes(data: mmap.mmap, position: int, end: int) -> frozenset[DeviceCode]:
    found = set()
    while position < end:
        if end > len(data) or position + _ENTRY.size > end:
            raise ValueError(f"a fat binary at byte {position} is cut short, or of a form that is not known")
        kind, _, header_bytes, num_bytes, architecture = _ENTRY.unpack_from(data, position)
        if header_bytes < _ENTRY.size or not 10 <= architecture < 10_000:
            raise ValueError(f"a fat binary at byte {position} is of a form that is not known")
        if kind in (_PTX, _CUBIN):
            found.add(DeviceCode(kind == _PTX, _capability(architecture)))
        position += header_bytes + num_bytes
    return frozenset(found)


def _capability(architecture: int) -> Capability:
    """90 -> (9, 0); 103 -> (10, 3)."""
    major, minor = divmod(architecture, 10)
    return major, minor
