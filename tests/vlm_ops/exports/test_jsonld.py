from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import extruct
import jsonschema
import pytest
import rdflib
from hypothesis import given

from tests.tagged_catalogs import export_row
from tests.vlm_ops.exports.texts import ANY_TEXT, NASTY
from vlm_ops.exports import jsonld
from vlm_ops.exports.addresses import Addresses
from vlm_ops.exports.escaping import html_json
from vlm_ops.exports.rows import ExportRow, NothingToExportError
from vlm_ops.exports.targets import Target

SCHEMA_ORG = rdflib.Namespace("https://schema.org/")
ADDRESSES = Addresses("https://cdn.example/", uri_prefix="/data/")
RIGHTS = {
    "creator": "Ann Example", "credit_text": "Example Press", "copyright_notice": "© Example Press",
    "license": "https://example.com/licence", "acquire_license_page": "https://example.com/buy",
}  # fmt: skip

# The properties of https://schema.org/ImageObject that are written, with their expected types.
_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_URL = {"type": "string", "pattern": "^https?://[!-~]+$"}
_PIXELS = {
    "type": "object",
    "properties": {
        "@type": {"const": "QuantitativeValue"},
        "value": {"type": "integer", "minimum": 1},
        "unitCode": {"const": "E37"},
    },
    "required": ["@type", "value", "unitCode"],
    "additionalProperties": False,
}
_CREATOR = {
    "type": "object",
    "properties": {"@type": {"enum": ["Person", "Organization"]}, "name": _TEXT},
    "required": ["@type", "name"],
    "additionalProperties": False,
}
IMAGE_OBJECT = {
    "type": "object",
    "properties": {
        "@type": {"const": "ImageObject"}, "contentUrl": _URL, "name": _TEXT, "caption": _TEXT, "description": _TEXT,
        "keywords": {"type": "array", "items": {"type": "string"}, "minItems": 1}, "width": _PIXELS, "height": _PIXELS,
        "encodingFormat": {"enum": ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff"]},
        "creator": _CREATOR, "creditText": _TEXT, "copyrightNotice": _TEXT, "license": _URL, "acquireLicensePage": _URL,
    },
    "required": ["@type", "contentUrl"],
    "additionalProperties": False,
}  # fmt: skip


def graph_of(document: dict[str, Any]) -> rdflib.Graph:
    """The document as rdflib reads it. The context is put in its place: on the web it says the same of these properties."""
    assert document["@context"] == "https://schema.org/"
    local = {**document, "@context": {"@vocab": "https://schema.org/"}}
    return rdflib.Graph().parse(data=json.dumps(local), format="json-ld")


def test_what_is_known_is_told() -> None:
    actual = jsonld.image_object(export_row(rights=RIGHTS), "https://cdn.example/dog.jpg", "Organization")
    jsonschema.validate(actual, IMAGE_OBJECT)
    assert actual == {
        "@type": "ImageObject",
        "contentUrl": "https://cdn.example/dog.jpg",
        "name": "Two dogs in the snow",
        "caption": "two dogs run through the snow",
        "description": "Two dogs run through the snow.",
        "keywords": ["dog", "snow", "winter"],
        "width": {"@type": "QuantitativeValue", "value": 800, "unitCode": "E37"},
        "height": {"@type": "QuantitativeValue", "value": 600, "unitCode": "E37"},
        "encodingFormat": "image/jpeg",
        "creator": {"@type": "Organization", "name": "Ann Example"},
        "creditText": "Example Press",
        "copyrightNotice": "© Example Press",
        "license": "https://example.com/licence",
        "acquireLicensePage": "https://example.com/buy",
    }


def test_what_is_not_known_is_not_told() -> None:
    nothing = dict.fromkeys(("title", "caption", "description", "keywords", "rights"))
    row = export_row(image={"width": None, "height": None, "format": None}, **nothing)
    url = "https://cdn.example/dog.jpg"
    assert jsonld.image_object(row, url) == {"@type": "ImageObject", "contentUrl": url}


def test_a_licence_that_is_no_page_is_not_called_one() -> None:
    row = export_row(rights={"license": "CC BY 4.0", "acquire_license_page": "javascript:alert(1)", "creator": ""})
    assert not {"license", "acquireLicensePage", "creator"} & set(jsonld.image_object(row, "https://cdn.example/a"))


@given(ANY_TEXT)
def test_a_page_that_holds_it_is_read_by_others(text: str) -> None:
    text = text.replace("\x00", "")  # what no page can hold; in JSON it is escaped
    row = export_row(title=text, caption=text, description=text, keywords=[text], rights=dict.fromkeys(RIGHTS, text))
    document = {"@context": "https://schema.org/", **jsonld.image_object(row, "https://cdn.example/dog.jpg")}
    page = f'<html><head><script type="application/ld+json">{html_json(document)}</script></head><body><p>x</p></body></html>'
    (found,) = extruct.extract(page, syntaxes=["json-ld"])["json-ld"]
    assert found == document
    graph = graph_of(found)
    (image,) = graph.subjects(rdflib.RDF.type, SCHEMA_ORG.ImageObject)
    names = list(graph.objects(image, SCHEMA_ORG.name))
    assert [str(name) for name in names] == ([text] if text else [])


def read(folder: Path, path: str) -> dict[str, Any]:
    return json.loads((folder / path).read_text(encoding="utf-8"))


def rows() -> list[ExportRow]:
    page = {"page_url": "https://shop.example/p/1?x=2"}
    return [
        export_row("/data/b/dog.jpg", page),
        export_row("/data/a/dog 1.jpg", page),
        export_row("/data/c.jpg", {"page_url": "https://shop.example/"}),
        export_row("/data/no page.jpg"),
        export_row("/elsewhere/x.jpg", page),
    ]


def test_a_document_an_image(tmp_path: Path) -> None:
    target = Target(str(tmp_path), ADDRESSES)
    assert jsonld.write(rows(), target) == {"images": 4, "documents": 4}
    for row in rows()[:4]:
        document = read(tmp_path, f"{row.uri.removeprefix('/data/')}.jsonld")
        assert len(list(graph_of(document).subjects(rdflib.RDF.type, SCHEMA_ORG.ImageObject))) == 1
        jsonschema.validate({name: value for name, value in document.items() if name != "@context"}, IMAGE_OBJECT)
    assert target.left_out.counts == {"no image URL": 1}


def test_a_document_a_page(tmp_path: Path) -> None:
    assert jsonld.write(rows(), Target(str(tmp_path), ADDRESSES), is_by_page=True) == {"images": 4, "documents": 3}
    document = read(tmp_path, "shop.example/p/1?x=2.jsonld")
    assert [image["contentUrl"] for image in document["@graph"]] == [
        "https://cdn.example/a/dog%201.jpg",
        "https://cdn.example/b/dog.jpg",
    ]
    assert len(list(graph_of(document).subjects(rdflib.RDF.type, SCHEMA_ORG.ImageObject))) == 2
    for image in document["@graph"]:
        jsonschema.validate(image, IMAGE_OBJECT)
    assert len(read(tmp_path, "shop.example/index.jsonld")["@graph"]) == 1
    assert len(read(tmp_path, "cdn.example/no%20page.jpg.jsonld")["@graph"]) == 1


def test_names_that_climb_stay_in_the_folder(tmp_path: Path) -> None:
    climbing = [export_row(f"/data/x.tar#{'../' * 5}etc/{number}.jpg") for number in range(2)]
    climbing += [
        export_row(f"/data/{number}.jpg", {"page_url": "https://shop.example/../../../x"}) for number in range(2)
    ]
    folder = tmp_path / "out"
    jsonld.write(climbing, Target(str(folder), ADDRESSES))
    jsonld.write(climbing, Target(str(folder), ADDRESSES), is_by_page=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list(folder.rglob("*.jsonld"))) == 4 + 3


def test_nothing_to_write_is_told(tmp_path: Path) -> None:
    with pytest.raises(NothingToExportError, match=r"nothing to export: no image URL \(1\)"):
        jsonld.write([export_row()], Target(str(tmp_path)))


def test_nasty_texts_in_files(tmp_path: Path) -> None:
    nasty = [export_row(f"/data/{number}.jpg", title=text) for number, text in enumerate(NASTY)]
    jsonld.write(nasty, Target(str(tmp_path), ADDRESSES))
    assert [read(tmp_path, f"{number}.jpg.jsonld")["name"] for number in range(len(NASTY))] == list(NASTY)
