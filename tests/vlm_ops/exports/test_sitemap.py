from __future__ import annotations

import gzip
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from tests.tagged_catalogs import export_row
from tests.vlm_ops.exports.rules import valid
from tests.vlm_ops.exports.texts import ANY_TEXT
from vlm_ops.exports import sitemap
from vlm_ops.exports.addresses import Addresses
from vlm_ops.exports.rows import ExportRow, NothingToExportError
from vlm_ops.exports.targets import Target, Written

NAMES = {"s": "http://www.sitemaps.org/schemas/sitemap/0.9", "image": "http://www.google.com/schemas/sitemap-image/1.1"}
SHOP = "https://shop.example/"
ADDRESSES = Addresses("https://cdn.example/", uri_prefix="/data/")


def write(folder: Path, rows: Sequence[ExportRow], **limits: int) -> tuple[Written, Target]:
    target = Target(str(folder), ADDRESSES)
    return sitemap.write(rows, target, SHOP, **limits), target


def files(folder: Path) -> list[bytes]:
    """The sitemaps that the index leads to, unpacked, once both are found valid."""
    index = valid("siteindex.xsd", (folder / "sitemap_index.xml").read_bytes())
    urls = index.xpath("//s:loc/text()", namespaces=NAMES)
    assert all(url.startswith(SHOP) for url in urls)
    documents = [gzip.decompress((folder / url.removeprefix(SHOP)).read_bytes()) for url in urls]
    for document in documents:
        valid("sitemap.xsd", document)
    return documents


def pages(folder: Path) -> dict[str, list[str]]:
    """Images by their pages, in all sitemaps."""
    found: dict[str, list[str]] = {}
    for document in files(folder):
        for url in etree.fromstring(document).findall("s:url", NAMES):
            page = url.findtext("s:loc", namespaces=NAMES)
            assert page not in found
            found[page] = url.xpath("image:image/image:loc/text()", namespaces=NAMES)
    return found


def test_images_stand_with_their_pages(tmp_path: Path) -> None:
    rows = [
        export_row("/data/b.jpg", {"page_url": f"{SHOP}p?a=1&b=2"}),
        export_row("/data/a & b.jpg", {"page_url": f"{SHOP}p?a=1&b=2"}),
        export_row("/data/c.jpg", {"page_url": f"{SHOP}ü"}),
    ]
    written, _ = write(tmp_path, rows)
    assert written == {"images": 3, "pages": 2, "sitemaps": 1}
    assert pages(tmp_path) == {
        f"{SHOP}p?a=1&b=2": ["https://cdn.example/a%20%26%20b.jpg", "https://cdn.example/b.jpg"],
        f"{SHOP}%C3%BC": ["https://cdn.example/c.jpg"],
    }
    assert b"lastmod" not in files(tmp_path)[0] and b"caption" not in files(tmp_path)[0]


def test_what_cannot_stand_there_is_left_out_with_the_reason(tmp_path: Path) -> None:
    rows = [
        export_row("/data/good.jpg", {"page_url": f"{SHOP}p"}),
        export_row("/data/no page.jpg"),
        export_row("/elsewhere/x.jpg", {"page_url": f"{SHOP}p"}),
        export_row("/data/other host.jpg", {"page_url": "https://other.example/p"}),
        export_row("/data/other scheme.jpg", {"page_url": "http://shop.example/p"}),
        export_row("/data/long.jpg", {"page_url": f"{SHOP}{'x' * 2048}"}),
        export_row(f"/data/{'ü' * 90}/{'ü' * 90}/{'ü' * 90}/{'ü' * 90}.jpg", {"page_url": f"{SHOP}p"}),
    ]
    written, target = write(tmp_path, rows)
    assert written["images"] == 1
    assert target.left_out.counts == {
        "no page: its metadata has no page_url, and --page_url is not given or names a field that it lacks": 1,
        "no image URL": 1,
        "page not below https://shop.example/, the --sitemap_url": 2,
        "URL longer than 2047 characters": 2,
    }


def test_no_page_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(NothingToExportError, match="nothing to export: no page: its metadata has no page_url"):
        write(tmp_path, [export_row()])
    assert not list(tmp_path.iterdir())


def test_a_page_has_at_most_a_thousand_images(tmp_path: Path) -> None:
    rows = [export_row(f"/data/{number:04}.jpg", {"page_url": f"{SHOP}p"}) for number in range(1_002)]
    written, target = write(tmp_path, [*rows, rows[0]])
    assert written == {"images": 1_000, "pages": 1, "sitemaps": 1}
    (images,) = pages(tmp_path).values()
    assert images == [f"https://cdn.example/{number:04}.jpg" for number in range(1_000)]
    assert target.left_out.counts == {"page has more than 1000 images": 2}


def test_the_published_limits() -> None:
    assert (sitemap.MAX_URLS, sitemap.MAX_BYTES, sitemap.MAX_IMAGES_A_PAGE) == (50_000, 52_428_800, 1_000)


def test_files_are_split_at_their_number_of_urls(tmp_path: Path) -> None:
    rows = [export_row(f"/data/{number}.jpg", {"page_url": f"{SHOP}{number}"}) for number in range(7)]
    written, _ = write(tmp_path, rows, max_urls=3)
    assert written["sitemaps"] == 3
    assert [document.count(b"<url>") for document in files(tmp_path)] == [3, 3, 1]
    assert len(pages(tmp_path)) == 7
    write(tmp_path, rows[:6], max_urls=3)
    assert [document.count(b"<url>") for document in files(tmp_path)] == [3, 3]


@settings(max_examples=20)
@given(st.integers(min_value=700, max_value=3_000), st.lists(st.integers(1, 200), min_size=1, max_size=20, unique=True))
def test_files_are_split_at_their_size(
    tmp_path_factory: pytest.TempPathFactory, max_bytes: int, lengths: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("sitemaps")
    rows = [export_row(f"/data/{length}.jpg", {"page_url": SHOP + "x" * length}) for length in lengths]
    write(folder, rows, max_bytes=max_bytes)
    documents = files(folder)
    assert all(len(document) <= max_bytes for document in documents)
    assert len(pages(folder)) == len(rows)
    # No file could have taken the first page of the next one.
    for document, following in itertools.pairwise(documents):
        first = following.index(b"<url>"), following.index(b"</url>\n") + len(b"</url>\n")
        assert len(document) + first[1] - first[0] > max_bytes


@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), max_size=5))
@settings(max_examples=30)
def test_any_page_and_any_name_make_a_valid_sitemap(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("sitemaps")
    rows = [
        export_row(f"/data/{name}", {"page_url": SHOP + page}, {"shard_uri": f"/data/{name}"}) for name, page in names
    ]
    written, _ = write(folder, [*rows, export_row("/data/last.jpg", {"page_url": SHOP})])
    found = pages(folder)
    assert written["pages"] == len(found) and sum(map(len, found.values())) == written["images"]


def test_equal_content_makes_equal_bytes(tmp_path: Path) -> None:
    rows = [export_row("/data/a.jpg", {"page_url": SHOP})]
    for name in ("one", "two"):
        write(tmp_path / name, rows)
    one, two = (tmp_path / name / "sitemap-00001.xml.gz" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
