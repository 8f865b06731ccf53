"""Storage servers that tests start on 127.0.0.1."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass(frozen=True)
class Store:
    """A place for data and catalogs.

    Attributes:
        uri: Folder or bucket.
        options: Storage options that open it.
    """

    uri: str
    options: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def moto_store(bucket: str) -> Iterator[Store]:
    """An S3 server in this process, and a bucket on it."""
    import s3fs

    server_of = pytest.importorskip("moto.server", reason="needs moto[server]")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_of.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    store = Store(f"s3://{bucket}", {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"})
    try:
        s3fs.S3FileSystem(**store.options).mkdir(bucket)
        yield store
    finally:
        server.stop()
