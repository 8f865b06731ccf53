"""schema.org `ImageObject` in JSON-LD: a document an image, or a document a page with all its images.

The properties are those of https://schema.org/ImageObject; who made a picture and under which terms it may be used as
in https://developers.google.com/search/docs/appearance/structured-data/image-license-metadata. What is not known is not there:
`representativeOfPage`, dates and licences are never made up. The text may be put as it is into
`<script type="application/ld+json">`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vlm_ops.exports.escaping import html_json
from vlm_ops.exports.files import folder
from vlm_ops.exports.grouping import grouped
from vlm_ops.exports.rows import ExportRow
from vlm_ops.exports.targets import Target, Written
from vlm_ops.exports.urls import encode_url, safe_path

TAG_COLUMNS = ("slug", "title", "caption", "description", "keywords", "rights")
IMAGE_COLUMNS = ("key", "width", "height", "format", "source_metadata")
_CONTEXT = "https://schema.org/"
_PIXEL = "E37"  # the code of UN/CEFACT's recommendation 20
_MEDIA_TYPES = {name: f"image/{name.lower()}" for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}


def image_object(row: ExportRow, url: str, creator_type: str = "Person") -> dict[str, Any]:
    """What is known of an image, without `@context`."""
    tags, rights = row.tags, row.rights
    creator = rights.get("creator")
    properties = {
        "@type": "ImageObject",
        "contentUrl": url,
        "name": tags.get("title"),
        "caption": tags.get("caption"),
        "description": tags.get("description"),
        "keywords": tags.get("keywords"),
        "width": _pixels(row.image.get("width")),
        "height": _pixels(row.image.get("height")),
        "encodingFormat": _MEDIA_TYPES.get(row.image.get("format") or ""),
        "creator": {"@type": creator_type, "name": creator} if creator else None,
        "creditText": rights.get("credit_text"),
        "copyrightNotice": rights.get("copyright_notice"),
        "license": encode_url(rights.get("license", "")),
        "acquireLicensePage": encode_url(rights.get("acquire_license_page", "")),
    }
    return {name: value for name, value in properties.items() if value}


def write(rows: Iterable[ExportRow], target: Target, is_by_page: bool = False, creator_type: str = "Person") -> Written:
    """Writes `PATH.jsonld` for each image, by the path that it has in its URL.

    Args:
        is_by_page: Instead `HOST/PATH.jsonld` for each page, and one for each image whose page is not known.
        creator_type: `Person` or `Organization`.

    Raises:
        ValueError: No image has a URL.
    """
    num_images = num_documents = 0
    documents = (_of_pages if is_by_page else _of_images)(rows, target, creator_type)
    with folder(target.uri, target.storage_options) as write_file:
        for name, images in documents:
            content = {"@graph": images} if is_by_page else images[0]
            write_file(f"{name}.jsonld", html_json({"@context": _CONTEXT, **content}) + "\n")
            num_images, num_documents = num_images + len(images), num_documents + 1
    if not num_documents:
        raise target.left_out.nothing_left()
    return {"images": num_images, "documents": num_documents}


def _of_images(rows: Iterable[ExportRow], target: Target, creator_type: str) -> Iterator[tuple[str, list[Any]]]:
    for row, url in _with_urls(rows, target):
        yield target.addresses.path(row) or _name_of(url), [image_object(row, url, creator_type)]


def _of_pages(rows: Iterable[ExportRow], target: Target, creator_type: str) -> Iterator[tuple[str, list[Any]]]:
    items = (
        (target.addresses.page(row) or url, row.uri, image_object(row, url, creator_type))
        for row, url in _with_urls(rows, target)
    )
    for page, images in grouped(items):
        yield _name_of(page), list(images)


def _with_urls(rows: Iterable[ExportRow], target: Target) -> Iterator[tuple[ExportRow, str]]:
    for row in rows:
        if url := target.addresses.image_url(row):
            yield row, url
        else:
            target.left_out.add(row.image_id, row.uri, "no image URL")


def _name_of(url: str) -> str:
    name = url.partition("://")[2]
    return safe_path(f"{name}index" if name.endswith("/") else name)


def _pixels(number: int | None) -> dict[str, Any] | None:
    return {"@type": "QuantitativeValue", "value": number, "unitCode": _PIXEL} if number else None
