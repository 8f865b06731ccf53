"""Who made an image and under which licence, from the metadata that came with it.

The fields are those of schema.org's ImageObject that Google reads, each with the IPTC field that means the same
(https://developers.google.com/search/docs/appearance/structured-data/image-license-metadata).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

# The names that a field goes by, best first: of schema.org, of IPTC and XMP, of EXIF, and of what crawlers and photo sites
# write. Compared without case, punctuation and namespace: `dc:creator` and `Creator` are one.
_NAMES = {
    "creator": ("creator", "creators", "byline", "artist", "author", "authors", "authorname", "photographer", "photographername", "photocredit", "ownername"),
    "credit_text": ("credittext", "creditline", "credit", "credits", "attribution", "attributiontext"),
    "copyright_notice": ("copyrightnotice", "copyright", "rights", "rightsstatement", "usageterms"),
    "license": ("licenseurl", "licenceurl", "licenselink", "webstatement", "webstatementofrights", "license", "licence", "licensename", "licencename"),
    "acquire_license_page": ("acquirelicensepage", "licensorurl"),
}  # fmt: skip
_URL_FIELDS = ("acquire_license_page",)
# Where sources keep such fields together, and IPTC those of a licensor.
_GROUPS = frozenset({"xmp", "iptc", "exif", "rights", "metadata", "licensor"})
# What an object says of itself: a schema.org Person, an XMP text in several languages, a licence.
_SPOKEN = ("name", "xdefault", "value", "url", "id")
_MAX_CHARACTERS = 1000
_RUNS_OR_EMBEDS = re.compile(r"(?:javascript|vbscript)\s*:|(?:data|file|blob):\S", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff]")
_CREATIVE_COMMONS = re.compile(
    r"(?:cc|creative commons)[\s-]*(?:(?P<kind>by(?:-(?:nc|sa|nd)){0,2})[\s-]*(?P<version>[1-4]\.[05])|(?P<zero>(?:cc)?0|zero)(?:[\s-]*(?:1\.0|universal))*)",
    re.IGNORECASE,
)


def rights(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The fields of `rights` that metadata name: {"creator": "Ada", "license": "https://..."}.

    A licence that is known by a short name of Creative Commons becomes its URL; another one stays as it is written.
    Only texts count: a bare number is a licence to nobody but the site that counts them so. What is no web address where
    one is asked for, or is a URL of a scheme that runs or embeds something, is left out.
    """
    named = dict(_fields(metadata))
    found = {}
    for field, names in _NAMES.items():
        texts = (named[name] for name in names if name in named)
        text = next((text for text in map(_FIELD_TEXTS[field], texts) if text), None)
        if text:
            found[field] = text
    return found


def _fields(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text), those further up last, so that they win."""
    plain = []
    for key, value in metadata.items():
        name = _plain_name(key)
        objects = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, Mapping)]
        if text := _spoken(value):
            plain.append((name, text))
            plain += [(f"{name}url", text) for each in objects if (text := _spoken(each.get("url")))]
        elif name in _GROUPS:
            for each in objects:
                yield from _fields(each)
    yield from reversed(plain)


def _plain_name(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", str(key).rpartition(":")[2].lower())


def _spoken(value: Any, depth: int = 0) -> str:
    """What a value says: a text; the texts of a list; the name of an object, or its address."""
    if isinstance(value, str):
        return "" if len(value) > _MAX_CHARACTERS else " ".join(_CONTROL.sub(" ", value).split())
    if depth < 3 and isinstance(value, list):
        return ", ".join(dict.fromkeys(text for text in (_spoken(each, depth + 1) for each in value) if text))
    if depth < 3 and isinstance(value, Mapping):
        named = {_plain_name(str(key).lstrip("@")): each for key, each in value.items()}
        return next((text for text in (_spoken(named.get(name), depth + 1) for name in _SPOKEN) if text), "")
    return ""


def _text(text: str) -> str:
    return "" if _RUNS_OR_EMBEDS.match(text) or len(text) > _MAX_CHARACTERS or text.isdigit() else text


def _url(text: str) -> str:
    """The text, where it is an address in the web, without a password."""
    if any(character.isspace() or character in '<>"{}|\\^`' for character in text):
        return ""
    try:
        parts = urlsplit(text)
        web = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
    except ValueError:  # such as an IPv6 address that does not end
        return ""
    return text if web else ""


def _license(text: str) -> str:
    match = _CREATIVE_COMMONS.fullmatch(text)
    if match is None:
        return _url(text) or ("" if "://" in text else _text(text))
    if match["zero"]:
        return "https://creativecommons.org/publicdomain/zero/1.0/"
    return f"https://creativecommons.org/licenses/{match['kind'].lower()}/{match['version']}/"


_FIELD_TEXTS = dict.fromkeys(_NAMES, _text) | {"license": _license} | dict.fromkeys(_URL_FIELDS, _url)
