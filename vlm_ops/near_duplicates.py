"""Which images nearly equal one that was tagged otherwise: one of the two tags is wrong.

Pictures are compared by their perceptual hash. Hashes of 64 bits that differ in at most 3 agree in one of 4 parts of
16 bits, which is how they are found without comparing each with each (Norouzi, Punjani, Fleet, "Fast Search in
Hamming Space with Multi-Index Hashing", 2012; the index is FAISS's).
"""

from __future__ import annotations

from collections.abc import Sequence

import faiss
import numpy as np

MAX_DISTANCE = 3
_HASH_BYTES = 8
# A plain picture has next to no structure, and its hash next to no bits: it resembles every other one.
_MIN_BITS = 8


def hash_bytes(hashes: Sequence[str | None]) -> np.ndarray:
    """Hex digits -> uint8[n, 8]; zeros where there is no hash."""
    empty = "0" * (2 * _HASH_BYTES)
    return np.frombuffer(bytes.fromhex("".join(text or empty for text in hashes)), np.uint8).reshape(-1, _HASH_BYTES)


def contradicted(hashes: np.ndarray, tags: np.ndarray, max_distance: int = MAX_DISTANCE) -> np.ndarray:
    """For each image the position of a near duplicate with other tags, or -1.

    Args:
        hashes: uint8[n, 8], as `hash_bytes` makes them.
        tags: int64[n], equal where tags are.

    Returns:
        int64[n]; of several the one with the lowest position.
    """
    found = np.full(len(hashes), -1, np.int64)
    bits = np.unpackbits(hashes, axis=1).sum(axis=1)
    telling = np.flatnonzero((bits >= _MIN_BITS) & (bits <= 8 * _HASH_BYTES - _MIN_BITS))
    if not len(telling):
        return found
    # Equal hash and tags are one case: a catalog may hold a picture a thousand times.
    keys = np.concatenate([hashes[telling], tags[telling, None].view(np.uint8)], axis=1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    cases = telling[first]
    index = faiss.IndexBinaryMultiHash(8 * _HASH_BYTES, 4, 16)
    index.add(np.ascontiguousarray(hashes[cases]))
    limits, _, near = index.range_search(np.ascontiguousarray(hashes[cases]), max_distance + 1)
    of_case = np.repeat(np.arange(len(cases)), np.diff(limits).astype(np.int64))
    differs = tags[cases[of_case]] != tags[cases[near]]
    answer = np.full(len(cases), np.iinfo(np.int64).max)
    np.minimum.at(answer, of_case[differs], cases[near[differs]])
    answer[answer == np.iinfo(np.int64).max] = -1
    found[telling] = answer[inverse.reshape(-1)]
    return found
