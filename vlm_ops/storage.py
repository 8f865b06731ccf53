"""Files anywhere, through fsspec: one set of storage options for images, parts and indexes.

What fails for a moment is tried again, with growing pauses, for about half a minute; then it is an
error. s3fs, gcsfs and Delta do so themselves for most requests, once they are told to; `persistent`
is for what is left: whole uploads and reads, and answers of Delta's that end in the middle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem

StorageOptions = Mapping[str, Any]
_Item = TypeVar("_Item")
_Read = TypeVar("_Read")

_S3, _GCS = ("s3", "s3a"), ("gs", "gcs")
_TIMEOUT_SEC = 15  # without any byte
_ATTEMPTS = 10  # of s3fs, with pauses of 0.1, 0.17, ... 7 seconds, 29 in all
_PERSISTENCE_SEC = 30
_DELTA_PATIENCE = {
    "max_retries": "100", "retry_timeout": f"{_PERSISTENCE_SEC}s", "backoff_config.base": "4", "backoff_config.max_backoff": "5s",
}  # fmt: skip
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_PASSING_CODES = (
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "NoSuchUpload", "OperationAborted",
    "RequestTimeout", "ServiceUnavailable", "SlowDown",
)  # fmt: skip

# Lost connections and time-outs, by name: their libraries need not be loaded.
_PASSING_TYPES = {
    "aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "botocore.ConnectionError", "botocore.HTTPClientError",
    "botocore.ReadTimeoutError", "botocore.IncompleteReadError", "botocore.ResponseStreamingError",
    "requests.ConnectionError", "requests.Timeout", "fsspec.FSTimeoutError", "gcsfs.ChecksumError",
}  # fmt: skip
_FRESH = {"use_listings_cache": False}  # other processes write too
_HTTP_STATUS = re.compile(r"([45][0-9]{2}) ")
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
        if scheme in _S3:
            return _s3_filesystem(options)
        if scheme in _GCS:
            return _gcs_filesystem(options)
        return fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError, TypeError) as error:  # an unknown scheme, or options that are none
        raise ValueError(f"cannot open {uri!r}: {error}") from error


def _s3_filesystem(options: dict[str, Any]) -> fsspec.AbstractFileSystem:
    import s3fs

    # Attempts are counted in one place: botocore's own would multiply those of s3fs, and know less.
    patience = {"connect_timeout": 10, "read_timeout": _TIMEOUT_SEC, "retries": {"total_max_attempts": 1}}
    options["config_kwargs"] = {**patience, **(options.get("config_kwargs") or {})}
    s3fs.core.set_custom_error_handler(may_pass)
    fs = s3fs.S3FileSystem(**{**_FRESH, **options})
    fs.retries = _ATTEMPTS
    return fs


def _gcs_filesystem(options: dict[str, Any]) -> fsspec.AbstractFileSystem:
    import aiohttp
    import gcsfs

    # By default a request has five minutes in all, too little for large parts and too much for a dead
    # server; and only a time-out of the socket is one that gcsfs tries again.
    timeout = options.get("requests_timeout") or _TIMEOUT_SEC
    if isinstance(timeout, (int, float)):
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=timeout)
    # Asking an emulator for the kind of a bucket, by gRPC, would take a minute.
    kind = gcsfs.core.GCSFileSystem if _gcs_endpoint(options) else gcsfs.GCSFileSystem
    return kind(**{**_FRESH, **options, "requests_timeout": timeout})


def may_pass(error: BaseException) -> bool:
    """Whether an error of storage may be gone in a moment: an overloaded server, a time-out, a lost connection.

    What is forbidden, missing or wrong stays so.
    """
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _PASSING_STATUS or response.get("Error", {}).get("Code") in _PASSING_CODES
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if getattr(error, "code", None) in (*_PASSING_STATUS, *map(str, _PASSING_STATUS)):  # gcsfs
        return True
    if (
        f"{type(error).__module__}.{type(error).__name__}" == "_internal.DeltaError"
    ):  # a commit whose answer was cut off
        return "HTTP error" in str(error)
    if isinstance(error, OSError) and error.errno is None and "↳" in str(error):  # Delta
        status = _HTTP_STATUS.match(_reason(error))
        return "HTTP error" in str(error) if status is None else int(status[1]) in _PASSING_STATUS
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return not names.isdisjoint(_PASSING_TYPES)


persistent = tenacity.retry(
    retry=tenacity.retry_if_exception(may_pass),
    wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
    stop=tenacity.stop_after_delay(_PERSISTENCE_SEC),
    reraise=True,
)
"""Decorates a function that may be called again where storage failed for a moment."""


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


@persistent
def read_bytes(
    uri: str, storage_options: StorageOptions | None = None, start: int | None = None, end: int | None = None
) -> bytes:
    """A file, or its bytes from `start` to before `end`."""
    return filesystem(uri, storage_options).cat_file(uri, start=start, end=end)


def write_bytes(uri: str, data: bytes, storage_options: StorageOptions | None = None) -> None:
    """Writes a whole file at once: readers see the old content or the new."""
    with replacing(uri, storage_options) as path, open(path, "wb") as file:
        file.write(data)


def read_ahead(read: Callable[[_Item], _Read], items: Iterable[_Item], num_ahead: int) -> Iterator[tuple[_Item, _Read]]:
    """(item, what reading it gives) of each, in order. So many are read at a time, and wait: object storage is slow to answer,
    and not slower to answer many."""
    pending: deque[tuple[_Item, Future[_Read]]] = deque()
    with ThreadPoolExecutor(num_ahead, "read") as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(read, item)))
                if len(pending) > num_ahead:
                    first, future = pending.popleft()
                    yield first, future.result()
            for first, future in pending:
                yield first, future.result()
        finally:  # also where somebody has read enough
            pool.shutdown(wait=False, cancel_futures=True)


def names_in(uri: str, storage_options: StorageOptions | None = None) -> set[str]:
    """Names of what a folder holds now, whatever was listed before.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    fs = filesystem(uri, storage_options)
    fs.invalidate_cache()
    return {str(path).rstrip("/").rsplit("/", 1)[-1] for path in fs.ls(uri, detail=False)}


