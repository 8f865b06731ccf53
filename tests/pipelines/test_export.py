from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import uuid
from pathlib import Path
from typing import Any

import fsspec
import jsonschema
import pytest

from pipelines.cli import main
from pipelines.options import parse_export
from tests.tagged_catalogs import image_row, tag_row, write_catalog
from tests.vlm_ops.exports.rules import valid
from tests.vlm_ops.exports.test_jsonl import VALIDATOR
from tests.vlm_ops.exports.test_jsonld import IMAGE_OBJECT, graph_of
from tests.vlm_ops.exports.test_xmp import graph_of as graph_of_packet
from tests.vlm_ops.exports.texts import NASTY

BASE = ("--base_url", "https://cdn.example/i")
# What each format needs besides.
NEEDED: dict[str, tuple[str, ...]] = {
    "jsonl": (), "csv": (), "jsonld": BASE, "sitemap": (*BASE, "--sitemap_url", "https://shop.example/"),
    "merchant": (*BASE, "--product_field", "sku"), "xmp": (),
}  # fmt: skip
OUTPUTS = {
    "jsonl": "tags.jsonl",
    "csv": "tags.csv",
    "jsonld": "jsonld",
    "sitemap": "maps",
    "merchant": "feed.xml",
    "xmp": "xmp",
}
URIS = tuple(f"/data/photos/{number:02}/ü & {number}.jpg" for number in range(len(NASTY)))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that show two a product on a page; every text is a nasty one; the last needs review."""
    root = tmp_path_factory.mktemp("exports") / "catalog"
    images, tags = [], []
    for number, (uri, text) in enumerate(zip(URIS, NASTY, strict=True)):
        metadata = {"sku": f"S{number // 2}", "page_url": f"https://shop.example/p/{number // 2}?a=1&b=2"}
        images.append(image_row(uri, metadata))
        rights = dict.fromkeys(("creator", "credit_text", "copyright_notice", "license", "acquire_license_page"), text)
        texts = dict.fromkeys(("alt_text", "title", "caption", "description"), text)
        review = "needs_review" if number == len(NASTY) - 1 else "ok"
        tags.append(tag_row(uri, **texts, keywords=[text], rights=rights, review=review))
    write_catalog(root, images, tags, rows_a_part=7)
    return root


def export(catalog: Path, format_: str, output: Path | str, *flags: str) -> int:
    return main(["export", str(catalog), "--format", format_, "--output", str(output), *NEEDED[format_], *flags])


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The message of a command line that is refused."""
    try:
        assert main(["export", *argv]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    return capsys.readouterr().err


def test_jsonl(catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tags.jsonl"
    assert export(catalog, "jsonl", path, *BASE) == 0
    assert capsys.readouterr().out == f"exported   {path} (images: {len(URIS)})\n"
    lines = [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    for line in lines:
        VALIDATOR.validate(line)
    by_uri = {line["uri"]: line for line in lines}
    assert {uri: by_uri[uri]["title"] for uri in URIS} == dict(zip(URIS, NASTY, strict=True))
    assert by_uri[URIS[3]]["image_url"] == "https://cdn.example/i/03/%C3%BC%20%26%203.jpg"
    assert [line["review"] for line in lines].count("needs_review") == 1


def test_csv(catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "tags.csv"
    assert export(catalog, "csv", path) == 0
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    assert {row["uri"] for row in rows} == set(URIS)
    assert not any(value.startswith(tuple("=+-@\t\r")) for row in rows for value in row.values())
    assert export(catalog, "csv", path, "--raw_texts") == 0
    assert any(
        row["title"].startswith("=") for row in csv.DictReader(io.StringIO(path.read_bytes().decode(), newline=""))
    )


def test_jsonld(catalog: Path, tmp_path: Path) -> None:
    assert export(catalog, "jsonld", tmp_path / "images") == 0
    assert export(catalog, "jsonld", tmp_path / "pages", "--per", "page", "--creator_type", "Organization") == 0
    documents = [json.loads(path.read_bytes()) for path in (tmp_path / "images").rglob("*.jsonld")]
    assert len(documents) == len(URIS) - 1
    for document in documents:
        jsonschema.validate({name: value for name, value in document.items() if name != "@context"}, IMAGE_OBJECT)
    pages = [json.loads(path.read_bytes()) for path in (tmp_path / "pages" / "shop.example" / "p").iterdir()]
    assert sum(len(page["@graph"]) for page in pages) == len(URIS) - 1 and len(pages) == (len(URIS)) // 2
    assert pages[0]["@graph"][0]["creator"]["@type"] == "Organization"
    assert len(graph_of(pages[0])) > 10


def test_sitemap(catalog: Path, tmp_path: Path) -> None:
    assert export(catalog, "sitemap", tmp_path / "maps") == 0
    valid("siteindex.xsd", (tmp_path / "maps" / "sitemap_index.xml").read_bytes())
    root = valid("sitemap.xsd", gzip.decompress((tmp_path / "maps" / "sitemap-00001.xml.gz").read_bytes()))
    assert len(root) == (len(URIS) + 1) // 2


def test_merchant(catalog: Path, tmp_path: Path) -> None:
    assert export(catalog, "merchant", tmp_path / "feed.xml", "--titles") == 0
    root = valid("rss.xsd", (tmp_path / "feed.xml").read_bytes())
    assert len(list(root.iter("item"))) == len(URIS) // 2
    assert export(catalog, "merchant", tmp_path / "feed.tsv") == 0
    assert len((tmp_path / "feed.tsv").read_text().splitlines()) == len(URIS) // 2 + 1


def test_xmp(catalog: Path, tmp_path: Path) -> None:
    assert export(catalog, "xmp", tmp_path / "xmp", "--review", "include") == 0
    packets = list((tmp_path / "xmp").rglob("*.xmp"))
    assert {path.relative_to(tmp_path / "xmp").as_posix() for path in packets} == {f"{uri[13:]}.xmp" for uri in URIS}
    for path in packets:
        graph_of_packet(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("format_", list(NEEDED))
def test_an_object_store_gets_the_same_bytes(catalog: Path, tmp_path: Path, format_: str) -> None:
    place = f"memory://exports-{uuid.uuid4().hex}"
    assert export(catalog, format_, f"{place}/{OUTPUTS[format_]}") == 0
    assert export(catalog, format_, tmp_path / OUTPUTS[format_]) == 0
    fs = fsspec.filesystem("memory")
    root = fs._strip_protocol(place)
    actual = {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(place)}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert actual == {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(("format_", "by_default"), [("jsonl", True), ("csv", True), ("jsonld", False), ("sitemap", True), ("merchant", False), ("xmp", False)])  # fmt: skip
def test_review_by_default(format_: str, by_default: bool) -> None:
    flags = ["catalog", "--format", format_, "--output", OUTPUTS[format_], *NEEDED[format_]]
    assert parse_export(flags).review == ("include" if by_default else "exclude")
    assert parse_export([*flags, "--review", "only"]).review == "only"


def test_what_is_left_out_is_counted_and_reported(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "left_out.jsonl"
    assert export(catalog, "jsonld", tmp_path / "out", "--report", str(report)) == 0
    assert "left out   needs review (1)\n" in capsys.readouterr().out
    (line,) = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    assert line["uri"] == URIS[-1] and line["reasons"] == ["needs review"]


def test_where_nothing_is_left_the_report_says_why(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "left_out.jsonl"
    argv = [
        str(catalog),
        "--format",
        "merchant",
        "--output",
        str(tmp_path / "feed.xml"),
        *BASE,
        "--product_field",
        "gtin",
    ]
    message = error_of(capsys, [*argv, "--report", str(report)])
    assert message.endswith(
        "beamsight export: error: nothing to export: no product id in the metadata field 'gtin' (18), needs review (1); --review include exports what needs review, too\n"
    )
    assert len(report.read_text(encoding="utf-8").splitlines()) == len(URIS)
    assert not (tmp_path / "feed.xml").exists()


def test_an_old_file_stays_where_an_export_fails(catalog: Path, tmp_path: Path) -> None:
    feed = tmp_path / "feed.xml"
    assert export(catalog, "merchant", feed) == 0
    before = feed.read_bytes()
    assert export(catalog, "merchant", feed, "--product_field", "gtin") == 2
    assert feed.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["feed.xml"]


def test_the_prefix_decides_the_urls_and_is_told(
    catalog: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tags.jsonl"
    with caplog.at_level(logging.INFO, "pipelines.export"):
        assert export(catalog, "jsonl", path, *BASE, "--uri_prefix", "/data") == 0
    assert "images of /data/ are served at https://cdn.example/i/" in caplog.text
    urls = [json.loads(line)["image_url"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert all(url.startswith("https://cdn.example/i/photos/") for url in urls)
    assert export(catalog, "jsonl", path, *BASE, "--url_path", "slug") == 0
    urls = [json.loads(line)["image_url"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert all(url.startswith("https://cdn.example/i/two-dogs-") and url.endswith(".jpg") for url in urls)


def test_pages_may_come_from_a_template(tmp_path: Path) -> None:
    uris = ["/data/a.jpg", "/data/b.jpg"]
    write_catalog(
        tmp_path / "catalog", [image_row(uris[0], {"sku": "A 1"}), image_row(uris[1])], [tag_row(uri) for uri in uris]
    )
    assert main(["export", str(tmp_path / "catalog"), "--format", "sitemap", "--output", str(tmp_path / "maps"), *BASE, "--page_url", "https://shop.example/p/{sku}"]) == 0  # fmt: skip
    root = valid("sitemap.xsd", gzip.decompress((tmp_path / "maps" / "sitemap-00001.xml.gz").read_bytes()))
    assert [each.text for each in root.iter("{*}loc")] == [
        "https://shop.example/p/A%201",
        "https://cdn.example/i/a.jpg",
    ]


def test_images_of_the_web_need_no_base_url(tmp_path: Path) -> None:
    uri = "https://shop.example/a b.jpg"
    write_catalog(tmp_path / "catalog", [image_row(uri)], [tag_row(uri)])
    assert main(["export", str(tmp_path / "catalog"), "--format", "jsonld", "--output", str(tmp_path / "out")]) == 0
    assert (
        json.loads((tmp_path / "out" / "a b.jpg.jsonld").read_bytes())["contentUrl"] == "https://shop.example/a%20b.jpg"
    )


def test_images_that_are_not_tagged_yet_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    catalog = tmp_path / "catalog"
    write_catalog(catalog, [image_row("/data/a.jpg"), image_row("/data/b.jpg")], [tag_row("/data/a.jpg")])
    assert export(catalog, "jsonl", tmp_path / "tags.jsonl") == 0
    assert f"1 images have no tags yet; run `beamsight tag {catalog}`" in caplog.text


def test_without_tags_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = tmp_path / "catalog"
    argv = [str(catalog), "--format", "jsonl", "--output", str(tmp_path / "x.jsonl")]
    assert f"no catalog at {catalog}; make one with `beamsight build" in error_of(capsys, argv)
    write_catalog(catalog, [image_row("/data/a.jpg")], None)
    assert f"no tags in {catalog}; make them with `beamsight tag {catalog}`" in error_of(capsys, argv)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "xml", "--output", "x"], "argument --format: invalid choice: 'xml'"),
        (["--format", "jsonl"], "the following arguments are required: --output"),
        (["--format", "merchant", "--output", "x.xml", *BASE], "--format merchant needs --product_field, the metadata field with the id of an image's product"),
        (["--format", "merchant", "--output", "x.csv", "--product_field", "sku"], "argument --output: a feed is named .xml or .tsv, got 'x.csv'"),
        (["--format", "merchant", "--output", "x.tsv", "--product_field", "sku", "--titles"], "--titles is for XML; name the feed .xml"),
        (["--format", "sitemap", "--output", "x"], "--format sitemap needs --sitemap_url, where its files will be served"),
        (["--format", "jsonl", "--output", "x", "--base_url", "cdn.example"], "argument --base_url: must be a URL such as https://www.example.com/images/, without ? and #, got 'cdn.example'"),
        (["--format", "jsonl", "--output", "x", "--page_url", "https://s.example/{}"], "argument --page_url: must be a URL such as 'https://www.example.com/{slug}', got 'https://s.example/{}'"),
        (["--format", "jsonl", "--output", "x", "--per", "page"], "--per is for jsonld, and jsonl does not read it; leave it out"),
        (["--format", "csv", "--output", "x", "--titles"], "--titles is for merchant, and csv does not read it; leave it out"),
        (["--format", "xmp", "--output", "x", "--page_url", "https://s.example/{slug}"], "--page_url is for jsonl and csv and jsonld and sitemap, and xmp does not read it; leave it out"),
        (["--format", "jsonl", "--output", "x", "--url_path", "slug", "--uri_prefix", "/data"], "--uri_prefix has no meaning with --url_path slug; leave one of them out"),
    ],
)  # fmt: skip
def test_wrong_flags_are_told_before_any_work(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in error_of(capsys, ["no-such-catalog", *flags])


@pytest.mark.parametrize("format_", ["jsonld", "sitemap", "merchant"])
def test_a_base_url_that_is_missing_is_told_at_once(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str
) -> None:
    needed = [flag for flag in NEEDED[format_] if flag not in BASE]
    argv = [str(catalog), "--format", format_, "--output", str(tmp_path / OUTPUTS[format_]), *needed]
    expected = f"--format {format_} needs --base_url, where the images of /data/photos/ are served, such as https://cdn.example.com/photos/"
    assert expected in error_of(capsys, argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format_", "is_folder", "message"), [
    ("jsonl", True, "is a directory; name a file"),
    ("xmp", False, "is a file; name a folder for xmp"),
])  # fmt: skip
def test_outputs_of_the_wrong_kind_are_told(
    catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: str, is_folder: bool, message: str
) -> None:
    output = tmp_path / "output"
    output.mkdir() if is_folder else output.write_text("")
    assert message in error_of(capsys, [str(catalog), "--format", format_, "--output", str(output), *NEEDED[format_]])


def test_flags_may_stand_in_a_file(catalog: Path, tmp_path: Path) -> None:
    config = tmp_path / "export.yaml"
    values: dict[str, Any] = {
        "catalog": str(catalog),
        "format": "merchant",
        "output": str(tmp_path / "feed.xml"),
        "base_url": BASE[1],
        "product_field": "sku",
        "titles": True,
    }
    config.write_text(json.dumps(values))
    assert main(["export", "--config", str(config)]) == 0
    assert b"structured_title" in (tmp_path / "feed.xml").read_bytes()
