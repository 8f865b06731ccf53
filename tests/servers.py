"""Storage servers that tests start on 127.0.0.1, and a proxy that makes them fail.

moto_store(bucket)     S3, in this process
minio_store(bucket)    S3, the real server, built from its Go module
gcs_store(bucket)      Google Cloud Storage: fake-gcs-server, built from its Go module
fake_gcs_store(bucket) Google Cloud Storage: tests/buckets.py, in memory; needs nothing
Proxy(host, port)      stands before any of them and injects faults
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit
from xml.sax.saxutils import escape

import pytest


@dataclass(frozen=True)
class Store:
    """A place for data and catalogs.

    Attributes:
        uri: The bucket, or a folder.
        options: Storage options that open it.
    """

    uri: str
    options: dict[str, Any] = field(default_factory=dict)

    def at(self, url: str) -> Store:
        """The same store behind another endpoint."""
        return replace(self, options={**self.options, "endpoint_url": url})

    @property
    def address(self) -> tuple[str, int]:
        url = urlsplit(self.options["endpoint_url"])
        assert url.hostname and url.port
        return url.hostname, url.port


# --- servers -------------------------------------------------------------------------------------


@contextlib.contextmanager
def moto_store(bucket: str) -> Iterator[Store]:
    """An S3 server in a process of its own, and a bucket on it."""
    pytest.importorskip("moto.server", reason="needs moto[server]")
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, f"http://127.0.0.1:{port}/moto-api/", {}):
        yield _with_s3_bucket(bucket, f"http://127.0.0.1:{port}", "key", "secret")


@contextlib.contextmanager
def minio_store(bucket: str, folder: Path) -> Iterator[Store]:
    """A MinIO server that keeps its files in `folder`, and a bucket on it."""
    binary = _go_binary("github.com/minio/minio@latest")
    port = _free_port()
    command = [binary, "server", str(folder), "--address", f"127.0.0.1:{port}"]
    account = {"MINIO_ROOT_USER": "beamsight", "MINIO_ROOT_PASSWORD": "only-for-tests"}
    quiet = {"MINIO_BROWSER": "off", "MINIO_UPDATE": "off", "MINIO_CALLHOME_ENABLE": "off"}
    with _running(command, f"http://127.0.0.1:{port}/minio/health/live", account | quiet):
        yield _with_s3_bucket(bucket, f"http://127.0.0.1:{port}", *account.values())


@contextlib.contextmanager
def gcs_store(bucket: str, folder: Path) -> Iterator[Store]:
    """A Google Cloud Storage server that keeps its files in `folder`, and a bucket on it."""
    binary = _go_binary("github.com/fsouza/fake-gcs-server@latest")
    port = _free_port()
    command = [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-filesystem-root", str(folder)]
    with (
        _running(command, f"http://127.0.0.1:{port}/_internal/healthcheck", {}),
        Proxy(("127.0.0.1", port), "xml") as proxy,
    ):
        store = Store(f"gs://{bucket}", {"token": "anon", "endpoint_url": proxy.url})
        _make_gcs_bucket(bucket, f"http://127.0.0.1:{port}")
        yield store


@contextlib.contextmanager
def fake_gcs_store(bucket: str) -> Iterator[tuple[Store, Proxy]]:
    """A Google Cloud Storage server in memory, a bucket on it, and the proxy that makes it fail."""
    with Proxy(("in memory", 0), "buckets") as proxy:
        _make_gcs_bucket(bucket, proxy.url)
        yield Store(f"gs://{bucket}", {"token": "anon", "endpoint_url": proxy.url}), proxy


def _make_gcs_bucket(bucket: str, url: str) -> None:
    body = json.dumps({"name": bucket}).encode()
    request = urllib.request.Request(f"{url}/storage/v1/b?project=test", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request).close()


def _with_s3_bucket(bucket: str, url: str, key: str, secret: str) -> Store:
    import s3fs

    store = Store(f"s3://{bucket}", {"key": key, "secret": secret, "endpoint_url": url})
    s3fs.S3FileSystem(**store.options).mkdir(bucket)
    return store


def _go_binary(module: str) -> str:
    """A program built from its Go module; built once, and kept in Beamsight's cache."""
    from vlm_ops.models.onnx_engine import cache_dir  # heavy, and the other servers do not need it

    name, _, version = module.partition("@")
    folder = cache_dir() / "servers" / version
    path = folder / name.rpartition("/")[2]
    if path.exists():
        return str(path)
    if not shutil.which("go"):
        pytest.skip(f"needs Go, to build {module}")
    folder.mkdir(parents=True, exist_ok=True)
    built = subprocess.run(
        ["go", "install", module], env={**os.environ, "GOBIN": str(folder)}, cwd=folder, capture_output=True, text=True
    )
    if built.returncode:
        pytest.skip(f"cannot build {module}: {(built.stderr.strip().splitlines() or ['go failed'])[-1]}")
    return str(path)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def _running(command: list[str], health_url: str, environment: Mapping[str, str]) -> Iterator[None]:
    """A program that serves as long as the block lasts."""
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(health_url, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, f"{command[0]} does not answer"
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- a proxy that fails --------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One HTTP request."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Response:
    status: int
    headers: Mapping[str, str]
    body: bytes = b""


Forward = Callable[["Request"], "Response"]

# What can befall a request.
RESET = "reset"  # the connection ends before the server has seen anything
CUT_WRITE = "cut write"  # ... in the middle of the request's body
LOST_ANSWER = "lost answer"  # the server has done it, but its answer never arrives
CUT_READ = "cut read"  # the answer's body ends in the middle
HANG = "hang"  # nothing happens until the client gives up
Fault = int | str | None


@dataclass(frozen=True)
class Rule:
    """Which requests fail, and how.

    Attributes:
        fault: A number is the HTTP status that is answered in place of the server's.
        every: Each so-and-so-many-th of the requests that are meant.
        times: So many of them; None for ever.
        after: So many of them pass first.
        methods: The methods that are meant, with spaces between; all where it is empty.
        path: What their paths have in them.
    """

    fault: int | str
    every: int = 1
    times: int | None = None
    after: int = 0
    methods: str = ""
    path: str = ""


@dataclass(frozen=True)
class Seen:
    """A request that came to a proxy, and what befell it."""

    method: str
    path: str
    fault: Fault


class Proxy:
    """Hands requests to a server on this machine, or lets them fail.

    It is a process of its own: Delta holds Python's lock while it commits, and would wait for itself.
    """

    def __init__(self, address: tuple[str, int], api: str = "as it is", port: int = 0) -> None:
        command = [sys.executable, "-m", "tests.servers", address[0], str(address[1]), str(port), api]
        self._process = subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.port: int = self._told()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        self._process.kill()
        self._process.communicate()

    def fail(self, *rules: Rule) -> None:
        """From now on requests fail by these rules alone; what was seen is forgotten."""
        self._tell([vars(rule) for rule in rules])

    def seen(self) -> list[Seen]:
        """All requests since the rules were set."""
        return [Seen(*each) for each in self._tell("seen")]

    def num_failed(self) -> int:
        return sum(each.fault is not None for each in self.seen())

    def _tell(self, message: Any) -> Any:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return self._told()

    def _told(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


def _serve(host: str, port: str, own_port: str, api: str) -> None:
    """The process of a Proxy: says its port, and then answers each line of input."""
    server = _ProxyServer(("127.0.0.1", int(own_port)), _Handler)
    server.upstream = (host, int(port))
    if api == "buckets":
        from tests.buckets import Buckets  # which knows this module

        server.forward = Buckets().respond  # type: ignore[method-assign]
    is_google = api in ("xml", "buckets")
    server.respond = (lambda request: translate_xml_api(request, server.forward)) if is_google else server.forward
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        print(json.dumps(server.seen if message == "seen" else server.set_rules(message)), flush=True)


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    upstream: tuple[str, int]
    respond: Forward

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lock = threading.Lock()
        self.set_rules([])

    def set_rules(self, rules: list[dict[str, Any]]) -> None:
        with self.lock:
            self.rules = [Rule(**rule) for rule in rules]
            self.counts = [0] * len(rules)
            self.seen: list[tuple[str, str, Fault]] = []

    def fault_of(self, request: Request) -> Fault:
        with self.lock:
            fault = next((rule.fault for i, rule in enumerate(self.rules) if self._befalls(i, rule, request)), None)
            self.seen.append((request.method, request.path, fault))
            return fault

    def _befalls(self, i: int, rule: Rule, request: Request) -> bool:
        if (rule.methods and request.method not in rule.methods.split()) or rule.path not in unquote(request.path):
            return False
        self.counts[i] += 1
        count = self.counts[i] - rule.after
        is_over = rule.times is not None and count > rule.times * rule.every
        return count > 0 and count % rule.every == 0 and not is_over

    def forward(self, request: Request) -> Response:
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        try:
            # The client's own Host: it is part of what S3 signs.
            has_host = any(name.lower() == "host" for name in request.headers)
            connection.putrequest(request.method, request.path, skip_host=has_host, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "expect"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body)
            answer = connection.getresponse()
            return Response(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _ProxyServer

    def do_any(self) -> None:
        asked = Request(self.command, self.path, dict(self.headers.items()))
        fault = self.server.fault_of(asked)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == CUT_WRITE and length:
            self.rfile.read(length // 2)
        if fault == HANG:
            time.sleep(60)
        if fault in (RESET, CUT_WRITE, HANG):
            return self._cut()
        chunked = "chunked" in (self.headers.get("Transfer-Encoding") or "")
        request = replace(asked, body=self._read_chunks() if chunked else self.rfile.read(length))
        if isinstance(fault, int):
            return self._answer(Response(fault, {"Content-Type": "text/plain"}, b"injected fault"))
        response = self.server.respond(request)
        if fault == LOST_ANSWER or (fault == CUT_READ and (self.command == "HEAD" or not response.body)):
            return self._cut()
        self._answer(response, len(response.body) // 2 if fault == CUT_READ else None)
        if fault == CUT_READ:
            self._cut()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_any  # noqa: N815

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return body

    def _answer(self, response: Response, num_bytes: int | None = None) -> None:
        self.send_response_only(response.status)
        length = str(len(response.body))
        for name, value in response.headers.items():
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        if response.status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[:num_bytes])

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a client that went away
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


# --- Google's XML API ----------------------------------------------------------------------------


def translate_xml_api(request: Request, forward: Forward) -> Response:
    """Google Cloud Storage has two APIs. Delta speaks the XML one, of which fake-gcs-server knows little;
    so it is put in the words of the JSON one (https://cloud.google.com/storage/docs/xml-api/overview)."""
    url = urlsplit(request.path)
    if url.path.startswith(("/storage/", "/upload/", "/download/", "/batch/", "/_internal/")):
        return forward(request)
    bucket, _, name = unquote(url.path).lstrip("/").partition("/")
    if not name:
        return _xml_list(bucket, parse_qs(url.query), forward)
    assert not url.query, f"not translated: {request.method} {request.path}"
    object_path = f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
    if request.method == "PUT":
        return _xml_put(bucket, name, request, forward)
    if request.method == "DELETE":
        return forward(Request("DELETE", object_path, {}))
    assert request.method in ("GET", "HEAD"), f"not translated: {request.method} {request.path}"
    found = forward(Request("GET", object_path, {}))
    if found.status != 200:
        return found
    about = json.loads(found.body)
    headers = _xml_headers(about)
    if request.method == "HEAD":
        return Response(200, {**headers, "Content-Length": str(about["size"])})
    ranges = {name: value for name, value in request.headers.items() if name.lower() == "range"}
    media = forward(Request("GET", f"{object_path}?alt=media", ranges))
    kept = {name: value for name, value in media.headers.items() if name.lower() == "content-range"}
    return Response(media.status, {**headers, **kept}, media.body)


def _xml_put(bucket: str, name: str, request: Request, forward: Forward) -> Response:
    query = {"uploadType": "media", "name": name}
    headers = {header.lower(): value for header, value in request.headers.items()}
    if "x-goog-if-generation-match" in headers:
        query["ifGenerationMatch"] = headers["x-goog-if-generation-match"]
    content_type = {"Content-Type": headers.get("content-type", "application/octet-stream")}
    path = f"/upload/storage/v1/b/{bucket}/o?{urlencode(query)}"
    made = forward(Request("POST", path, content_type, request.body))
    return Response(200, _xml_headers(json.loads(made.body))) if made.status == 200 else made


def _xml_headers(about: Mapping[str, Any]) -> dict[str, str]:
    return {
        "ETag": f'"{_etag(about)}"',
        "Last-Modified": formatdate(_seconds(about["updated"]), usegmt=True),
        "x-goog-generation": str(about["generation"]),
    }


def _xml_list(bucket: str, query: Mapping[str, list[str]], forward: Forward) -> Response:
    asked = {name: values[0] for name, values in query.items()}
    names = {"prefix": "prefix", "delimiter": "delimiter", "max-keys": "maxResults", "continuation-token": "pageToken"}
    wanted = {new: asked[old] for old, new in names.items() if old in asked}
    listed = forward(Request("GET", f"/storage/v1/b/{bucket}/o?{urlencode(wanted)}", {}))
    if listed.status != 200:
        return listed
    page = json.loads(listed.body)
    contents = "".join(
        f"<Contents><Key>{escape(item['name'])}</Key><Size>{item['size']}</Size>"
        f"<LastModified>{item['updated']}</LastModified><ETag>{escape(_etag(item))}</ETag></Contents>"
        for item in page.get("items", [])
        if item["name"] > asked.get("start-after", "")
    )
    folders = "".join(
        f"<CommonPrefixes><Prefix>{escape(prefix)}</Prefix></CommonPrefixes>" for prefix in page.get("prefixes", [])
    )
    token = page.get("nextPageToken")
    more = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
    body = f"<ListBucketResult>{contents}{folders}{more}</ListBucketResult>"
    return Response(200, {"Content-Type": "application/xml"}, body.encode())


def _etag(about: Mapping[str, Any]) -> str:
    return hashlib.md5(f"{about['name']} {about['generation']}".encode()).hexdigest()


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
