"""XMP sidecars with the fields of the IPTC Photo Metadata Standard (https://iptc.org/std/photometadata/specification/IPTC-PhotoMetadata).

`DigitalSourceType` says how a picture came to be, not its texts: that a model wrote the alt text does not make a photo
generated. So it is written only where the image's own metadata says it, as a term of IPTC's vocabulary
(http://cv.iptc.org/newscodes/digitalsourcetype/), and left out where that says something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vlm_ops.exports.escaping import xml_text
from vlm_ops.exports.files import folder
from vlm_ops.exports.rows import ExportRow
from vlm_ops.exports.targets import Target, Written
from vlm_ops.exports.urls import encode_url

TAG_COLUMNS = ("slug", "alt_text", "title", "description", "keywords", "rights")
IMAGE_COLUMNS = ("key", "format", "source_metadata")
_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
# All its terms, also those that IPTC has retired for new pictures: they stay true of older ones.
_TERMS = (
    "digitalCapture", "computationalCapture", "negativeFilm", "positiveFilm", "print", "minorHumanEdits", "humanEdits",
    "algorithmicallyEnhanced", "softwareImage", "digitalArt", "digitalCreation", "dataDrivenMedia",
    "trainedAlgorithmicMedia", "algorithmicMedia", "screenCapture", "virtualRecording", "composite", "compositeCapture",
    "compositeSynthetic", "compositeWithTrainedAlgorithmicMedia",
)  # fmt: skip
_SOURCE_TYPES = {term.lower(): _VOCABULARY + term for term in _TERMS}
_NOT_LETTERS = re.compile("[^a-z]")
_NAMESPACES = {
    "dc": "http://purl.org/dc/elements/1.1/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "xmpRights": "http://ns.adobe.com/xap/1.0/rights/",
    "Iptc4xmpCore": "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "plus": "http://ns.useplus.org/ldf/xmp/1.0/",
}
_DECLARED = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in _NAMESPACES.items())
_HEAD = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" {_DECLARED}>
"""
_TAIL = """</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


def write(rows: Iterable[ExportRow], target: Target) -> Written:
    """Writes `PATH.xmp` for each image, such as `photos/cat.jpg.xmp`.

    Raises:
        ValueError: No image is left.
    """
    num_images = 0
    with folder(target.uri, target.storage_options) as write_file:
        for row in rows:
            if path := target.addresses.path(row):
                write_file(f"{path}.xmp", sidecar(row))
                num_images += 1
            else:
                target.left_out.add(row.image_id, row.uri, "no path: not below --uri_prefix, or no slug")
    if not num_images:
        raise target.left_out.nothing_left()
    return {"sidecars": num_images}


def sidecar(row: ExportRow) -> str:
    """The packet of an image. What is not known is not there."""
    tags, rights = row.tags, row.rights
    licence = encode_url(rights.get("license", ""))
    licensor = encode_url(rights.get("acquire_license_page", ""))
    licensor_struct = (
        f'<rdf:Bag><rdf:li rdf:parseType="Resource"><plus:LicensorURL>{xml_text(licensor)}</plus:LicensorURL></rdf:li></rdf:Bag>'
        if licensor
        else ""
    )
    properties = {
        "Iptc4xmpCore:AltTextAccessibility": _in_default_language(tags.get("alt_text")),
        "dc:title": _in_default_language(tags.get("title")),
        "dc:description": _in_default_language(tags.get("description")),
        "dc:subject": _list("Bag", tags.get("keywords")),
        "dc:creator": _list("Seq", [rights.get("creator")]),
        "dc:rights": _in_default_language(rights.get("copyright_notice")),
        "photoshop:Credit": xml_text(rights.get("credit_text", "")),
        "xmpRights:WebStatement": xml_text(licence or ""),
        "xmpRights:UsageTerms": _in_default_language(None if licence else rights.get("license")),
        "plus:Licensor": licensor_struct,
        "Iptc4xmpExt:DigitalSourceType": xml_text(digital_source_type(row.metadata) or ""),
    }
    return _HEAD + "".join(f"<{name}>{value}</{name}>\n" for name, value in properties.items() if value) + _TAIL


def digital_source_type(metadata: Mapping[str, Any]) -> str | None:
    """URI of the term of IPTC's vocabulary that the metadata names, as a URI, a code or a QCode; None where it names none."""
    for name, value in metadata.items():
        if isinstance(value, str) and _NOT_LETTERS.sub("", name.lower()).endswith("digitalsourcetype"):
            code = re.split("[/:#]", value.strip().rstrip("/"))[-1]
            return _SOURCE_TYPES.get(_NOT_LETTERS.sub("", code.lower()))
    return None


def _in_default_language(text: str | None) -> str:
    """A language alternative: XMP wants one that is the default."""
    content = xml_text(text or "")
    return f'<rdf:Alt><rdf:li xml:lang="x-default">{content}</rdf:li></rdf:Alt>' if content else ""


def _list(kind: str, texts: Iterable[str | None] | None) -> str:
    items = "".join(f"<rdf:li>{content}</rdf:li>" for text in texts or () if (content := xml_text(text or "")))
    return f"<rdf:{kind}>{items}</rdf:{kind}>" if items else ""
