from __future__ import annotations

from pathlib import Path

import pytest
import rdflib
from hypothesis import given
from lxml import etree

from tests.tagged_catalogs import export_row
from tests.vlm_ops.exports.texts import ANY_TEXT, NASTY
from vlm_ops.exports import xmp
from vlm_ops.exports.addresses import Addresses
from vlm_ops.exports.rows import NothingToExportError
from vlm_ops.exports.targets import Target

RDF = rdflib.RDF
DC = rdflib.Namespace("http://purl.org/dc/elements/1.1/")
CORE = rdflib.Namespace("http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/")
EXTENSION = rdflib.Namespace("http://iptc.org/std/Iptc4xmpExt/2008-02-29/")
RIGHTS = rdflib.Namespace("http://ns.adobe.com/xap/1.0/rights/")
PHOTOSHOP = rdflib.Namespace("http://ns.adobe.com/photoshop/1.0/")
PLUS = rdflib.Namespace("http://ns.useplus.org/ldf/xmp/1.0/")
KNOWN = {
    "creator": "Ann Example", "credit_text": "Example Press", "copyright_notice": "© Example Press",
    "license": "https://example.com/licence", "acquire_license_page": "https://example.com/buy",
}  # fmt: skip


def graph_of(packet: str) -> rdflib.Graph:
    """The packet as rdflib reads RDF/XML."""
    root = etree.fromstring(packet.encode())
    assert root.tag == "{adobe:ns:meta/}xmpmeta"
    (rdf,) = root
    return rdflib.Graph().parse(data=etree.tostring(rdf), format="xml")


def items(graph: rdflib.Graph, property_: rdflib.URIRef, kind: rdflib.URIRef) -> list[rdflib.Literal]:
    """Items of the list of a property, whose kind is as IPTC has it."""
    found = list(graph.objects(None, property_))
    if not found:
        return []
    (node,) = found
    assert (node, RDF.type, kind) in graph
    return list(rdflib.Graph.items(graph, node)) or [
        each for _, each in sorted(graph.predicate_objects(node)) if isinstance(each, rdflib.Literal)
    ]


def test_fields_are_those_of_iptc() -> None:
    row = export_row(metadata={"DigitalSourceType": "trainedAlgorithmicMedia"}, rights=KNOWN, alt_text="Two dogs")
    graph = graph_of(xmp.sidecar(row))
    default = "x-default"
    assert items(graph, CORE.AltTextAccessibility, RDF.Alt) == [rdflib.Literal("Two dogs", lang=default)]
    assert items(graph, DC.title, RDF.Alt) == [rdflib.Literal("Two dogs in the snow", lang=default)]
    assert items(graph, DC.description, RDF.Alt) == [rdflib.Literal("Two dogs run through the snow.", lang=default)]
    assert items(graph, DC.rights, RDF.Alt) == [rdflib.Literal("© Example Press", lang=default)]
    assert [str(each) for each in items(graph, DC.subject, RDF.Bag)] == ["dog", "snow", "winter"]
    assert [str(each) for each in items(graph, DC.creator, RDF.Seq)] == ["Ann Example"]
    assert str(next(graph.objects(None, PHOTOSHOP.Credit))) == "Example Press"
    assert [str(each) for each in graph.objects(None, RIGHTS.WebStatement)] == ["https://example.com/licence"]
    assert [str(each) for each in graph.objects(None, PLUS.LicensorURL)] == ["https://example.com/buy"]
    assert [str(each) for each in graph.objects(None, EXTENSION.DigitalSourceType)] == [
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    ]
    assert not list(graph.objects(None, RIGHTS.UsageTerms))


def test_what_is_not_known_is_not_there() -> None:
    nothing = dict.fromkeys(("alt_text", "title", "description", "keywords", "rights"))
    graph = graph_of(xmp.sidecar(export_row(**nothing)))
    assert not list(graph)
    graph = graph_of(xmp.sidecar(export_row(alt_text="", alt_reason="decorative", keywords=[])))
    assert not list(graph.objects(None, CORE.AltTextAccessibility)) and not list(graph.objects(None, DC.subject))


