"""Image sitemaps: pages, and the images that each of them shows.

https://www.sitemaps.org/protocol.html: at most 50,000 URLs and 50 MB (52,428,800 bytes) a file before compression, URLs under
2,048 characters and below the folder of the sitemap, an index over the files. https://developers.google.com/search/docs/crawling-indexing/sitemaps/image-sitemaps:
at most 1,000 images a page, and of the tags only `image:image` and `image:loc`; the others have no meaning any more. `lastmod`
is left out: when a page changed is not known here, and a wrong date makes search engines ignore all dates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from vlm_ops.exports.escaping import xml_text
from vlm_ops.exports.files import gzip_file, text_file
from vlm_ops.exports.grouping import grouped
from vlm_ops.exports.rows import ExportRow
from vlm_ops.exports.targets import Target, Written

TAG_COLUMNS = ("slug",)
IMAGE_COLUMNS = ("key", "format", "source_metadata")
INDEX_NAME = "sitemap_index.xml"
MAX_URLS = 50_000
MAX_BYTES = 52_428_800
MAX_IMAGES_A_PAGE = 1_000
_MAX_SITEMAPS = 50_000
_MAX_URL_LENGTH = 2_047
_XML = '<?xml version="1.0" encoding="UTF-8"?>\n'
_SITEMAP = "http://www.sitemaps.org/schemas/sitemap/0.9"
_HEAD = (f'{_XML}<urlset xmlns="{_SITEMAP}" xmlns:image="http://www.google.com/schemas/sitemap-image/1.1">\n').encode()
_TAIL = b"</urlset>\n"


def write(
    rows: Iterable[ExportRow],
    target: Target,
    sitemap_url: str,
    max_urls: int = MAX_URLS,
    max_bytes: int = MAX_BYTES,
) -> Written:
    """Writes `sitemap-00001.xml.gz` and those that follow, and when all are there their index.

    Args:
        sitemap_url: Where the files will be served: a URL with a slash at its end. Pages are below it.

    Raises:
        ValueError: No image has a page, or there are more pages than an index can lead to.
    """
    written = Counter(images=0, pages=0, sitemaps=0)
    entries = _entries(rows, target, sitemap_url, written)
    for part in _split(entries, max_urls, max_bytes - len(_HEAD) - len(_TAIL)):
        written["sitemaps"] += 1
        if written["sitemaps"] > _MAX_SITEMAPS:
            raise ValueError(f"more than {_MAX_SITEMAPS} sitemaps, which no index may list; export less at once")
        with gzip_file(f"{target.uri}/{_name(written['sitemaps'])}", target.storage_options) as file:
            file.write(_HEAD)
            file.writelines(part)
            file.write(_TAIL)
    if not written["sitemaps"]:
        raise target.left_out.nothing_left()
    with text_file(f"{target.uri}/{INDEX_NAME}", target.storage_options) as index:
        index.write(f'{_XML}<sitemapindex xmlns="{_SITEMAP}">\n')
        for number in range(1, written["sitemaps"] + 1):
            index.write(f"<sitemap><loc>{xml_text(sitemap_url + _name(number))}</loc></sitemap>\n")
        index.write("</sitemapindex>\n")
    return written


def _entries(rows: Iterable[ExportRow], target: Target, sitemap_url: str, written: Counter[str]) -> Iterator[bytes]:
    """One `url` element a page."""
    for page, images in grouped(_with_pages(rows, target, sitemap_url)):
        urls: dict[str, None] = {}  # each once, in their order
        for image_id, uri, url in images:
            if url in urls or len(urls) < MAX_IMAGES_A_PAGE:
                urls[url] = None
            else:
                target.left_out.add(image_id, uri, f"page has more than {MAX_IMAGES_A_PAGE} images")
        written.update(images=len(urls), pages=1)
        told = "".join(f"<image:image><image:loc>{xml_text(url)}</image:loc></image:image>" for url in urls)
        yield f"<url><loc>{xml_text(page)}</loc>{told}</url>\n".encode()


def _with_pages(
    rows: Iterable[ExportRow], target: Target, sitemap_url: str
) -> Iterator[tuple[str, str, tuple[int, str, str]]]:
    """Images by their pages, in the order of their URIs."""
    for row in rows:
        url, page = target.addresses.image_url(row), target.addresses.page(row)
        if reason := _unfit(url, page, sitemap_url):
            target.left_out.add(row.image_id, row.uri, reason)
        elif url is not None and page is not None:
            yield page, row.uri, (row.image_id, row.uri, url)


def _unfit(url: str | None, page: str | None, sitemap_url: str) -> str | None:
    """Why an image cannot stand in a sitemap; None where it can."""
    if url is None:
        return "no image URL"
    if page is None:
        return "no page: its metadata has no page_url, and --page_url is not given or names a field that it lacks"
    if not page.startswith(sitemap_url):
        return f"page not below {sitemap_url}, the --sitemap_url"
    return f"URL longer than {_MAX_URL_LENGTH} characters" if max(len(url), len(page)) > _MAX_URL_LENGTH else None


def _split(entries: Iterator[bytes], max_urls: int, max_bytes: int) -> Iterator[Iterator[bytes]]:
    """The entries in parts of so many, and so many bytes, at most. Each part is to be read to its end."""
    waiting = next(entries, None)

    def part() -> Iterator[bytes]:
        nonlocal waiting
        num_urls = num_bytes = 0
        while waiting is not None and num_urls < max_urls and (not num_urls or num_bytes + len(waiting) <= max_bytes):
            num_urls, num_bytes = num_urls + 1, num_bytes + len(waiting)
            yield waiting
            waiting = next(entries, None)

    while waiting is not None:
        yield part()


def _name(number: int) -> str:
    return f"sitemap-{number:05}.xml.gz"
