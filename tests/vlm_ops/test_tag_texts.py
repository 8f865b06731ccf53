"""The written fields: which text each takes, how it reads, and that no text of any kind breaks a rule."""

from __future__ import annotations

import json
import re
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.tags import Box, Category, FoundText, ImageEvidence, Label, TagTexts
from vlm_ops.plain_text import plain, word_is_cut
from vlm_ops.tag_texts import slug, write_texts
from vlm_ops.text_rules import violations


def write(categories: tuple[Category, ...] = (), language: str = "en", **evidence: Any) -> TagTexts:
    texts = write_texts(ImageEvidence(1, "photos/1.jpg", **evidence), categories, language)
    assert violations(texts) == {}
    return texts


def generated(caption: str, score: float = 0.95, **evidence: Any) -> TagTexts:
    return write(caption=caption, caption_source="generated", caption_score=score, **evidence)


PIECES = st.sampled_from(
    [
        "a dog", " ", "runs", "an image of ", "picture of", "photo of a", "<b>", "</b>", "<script>x</script>", "&lt;b&gt;",
        "&amp;amp;", "&#x202e;", "&#0;", "IMG_1234.JPG", "red_shoe.png", "shoes, red shoes, cheap shoes, buy shoes",
        "https://example.com/x", "www.example.com", "\n", "\t", "\x00", "\u202e", "\u200b", "\u200d", "\ud800", "\udfff",
        "👩‍👩‍👧‍👦", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "👍🏽", "❤️", "🇩🇪", "é", "e\u0301", "\u0301\u0302\u0303", "Straße", "犬が公園で走っています。",
        "在公园里，一只狗追着球", "สุนัขวิ่งในสวน", "सुनहरा कुत्ता", "كلب أسود يجري", "כלב שחור", "черная собака", "μαύρος ΣΚΥΛΟΣ", "한국어 개",
        "\"", "'", "`", "...", "…", "#tag #tag", "x" * 200, "dog " * 60, "İ", "ǅ", "ﬁ", "\ufeff", "\U000e0041", "ㅤ", "<", "&", ",",
        "; ", "|", "n/a", "null", "1234567890", "\ufffd", "\x1c", "—", "mother-in-law", "man 's", "UNK", "[UNK]", "<unk>",
    ]
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=300),
    st.text(st.characters(), max_size=200),
    st.lists(PIECES, max_size=30).map("".join),
    st.lists(PIECES, max_size=30).map(" ".join),
    st.tuples(PIECES, st.integers(1, 5000)).map(lambda pair: (pair[0] * pair[1])[:10_000]),
)
VALUES = st.one_of(
    TEXTS, st.lists(TEXTS, max_size=5), st.none(), st.integers(), st.floats(), st.dictionaries(TEXTS, TEXTS)
)
FIELDS = st.sampled_from(
    ["alt", "Alt Text", "alt_text", "title", "name", "product_name", "headline", "caption", "description", "keywords", "tags",
     "lang", "language", "inLanguage", "label", "kind", "product_type", "colour", "color", "brand", "category", "gender", "usage", ""]
)  # fmt: skip
EVIDENCE = st.builds(
    ImageEvidence,
    st.integers(0, 2**63 - 1),
    TEXTS,
    key=TEXTS,
    width=st.one_of(st.none(), st.integers(1, 300)),
    height=st.one_of(st.none(), st.integers(1, 300)),
    caption=st.one_of(st.none(), TEXTS),
    caption_source=st.sampled_from([None, "generated", "labels"]),
    caption_score=st.one_of(st.none(), st.floats(0, 1)),
    labels=st.lists(st.builds(Label, TEXTS, st.floats(0, 1)), max_size=4).map(tuple),
    source_captions=st.lists(TEXTS, max_size=3).map(tuple),
    metadata=st.dictionaries(FIELDS, VALUES, max_size=6),
    colors=st.one_of(st.just(()), st.just((("#ffffff", 1.0),))),
)
CATEGORIES = st.lists(
    st.builds(Category, TEXTS, st.lists(TEXTS, max_size=3).map(tuple), st.floats(0, 1)), max_size=3
).map(tuple)


