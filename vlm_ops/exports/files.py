"""How exported files are written: whole or not at all, anywhere fsspec can write."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, TextIO, cast

from vlm_ops import storage

_UPLOADS = 16  # at once: each waits for its answer
_Write = Callable[[str, str], None]


@contextlib.contextmanager
def text_file(uri: str, storage_options: storage.StorageOptions) -> Iterator[TextIO]:
    """A file that is there when the block has ended well. Line ends are written as they are."""
    with storage.replacing(uri, storage_options) as path, open(path, "w", encoding="utf-8", newline="") as file:
        yield file


@contextlib.contextmanager
def gzip_file(uri: str, storage_options: storage.StorageOptions) -> Iterator[BinaryIO]:
    """The same, compressed; equal content makes equal bytes."""
    with (
        storage.replacing(uri, storage_options) as path,
        open(path, "wb") as raw,
        gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file,
    ):
        yield cast(BinaryIO, file)


@contextlib.contextmanager
def folder(uri: str, storage_options: storage.StorageOptions) -> Iterator[_Write]:
    """Yields what writes one of many small files, by its path and its text; all are there when the block has ended."""
    if storage.is_local(uri):
        yield lambda path, text: storage.write_bytes(f"{uri}/{path}", text.encode())
        return
    waiting: list[Future[None]] = []

    def upload(path: str, text: str) -> None:
        if len(waiting) >= 4 * _UPLOADS:
            waiting.pop(0).result()
        waiting.append(pool.submit(storage.write_bytes, f"{uri}/{path}", text.encode(), storage_options))

    with ThreadPoolExecutor(_UPLOADS) as pool:
        yield upload
        for each in waiting:
            each.result()
