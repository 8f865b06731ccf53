"""The written fields: which text each takes, how it reads, and that no text of any kind breaks a rule."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.tags import Category, ImageEvidence, Label, TagTexts
from vlm_ops.tag_texts import write_texts
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


@settings(max_examples=500, deadline=None)
@given(EVIDENCE, CATEGORIES)
def test_no_text_breaks_a_rule(evidence: ImageEvidence, categories: tuple[Category, ...]) -> None:
    texts = write_texts(evidence, categories)

    assert violations(texts) == {}
    assert bool(texts.alt_text) != bool(texts.alt_reason)
    assert set(texts.sources.values()) <= {"generated", "labels", "source_metadata"}
    for field in ("alt_text", "title", "caption", "description", "keywords"):
        assert bool(getattr(texts, field)) == (field in texts.sources)
    "".join(
        [texts.alt_text, texts.title, texts.caption or "", texts.description, *texts.keywords, *texts.doubts]
    ).encode()
