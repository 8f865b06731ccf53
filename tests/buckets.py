"""Google Cloud Storage in memory: as much of its JSON API as gcsfs, google-cloud-storage and Delta use.

Writes honour `ifGenerationMatch`, on which commits stand. https://cloud.google.com/storage/docs/json_api
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

from tests.servers import Request, Response

_BUCKET = re.compile(r"(?:/upload|/download)?/storage/v1/b(?:/(?P<bucket>[^/]+)(?:/o(?:/(?P<name>[^/]+))?)?)?$")


class Buckets:
    """Buckets and their objects; whoever asks for a bucket that was not made is told that there is none."""

    def __init__(self) -> None:
        self._objects: dict[str, dict[str, tuple[dict[str, Any], bytes]]] = {}
        self._uploads: dict[str, tuple[str, dict[str, Any], Mapping[str, str], bytes]] = {}
        self._generation = 1_700_000_000_000_000
        self._lock = threading.Lock()

    def respond(self, request: Request) -> Response:
        url = urlsplit(request.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        place = _BUCKET.match(url.path)
        if place is None:
            return _error(501, f"not imitated: {request.method} {request.path}")
        bucket, name = (None if part is None else unquote(part) for part in place.groups())
        with self._lock:
            if request.method == "POST" and bucket is None:
                self._objects.setdefault(json.loads(request.body)["name"], {})
                return _json({})
            if bucket not in self._objects:
                return _error(404, "The specified bucket does not exist.")
            if url.path.startswith("/upload"):
                return self._upload(bucket, query, request)
            if name is not None:
                return self._object(bucket, name, query, request)
            if url.path.endswith("/o"):
                return self._list(bucket, query)
            return _json({"kind": "storage#bucket", "id": bucket, "name": bucket})

    def _object(self, bucket: str, name: str, query: Mapping[str, str], request: Request) -> Response:
        if name not in self._objects[bucket]:
            return _error(404, f"No such object: {bucket}/{name}")
        about, content = self._objects[bucket][name]
        if request.method == "DELETE":
            del self._objects[bucket][name]
            return Response(204, {})
        if query.get("alt") != "media":
            return _json(about)
        headers = {"Content-Type": "application/octet-stream", "ETag": about["etag"]}
        headers |= {"x-goog-generation": about["generation"], "x-goog-hash": f"md5={about['md5Hash']}"}
        asked = {key.lower(): value for key, value in request.headers.items()}.get("range")
        if asked is None:
            return Response(200, headers, content)
        first, last = asked.removeprefix("bytes=").split("-")
        start, end = (int(first), int(last or len(content) - 1)) if first else (-int(last), len(content) - 1)
        start, end = max(start if first else len(content) + start, 0), min(end, len(content) - 1)
        if start > end:
            return Response(416, {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return Response(206, headers, content[start : end + 1])

    def _list(self, bucket: str, query: Mapping[str, str]) -> Response:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, folders = [], set()
        for name, (about, _) in sorted(self._objects[bucket].items()):
            if not name.startswith(prefix):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                folders.add(prefix + head + found)
            else:
                items.append(about)
        return _json({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def _upload(self, bucket: str, query: Mapping[str, str], request: Request) -> Response:
        kind = query.get("uploadType")
        if "upload_id" in query:
            return self._continue_upload(bucket, query["upload_id"], request)
        if kind == "media":
            return self._put(bucket, {"name": query["name"]}, query, request.body)
        if kind == "multipart":
            about, content = _parts(request)
            return self._put(bucket, about, query, content)
        about = {"name": query.get("name"), **(json.loads(request.body) if request.body else {})}
        upload = str(len(self._uploads))
        self._uploads[upload] = (bucket, about, query, b"")
        host = next(value for name, value in request.headers.items() if name.lower() == "host")
        location = f"http://{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}"
        return Response(200, {"Location": location, "X-GUploader-UploadID": upload})

    def _continue_upload(self, bucket: str, upload: str, request: Request) -> Response:
        _, about, query, content = self._uploads[upload]
        content += request.body
        place = {key.lower(): value for key, value in request.headers.items()}.get("content-range", "")
        if place.endswith("/*"):  # more is to come
            self._uploads[upload] = (bucket, about, query, content)
            return Response(308, {"Range": f"bytes=0-{len(content) - 1}"})
        del self._uploads[upload]
        return self._put(bucket, about, query, content)

    def _put(self, bucket: str, about: Mapping[str, Any], query: Mapping[str, str], content: bytes) -> Response:
        name, objects = about["name"], self._objects[bucket]
        wanted = query.get("ifGenerationMatch")
        if wanted is not None and wanted != (objects[name][0]["generation"] if name in objects else "0"):
            return _error(412, "At least one of the pre-conditions you specified did not hold.")
        self._generation += 1
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        made = {
            "kind": "storage#object", "id": f"{bucket}/{name}/{self._generation}", "name": name, "bucket": bucket,
            "size": str(len(content)), "generation": str(self._generation), "metageneration": "1",
            "timeCreated": now, "updated": now, "etag": f"E{self._generation}",
            "contentType": about.get("contentType", "application/octet-stream"),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode(),
        }  # fmt: skip
        objects[name] = (made, content)
        return _json(made)


def _parts(request: Request) -> tuple[dict[str, Any], bytes]:
    """What a multipart upload says of the object, and its content."""
    kind = next(value for name, value in request.headers.items() if name.lower() == "content-type")
    found = re.search(r'boundary="?([^";]+)', kind)
    assert found, kind
    boundary = b"--" + found[1].encode()
    _, said, content = request.body.rpartition(boundary)[0].split(boundary, 2)
    line_end = b"\r\n" if said.startswith(b"\r\n") else b"\n"  # gcsfs: without the carriage return
    about, content = (part.partition(2 * line_end)[2].removesuffix(line_end) for part in (said, content))
    return json.loads(about), content


def _json(content: Mapping[str, Any]) -> Response:
    return Response(200, {"Content-Type": "application/json"}, json.dumps(content).encode())


def _error(status: int, message: str) -> Response:
    body = json.dumps({"error": {"code": status, "message": message, "errors": [{"message": message}]}})
    return Response(status, {"Content-Type": "application/json"}, body.encode())
