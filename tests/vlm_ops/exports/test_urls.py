from __future__ import annotations

import os
import posixpath
import re
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vlm_ops.exports.texts import ANY_TEXT
from vlm_ops.exports.urls import check_template, common_folder, encode_url, fill_template, folder_url, safe_path

# https://www.rfc-editor.org/rfc/rfc3986#appendix-A, for absolute http(s) URLs
RFC_3986 = re.compile(
    r"https?://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]+)?(/([A-Za-z0-9\-._~!$&'()*+,;=:@]|%[0-9A-Fa-f]{2})*)*"
    r"(\?([A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*)?(#([A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*)?"
)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("https://shop.example/a b.jpg", "https://shop.example/a%20b.jpg"),
        ("https://shop.example/a%20b.jpg", "https://shop.example/a%20b.jpg"),
        ("https://shop.example/100%.jpg", "https://shop.example/100%25.jpg"),
        ("HTTP://Shop.Example:8080", "http://shop.example:8080/"),
        ("https://shop.example/ü?q=é&x=1#ß", "https://shop.example/%C3%BC?q=%C3%A9&x=1#%C3%9F"),
        ("https://bücher.example/x", "https://xn--bcher-kva.example/x"),
        ("https://[2001:db8::1]/x", "https://[2001:db8::1]/x"),
        ("https://shop.example/<script>\"'`{}|^", "https://shop.example/%3Cscript%3E%22'%60%7B%7D%7C%5E"),
        ("  https://shop.example/x\n", "https://shop.example/x"),
        ("https://user:secret@shop.example/x", None),
        ("https://shop.example/a\nb", None),
        ("https://shop.example\\@evil.example/", None),
        ("https://exa mple/x", None),
        ("https://shop.example:port/", None),
        ("https:///x", None),
        ("javascript:alert(1)", None),
        ("ftp://shop.example/x", None),
        ("s3://bucket/x", None),
        ("/x.jpg", None),
        ("", None),
    ],
)
def test_encode_url(given_: str, expected: str | None) -> None:
    assert encode_url(given_) == expected


@given(
    st.one_of(
        ANY_TEXT,
        st.builds("https://{}/{}?{}#{}".format, *[ANY_TEXT] * 4),
        st.builds("https://a.example/{}".format, ANY_TEXT),
    )
)
def test_an_encoded_url_is_one_of_rfc_3986_and_stays_so(text: str) -> None:
    url = encode_url(text)
    if url is not None:
        assert RFC_3986.fullmatch(url), url
        assert encode_url(url) == url
        assert "@" not in urlsplit(url).netloc


@given(st.one_of(ANY_TEXT, st.builds("{}/../{}".format, ANY_TEXT, ANY_TEXT), st.lists(ANY_TEXT).map("/".join)))
def test_a_safe_path_stays_below_its_folder(path: str) -> None:
    safe = safe_path(path)
    assert posixpath.normpath(posixpath.join("/folder", safe)) == f"/folder/{safe}"
    assert all(0 < len(os.fsencode(name)) <= 240 for name in safe.split("/"))
    assert len(safe.encode()) <= 1_000
    assert not re.search(r"[\x00-\x1f\x7f\\]", safe)
    assert safe_path(safe) == safe


def test_a_safe_path_keeps_good_names_and_tells_changed_ones_apart() -> None:
    assert safe_path("a b/ü.jpg") == "a b/ü.jpg"
    assert safe_path("/a.jpg") == "a.jpg"
    names = [
        safe_path(name) for name in ("../a.jpg", "./a.jpg", "_/a.jpg", "x/../a.jpg", "a\x00.jpg", "a\x01.jpg", "a_.jpg")
    ]
    assert len(set(names)) == len(names)
    assert all(name.endswith(".jpg") for name in names)
    long_paths = [safe_path("folder/" * 300 + end) for end in ("1.jpg", "2.jpg")]
    assert len(set(long_paths)) == 2 and all(len(path) < 50 for path in long_paths)
    long_names = [safe_path("é" * 300 + end) for end in ("1.jpg", "2.jpg")]
    assert len(set(long_names)) == 2 and all(name.endswith(".jpg") for name in long_names)


@given(st.lists(st.lists(st.sampled_from(["a", "b", "ab", "c d"]), min_size=1, max_size=4), min_size=1, max_size=5))
def test_common_folder_is_the_longest_that_all_share(names: list[list[str]]) -> None:
    uris = ["/" + "/".join(each) for each in names]
    shared = os.path.commonpath([os.path.dirname(uri) for uri in uris])
    assert common_folder(uris) == (shared if shared == "/" else f"{shared}/")


def test_common_folder_of_other_places() -> None:
    assert common_folder([]) == ""
    assert common_folder(["s3://bucket/a/1.tar", "s3://bucket/a/2.tar"]) == "s3://bucket/a/"
    assert common_folder(["s3://one/a.jpg", "s3://two/a.jpg"]) == ""
    assert common_folder(["s3://one/a.jpg", "/data/a.jpg"]) == ""


def test_templates_are_filled_with_encoded_values() -> None:
    values = {"sku": "a/b c?", "number": 7, "path": "x/ü.jpg", "flag": True, "none": None, "blank": " "}
    assert fill_template("https://s.example/{sku}/{number}", values) == "https://s.example/a%2Fb%20c%3F/7"
    assert fill_template("https://s.example/{path}", values) == "https://s.example/x/%C3%BC.jpg"
    for name in ("flag", "none", "blank", "missing"):
        assert fill_template(f"https://s.example/{{{name}}}", values) is None


@given(ANY_TEXT)
def test_a_value_cannot_leave_its_place_in_a_template(value: str) -> None:
    filled = fill_template("https://s.example/p/{sku}/end", {"sku": value})
    if filled is None:
        assert not value.strip()
    else:
        middle = filled.removeprefix("https://s.example/p/").removesuffix("/end")
        assert re.fullmatch(r"([A-Za-z0-9\-._~]|%[0-9A-F]{2})+", middle) and unquote(middle) == value.strip()


@pytest.mark.parametrize(
    "text",
    ["https://s.example/{}", "https://s.example/{a", "{slug}", "ftp://s.example/{slug}", "https://s.example/a}b"],
)
def test_wrong_templates_are_told(text: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"must be a URL such as 'https://www.example.com/{{slug}}', got {text!r}")
    ):
        check_template(text)


def test_folder_urls() -> None:
    assert folder_url("https://cdn.example") == "https://cdn.example/"
    assert folder_url("https://cdn.example/a b/") == "https://cdn.example/a%20b/"
    for text in ("cdn.example", "https://cdn.example/?a=1", "https://cdn.example/#x", "file:///x"):
        with pytest.raises(
            ValueError,
            match=re.escape(f"must be a URL such as https://www.example.com/images/, without ? and #, got {text!r}"),
        ):
            folder_url(text)
