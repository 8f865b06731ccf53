"""Texts that come from pictures and web pages, made safe for the formats that carry them. All escaping is done here."""

from __future__ import annotations

import json
import math
import re
from typing import Any

# What XML 1.0 cannot hold, even escaped (https://www.w3.org/TR/xml/#charsets), is dropped. A parser would make a line feed
# of a bare carriage return.
_XML_ESCAPES: dict[int, str | None] = {
    **dict.fromkeys([*range(0x20), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF]),
    **{ord(space): space for space in "\t\n"},
    **{
        ord("&"): "&amp;",
        ord("<"): "&lt;",
        ord(">"): "&gt;",
        ord('"'): "&quot;",
        ord("'"): "&apos;",
        ord("\r"): "&#13;",
    },
}
# `</script>` and `<!--` would end, or comment out, the element that JSON-LD stands in; the two separators are line
# ends to old JavaScript. Escaped they are the same JSON.
_HTML_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
# What a spreadsheet takes for a formula: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NOT_IN_VALUES = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ue000-\uf8ff\ufffe\uffff]")
_WHITESPACE = re.compile(r"\s+")


def xml_text(text: str) -> str:
    """Text as the content of an XML element; characters that XML 1.0 cannot hold are dropped."""
    return text.translate(_XML_ESCAPES)


def html_json(value: Any) -> str:
    """JSON that may stand inside `<script type="application/ld+json">` whatever its texts say."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_HTML_ESCAPES)


def csv_text(text: str, is_raw: bool = False) -> str:
    """Text as a CSV cell, quotes aside: control characters dropped and, unless raw, an apostrophe before what
    spreadsheets would run as a formula."""
    text = _CONTROLS.sub("", text)
    return f"'{text}" if not is_raw and text.startswith(_FORMULA_STARTS) else text


def one_line(text: str) -> str:
    """Text without control and private characters and line ends, for values that are names."""
    return _WHITESPACE.sub(" ", _NOT_IN_VALUES.sub("", text)).strip()


def plain(value: Any) -> Any:
    """The value as JSON can say it: float32 without the digits that it does not have, null for what is no number."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value
