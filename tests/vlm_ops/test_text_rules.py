"""Each rule, broken by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schemas.tags import TagTexts
from vlm_ops.text_rules import (
    alt_text_violations,
    caption_violations,
    description_violations,
    keywords_violations,
    language_violations,
    repeats,
    slug_violations,
    title_violations,
    violations,
)

GOOD = TagTexts(
    alt_text="A black dog runs on the beach.",
    alt_reason=None,
    title="Black dog on the beach",
    caption="A black dog runs on the beach.",
    description="A black dog runs on the beach. It is wet.",
    keywords=("black dog", "beach", "sea"),
    slug="black-dog-on-the-beach-1x",
    language="en-GB",
)
PICTURE, LIST, FILE, HTML, URL = (
    'it says that it is a picture ("image of")', "it is a list of keywords", "it is a file name", "it has HTML in it",
    "it has a URL in it",
)  # fmt: skip
CONTROLS = "it has control or invisible characters, or more than single spaces"
CUT = "it ends with an ellipsis, as a text does that was cut"


def test_good_fields_break_no_rule() -> None:
    assert violations(GOOD) == {}
    assert (
        violations(
            replace(GOOD, alt_text="", alt_reason="decorative", title="", caption=None, description="", keywords=())
        )
        == {}
    )


def test_violations_are_told_by_field() -> None:
    bad = replace(GOOD, title="<b>Dog</b>", keywords=("dog", "dogs"), slug="A", language="english!")
    assert violations(bad) == {
        "title": [HTML],
        "keywords": ["'dogs' repeats 'dog'"],
        "slug": ["it has other characters than a-z, 0-9 and single hyphens between them"],
        "language": ["'english!' is no language tag of BCP 47"],
    }


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("A dog " * 30, "it has 180 characters; at most 125 are allowed"),
        *[(f"{start} a dog in the park", PICTURE) for start in (
            "Image of", "An image of", "a picture of", "Photo of", "The photograph of", "Pictures of", "IMAGE OF", "This is a photo of",
            "Close-up photo of", "A black and white picture of", "Image:", "Photo showing", "This image shows", "Bild von", "Ein Foto von",
            "Une photo de", "Una foto di", "Imagen de",
        )],
        ("shoes, red shoes, cheap shoes, buy shoes online", LIST),
        ("dog, park, ball", LIST),
        ("dog | park | ball | summer", LIST),
        ("dog; park; ball; sun", LIST),
        ("#dog #beach", LIST), ("dog photo stock beach dog golden retriever puppy", LIST),
        ("犬、公園、球、夏", LIST),
        ("Buy cheap shoes, best shoes and shoes for your shoes", LIST),
        ("IMG_1234.JPG", FILE), ("red-shoe.png", FILE), ("A dog (dog.jpeg)", FILE), ("DSC01234", FILE), ("IMG_20200101_120000", FILE),
        ("red_shoe", FILE), ("red-shoe-2020", FILE), ("black-dog-on-the-beach", FILE), ("0012345", FILE), ("3f2a9c1b7d", FILE),
        ("127708b5-72ad-4793-9512-3d33427459bb", FILE), ("Screenshot 2020-01-01", FILE), ("PXL-20210304", FILE),
        ("A dog...", CUT), ("A dog runs …", CUT),
        ("A <b>dog</b> runs", HTML), ("A dog &amp; a cat", HTML), ("A dog <br/> runs", HTML),
        ("A dog, see https://dogs.example", URL), ("A dog of www.dogs.example", URL), ("javascript:alert(1) dog", URL),
        ("A dog\nruns", CONTROLS), ("A  dog", CONTROLS), (" A dog", CONTROLS), ("A dog\u202e", CONTROLS), ("A\x00 dog", CONTROLS),
        ("A dog\ud800", CONTROLS),
        ("!?", "it has no word in it"), ("👍🏽", "it has no word in it"), ("x", "it has no word in it"),
        ("image", "it is a placeholder"), ("Untitled", "it is a placeholder"), ("N/A", "it is a placeholder"), ("null", "it is a placeholder"),
    ],
)  # fmt: skip
def test_alternative_texts_that_break_a_rule(text: str, wrong: str) -> None:
    assert wrong in alt_text_violations(text)


@pytest.mark.parametrize(
    "text",
    [
        "A red, a white and a blue flag", "A woman, a man, and a dog sit on a bench", "Apples, oranges, bananas and grapes",
        "Dog with a bell attached to its collar.", "T-shirt", "A merry-go-round", "Jack-in-the-box", "Mother-in-law", "iPhone 15 Pro",
        "A painting of a dog", "Photographer at work", "A photographer takes a picture of a dog", "Imagery of war", "犬", "一只狗在公园里，追着一个红色的球",
        "Собака бежит", "A Boeing 747-400 lands", "WALL-E and EVE", "A man says: hello", "Beethoven's 5th", "A dog 👍🏽", "AT&T shop",
        "Dog: a portrait", "Nike Air Max, black, men", "Elizabeth II", "Cafe in 1920s style", "Honeydews", "Deadbeef steak", "A.M. traffic",
    ],
)  # fmt: skip
def test_alternative_texts_that_are_fine(text: str) -> None:
    assert alt_text_violations(text) == []


def test_an_empty_alternative_text_wants_a_reason_and_no_other_has_one() -> None:
    assert alt_text_violations("") == ["it is empty, and no reason is given"]
    assert alt_text_violations("", "decorative") == []
    assert alt_text_violations("A dog", "decorative") == ["a reason is given for its being empty, but it is not"]


def test_lengths_are_those_of_code_points() -> None:
    assert title_violations("é" * 60) == []
    assert title_violations("é" * 61) == ["it has 61 characters; at most 60 are allowed"]
    assert caption_violations("é" * 501) == ["it has 501 characters; at most 500 are allowed"]
    assert description_violations("é" * 501) == ["it has 501 characters; at most 500 are allowed"]
    assert slug_violations("x" * 61) == ["it has 61 characters; at most 60 are allowed"]


def test_captions_are_text_or_null() -> None:
    assert caption_violations(None) == []
    assert caption_violations("") == ["it is empty; it is null where there is none"]
    assert caption_violations("a.jpg") == [FILE]


def test_descriptions_have_up_to_three_sentences() -> None:
    assert description_violations("One is. Two are. Dr. Three is, e.g. here.") == []
    assert description_violations("One is. Two are. Three are! Four are?") == [
        "it has 4 sentences; at most 3 are allowed"
    ]


@pytest.mark.parametrize(
    ("keywords", "wrong"),
    [
        (("Dog",), "'Dog': it is not lower case"),
        (("a very black dog",), "'a very black dog': it has 4 words; at most 3 are allowed"),
        (("dog, cat",), "'dog, cat': it holds a separator"),
        (("x" * 41,), f"'{'x' * 41}': it has 41 characters; at most 40 are allowed"),
        (("",), "'': it has no word in it"),
        (("dog.jpg",), "'dog.jpg': it is a file name"),
        (("dog", "dog"), "'dog' repeats 'dog'"),
        (("dog", "dogs"), "'dogs' repeats 'dog'"),
        (("dresses", "dress"), "'dress' repeats 'dresses'"),
        (("children", "child"), "'child' repeats 'children'"),
        (("black dog", "dog"), "'dog' repeats 'black dog'"),
        (("dog", "black dogs"), "'black dogs' repeats 'dog'"),
        (("t-shirt", "tshirts"), "'tshirts' repeats 't-shirt'"),
        (("dog black", "black dog"), "'black dog' repeats 'dog black'"),
        (("black dog", "white dog", "brown dog"), "more than 2 keywords have the word 'dog'"),
        (
            ("ant", "bee", "cow", "dog", "eel", "fly", "gnu", "hen", "imp", "jay", "kid"),
            "there are 11; at most 10 are allowed",
        ),
    ],
)
def test_keywords_that_break_a_rule(keywords: tuple[str, ...], wrong: str) -> None:
    assert wrong in keywords_violations(keywords)


def test_keywords_that_are_fine() -> None:
    assert keywords_violations(("black dog", "white dog", "men's shoe", "glasses", "glass", "犬", "собака")) == []
    assert not repeats("bus", "boss")


@pytest.mark.parametrize("slug", ["", "-dog", "dog-", "a--b", "Dog", "dög", "a b", "a_b", "a/b"])
def test_slugs_that_break_a_rule(slug: str) -> None:
    assert slug_violations(slug) == ["it has other characters than a-z, 0-9 and single hyphens between them"]


@pytest.mark.parametrize(
    "tag",
    [
        "en",
        "en-GB",
        "zh-Hant-TW",
        "und",
        "sl-rozaj-biske",
        "de-CH-1996",
        "x" * 3,
        "en-x-own",
        "es-419",
        "hy-Latn-IT-arevela",
    ],
)
def test_language_tags(tag: str) -> None:
    assert language_violations(tag) == []


@pytest.mark.parametrize("tag", ["", "e", "english language", "en_GB", "en-", "-en", "en--GB", "123", "en\n"])
def test_language_tags_that_are_none(tag: str) -> None:
    assert language_violations(tag) == [f"{tag!r} is no language tag of BCP 47"]