def test_a_licence_that_is_no_page_is_told_as_terms() -> None:
    graph = graph_of(xmp.sidecar(export_row(rights={"license": "CC BY 4.0"})))
    assert [str(each) for each in items(graph, RIGHTS.UsageTerms, RDF.Alt)] == ["CC BY 4.0"]
    assert not list(graph.objects(None, RIGHTS.WebStatement))


def test_a_generated_text_does_not_make_a_generated_picture() -> None:
    row = export_row(
        tag_source=dict.fromkeys(("alt_text", "title", "caption", "description", "keywords"), "text_model")
    )
    assert "DigitalSourceType" not in xmp.sidecar(row)


@pytest.mark.parametrize(
    "name",
    ["digital_source_type", "DigitalSourceType", "Iptc4xmpExt:DigitalSourceType", "XMP-iptcExt:DigitalSourceType"],
)
@pytest.mark.parametrize(
    ("value", "term"),
    [
        ("digitalCapture", "digitalCapture"),
        ("digsrctype:compositeSynthetic", "compositeSynthetic"),
        ("http://cv.iptc.org/newscodes/digitalsourcetype/screenCapture", "screenCapture"),
        ("https://cv.iptc.org/newscodes/digitalsourcetype/screenCapture/", "screenCapture"),
        ("trained_algorithmic_media", "trainedAlgorithmicMedia"),
        (" DIGITALCAPTURE ", "digitalCapture"),
        ("AI", None),
        ("photo", None),
        ("", None),
        (3, None),
    ],
)
def test_digital_source_types(name: str, value: object, term: str | None) -> None:
    expected = None if term is None else f"http://cv.iptc.org/newscodes/digitalsourcetype/{term}"
    assert xmp.digital_source_type({"other": "x", name: value}) == expected


@given(ANY_TEXT)
def test_any_text_comes_back(text: str) -> None:
    row = export_row(
        alt_text=text, title=text, description=text, keywords=[text, "last"], rights=dict.fromkeys(KNOWN, text)
    )
    root = etree.fromstring(xmp.sidecar(row).encode())
    allowed = "".join(c for c in text if c in "\t\n\r" or 0x20 <= ord(c) not in (0xFFFE, 0xFFFF))
    assert root.xpath("string(//dc:title//rdf:li)", namespaces={"dc": str(DC), "rdf": str(RDF)}) == allowed
    assert len(root.xpath("//dc:subject//rdf:li", namespaces={"dc": str(DC), "rdf": str(RDF)})) == (2 if allowed else 1)
    graph_of(xmp.sidecar(row))


def test_exiv2_reads_what_was_written(tmp_path: Path) -> None:
    pyexiv2 = pytest.importorskip("pyexiv2", reason="pyexiv2 has no wheel for this machine")
    texts = [text for text in NASTY if text.isprintable() and text.strip()]
    rows = [export_row(f"/data/{number}.jpg", rights=KNOWN, alt_text=text) for number, text in enumerate(texts)]
    assert xmp.write(rows, Target(str(tmp_path), Addresses(uri_prefix="/data/"))) == {"sidecars": len(texts)}
    for number, text in enumerate(texts):
        with pyexiv2.Image(str(tmp_path / f"{number}.jpg.xmp")) as image:
            fields = image.read_xmp()
        assert fields["Xmp.iptc.AltTextAccessibility"] == {'lang="x-default"': text}
        assert fields["Xmp.dc.subject"] == ["dog", "snow", "winter"]
        assert fields["Xmp.dc.creator"] == ["Ann Example"]
        assert fields["Xmp.photoshop.Credit"] == "Example Press"
        assert fields["Xmp.xmpRights.WebStatement"] == "https://example.com/licence"


def test_files_stand_where_the_images_do(tmp_path: Path) -> None:
    target = Target(str(tmp_path / "out"), Addresses(uri_prefix="/data/"))
    rows = [export_row("/data/a/b c.jpg"), export_row("/data/x.tar#../../y.jpg"), export_row("/elsewhere/z.jpg")]
    assert xmp.write(rows, target) == {"sidecars": 2}
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.xmp"))
    assert names[0] == "a/b c.jpg.xmp" and names[1].startswith("x.tar/_/_/y-") and len(names) == 2
    assert target.left_out.counts == {"no path: not below --uri_prefix, or no slug": 1}
    with pytest.raises(NothingToExportError, match="nothing to export: no image has tags"):
        xmp.write([], Target(str(tmp_path / "none")))
