"""Where images and their pages are on the web."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote

from vlm_ops.exports.rows import ExportRow
from vlm_ops.exports.urls import encode_url, fill_template, is_web, safe_path

# Where source metadata tells the page that shows an image.
PAGE_FIELDS = ("page_url", "page")
_EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


@dataclass(frozen=True)
class Addresses:
    """How to tell the URL of an image and of its page.

    Attributes:
        base_url: Where the images are served, with a slash at its end; None where they are only known by their URIs.
        url_path: What follows it: `uri`, the path of the URI below `uri_prefix`, where the shard of a member counts as
            a folder; `member`, the name inside the shard, of single files as with `uri`; `slug`, the slug and the
            suffix of the image's format.
        uri_prefix: What URIs begin with and URLs do not have.
        page_url: Template of the page of an image, of those whose metadata names none: `{slug}`, `{key}`,
            `{image_id}`, `{path}`, or the name of a metadata field.
    """

    base_url: str | None = None
    url_path: str = "uri"
    uri_prefix: str = ""
    page_url: str | None = None

    def path(self, row: ExportRow) -> str | None:
        """The image's path, relative and safe as a file name; None where it has no slug, or its URI is not
        below `uri_prefix`."""
        if self.url_path == "slug":
            slug, suffix = row.tags.get("slug"), _EXTENSIONS.get(row.image.get("format") or "", "")
            return safe_path(f"{slug}{suffix}") if slug else None
        if self.url_path == "member" and row.member:
            return safe_path(row.member)
        if not row.shard_uri.startswith(self.uri_prefix):
            return None
        path = row.shard_uri[len(self.uri_prefix) :]
        if not self.uri_prefix:  # images of several places: the scheme becomes a folder
            path = path.replace("://", "/", 1)
        path = unquote(path) if is_web(row.shard_uri) else path
        return safe_path("/".join(part for part in (path, row.member) if part))

    def image_url(self, row: ExportRow) -> str | None:
        """The image's URL; None where it cannot be told."""
        if self.base_url is None:
            return encode_url(row.uri) if is_web(row.uri) and not row.member else None
        path = self.path(row)
        return None if path is None else self.base_url + quote(path)

    def page(self, row: ExportRow) -> str | None:
        """URL of the page that shows the image, without a fragment; None where it is not known."""
        for name in PAGE_FIELDS:
            if (value := row.metadata.get(name)) and isinstance(value, str) and (url := encode_url(value)):
                return url.partition("#")[0]
        if self.page_url is None:
            return None
        values = {**row.metadata, "slug": row.tags.get("slug"), "key": row.image.get("key"), "image_id": row.image_id}
        filled = fill_template(self.page_url, {**values, "path": self.path(row)})
        return None if filled is None else encode_url(filled)
