from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.tags import TEXT_FIELDS
from tests.tagged_catalogs import export_row
from tests.vlm_ops.exports.rules import valid
from tests.vlm_ops.exports.texts import ANY_TEXT, NASTY
from vlm_ops.exports import merchant
from vlm_ops.exports.addresses import Addresses
from vlm_ops.exports.rows import ExportRow, NothingToExportError, leaving_out
from vlm_ops.exports.targets import Target

G = {"g": "http://base.google.com/ns/1.0"}
CDN = "https://cdn.example/"


def product(name: str, sku: Any = "A1", image: dict[str, Any] | None = None, **tags: Any) -> ExportRow:
    uri = f"/data/{name}"
    return export_row(uri, {"sku": sku}, {"shard_uri": uri, **(image or {})}, **tags)


def write(path: Path, rows: list[ExportRow], has_titles: bool = False) -> Target:
    target = Target(str(path), Addresses(CDN, uri_prefix="/data/"))
    merchant.write(rows, target, "sku", has_titles)
    return target


def items(path: Path) -> dict[str, list[str]]:
    """Image links by product, main one first, of a feed that is found valid."""
    root = valid("rss.xsd", path.read_bytes())
    return {
        item.findtext("g:id", namespaces=G): item.xpath(
            "g:image_link/text() | g:additional_image_link/text()", namespaces=G
        )
        for item in root.iter("item")
    }


def test_images_of_a_product_stand_together(tmp_path: Path) -> None:
    path = tmp_path / "feed.xml"
    rows = [product("b-2.jpg"), product("a.jpg", 77), product("b-1.jpg", "A1 "), product("c & d.jpg", "C<&>")]
    target = Target(str(path), Addresses(CDN, uri_prefix="/data/"))
    assert merchant.write(rows, target, "sku") == {"images": 4, "products": 3}
    assert items(path) == {
        "A1": [f"{CDN}b-1.jpg", f"{CDN}b-2.jpg"],
        "77": [f"{CDN}a.jpg"],
        "C<&>": [f"{CDN}c%20%26%20d.jpg"],
    }
    assert valid("rss.xsd", path.read_bytes()).findtext("channel/link") == CDN


def test_a_product_has_at_most_ten_additional_images(tmp_path: Path) -> None:
    path = tmp_path / "feed.xml"
    target = write(path, [product(f"{number:02}.jpg") for number in range(13)] + [product("00.jpg")])
    assert items(path)["A1"] == [f"{CDN}{number:02}.jpg" for number in range(11)]
    assert target.left_out.counts == {
        "product has more than 11 images": 2,
        "same URL as another image of the product": 1,
    }


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"width": 499}, "smaller than 500 x 500 pixels"),
        ({"height": 499, "width": 5000}, "smaller than 500 x 500 pixels"),
        ({"width": None}, "size not known"),
        ({"width": 8001, "height": 8000}, "more than 64 megapixels"),
        ({"num_bytes": 2**24 + 1}, "larger than 16 MB"),
        ({"format": None}, "format not allowed, or not known"),
        ({"format": "AVIF"}, "format not allowed, or not known"),
        ({"shard_uri": "/elsewhere/x.jpg"}, "no image URL"),
    ],
)
def test_an_unfit_image_is_left_out_with_the_reason(tmp_path: Path, image: dict[str, Any], reason: str) -> None:
    path = tmp_path / "feed.xml"
    target = write(
        path,
        [
            product("bad.jpg", "B", image),
            product("good.jpg", "G", {"width": 500, "height": 500, "num_bytes": 2**24}),
        ],
    )
    assert items(path) == {"G": [f"{CDN}good.jpg"]}
    assert target.left_out.counts == {reason: 1}


def test_all_reasons_are_told_at_once() -> None:
    row = product("x.jpg", image={"width": 10, "num_bytes": 10**9, "format": "SVG"})
    assert merchant.unfit(row, "https://cdn.example/" + "x" * 2000) == [
        "URL longer than 2000 characters", "format not allowed, or not known", "smaller than 500 x 500 pixels", "larger than 16 MB",
    ]  # fmt: skip


def slot(name: str, eligible: bool, *reasons: str) -> dict[str, Any]:
    return {"slot": name, "eligible": eligible, "reasons": list(reasons), "crop": None}


