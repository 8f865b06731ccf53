"""Files appear whole or not at all, names are canonical, and Delta is told the same credentials."""

from __future__ import annotations

import errno
import json
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import botocore.exceptions
import fsspec
import gcsfs.retry
import pytest
from deltalake.exceptions import DeltaError
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from tests.servers import Store, gcs_store, minio_store, moto_store
from vlm_ops import storage


@pytest.fixture
def memory() -> Iterator[str]:
    """A URI below which nothing is yet."""
    yield "memory://storage-test"
    fs = fsspec.filesystem("memory")
    if fs.exists("/storage-test"):
        fs.rm("/storage-test", recursive=True)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a/b", "/a/b"),
        ("/a/b/", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("/a/./c/../b", "/a/b"),
        ("a/b", "{cwd}/a/b"),
        ("./a", "{cwd}/a"),
        ("../a", "{parent}/a"),
        (".", "{cwd}"),
        ("~/a", "{home}/a"),
        ("/", "/"),
        ("/a b/ü.jpg", "/a b/ü.jpg"),
        ("s3://bucket/a/", "s3://bucket/a"),
        ("s3://bucket/a/../b", "s3://bucket/a/../b"),
        ("memory://a", "memory://a"),
    ],
)
def test_a_file_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, expected: str) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("HOME", "/home/somebody")
    expected = expected.format(cwd=tmp_path / "home", parent=tmp_path, home="/home/somebody")
    assert storage.normalise(uri) == expected
    assert storage.normalise(expected) == expected


def test_listed_names_are_canonical(tmp_path: Path, memory: str) -> None:
    (tmp_path / "a").write_bytes(b"x")
    local = LocalFileSystem()
    assert [storage.uri_of(local, name) for name in local.find(str(tmp_path))] == [str(tmp_path / "a")]
    storage.write_bytes(f"{memory}/a", b"x")
    fs = fsspec.filesystem("memory")
    (uri,) = (storage.uri_of(fs, name) for name in fs.find(memory))
    assert storage.scheme_of(uri) == "memory" and storage.read_bytes(uri) == b"x"


def test_schemes() -> None:
    assert [storage.scheme_of(uri) for uri in ("/a", "a", "file:///a", "s3://b/a")] == ["file", "file", "file", "s3"]
    assert storage.is_local("a") and storage.is_local("file:///a") and not storage.is_local("s3://a")
    with pytest.raises(ValueError, match="cannot open 'nope://a': Protocol not known: nope"):
        storage.filesystem("nope://a")


def test_options_are_for_remote_filesystems(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert storage.read_bytes(str(tmp_path / "a"), {"key": "k", "secret": "s"}) == b"x"


# --- writing -------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"{memory}/out"


def leftovers() -> set[str]:
    return set(storage._unfinished)


def test_writing_whole_files(place: str) -> None:
    uri = f"{place}/deep/a.bin"
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"old")
    storage.write_bytes(uri, b"new content")
    assert storage.read_bytes(uri) == b"new content"
    with storage.open_for_reading(uri) as file:
        assert file.read(3) == b"new" and file.read() == b" content"
    assert len(storage.filesystem(uri).find(place)) == 1 and not leftovers()


def test_an_error_while_writing_leaves_nothing_behind(place: str) -> None:
    uri = f"{place}/a.bin"
    storage.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError, match="half way"), storage.replacing(uri) as path:
        Path(path).write_bytes(b"half of the ne")
        raise RuntimeError("half way")
    assert storage.read_bytes(uri) == b"old"
    assert len(storage.filesystem(uri).find(place)) == 1
    assert not os.path.exists(path) and not leftovers()