def exists(uri: str, storage_options: StorageOptions | None = None) -> bool:
    return filesystem(uri, storage_options).exists(uri)


def check_writable(uri: str, storage_options: StorageOptions | None = None) -> None:
    """Finds out before any work whether a catalog, or a model directory, can be here.

    Raises:
        ValueError: The scheme cannot hold a catalog, the bucket is not there or forbidden, or the local
            path is no directory that can be written.
        OSError: The storage does not answer.
    """
    delta_options(uri, storage_options)
    if odd := next((character for character in "#?%" if character in uri), None):
        raise ValueError(f"{uri!r} cannot hold a catalog: Delta tables cannot have {odd!r} in their path; name another")
    if not is_local(uri):
        _check_bucket(uri, storage_options)
        return
    path = normalise(uri)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise ValueError(f"{uri!r} cannot be made: {path} is not a directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{uri!r} cannot be written: no permission, or a read-only filesystem, at {path}")


def _check_bucket(uri: str, storage_options: StorageOptions | None) -> None:
    fs = filesystem(uri, storage_options)
    bucket = "/".join(uri.split("/")[:3])
    for place in (uri, bucket):  # no catalog yet, or no bucket?
        try:
            fs.ls(place, detail=False)
            return
        except FileNotFoundError:
            continue
        except Exception as error:
            if place == bucket and not may_pass(error):
                return  # who may list a folder need not be allowed to list the bucket
            raise unreachable(uri, error) from error
    raise ValueError(f"{uri!r} cannot be made: there is no bucket {bucket}; make it, or name another")


@contextlib.contextmanager
def named(uri: str) -> Iterator[None]:
    """What storage refuses inside the block is told with the place: libraries say "Forbidden", and no more.

    Raises:
        ValueError: It may not be read.
    """
    try:
        yield
    except PermissionError as error:
        raise unreachable(uri, error) from error


def unreachable(uri: str, error: Exception) -> Exception:
    """What to raise where storage, or Delta on it, does not let one in: one line that says where, why,
    and what to do."""
    if may_pass(error):
        return OSError(f"cannot reach {uri}: {_reason(error)}")
    return ValueError(
        f"{uri!r} cannot be reached: {_reason(error)}; check its name, and the credentials and the endpoint "
        "in --storage_options or in the environment"
    )


