"""Plain texts, and where they may end."""

from __future__ import annotations

import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_ops.plain_text import MAX_READ, folded, is_mostly_latin, num_words, plain, sentences, shorten, word_is_cut

FAMILY, SCOTLAND = "👩‍👩‍👧‍👦", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"
SCRIPTS = (
    "a dog",
    "犬が走る",
    "。",
    "狗，",
    "สุนัข",
    "सुनहरा",
    "كلب",
    "é",
    "e\u0301",
    FAMILY,
    "👍🏽",
    "🇩🇪",
    " ",
    ". ",
    ", ",
    "x" * 40,
)
MIXED = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(SCRIPTS), max_size=40).map("".join))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a \t dog\r\n runs\u2028 ", "a dog runs"),
        ("<p>A <b>dog</b> &amp; a cat</p>", "A dog & a cat"),
        ("&amp;lt;b&amp;gt;bold&amp;lt;/b&amp;gt;", "bold"),
        ("a <script>alert('x')</script> dog <!-- hidden -->", "a dog"),
        ("a dog <script>never ends", "a dog"),
        ("a dog <style>p {}</style >here", "a dog here"),
        ("3 < 4 and 5 > 2, <3", "3 < 4 and 5 > 2, <3"),
        ("Q&A at AT&T", "Q&A at AT&T"),
        ("a\x00b\u202ec\u200bd\ufeff\u00ade\ud800\udfff", "abcde"),
        ("<\x00b>bold", "bold"),
        ("&#x202e;god &#0;", "god"),
        ("e\u0301", "é"),
        (f"{FAMILY} 👍🏽 ❤️ 🇩🇪", f"{FAMILY} 👍🏽 ❤️ 🇩🇪"),
        ("می‌خواهم", "می‌خواهم"),  # a joiner that Persian needs
        ("\u200d\u200c", ""),
        (SCOTLAND, "🏴"),  # its tags are characters that nobody sees
        (None, ""), (3, ""), (["a dog"], ""), (b"a dog", ""),
    ],
)  # fmt: skip
def test_plain(text: object, expected: str) -> None:
    assert plain(text) == expected


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        MIXED,
        st.lists(
            st.sampled_from(["<", ">", "&", ";", "amp", "lt", "#x3c", "script", "/", "!--", "b", "\x00", "\u202e"])
        ).map("".join),
    )
)
def test_plain_text_stays_as_it_is(text: str) -> None:
    made = plain(text)
    assert plain(made) == made
    assert not any(unicodedata.category(char) in ("Cc", "Cs", "Co") for char in made)
    assert not {unicodedata.bidirectional(char) for char in made} & {
        "LRE",
        "RLE",
        "LRO",
        "RLO",
        "PDF",
        "LRI",
        "RLI",
        "FSI",
        "PDI",
    }
    made.encode()


def test_long_texts_are_read_to_a_word() -> None:
    text = plain("wordy " * MAX_READ)
    assert len(text) <= MAX_READ
    assert set(text.split()) == {"wordy"}
    assert plain("x" * (MAX_READ + 1)) == ""
    assert len(plain("犬" * (MAX_READ + 1))) == MAX_READ


def test_markup_that_never_closes_takes_no_time() -> None:
    for text in ("<script>" * 2500, "<!--" * 5000, "<a" * 10_000, "&lt;" * 5000, "&" * 20_000, "<a <" * 5000):
        assert plain(text).count("<script") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Prix RÉDUIT", "prix reduit"),
        ("e\u0301 Straße", "e strasse"),
        ("ＳＡＬＥ ﬁnal ½", "sale final 1⁄2"),
        ("SALE 50% OFF", "sale 50% off"),
        ("狗", "狗"),
    ],
)
def test_folded(text: str, expected: str) -> None:
    assert folded(text) == expected


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("A dog runs", 10, "A dog runs"),
        ("A dog runs away", 12, "A dog runs"),
        ("A man in a black jacket is walking down a snowy hill", 40, "A man in a black jacket"),
        ("A dog runs. It is black and very large indeed.", 30, "A dog runs."),
        ("Dr. Smith walks his large black dog in the park", 20, "Dr. Smith walks"),
        ("White dog with a ball in its mouth", 30, "White dog with a ball"),
        ("Man in a blue shirt looking at the camera", 30, "Man in a blue shirt"),
        ("A large concrete wall with red lettering", 33, "A large concrete wall"),
        ("red, green, blue, yellow", 14, "red, green"),
        ("x" * 20, 10, ""),
        ("dog " + "x" * 20, 10, "dog"),
        ("犬が公園で走っています。猫は寝ています。", 15, "犬が公園で走っています。"),
        ("犬が公園で、猫が家で寝ています", 8, "犬が公園で"),
        ("犬が公園で走っています", 6, "犬が公園で走"),
        ("東京Tower高層建築物", 5, "東京"),
        (FAMILY * 3, 10, FAMILY),
        ("🇩🇪" * 4, 5, "🇩🇪🇩🇪"),
        ("", 5, ""),
    ],
)  # fmt: skip
def test_shorten(text: str, limit: int, expected: str) -> None:
    assert shorten(text, limit) == expected


@settings(max_examples=500, deadline=None)
@given(MIXED.map(plain), st.integers(1, 60))
def test_what_is_shortened_is_a_beginning_that_cuts_nothing(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert len(short) <= limit
    assert text.startswith(short)
    assert not word_is_cut(text, len(short))
    if short and short != text:
        clusters = regex.findall(r"\X", text)
        assert short in {"".join(clusters[:n]) for n in range(len(clusters) + 1)}
        following = text[len(short)]
        assert not (short[-1].isascii() and short[-1].isalnum() and following.isascii() and following.isalnum())


def test_a_cut_word_is_seen() -> None:
    text = "A dog👍🏽 in 東京"
    assert [end for end in range(len(text) + 1) if word_is_cut(text, end)] == [3, 4, 6, 9]


def test_sentences() -> None:
    assert sentences("A dog. Dr. Smith, e.g. him! Why? 犬。猫。 end") == [
        "A dog.",
        "Dr. Smith, e.g. him!",
        "Why?",
        "犬。",
        "猫。",
        "end",
    ]
    assert sentences("") == []
    assert sentences('He said "go." She 3.5 went') == ['He said "go."', "She 3.5 went"]


def test_scripts() -> None:
    assert is_mostly_latin("Ein Hund läuft, 犬") and is_mostly_latin("123") and is_mostly_latin("")
    assert not is_mostly_latin("черная собака dog")


def test_words_of_scripts_without_spaces_are_counted_by_length() -> None:
    assert [num_words(text) for text in ("a black dog", "犬", "犬が公園で走っています", "")] == [3, 1, 4, 0]