def test_an_error_while_publishing_leaves_nothing_behind(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    storage.write_bytes(f"{memory}/a", b"old")
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(MemoryFileSystem, "put_file", full)
    monkeypatch.setattr(os, "replace", full)
    for uri in (f"{memory}/a", str(tmp_path / "a")):
        with pytest.raises(OSError, match="No space left"), storage.replacing(uri) as path:
            Path(path).write_bytes(b"new")
        assert storage.read_bytes(uri) == b"old"
        assert not os.path.exists(path) and not leftovers()
    assert os.listdir(tmp_path) == ["a"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(place: str) -> None:
    uri = f"{place}/a.bin"
    storage.write_bytes(uri, b"old")
    with storage.replacing(uri) as path:
        Path(path).write_bytes(b"new")
        assert storage.read_bytes(uri) == b"old"
    assert storage.read_bytes(uri) == b"new"


def test_unfinished_files_are_hidden_and_can_be_discarded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a.bin"), storage.replacing(str(tmp_path / "a.bin")) as path:
        Path(path).write_bytes(b"half")
        assert os.path.dirname(path) == str(tmp_path) and os.path.basename(path).startswith(".")
        storage.discard_unfinished()
        assert os.listdir(tmp_path) == []
    assert os.listdir(tmp_path) == [] and not leftovers()


# --- the first one stays ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[Store]:
    with moto_store("first") as store:
        yield store


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with minio_store("first", tmp_path_factory.mktemp("minio")) as store:
        yield store


@pytest.fixture(scope="module")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with gcs_store("first", tmp_path_factory.mktemp("gcs")) as store:
        yield store


SERVERS = ["s3", pytest.param("minio", marks=pytest.mark.minio), pytest.param("gcs", marks=pytest.mark.gcs)]


@pytest.fixture(params=["local", "memory", *SERVERS])
def shared_place(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> Store:
    """A place that several processes may write to."""
    if request.param in ("s3", "minio", "gcs"):
        return request.getfixturevalue(request.param)
    return Store(str(tmp_path / "out") if request.param == "local" else f"{memory}/out", {})


def test_the_first_one_stays(shared_place: Store) -> None:
    uri, options = f"{shared_place.uri}/deep/{uuid.uuid4()}", shared_place.options
    with storage.replacing(uri, options, only_if_absent=True) as late:
        Path(late).write_bytes(b"late")
        with storage.replacing(uri, options, only_if_absent=True) as first:
            Path(first).write_bytes(b"first")
        assert storage.read_bytes(uri, options) == b"first"
    assert storage.read_bytes(uri, options) == b"first"
    with storage.replacing(uri, options) as path:
        Path(path).write_bytes(b"whoever comes")
    assert storage.read_bytes(uri, options) == b"whoever comes"
    fs = storage.filesystem(uri, options)
    assert [name for name in fs.find(shared_place.uri) if uri.rsplit("/")[-1] in name] == [fs._strip_protocol(uri)]
    assert not os.path.exists(late) and not os.path.exists(first) and not leftovers()


@pytest.mark.parametrize("shared_place", ["local", *SERVERS], indirect=True)
def test_of_many_at_once_one_stays_whole(shared_place: Store) -> None:
    uri, options = f"{shared_place.uri}/{uuid.uuid4()}", shared_place.options
    together = threading.Barrier(6)

    def write(number: int) -> bytes:
        with storage.replacing(uri, options, only_if_absent=True) as path:
            Path(path).write_bytes(bytes([number]) * 100_000)
            together.wait()
        return storage.read_bytes(uri, options)

    with ThreadPoolExecutor(6) as pool:
        seen = set(pool.map(write, range(6)))
    assert len(seen) == 1 and len(seen.pop()) == 100_000 and not leftovers()


def test_the_first_one_stays_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for content in (b"first", b"late"):
        with storage.replacing(str(tmp_path / "a"), only_if_absent=True) as path:
            Path(path).write_bytes(content)
    assert (tmp_path / "a").read_bytes() == b"first" and os.listdir(tmp_path) == ["a"]


def test_other_errors_are_not_taken_for_a_first_one(tmp_path: Path, s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with (
        pytest.raises(OSError, match="No space left"),
        storage.replacing(str(tmp_path / "a"), only_if_absent=True) as path,
    ):
        Path(path).write_bytes(b"new")
    assert os.listdir(tmp_path) == [] and not leftovers()
    with (
        pytest.raises(FileNotFoundError, match="bucket does not exist"),
        storage.replacing("s3://no-such-bucket/a", s3.options, only_if_absent=True) as path,
    ):
        Path(path).write_bytes(b"new")
    assert not os.path.exists(path) and not leftovers()


# --- versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ({"ETag": '"abc"', "size": 3}, "abc"),
        ({"etag": "abc", "mtime": 1.0}, "abc"),
        ({"md5Hash": "q1w2==", "size": 3}, "q1w2=="),
        ({"size": 3, "mtime": 1.5}, "3-1.5"),
        ({"size": 3, "LastModified": "2026-01-01"}, "3-2026-01-01"),
        ({}, "0-"),
    ],
)
def test_versions(info: dict, version: str) -> None:
    assert storage.version_of(info) == version


def test_versions_of_files_change_with_them(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    os.utime(path, (1, 1))
    info = LocalFileSystem().info(str(path))
    assert storage.version_of(info) == storage.version_of(LocalFileSystem().info(str(path)))
    os.utime(path, (2, 2))
    assert storage.version_of(LocalFileSystem().info(str(path))) != storage.version_of(info)


# --- Delta's options -----------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One that says nothing of storage."""
    names = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "STORAGE_EMULATOR_HOST")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fsspec.config, "conf", {})
    return monkeypatch


def told(uri: str, options: dict | None) -> dict[str, str]:
    """What Delta is told, besides how patient to be."""
    everything = storage.delta_options(uri, options)
    assert everything["retry_timeout"] == "30s"
    return {name: value for name, value in everything.items() if name not in storage._DELTA_PATIENCE}


def test_delta_gets_the_credentials_of_s3(environment: pytest.MonkeyPatch) -> None:
    options = {"key": "k", "secret": "s", "token": "t", "client_kwargs": {"region_name": "eu-west-1"}}
    expected = {
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_SESSION_TOKEN": "t",
        "AWS_REGION": "eu-west-1",
        "aws_conditional_put": "etag",
    }
    assert told("s3://bucket/c", options) == told("s3a://bucket/c", options) == expected
    assert told("s3://bucket/c", None) == {"aws_conditional_put": "etag", "AWS_FORCE_CREDENTIAL_LOAD": "true"}
    assert told("s3://bucket/c", {"anon": True})["AWS_SKIP_SIGNATURE"] == "true"
    environment.setattr(fsspec.config, "conf", {"s3": {"key": "configured"}})
    assert told("s3://bucket/c", None)["AWS_ACCESS_KEY_ID"] == "configured"
    assert told("s3://bucket/c", {"key": "given"})["AWS_ACCESS_KEY_ID"] == "given"


@pytest.mark.parametrize(
    ("options", "variable"),
    [
        ({"endpoint_url": "http://h:9000"}, None),
        ({"client_kwargs": {"endpoint_url": "http://h:9000"}}, None),
        ({}, "AWS_ENDPOINT_URL"),
        ({}, "AWS_ENDPOINT_URL_S3"),
    ],
)
def test_delta_gets_the_endpoint_of_s3(environment: pytest.MonkeyPatch, options: dict, variable: str | None) -> None:
    if variable:
        environment.setenv(variable, "http://h:9000")
        environment.setenv("AWS_DEFAULT_REGION", "here")
    found = told("s3://bucket/c", options)
    assert (found["AWS_ENDPOINT_URL"], found["AWS_ALLOW_HTTP"]) == ("http://h:9000", "true")
    assert found.get("AWS_REGION") == ("here" if variable else None)
    assert "AWS_ALLOW_HTTP" not in told("s3://b/c", {"endpoint_url": "https://h"})


def test_delta_gets_the_account_of_gcs(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    account = {"client_email": "a@b", "private_key": "p", "private_key_id": "i"}
    file = tmp_path / "key.json"
    file.write_text(json.dumps(account))
    assert told("gs://b/c", {"token": str(file)}) == {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}
    assert json.loads(told("gs://b/c", {"token": account})["GOOGLE_SERVICE_ACCOUNT_KEY"]) == account
    assert told("gcs://b/c", {"token": "google_default"}) == told("gcs://b/c", {}) == {}
    nobody = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
    assert json.loads(told("gs://b/c", {"token": "anon"})["GOOGLE_SERVICE_ACCOUNT_KEY"]) == nobody
    elsewhere = told("gs://b/c", {"token": str(file), "endpoint_url": "https://h/"})
    assert json.loads(elsewhere["GOOGLE_SERVICE_ACCOUNT_KEY"]) == {**account, "gcs_base_url": "https://h"}


@pytest.mark.parametrize("host", ["http://h:4443", "h:4443"])
def test_delta_goes_to_the_emulator_that_gcsfs_goes_to(environment: pytest.MonkeyPatch, host: str) -> None:
    environment.setenv("STORAGE_EMULATOR_HOST", host)
    key = json.loads(told("gs://b/c", {})["GOOGLE_SERVICE_ACCOUNT_KEY"])
    assert (key["gcs_base_url"], key["disable_oauth"]) == ("http://h:4443", True)
    assert storage.filesystem("gs://b", {"token": "anon"})._location == "http://h:4443"


def test_delta_waits_as_long_as_the_data(environment: pytest.MonkeyPatch) -> None:
    assert told("s3://b/c", {"config_kwargs": {"read_timeout": 7}})["timeout"] == "7000ms"
    assert told("gs://b/c", {"requests_timeout": 0.5})["timeout"] == "500ms"
    assert "timeout" not in told("s3://b/c", {}) and "timeout" not in told("gs://b/c", {})


def test_delta_elsewhere() -> None:
    assert storage.delta_options("/catalog", {"key": "k"}) == {}
    message = r"a catalog cannot live on memory://; use a local directory, s3:// or gs:// \(got 'memory://c'\)"
    with pytest.raises(ValueError, match=message):
        storage.delta_options("memory://c", {})


# --- what is told to s3fs and gcsfs --------------------------------------------------------------


def test_what_is_given_wins_over_what_is_usual(environment: pytest.MonkeyPatch) -> None:
    usual = storage.filesystem("s3://b", {"key": "k", "secret": "s"})
    assert usual.config_kwargs["read_timeout"] == 15 and usual.config_kwargs["retries"] == {"total_max_attempts": 1}
    given = storage.filesystem("s3://b", {"key": "k", "secret": "s", "config_kwargs": {"read_timeout": 99}})
    assert given.config_kwargs["read_timeout"] == 99 and given.config_kwargs["connect_timeout"] == 10
    timeout = storage.filesystem("gs://b", {"token": "anon"}).requests_timeout
    assert (timeout.total, timeout.sock_connect, timeout.sock_read) == (None, 10, 15)
    assert storage.filesystem("gs://b", {"token": "anon", "requests_timeout": 99}).requests_timeout.sock_read == 99


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (aiohttp.ClientPayloadError("cut"), True),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://h"), True),
        (botocore.exceptions.ClientError({"Error": {"Code": "SlowDown"}}, "PutObject"), True),
        (botocore.exceptions.ClientError({"Error": {}, "ResponseMetadata": {"HTTPStatusCode": 502}}, "Get"), True),
        (botocore.exceptions.ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject"), True),
        (botocore.exceptions.ClientError({"Error": {"Code": "AccessDenied"}}, "PutObject"), False),
        (botocore.exceptions.NoCredentialsError(), False),
        (gcsfs.retry.HttpError({"code": 503}), True),
        (gcsfs.retry.HttpError({"code": 401}), False),
        (OSError("Generic S3 error\n \x1b[31m↳\x1b[0m HTTP error\n \x1b[31m↳\x1b[0m error reading a body"), True),
        (OSError("Generic S3 error\n \x1b[31m↳\x1b[0m Server returned\n \x1b[31m↳\x1b[0m 500 Internal"), True),
        (OSError("Generic S3 error\n \x1b[31m↳\x1b[0m Server returned\n \x1b[31m↳\x1b[0m 403 Forbidden"), False),
        (DeltaError("Error interacting with object store: Generic S3 error: HTTP error: error reading a body"), True),
        (DeltaError("Error interacting with object store: Client error with status 403 Forbidden"), False),
        (FileNotFoundError("gone"), False),
        (PermissionError("Forbidden"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("wrong"), False),
    ],
    ids=str,
)
def test_what_may_pass(error: Exception, expected: bool) -> None:
    assert storage.may_pass(error) == expected


def test_an_upload_that_is_gone_is_made_again() -> None:
    """S3 forgets an upload in parts once it is complete; where that answer is lost, the next says it was never there."""
    gone = FileNotFoundError("The specified upload does not exist.")
    gone.__cause__ = botocore.exceptions.ClientError({"Error": {"Code": "NoSuchUpload"}}, "CompleteMultipartUpload")
    assert storage.may_pass(gone)
    gone.__cause__ = botocore.exceptions.ClientError({"Error": {"Code": "NoSuchBucket"}}, "CompleteMultipartUpload")
    assert not storage.may_pass(gone)