def _reason(error: BaseException) -> str:
    """Why storage failed, in one line. Delta tells a chain of causes, with arrows and in colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(getattr(error, "strerror", None) or error))
    causes = [cause.strip() for cause in text.split("↳") if cause.strip()] or [type(error).__name__]
    told = next((cause for cause in causes if _HTTP_STATUS.match(cause)), causes[-1])
    return told.splitlines()[0].rstrip(".")


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
    # If-None-Match on S3, ifGenerationMatch on GCS.
    mode = {"mode": "create"} if only_if_absent else {}
    try:
        persistent(fs.put_file)(path, uri, **mode)
    except Exception as error:
        if only_if_absent and _says_that_it_is_there(error):
            return
        # FileNotFoundError and PermissionError stay what they are.
        kind = type(error) if type(error) in (FileNotFoundError, PermissionError) else OSError
        raise kind(f"cannot write {uri}: {_reason(error)}") from error


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
    """The same credentials, endpoint and time-out in the words of Delta's object store; what is not
    given it finds by itself in the usual environment variables and files.

    Raises:
        ValueError: The scheme cannot hold a Delta table.
    """
    scheme = scheme_of(uri)
    if scheme == "file":
        return {}
    options = {**fsspec.config.conf.get(scheme, {}), **(storage_options or {})}
    if scheme in _S3:
        return _DELTA_PATIENCE | _delta_options_of_s3(options)
    if scheme in _GCS:
        return _DELTA_PATIENCE | _delta_options_of_gcs(options)
    raise ValueError(f"a catalog cannot live on {scheme}://; use a local directory, s3:// or gs:// (got {uri!r})")


def _delta_options_of_s3(options: Mapping[str, Any]) -> dict[str, str]:
    options = {**_keys_of_profile(options.get("profile")), **options}
    client = dict(options.get("client_kwargs") or {})
    environment = os.environ
    endpoint = (
        options.get("endpoint_url")
        or client.get("endpoint_url")
        or environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
    )
    named = {
        "AWS_ACCESS_KEY_ID": options.get("key"),
        "AWS_SECRET_ACCESS_KEY": options.get("secret"),
        "AWS_SESSION_TOKEN": options.get("token"),
        "AWS_SKIP_SIGNATURE": "true" if options.get("anon") else None,
        # With another endpoint Delta would not look into the files, and go in as nobody.
        "AWS_FORCE_CREDENTIAL_LOAD": "true" if not options.get("key") and not options.get("anon") else None,
        "AWS_REGION": client.get("region_name")
        or environment.get("AWS_REGION")
        or environment.get("AWS_DEFAULT_REGION"),
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true" if str(endpoint or "").startswith("http://") else None,
        # Commits by "create if absent", so that of two writers one wins.
        "aws_conditional_put": "etag",
    }
    timeout = _delta_timeout((options.get("config_kwargs") or {}).get("read_timeout"))
    return {key: str(value) for key, value in named.items() if value} | timeout


def _keys_of_profile(profile: str | None) -> dict[str, str]:
    """The credentials of a profile in ~/.aws, of which Delta knows nothing."""
    if not profile:
        return {}
    import botocore.session

    credentials = botocore.session.Session(profile=profile).get_credentials()
    if credentials is None:
        return {}
    frozen = credentials.get_frozen_credentials()
    return {"key": frozen.access_key, "secret": frozen.secret_key, **({"token": frozen.token} if frozen.token else {})}


def _delta_options_of_gcs(options: Mapping[str, Any]) -> dict[str, str]:
    """Another endpoint, or no account at all, Delta takes only from what looks like a service account's key."""
    token, endpoint = options.get("token"), _gcs_endpoint(options)
    timeout = _delta_timeout(options.get("requests_timeout"))
    key_file = os.path.expanduser(token) if isinstance(token, str) and token.endswith(".json") else None
    if not endpoint and key_file:
        return {"GOOGLE_APPLICATION_CREDENTIALS": key_file, **timeout}
    if not endpoint and token != "anon" and not isinstance(token, Mapping):
        return timeout
    if key_file:
        with open(key_file, encoding="utf-8") as file:
            token = json.load(file)
    nobody = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
    key = {**(token if isinstance(token, Mapping) else nobody), **({"gcs_base_url": endpoint} if endpoint else {})}
    return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key), **timeout}


def _delta_timeout(seconds: object) -> dict[str, str]:
    return {"timeout": f"{round(1000 * seconds)}ms"} if isinstance(seconds, (int, float)) else {}


def _gcs_endpoint(options: Mapping[str, Any]) -> str | None:
    """Where Google Cloud Storage is, if elsewhere (an emulator): as gcsfs finds it."""
    endpoint = options.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST") or "default"
    if endpoint == "default":
        return None
    return str(endpoint if "://" in endpoint else f"http://{endpoint}").rstrip("/")
