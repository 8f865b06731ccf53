"""URLs, and file names made of them. Whatever becomes part of a URL is encoded here.

URLs follow RFC 3986: ASCII only, everything else percent-encoded, hosts in their IDNA form.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_RESERVED = "!$&'()*+,;=:@/?%"
_STRAY_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_HOST = re.compile(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]")
_MAX_NAME_BYTES = 200  # of a file name, of the 255 that filesystems have, so that suffixes fit
_MAX_PATH_BYTES = 1_000  # of the 1,024 that object stores have, so that one suffix fits


def is_web(uri: str) -> bool:
    """Whether a URI is one of the web."""
    return uri.lower().startswith(("http://", "https://"))


def encode_url(text: str) -> str | None:
    """A URL as RFC 3986 wants it: what is encoded stays, what is not is encoded; None for what is no http(s) URL.

    One with a user or a password in it is none either: it would be published.
    """
    text = text.strip()
    if not is_web(text) or _UNSAFE.search(text):
        return None
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        host = host.encode("idna").decode() if not host.isascii() else host
    except ValueError:  # UnicodeError is one
        return None
    host = f"[{host}]" if ":" in host else host
    if "@" in parts.netloc or not _HOST.fullmatch(host):
        return None
    location = f"{host}:{port}" if port is not None else host
    path, query, fragment = (
        quote(_STRAY_PERCENT.sub("%25", each), safe=_RESERVED) for each in (parts.path, parts.query, parts.fragment)
    )
    return urlunsplit((parts.scheme, location, path or "/", query, fragment))


def folder_url(text: str) -> str:
    """A URL that file names can follow.

    Raises:
        ValueError: It is no http(s) URL, or has a query or a fragment.
    """
    url = encode_url(text)
    if url is None or "?" in url or "#" in url:
        raise ValueError(f"must be a URL such as https://www.example.com/images/, without ? and #, got {text!r}")
    return url if url.endswith("/") else f"{url}/"


def check_template(text: str) -> str:
    """A template of page URLs.

    Raises:
        ValueError: What it makes would be no URL.
    """
    rest = _PLACEHOLDER.sub("x", text)
    names = _PLACEHOLDER.findall(text)
    if not all(names) or "{" in rest or "}" in rest or encode_url(rest) is None:
        raise ValueError(f"must be a URL such as 'https://www.example.com/{{slug}}', got {text!r}")
    return text


def fill_template(template: str, values: Mapping[str, Any]) -> str | None:
    """A template with percent-encoded values; None where one of them is missing. Only `path` keeps its slashes."""
    texts = {name: _as_text(values.get(name)) for name in _PLACEHOLDER.findall(template)}
    if not all(texts.values()):
        return None
    return _PLACEHOLDER.sub(lambda found: quote(texts[found[1]], safe="/" if found[1] == "path" else ""), template)


def _as_text(value: Any) -> str:
    is_plain = isinstance(value, (str, int)) and not isinstance(value, bool)
    return str(value).strip() if is_plain else ""


def safe_path(path: str) -> str:
    """A relative path that stays below its folder, on the web and on disk.

    Names from archives may climb (`../../x`), hold control characters or be too long. Where a name had to be changed it
    gets a hash of what it was, so that two of them stay two.
    """
    path = path.lstrip("/")
    safe = "/".join(_safe_name(name) for name in path.split("/"))
    if safe == path and len(safe.encode()) <= _MAX_PATH_BYTES:
        return safe
    folder, _, name = safe.rpartition("/")
    folder = folder if len(safe.encode()) <= _MAX_PATH_BYTES else "_"
    stem, dot, suffix = name.rpartition(".")
    mark = hashlib.sha256(path.encode()).hexdigest()[:8]
    name = f"{stem}-{mark}{dot}{suffix}" if stem else f"{name}-{mark}"
    return f"{folder}/{name}" if folder else name


def _safe_name(name: str) -> str:
    if name in ("", ".", ".."):
        return "_"
    name = _UNSAFE.sub("_", name)
    if len(name.encode()) <= _MAX_NAME_BYTES:
        return name
    stem, dot, suffix = name.rpartition(".")
    suffix = f"{dot}{suffix}" if stem and len(suffix.encode()) <= 8 else ""
    return name.encode()[: _MAX_NAME_BYTES - len(suffix.encode()) - 9].decode(errors="ignore") + suffix


def common_folder(uris: Iterable[str]) -> str:
    """What all URIs begin with, up to a slash; empty where that is nothing."""
    common: str | None = None
    for uri in uris:
        folder = uri[: uri.rfind("/") + 1]
        if common is None:
            common = folder
        while not folder.startswith(common):
            common = common[: common.rfind("/", 0, -1) + 1]
    common = common or ""
    return common if not common.endswith("://") else ""
