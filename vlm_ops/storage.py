"""Files anywhere, through fsspec: one set of storage options for images, parts and indexes."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

StorageOptions = Mapping[str, Any]

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_PRECONDITION_FAILED = 412

_unfinished: set[str] = set()  # files that `replacing` is writing in this process


def scheme_of(uri: str) -> str:
    """The scheme of a URI; `file` for a plain path."""
    scheme, separator, _ = uri.partition("://")
    return scheme if separator else "file"


def filesystem(uri: str, storage_options: StorageOptions | None = None) -> fsspec.AbstractFileSystem:
    """The filesystem behind a URI. Options are for remote schemes; local paths take none.

    Raises:
        ValueError: The scheme is unknown, or the package that reads it is not installed.
    """
    scheme = scheme_of(uri)
    options = {} if scheme in ("file", "memory") else dict(storage_options or {})
    try:
        return fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot open {uri!r}: {error}") from error


def normalise(uri: str) -> str:
    """A local path as an absolute path without a scheme; any other URI without its last slash.

    A file has one name, wherever it was named from: image ids are hashes of it.
    """
    if scheme_of(uri) == "file":
        return os.path.normpath(LocalFileSystem._strip_protocol(os.path.expanduser(uri)))
    return uri.rstrip("/")


def uri_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The URI, in the form `normalise` gives, of a path that the filesystem listed."""
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def is_local(uri: str) -> bool:
    return scheme_of(uri) == "file"


def open_for_reading(uri: str, storage_options: StorageOptions | None = None) -> Any:
    """A binary file object, read ahead in large blocks (shards are read front to back)."""
    fs = filesystem(uri, storage_options)
    if is_local(uri):
        return open(normalise(uri), "rb")
    return fs.open(uri, "rb", block_size=8 << 20, cache_type="readahead")


def read_bytes(uri: str, storage_options: StorageOptions | None = None) -> bytes:
    return filesystem(uri, storage_options).cat_file(uri)


def write_bytes(uri: str, data: bytes, storage_options: StorageOptions | None = None) -> None:
    """Writes a whole file at once: readers see the old content or the new."""
    with replacing(uri, storage_options) as path, open(path, "wb") as file:
        file.write(data)


def exists(uri: str, storage_options: StorageOptions | None = None) -> bool:
    return filesystem(uri, storage_options).exists(uri)


def check_writable(uri: str, storage_options: StorageOptions | None = None) -> None:
    """Finds out before any work whether a catalog, or a model directory, can be here.

    Raises:
        ValueError: The scheme cannot hold a catalog, or the local path is no directory that can be written.
    """
    delta_options(uri, storage_options)
    if not is_local(uri):
        return
    path = normalise(uri)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise ValueError(f"{uri!r} cannot be made: {path} is not a directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{uri!r} cannot be written: no permission, or a read-only filesystem, at {path}")


@contextlib.contextmanager
def replacing(uri: str, storage_options: StorageOptions | None = None, only_if_absent: bool = False) -> Iterator[str]:
    """Yields a local path to write; on success its content appears at `uri` in one step.

    Locally that step is a rename inside the same directory, on object storage one upload (which
    becomes visible when it is complete). On an error nothing appears and nothing stays behind.

    Args:
        only_if_absent: Of several that write the same file the first one stays: where `uri` is there
            already, the new content is dropped.
    """
    if is_local(uri):
        target = normalise(uri)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        path = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.{uuid.uuid4().hex[:8]}.tmp")
    else:
        handle, path = tempfile.mkstemp(prefix="beamsight-")
        os.close(handle)
    _unfinished.add(path)
    try:
        yield path
        if not is_local(uri):
            _upload(path, uri, storage_options, only_if_absent)
        elif only_if_absent:
            _link(path, target)
        else:
            os.replace(path, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        _unfinished.discard(path)


def _link(path: str, target: str) -> None:
    """Gives a finished file its name, unless another one has it: a rename would not ask."""
    try:
        os.link(path, target)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if not os.path.lexists(target):  # the best there is on such a filesystem
            os.replace(path, target)


def _upload(path: str, uri: str, storage_options: StorageOptions | None, only_if_absent: bool) -> None:
    fs = filesystem(uri, storage_options)
    if not only_if_absent:
        fs.put_file(path, uri)
        return
    try:
        fs.put_file(path, uri, mode="create")  # If-None-Match on S3, ifGenerationMatch on GCS
    except Exception as error:
        if not _says_that_it_is_there(error):
            raise


def _says_that_it_is_there(error: BaseException) -> bool:
    """Whether a conditional upload failed for its condition: HTTP 412, in the words of each library."""
    response = getattr(error.__cause__, "response", None)  # botocore's, where s3fs knows no word for it
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return isinstance(error, FileExistsError) or status == _PRECONDITION_FAILED


def remove(uri: str, storage_options: StorageOptions | None = None) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        filesystem(uri, storage_options).rm_file(uri)


def remove_all(uris: Sequence[str], storage_options: StorageOptions | None = None) -> None:
    """Removes files of one filesystem, and the local directories that are empty then."""
    if not uris:
        return
    fs = filesystem(uris[0], storage_options)
    if not is_local(uris[0]):
        fs.rm(list(uris))
        return
    for uri in uris:
        remove(uri)
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(os.path.dirname(normalise(uri)))


def discard_unfinished() -> None:
    """Removes what this process was writing, when it has to end at once (Ctrl-C)."""
    for path in list(_unfinished):
        with contextlib.suppress(OSError):
            os.unlink(path)


def version_of(info: Mapping[str, Any]) -> str:
    """A string that changes when a file does, from its listing entry: etag, else size and mtime."""
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    if etag:
        return str(etag).strip('"')
    changed = info.get("mtime") or info.get("LastModified") or info.get("created") or ""
    return f"{info.get('size', 0)}-{changed}"


def delta_options(uri: str, storage_options: StorageOptions | None) -> dict[str, str]:
    """The same credentials in the words of Delta's object store (and its defaults, which also
    read the usual environment variables).

    Raises:
        ValueError: The scheme cannot hold a Delta table.
    """
    scheme = scheme_of(uri)
    options = dict(storage_options or {})
    if scheme == "file":
        return {}
    if scheme in ("s3", "s3a"):
        client = dict(options.get("client_kwargs") or {})
        endpoint = options.get("endpoint_url") or client.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL")
        named = {
            "AWS_ACCESS_KEY_ID": options.get("key"),
            "AWS_SECRET_ACCESS_KEY": options.get("secret"),
            "AWS_SESSION_TOKEN": options.get("token"),
            "AWS_REGION": client.get("region_name")
            or os.environ.get("AWS_REGION")
            or os.environ.get("AWS_DEFAULT_REGION"),
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true" if str(endpoint or "").startswith("http://") else None,
            # Commits by "create if absent", so that of two writers one wins.
            "aws_conditional_put": "etag",
        }
        return {key: str(value) for key, value in named.items() if value}
    if scheme in ("gs", "gcs"):
        token = options.get("token")
        return {"GOOGLE_SERVICE_ACCOUNT": token} if isinstance(token, str) and token.endswith(".json") else {}
    raise ValueError(f"a catalog cannot live on {scheme}://; use a local directory, s3:// or gs:// (got {uri!r})")
