"""Sentences of names, and captions of metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_ops.sentences import CaptionTemplate, class_sentence, with_article


@pytest.mark.parametrize(
    ("name", "expected"), [("dog", "a dog"), ("otter", "an otter"), ("Egyptian cat", "an Egyptian cat")]
)
def test_articles(name: str, expected: str) -> None:
    assert with_article(name) == expected
    assert class_sentence(name) == f"a photo of {expected}"


def test_each_line_is_a_caption() -> None:
    template = CaptionTemplate("{{ color }}  {{ kind }}\n\n \n a {{ kind }} \n{{ color }} {{ kind }}\n")
    assert template.captions(json.dumps({"color": "blue", "kind": "shirt"})) == ["blue shirt", "a shirt"]


def test_what_is_missing_is_empty() -> None:
    template = CaptionTemplate("{{ color }} {{ maker.name }} {{ kind | default('thing') }}")
    assert template.captions('{"color": "red"}') == ["red thing"]
    assert CaptionTemplate("{{ color }}").captions(None) == []


def test_a_template_decides(tmp_path: Path) -> None:
    path = tmp_path / "captions.jinja"
    path.write_text(
        "{# Only shoes. #}{% if kind == 'shoes' %}a pair of {{ kind | lower }}{% endif %}", encoding="utf-8"
    )
    template = CaptionTemplate.read(str(path))
    assert template.captions('{"kind": "shoes"}') == ["a pair of shoes"] and template.captions('{"kind": "hat"}') == []


def test_what_is_no_template_says_where(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^template, line 2: unexpected '}'"):
        CaptionTemplate("fine\n{{ color }")
    path = tmp_path / "captions.jinja"
    path.write_text("{% if %}")
    with pytest.raises(ValueError, match=r"captions\.jinja, line 1: Expected an expression"):
        CaptionTemplate.read(str(path))
    with pytest.raises(FileNotFoundError):
        CaptionTemplate.read(str(tmp_path / "none.jinja"))


@pytest.mark.parametrize("source", ["{{ 1 / weight }}", "{{ weight.real() }}", "{{ undefined_filter() }}"])
def test_what_fails_on_some_metadata_says_on_which(source: str) -> None:
    with pytest.raises(ValueError, match='^shop.jinja fails on metadata {"weight": 0}: '):
        CaptionTemplate(source, "shop.jinja").captions('{"weight": 0}')


def test_a_template_cannot_reach_the_program() -> None:
    with pytest.raises(ValueError, match="unsafe"):
        CaptionTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").captions("{}")