@settings(max_examples=300, deadline=None)
@given(EVIDENCE, CATEGORIES)
def test_no_text_breaks_a_rule(evidence: ImageEvidence, categories: tuple[Category, ...]) -> None:
    texts = write_texts(evidence, categories)

    assert violations(texts) == {}
    assert bool(texts.alt_text) != bool(texts.alt_reason)
    assert set(texts.sources.values()) <= {"generated", "labels", "source_metadata"}
    for field in ("alt_text", "title", "caption", "description", "keywords"):
        assert bool(getattr(texts, field)) == (field in texts.sources)
    written = [texts.alt_text, texts.title, texts.caption or "", texts.description, *texts.keywords, texts.slug]
    for text in written:  # beside the rules' own code
        text.encode()
        assert not {unicodedata.category(char) for char in text} & {"Cc", "Cs", "Co", "Zl", "Zp"}
        assert not set("\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200b\ufeff") & set(text)
    assert len(texts.alt_text) <= 125 and len(texts.title) <= 60 and len(texts.slug) <= 60 and len(texts.keywords) <= 10
    assert not re.match(r"(an? |the )?(image|picture|photo)s? of ", texts.alt_text, re.I)
    "".join(texts.doubts).encode()


@settings(max_examples=200, deadline=None)
@given(TEXTS)
@example("A。\u0300")
def test_no_word_is_cut(caption: str) -> None:
    """Whatever is shown of a caption ends where one of its words does."""
    texts = write_texts(ImageEvidence(1, "1.jpg", source_captions=(caption,)), ())
    whole = plain(caption)
    for text in (texts.alt_text, texts.title, texts.caption or ""):
        start = whole.find(text.rstrip("."))
        if text and start >= 0:
            assert not word_is_cut(whole, start + len(text.rstrip(".")))


def test_texts_of_a_photo_with_a_generated_caption() -> None:
    texts = generated(
        "a black and white dog is running through the man 's garden", labels=(Label("Border collie", 0.8),)
    )
    assert texts.alt_text == "A black and white dog is running through the man's garden."
    assert texts.title == "Black and white dog running through the man's garden"
    assert texts.caption == texts.description == texts.alt_text
    assert texts.keywords == ("dog", "man's garden", "running", "border collie")
    assert texts.slug == "black-and-white-dog-running-through-the-mans-garden-1"
    assert texts.language == "en"
    assert set(texts.sources.values()) == {"generated"}
    assert (texts.alt_reason, texts.doubts) == (None, ())


def test_texts_of_a_product() -> None:
    metadata = {
        "title": "Acme Men White Printed T-shirt", "label": "Tshirts", "category": "Apparel", "subcategory": "Topwear",
        "colour": "White", "gender": "Men", "usage": "Casual", "brand": "Acme", "price": 3,
    }  # fmt: skip
    texts = generated("a white men's t-shirt", metadata=metadata)
    assert texts.alt_text == texts.title == "Acme Men White Printed T-shirt"
    assert texts.caption == "A white men's t-shirt."
    assert texts.description == "Acme Men White Printed T-shirt. Tshirts (topwear) in white for men, by Acme."
    assert texts.keywords == ("white tshirts", "acme", "topwear", "apparel", "casual", "men")
    assert texts.sources == {
        "alt_text": "source_metadata", "title": "source_metadata", "caption": "generated",
        "description": "source_metadata", "keywords": "source_metadata",
    }  # fmt: skip
    assert texts.doubts == ()


