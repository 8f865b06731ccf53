from __future__ import annotations

from urllib.parse import unquote

import pytest
from hypothesis import given

from tests.tagged_catalogs import export_row
from tests.vlm_ops.exports.test_urls import RFC_3986
from tests.vlm_ops.exports.texts import ANY_TEXT
from vlm_ops.exports.addresses import Addresses
from vlm_ops.exports.urls import safe_path

BASE = "https://cdn.example/photos/"


@pytest.mark.parametrize(
    ("url_path", "uri", "expected"),
    [
        ("uri", "/data/a b/ü.jpg", "a%20b/%C3%BC.jpg"),
        ("uri", "/data/x.tar#y/z.jpg", "x.tar/y/z.jpg"),
        ("member", "/data/x.tar#y/z.jpg", "y/z.jpg"),
        ("member", "/data/a.jpg", "a.jpg"),
        ("slug", "/elsewhere/a.jpg", "two-dogs.jpg"),
        ("uri", "/elsewhere/a.jpg", None),
    ],
)
def test_image_urls(url_path: str, uri: str, expected: str | None) -> None:
    addresses = Addresses(BASE, url_path, "/data/")
    row = export_row(uri, slug="two-dogs")
    assert addresses.image_url(row) == (None if expected is None else BASE + expected)
    path = addresses.path(row)
    assert (path if path is None else unquote(path)) == (None if expected is None else unquote(expected))


def test_a_hash_in_a_file_name_is_no_member() -> None:
    row = export_row("/data/a#1.jpg", image={"shard_uri": "/data/a#1.jpg"})
    assert row.member == ""
    assert Addresses(BASE, "member", "/data/").image_url(row) == f"{BASE}a%231.jpg"


def test_slugs_have_the_suffix_of_the_format() -> None:
    addresses = Addresses(BASE, "slug")
    assert addresses.image_url(export_row("/x/a.JPEG", image={"format": "WEBP"}, slug="a")) == f"{BASE}a.webp"
    assert addresses.image_url(export_row("/x/a.png", image={"format": None}, slug="a")) == f"{BASE}a"
    assert addresses.image_url(export_row("/x/a.png", slug=None)) is None


def test_images_of_the_web_have_their_url_already() -> None:
    row = export_row("https://shop.example/i/a%20b ü.jpg?v=1")
    assert Addresses().image_url(row) == "https://shop.example/i/a%20b%20%C3%BC.jpg?v=1"
    assert Addresses(BASE, uri_prefix="https://shop.example/i/").image_url(row) == f"{BASE}a%20b%20%C3%BC.jpg%3Fv%3D1"
    assert Addresses().image_url(export_row("https://shop.example/x.tar#a.jpg")) is None
    assert Addresses().image_url(export_row("/data/a.jpg")) is None


def test_pages() -> None:
    template = Addresses(page_url="https://shop.example/p/{sku}", uri_prefix="/data/")
    assert template.page(export_row(metadata={"sku": "A 1"})) == "https://shop.example/p/A%201"
    assert template.page(export_row(metadata={})) is None
    assert (
        template.page(export_row(metadata={"sku": "A", "page_url": "https://shop.example/own#part"}))
        == "https://shop.example/own"
    )
    assert (
        template.page(export_row(metadata={"sku": "A", "page_url": "no URL", "page": 3})) == "https://shop.example/p/A"
    )
    assert Addresses().page(export_row(metadata={"page": "https://shop.example/x"})) == "https://shop.example/x"
    assert Addresses().page(export_row(metadata={"page_url": "javascript:alert(1)"})) is None
    row = export_row("/data/a/b.jpg", slug="two-dogs")
    for name, value in (("slug", "two-dogs"), ("key", "b"), ("image_id", str(row.image_id)), ("path", "a/b.jpg")):
        page_url = f"https://shop.example/{{{name}}}"
        assert Addresses(page_url=page_url, uri_prefix="/data/").page(row) == f"https://shop.example/{value}"


@given(ANY_TEXT, ANY_TEXT)
def test_any_name_makes_a_url_below_the_base(folder: str, name: str) -> None:
    uri = f"/data/{folder}/{name}.jpg"
    row = export_row(uri, image={"shard_uri": uri})
    url = Addresses(BASE, uri_prefix="/data/").image_url(row)
    assert url is not None and RFC_3986.fullmatch(url) and url.startswith(BASE)
    assert unquote(url[len(BASE) :]) == safe_path(uri.removeprefix("/data/"))
