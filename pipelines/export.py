"""`beamsight export`: the tags of a catalog for a shop, a CMS or a search engine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from pipelines.options import ExportOptions
from pipelines.progress import counting
from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.exports import csv_file, jsonl, jsonld, merchant, sitemap, xmp
from vlm_ops.exports.addresses import Addresses
from vlm_ops.exports.rows import ExportRow, LeftOut, NothingToExportError, RowSource, leaving_out
from vlm_ops.exports.targets import Target
from vlm_ops.exports.urls import common_folder, is_web
from vlm_ops.states import existing_state
from vlm_ops.tag_states import existing_tags

logger = logging.getLogger(__name__)
_FORMATS: dict[str, Any] = {
    "jsonl": jsonl, "csv": csv_file, "jsonld": jsonld, "sitemap": sitemap, "merchant": merchant, "xmp": xmp,
}  # fmt: skip
_TO_FOLDERS = ("jsonld", "sitemap", "xmp")
_WITH_URLS = ("jsonld", "sitemap", "merchant")


def run(options: ExportOptions) -> int:
    """Writes, and says what was written and what was left out.

    Raises:
        FileNotFoundError: There is no catalog, or it has no tags.
        ValueError: The output cannot be written, URLs cannot be made, or nothing is left to be exported.
    """
    _check_output(options)
    source = open_source(options)
    addresses = addresses_of(options, source)
    report = storage.normalise(options.report) if options.report else None
    with leaving_out(report, options.storage_options) as left_out:
        target = Target(storage.normalise(options.output), addresses, left_out, options.storage_options)
        rows = _rows(options, source, left_out)
        try:
            written, nothing = _FORMATS[options.format].write(rows, target, **_settings(options)), None
        except NothingToExportError as error:  # the report says why, so it is wanted now more than ever
            written, nothing = {}, error
    if (num_untagged := source.num_untagged(left_out)) > 0:
        logger.warning("%d images have no tags yet; run `beamsight tag %s`", num_untagged, options.catalog)
    if nothing is not None:
        raise nothing
    print(f"exported   {options.output} ({', '.join(f'{name}: {number}' for name, number in written.items())})")
    if left_out.counts:
        print(f"left out   {left_out}")
    return 0


def open_source(options: ExportOptions) -> RowSource:
    """What is to be exported.

    Raises:
        FileNotFoundError: There is no catalog, or it has no tags.
    """
    catalog = CatalogLayout(storage.normalise(options.catalog))
    state = existing_state(catalog, options.storage_options)
    tags = existing_tags(catalog, options.storage_options)
    return RowSource(catalog, state.images, tags.parts, options.review, options.storage_options)


def addresses_of(options: ExportOptions, source: RowSource) -> Addresses:
    """Where images and pages are.

    Raises:
        ValueError: The format is about URLs, and they cannot be made.
    """
    prefix = storage.normalise(options.uri_prefix) + "/" if options.uri_prefix else common_folder(source.shard_uris())
    if options.format in _WITH_URLS and options.base_url is None and not any(map(is_web, source.shard_uris())):
        raise ValueError(
            f"--format {options.format} needs --base_url, where the images of {prefix or source.catalog.root} are served, "
            "such as https://cdn.example.com/photos/"
        )
    if options.base_url and options.url_path != "slug":
        logger.info("images of %s are served at %s", prefix or "any place", options.base_url)
    return Addresses(options.base_url, options.url_path, prefix, options.page_url)


def _rows(options: ExportOptions, source: RowSource, left_out: LeftOut) -> Iterator[ExportRow]:
    module = _FORMATS[options.format]
    with counting("export", source.num_rows) as advance:
        yield from source.rows(module.TAG_COLUMNS, module.IMAGE_COLUMNS, left_out, advance)


def _settings(options: ExportOptions) -> dict[str, Any]:
    """What one format alone reads."""
    settings: dict[str, dict[str, Any]] = {
        "csv": {"is_raw": options.raw_texts},
        "jsonld": {"is_by_page": options.per == "page", "creator_type": options.creator_type},
        "sitemap": {"sitemap_url": options.sitemap_url},
        "merchant": {"product_field": options.product_field, "has_titles": options.titles},
    }
    return settings.get(options.format, {})


def _check_output(options: ExportOptions) -> None:
    """A place that cannot be written says so before any work."""
    for flag, uri in (("--output", options.output), ("--report", options.report)):
        if not uri or not storage.is_local(uri):
            continue
        path = storage.normalise(uri)
        is_folder = flag == "--output" and options.format in _TO_FOLDERS
        if is_folder and os.path.isfile(path):
            raise ValueError(f"{flag} {uri!r} is a file; name a folder for {options.format}")
        if not is_folder and os.path.isdir(path):
            raise ValueError(f"{flag} {uri!r} is a directory; name a file")
        storage.check_writable(path if is_folder else os.path.dirname(path))


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("export", sys.argv[1:]))