def test_the_source_s_own_texts_come_first() -> None:
    own = {
        "alt": "Dog at sea",
        "name": "Rex",
        "description": "Rex swims. He is wet. It is cold. It is late.",
        "tags": "Rex, sea,Dogs",
    }
    texts = generated("a cat", metadata=own, source_captions=("A dog swims .",))
    assert texts.alt_text == "Dog at sea"
    assert texts.title == "Rex"
    assert texts.caption == "A dog swims."
    assert texts.description == "Rex swims. He is wet. It is cold."
    assert texts.keywords[:3] == ("rex", "sea", "dogs")
    assert set(texts.sources.values()) == {"source_metadata"}


@pytest.mark.parametrize("name", ["alt", "ALT", "alt_text", "Alt Text", "alt-text", "altText"])
def test_field_names_are_known_in_any_spelling(name: str) -> None:
    assert write(metadata={name: "Dog at sea"}).alt_text == "Dog at sea"


@pytest.mark.parametrize(
    ("alt", "why"),
    [
        ("IMG_0001.JPG", "it is a file name"),
        ("dog, sea, beach, summer", "it is a list of keywords"),
        ("see https://dogs.example", "it has a URL in it"),
        ("image", "it is a placeholder"),
        ("A dog ...", "it ends with an ellipsis, as a text does that was cut"),
        ("x" * 200, None),  # no word of it fits
    ],
)
def test_a_text_that_breaks_a_rule_is_replaced_and_told(alt: str, why: str | None) -> None:
    texts = generated("a dog swims in the blue sea", metadata={"alt": alt, "title": alt})
    assert texts.alt_text == "A dog swims in the blue sea."
    assert texts.sources["alt_text"] == "generated"
    told = [doubt for doubt in texts.doubts if "'alt' is not used as alternative text" in doubt]
    assert told == ([f"the source's 'alt' is not used as alternative text: {why}"] if why else [])


@pytest.mark.parametrize(
    ("text", "alt"),
    [
        ("Image of a dog", "a dog"),
        ("This is a photo of a picture of a dog", "a dog"),
        ("<p>A <b>dog</b> &amp; a cat</p>", "A dog & a cat"),
        ("A\u202e dog\x00 \ud800runs\n fast", "A dog runs fast"),
        ('He said "sit" & <3', 'He said "sit" & <3'),
        ("An old fisherman mends a long green net on the wooden deck of his small boat while two gulls wait on the mast above him and watch",
         "An old fisherman mends a long green net on the wooden deck of his small boat while two gulls wait on the mast"),
    ],
)  # fmt: skip
def test_alternative_texts_are_tidied(text: str, alt: str) -> None:
    assert write(metadata={"alt": text}).alt_text == alt


def test_a_caption_that_is_made_of_labels() -> None:
    texts = write(
        caption="a photo of a swimming trunks", caption_source="labels", labels=(Label("swimming trunks", 0.3),)
    )
    assert (texts.alt_text, texts.title) == ("Swimming trunks.", "Swimming trunks")
    assert set(texts.sources.values()) == {"labels"}
    assert texts.doubts[0] == "named by a class that is not likely: its probability is below 0.5"


def test_labels_alone_name_an_image() -> None:
    texts = write(labels=(Label("otter", 0.9), Label("mink", 0.05)))
    assert (texts.alt_text, texts.title, texts.keywords, texts.caption) == ("An otter", "Otter", ("otter",), None)
    assert set(texts.sources.values()) == {"labels"}


def test_nothing_known_gives_an_empty_text_with_its_reason() -> None:
    texts = write(width=100, height=100, labels=(Label("nematode", 0.01),), colors=(("#123456", 0.4),))
    assert (texts.alt_text, texts.alt_reason) == ("", "nothing is known of it")
    assert (texts.title, texts.caption, texts.description, texts.keywords) == ("", None, "", ())
    assert texts.slug == "image-1"
    assert texts.doubts == ("nothing is known of it", "fewer than 3 keywords have evidence")


def test_known_texts_that_are_all_unusable_are_told() -> None:
    texts = write(metadata={"alt": "IMG_0001.JPG"})
    assert texts.alt_reason == "nothing that is known of it can be used"
    assert texts.doubts[0] == "the source's 'alt' is not used as alternative text: it is a file name"