def test_what_the_tags_call_unfit_is_left_out(tmp_path: Path) -> None:
    report = tmp_path / "left_out.jsonl"
    rows = [
        product(
            "a.jpg",
            ad_slots=[
                slot("google_ads_square", False, "too small"),
                slot("merchant_center_product", True, "advised: ..."),
            ],
        ),
        product(
            "b.jpg",
            ad_slots=[
                slot("merchant_center_product", False, "promotional text: 'SALE'"),
                slot("google_ads_square", True),
            ],
        ),
        product("c.jpg", ad_slots=[slot("merchant_center_product", False)]),
        product("d.jpg", ad_slots=None),
        product(
            "e.jpg",
            ad_slots=[slot("merchant_center_apparel", False, "it has 200 x 200 pixels; at least 250 x 250 are needed")],
        ),
    ]
    with leaving_out(str(report), {}) as left_out:
        merchant.write(rows, Target(str(tmp_path / "feed.xml"), Addresses(CDN, uri_prefix="/data/"), left_out), "sku")
    assert items(tmp_path / "feed.xml") == {"A1": [f"{CDN}a.jpg", f"{CDN}d.jpg", f"{CDN}e.jpg"]}
    assert left_out.counts == {"unfit for merchant_center_product by its tags": 2}
    assert [json.loads(line)["reasons"][1:] for line in report.read_text().splitlines()] == [
        ["promotional text: 'SALE'"],
        ["not eligible"],
    ]


@pytest.mark.parametrize("sku", [None, "", "  ", True, 1.5, ["A"], {"a": 1}])
def test_an_image_without_a_product_is_left_out(tmp_path: Path, sku: Any) -> None:
    with pytest.raises(
        NothingToExportError, match=r"nothing to export: no product id in the metadata field 'sku' \(1\)"
    ):
        write(tmp_path / "feed.xml", [product("a.jpg", sku)])
    assert not list(tmp_path.iterdir())


def test_an_id_that_is_too_long_is_no_id(tmp_path: Path) -> None:
    with pytest.raises(NothingToExportError, match="product id longer than 50 characters"):
        write(tmp_path / "feed.xml", [product("a.jpg", "x" * 51)])


def test_titles_say_that_a_model_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "feed.xml"
    own = {**dict.fromkeys(TEXT_FIELDS, "generated"), "title": "source_metadata"}
    rows = [
        product("a.jpg", "A", title="Shoes & <b>"),
        product("b.jpg", "B", tag_source=own),
        product("c.jpg", "C", title=""),
    ]
    write(path, rows, has_titles=True)
    root = valid("rss.xsd", path.read_bytes())
    assert root.xpath("//g:structured_title/g:content/text()", namespaces=G) == ["Shoes & <b>"]
    assert root.xpath("//g:digital_source_type/text()", namespaces=G) == ["trained_algorithmic_media"]
    write(path, rows)
    assert b"structured_title" not in path.read_bytes()


@settings(max_examples=40)
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT), max_size=5))
def test_any_texts_make_a_valid_feed(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("feeds")
    rows = [product(name, sku, title=title) for name, sku, title in texts] + [product("last.jpg", "last")]
    write(folder / "feed.xml", rows, has_titles=True)
    by_product = items(folder / "feed.xml")
    assert "last" in by_product
    write(folder / "feed.tsv", rows)
    lines = (folder / "feed.tsv").read_bytes().decode().split("\n")
    assert lines[0] == "id\timage_link\tadditional_image_link" and lines[-1] == ""
    table = {}
    for cells in csv.reader(lines[1:-1], delimiter="\t", quoting=csv.QUOTE_NONE):
        number, link, additional = cells
        table[number] = [link, *(each for each in additional.split(",") if each)]
    assert len(table) == len(by_product)
    assert [links for _, links in sorted(table.items())] == [links for _, links in sorted(by_product.items())]
    assert all(re.fullmatch("https://[!-+.-~-]+", link) for links in table.values() for link in links)


def test_commas_in_links_are_encoded_in_text_feeds(tmp_path: Path) -> None:
    path = tmp_path / "feed.tsv"
    rows = [export_row(f"https://shop.example/{name}", {"sku": "A"}) for name in ("a,1.jpg", "b,2.jpg", "c.jpg")]
    merchant.write(rows, Target(str(path)), "sku")
    line = path.read_text().splitlines()[1]
    assert line == "A\thttps://shop.example/a,1.jpg\thttps://shop.example/b%2C2.jpg,https://shop.example/c.jpg"


def test_nasty_ids(tmp_path: Path) -> None:
    path = tmp_path / "feed.xml"
    target = write(path, [product(f"{number}.jpg", text) for number, text in enumerate(NASTY)])
    assert len(items(path)) + sum(target.left_out.counts.values()) == len(NASTY)
