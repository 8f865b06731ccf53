"""The image attributes of products for Google Merchant Center, to supplement a product feed.

`id`, `image_link` and up to ten `additional_image_link` a product, in RSS 2.0 with the `g:` namespace
(https://support.google.com/merchants/answer/14987622) or as tab-separated text. An image must keep to
https://support.google.com/merchants/answer/6324350: the encoding and the size that `vlm_ops.ad_slots` knows, an ASCII URL of at most 2,000
characters. What will be the least size is asked for at once, before it is in force (500 x 500 pixels from 31 January 2027), so
that no product is lost on that day. Images that do not keep to it are left out with their reasons, as are those that their tags call
unfit: for promotional text, say.

A title that a model wrote must be a `structured_title` that says so (https://support.google.com/merchants/answer/7052112); where a product has
a `title`, Google takes that. A title that came with the image is the shop's own, and in its feed already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO
from urllib.parse import urljoin

from vlm_ops.ad_slots import SLOTS
from vlm_ops.exports.escaping import one_line, xml_text
from vlm_ops.exports.files import text_file
from vlm_ops.exports.grouping import grouped
from vlm_ops.exports.rows import ExportRow
from vlm_ops.exports.targets import Target, Written

TAG_COLUMNS = ("slug", "title", "tag_source", "ad_slots")
IMAGE_COLUMNS = ("key", "width", "height", "format", "num_bytes", "source_metadata")
_SLOT = next(slot for slot in SLOTS if slot.name == "merchant_center_product")
_MINIMUM = _SLOT.minimums[-1][1]
_MAX_URL_LENGTH = 2_000
_MAX_ADDITIONAL = 10
_TOO_MANY = f"product has more than {_MAX_ADDITIONAL + 1} images"
_MAX_ID_LENGTH = 50
_MAX_TITLE_LENGTH = 150


@dataclass(frozen=True)
class Product:
    """What the feed says of a product.

    Attributes:
        title: One that a model wrote; None where it is not to be told, or none did.
    """

    id: str
    image_link: str
    additional_image_links: tuple[str, ...]
    title: str | None = None


def write(rows: Iterable[ExportRow], target: Target, product_field: str, has_titles: bool = False) -> Written:
    """Writes the feed: XML, or tab-separated text where the name ends in `.tsv`.

    Args:
        product_field: Metadata field that holds the id of the product that an image shows.
        has_titles: Whether titles that a model wrote are told (XML only).

    Raises:
        ValueError: No image is left.
    """
    written = Counter(images=0, products=0)
    write_products = _write_tsv if target.uri.lower().endswith(".tsv") else _write_rss
    with text_file(target.uri, target.storage_options) as file:
        write_products(_products(_of_products(rows, target, product_field), target, has_titles, written), file)
        if not written["products"]:
            raise target.left_out.nothing_left()
    return written


def unfit(row: ExportRow, url: str | None) -> list[str]:
    """Why an image may not stand in a feed; empty where it may."""
    width, height = row.image.get("width") or 0, row.image.get("height") or 0
    max_megapixels, max_megabytes = (_SLOT.max_pixels or 0) / 1e6, _SLOT.max_bytes / 2**20
    rules = [
        (url is None, "no image URL"),
        (len(url or "") > _MAX_URL_LENGTH, f"URL longer than {_MAX_URL_LENGTH} characters"),
        (row.image.get("format") not in _SLOT.formats, "format not allowed, or not known"),
        (not width or not height, "size not known"),
        (0 < width < _MINIMUM.width or 0 < height < _MINIMUM.height, f"smaller than {_MINIMUM} pixels"),
        (width * height > max_megapixels * 1e6, f"more than {max_megapixels:g} megapixels"),
        ((row.image.get("num_bytes") or 0) > _SLOT.max_bytes, f"larger than {max_megabytes:g} MB"),
        (bool(faults_by_tags(row)), f"unfit for {_SLOT.name} by its tags"),
    ]
    return [reason for applies, reason in rules if applies]


def faults_by_tags(row: ExportRow) -> list[str]:
    """What the tags have against the image as a product's; empty where they take it, or say nothing."""
    slots = (slot for slot in row.tags.get("ad_slots") or () if slot["slot"] == _SLOT.name and not slot["eligible"])
    return [reason for slot in slots for reason in slot["reasons"] or ("not eligible",)]