PLAIN = {"labels": (Label("nematode", 0.01),), "colors": (("#ffffff", 0.99),), "texts": (), "width": 200, "height": 200}


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        ({"width": 1, "height": 1}, "decorative: a spacer or rule of 1 x 1 pixels"),
        ({"width": 600, "height": 8, "caption": "a dog"}, "decorative: a spacer or rule of 600 x 8 pixels"),
        ({"width": 600, "height": 30, "texts": ()}, "decorative: a rule or border of 600 x 30 pixels"),
        (PLAIN, "decorative: 99% of it is one plain colour (#ffffff)"),
        (
            PLAIN | {"caption": "a white shirt", "caption_source": "generated"},
            "decorative: 99% of it is one plain colour (#ffffff)",
        ),
    ],
)
def test_decorative_images(evidence: dict[str, Any], reason: str) -> None:
    texts = write(**evidence)
    assert (texts.alt_text, texts.alt_reason) == ("", reason)
    assert (texts.title, texts.caption, texts.description, texts.keywords, texts.sources) == ("", None, "", (), {})
    assert texts.doubts == ()


@pytest.mark.parametrize(
    "more",
    [
        {"labels": (Label("belt", 0.2),)},
        {"colors": (("#ffffff", 0.98),)},
        {"texts": (FoundText("SALE", 0.9, Box(0, 0, 1, 1)),)},
        {"metadata": {"title": "White belt"}},
        {"source_captions": ("A white belt on white",)},
        {"colors": ()},
    ],
)
def test_images_that_are_not_decorative(more: dict[str, Any]) -> None:
    assert not (write(**(PLAIN | more)).alt_reason or "").startswith("decorative")


def test_one_colour_is_doubtful_where_no_text_was_looked_for() -> None:
    assert write(**(PLAIN | {"texts": None})).doubts == ("taken for decorative, but no text was looked for in it",)


def test_a_caption_that_agrees_with_the_source_is_used_and_one_that_does_not_says_nothing() -> None:
    agrees = generated("a white men's shirt", metadata={"label": "Shirt"})
    assert (agrees.alt_text, agrees.keywords) == ("A white men's shirt.", ("white men's shirt",))
    differs = generated("a little boy is playing with a ball", metadata={"label": "Yellow-Onion", "category": "Onion"})
    assert differs.alt_text == "Yellow-Onion (onion)"
    assert differs.keywords == ("yellow-onion", "onion")
    assert differs.caption is None


@pytest.mark.parametrize("label", ["3", "0017", "class_3.jpg", "x" * 61, "https://kinds.example"])
def test_a_label_that_is_no_name_says_nothing(label: str) -> None:
    assert generated("a dog and a ball in the snow", metadata={"label": label}) == generated(
        "a dog and a ball in the snow"
    )


def test_categories_stand_behind_what_the_first_caption_names() -> None:
    captions = ("A black dog on a beach .", "An animal and its ball near waves .")
    texts = generated("a dog in the sand", source_captions=captions, categories=(Category("1", ("Pets",), 0.9),))
    assert texts.keywords == ("black dog", "beach", "pets", "animal", "ball", "waves", "sand")


def test_an_unsure_caption_is_doubted() -> None:
    assert "the caption is unsure: its score is below 0.8" in generated("a dog in the snow", score=0.42).doubts
    assert generated("a dog and a ball in the snow", score=0.8).doubts == ()


def test_the_text_of_a_picture_of_text_is_its_alternative() -> None:
    lines = (
        FoundText("GRAND", 0.99, Box(0, 0, 1, 0.4)),
        FoundText("OPENING", 0.95, Box(0, 0.5, 1, 1)),
        FoundText("x9", 0.3, Box(0, 0, 1, 1)),
    )
    mostly = generated("a man is standing", texts=lines, text_share=0.5)
    assert (mostly.alt_text, mostly.title) == ('Text: "GRAND OPENING"', "GRAND OPENING")
    little = generated("a man is standing beside a sign", texts=lines, text_share=0.05)
    assert little.alt_text == "A man is standing beside a sign."
    assert little.description == 'A man is standing beside a sign. Text in the picture: "GRAND OPENING".'


