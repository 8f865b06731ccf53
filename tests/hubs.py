"""A Hugging Face hub on 127.0.0.1: what huggingface_hub 2.4 asks of one (hf_api.py, file_download.py).

with FakeHub() as hub:                     huggingface_hub asks it, and keeps what it fetches in a folder of its own
    commit = hub.publish("someone/tiny", folder)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
import transformers


class FakeHub:
    """Attributes:
    requests: The paths that were asked for, in order.
    refuses: Status and headers of the answer to whatever is asked, while there is one.
    refuses_files: The same for files alone.
    cut: A file whose content breaks off after its first bytes.
    token: What `Authorization: Bearer` must be, where one is asked for.
    """

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[str] = []
        self.refuses: tuple[int, dict[str, str]] | None = None
        self.refuses_files: tuple[int, dict[str, str]] | None = None
        self.cut: str | None = None
        self.token: str | None = None
        self.cache = cache
        self._refs: dict[tuple[str, str], str] = {}
        self._files: dict[tuple[str, str], dict[str, bytes]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", self.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        files = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        for module in ("file_download", "utils._http"):  # both wait a while before they ask again
            monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=lambda _: None))

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, repo: str, folder: Path, revision: str = "main") -> str:
        """A commit of all files of a folder."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self._files[repo, commit] = files
        self._refs[repo, revision] = commit
        self._refs[repo, commit] = commit
        return commit

    def forget(self) -> None:
        """Empties the cache."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        if self.refuses:
            return self.refuses[0], self.refuses[1], b""
        if self.token and token != f"Bearer {self.token}":
            return 401, {"X-Error-Message": "Invalid username or password."}, b""
        if parts[:2] == ["api", "models"]:
            return self._answer_api("/".join(parts[2:4]), parts[4:])
        if self.refuses_files:
            return self.refuses_files[0], self.refuses_files[1], b""
        repo, (_, revision, *name) = "/".join(parts[:2]), parts[2:]
        commit = self._refs[repo, revision]
        content = self._files[repo, commit]["/".join(name)]
        return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}, content

    def _answer_api(self, repo: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if not any(known == repo for known, _ in self._refs):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self._refs.get((repo, rest[1] if rest else "main"))
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self._files[repo, commit]
        answer: Any = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        if rest and rest[0] == "tree":
            answer = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in files.items()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def save_tiny(folder: Path, seed: int = 0, **options: object) -> Path:
    """A vision transformer of 5,000 parameters with its image processor, as `save_pretrained` writes them."""
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(folder, **options)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_content=True)

        def do_HEAD(self) -> None:
            self._answer(with_content=False)

        def _answer(self, with_content: bool) -> None:
            hub.requests.append(self.path)
            status, headers, content = hub.answer(self.path, self.headers.get("Authorization"))
            is_cut = with_content and hub.cut is not None and self.path.endswith(hub.cut)
            if start := self.headers.get("Range"):
                content, status = content[int(start.removeprefix("bytes=").partition("-")[0]) :], 206
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_content:
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(content[: 0 if start else len(content) // 2] if is_cut else content)
            if is_cut:
                self.connection.close()

        def log_message(self, *_: object) -> None:
            pass

    return Handler
