"""What English captions name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_ops.caption_words import doings, noun_phrases, reads_english


@pytest.mark.parametrize(
    ("caption", "names"),
    [
        ("a black dog is running on the beach", ["black dog", "beach"]),
        ("Two brown dogs sniff in the grass .", ["brown dogs", "grass"]),
        ("a young girl in a swimming pool", ["young girl", "swimming pool"]),
        ("A black and white dog runs", ["dog"]),
        ("a man in red and a woman in black", ["man", "woman"]),
        ("a white men's watch", ["white men's watch"]),
        ("A boy takes a large jump", ["boy", "large jump"]),
        ("A man is swinging on a swing", ["man", "swing"]),
        ("A ball near waves", ["ball", "waves"]),
        ("A man tries to surf", ["man"]),
        ("A man tries to evade a tackler next to water", ["man", "tackler", "water"]),
        ("A man dressed in blue holds a sign", ["man", "sign"]),
        ("A boy turning a somersault", ["boy", "somersault"]),
        ("a pair of pink running shoes", ["pink running shoes"]),
        ("A snow covered hill", ["snow", "hill"]),
        ("a group of people in front of a building in the background", ["people", "building"]),
        ("a man 's wet dog", ["man's wet dog"]),
        ("a very big old red double decker bus", ["double decker bus"]),
        ("it is what it is", []),
        ("", []),
    ],
)
def test_noun_phrases(caption: str, names: list[str]) -> None:
    assert list(noun_phrases(caption)) == names


def test_doings_are_those_that_say_something() -> None:
    assert doings("a man wearing a hat is skiing past a building") == ["skiing"]
    assert doings("a girl is swinging on a swing") == []


def test_english_is_told_from_other_languages_where_a_text_is_long_enough() -> None:
    assert reads_english("A dog runs across the wet sand")
    assert reads_english("Chien noir")
    assert not reads_english("Ein schwarzer Hund läuft schnell durch hohes Gras")
    assert not reads_english("Un chien noir court sur une plage")


@given(st.text())
def test_any_text_has_some(text: str) -> None:
    for name in noun_phrases(text):
        assert 1 <= len(name.split()) <= 3
    doings(text)