def test_keywords_are_lower_case_ordered_and_without_twins() -> None:
    categories = (
        Category("1", ("Pets", "Dogs"), 0.9),
        Category("2", ("Style & Fashion",), 0.6),
        Category("3", ("Cars",), 0.2),
    )
    metadata = {"keywords": ["Black Dog", "dogs", "DOG", "#beach", "a, b", "one two three four", "", 3, "IMG_1.jpg"]}
    texts = generated("two black dogs on a beach with a ball", metadata=metadata, categories=categories)
    assert texts.keywords == ("black dog", "beach", "ball", "style and fashion")
    assert texts.sources["keywords"] == "source_metadata"


def test_too_few_keywords_are_doubted_and_none_is_invented() -> None:
    texts = generated("a dog")
    assert texts.keywords == ("dog",)
    assert texts.doubts == ("fewer than 3 keywords have evidence",)


@pytest.mark.parametrize(
    ("metadata", "language"),
    [
        ({"alt": "A dog at sea"}, "en"),
        ({"alt": "Ein Hund am Meer", "lang": "DE-de"}, "de-DE"),
        ({"alt": "Un chien", "inLanguage": "fr_fr"}, "fr-FR"),
        ({"alt": "狗在海边", "language": "zh-hant-tw"}, "zh-Hant-TW"),
        ({"alt": "狗在海边"}, "und"),
        ({"alt": "Ein schwarzer Hund läuft schnell durch hohes Gras"}, "und"),
        ({"alt": "A dog at sea", "lang": "not a language!"}, "en"),
    ],
)
def test_the_language_is_that_of_the_source_s_texts(metadata: dict[str, str], language: str) -> None:
    texts = write(metadata=metadata)
    assert texts.language == language


def test_languages_that_are_mixed_are_doubted() -> None:
    texts = generated("a dog on a beach", metadata={"alt": "Ein Hund am Strand", "lang": "de"})
    assert texts.language == "de"
    assert texts.caption == "A dog on a beach."
    assert "some fields are in en, others in the source's language" in texts.doubts
    assert generated("ein Hund", language="de").language == "de"


def test_slugs_are_ascii_and_different_for_every_image() -> None:
    assert slug("Größe & Straße: 犬!", 35) == "grosse-strasse-quan-z"
    assert slug("", 36) == "image-10"
    assert slug("Man in front of the", 0) == "man-in-front-0"
    longest = slug("word " * 30, 2**63 - 1)
    assert longest == "word-word-word-word-word-word-word-word-word-1y2p0ij32e8e7" and len(longest) <= 60
    assert len(slug("x" * 100, 2**63 - 1)) == 60


@given(st.text(), st.text(), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_slugs_tell_images_apart_whatever_their_titles(first: str, second: str, one: int, other: int) -> None:
    assert (slug(first, one) == slug(second, other)) <= (one == other)
    assert int(slug(first, one).rpartition("-")[2], 36) == one


def test_the_photos_of_the_dev_split_have_no_violation(dev_shard: Path) -> None:
    """Their captions by people, each as if it were the only one, and as if a model had written it."""
    with tarfile.open(dev_shard) as shard:
        captions = [
            caption
            for member in shard
            if member.name.endswith(".json")
            for caption in json.loads(shard.extractfile(member).read())["captions"]  # type: ignore[union-attr]
        ]
    assert len(captions) == 5000
    for number, caption in enumerate(captions[::2]):
        own = write_texts(ImageEvidence(number, f"{number}.jpg", source_captions=(caption,)), ())
        made = write_texts(ImageEvidence(number, f"{number}.jpg", caption=caption, caption_source="generated"), ())
        assert violations(own) == violations(made) == {}
        assert own.alt_text and made.alt_text