def _of_products(
    rows: Iterable[ExportRow], target: Target, product_field: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Fit images by their products, in the order of their URIs."""
    for row in rows:
        product = _product_id(row.metadata.get(product_field))
        url = target.addresses.image_url(row)
        reasons = unfit(row, url)
        if product is None:
            reasons.insert(0, f"no product id in the metadata field {product_field!r}")
        elif len(product) > _MAX_ID_LENGTH:
            reasons.insert(0, f"product id longer than {_MAX_ID_LENGTH} characters")
        if reasons:
            target.left_out.add(row.image_id, row.uri, *reasons, details=faults_by_tags(row))
        elif product is not None and url is not None:
            value = {"image_id": row.image_id, "uri": row.uri, "url": url, "title": _written_title(row)}
            yield product, row.uri, value


def _products(
    items: Iterable[tuple[str, str, dict[str, Any]]], target: Target, has_titles: bool, written: Counter[str]
) -> Iterator[Product]:
    for product, images in grouped(items):
        first = next(images)
        additional: dict[str, None] = {}
        for image in images:
            if image["url"] == first["url"] or image["url"] in additional:
                target.left_out.add(image["image_id"], image["uri"], "same URL as another image of the product")
            elif len(additional) == _MAX_ADDITIONAL:
                target.left_out.add(image["image_id"], image["uri"], _TOO_MANY)
            else:
                additional[image["url"]] = None
        written.update(images=1 + len(additional), products=1)
        yield Product(product, first["url"], tuple(additional), first["title"] if has_titles else None)


def _product_id(value: Any) -> str | None:
    """An id as Merchant Center takes it: one line, no control characters."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return None
    return one_line(str(value)) or None


def _written_title(row: ExportRow) -> str | None:
    source = (row.tags.get("tag_source") or {}).get("title")
    title = one_line(row.tags.get("title") or "")
    return title[:_MAX_TITLE_LENGTH] if title and source not in (None, "source_metadata") else None


def _write_rss(products: Iterable[Product], file: TextIO) -> None:
    file.write(
        '<?xml version="1.0" encoding="UTF-8"?>\n<rss version="2.0" xmlns:g="http://base.google.com/ns/1.0">\n<channel>\n'
    )
    for position, product in enumerate(products):
        if not position:  # RSS wants a link of the channel: the site of its images
            site = xml_text(urljoin(product.image_link, "/"))
            about = "<description>Image attributes of products</description>"
            file.write(f"<title>Product images</title>\n<link>{site}</link>\n{about}\n")
        links = "".join(_element("additional_image_link", link) for link in product.additional_image_links)
        title = ""
        if product.title:
            source = _element("digital_source_type", "trained_algorithmic_media")
            title = f"<g:structured_title>{source}{_element('content', product.title)}</g:structured_title>"
        image = _element("image_link", product.image_link)
        file.write(f"<item>{_element('id', product.id)}{image}{links}{title}</item>\n")
    file.write("</channel>\n</rss>\n")


def _element(name: str, text: str) -> str:
    return f"<g:{name}>{xml_text(text)}</g:{name}>"


def _write_tsv(products: Iterable[Product], file: TextIO) -> None:
    """Commas part the additional links, so those inside a link are encoded."""
    file.write("id\timage_link\tadditional_image_link\n")
    for product in products:
        links = ",".join(link.replace(",", "%2C") for link in product.additional_image_links)
        file.write(f"{product.id}\t{product.image_link}\t{links}\n")
