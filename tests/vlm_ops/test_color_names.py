from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageColor

from vlm_ops.color_names import COLOR_NAMES, color_name

CHANNEL = st.integers(0, 255)


def hex_of(red, green, blue):
    return f"#{red:02x}{green:02x}{blue:02x}"


@pytest.mark.parametrize(
    ("color", "name"),
    [
        ("#000000", "black"), ("#ffffff", "white"), ("#808080", "grey"), ("#ff0000", "red"), ("#ffa500", "orange"), ("#ffff00", "yellow"),
        ("#008000", "green"), ("#0000ff", "blue"), ("#800080", "purple"), ("#ffc0cb", "pink"), ("#8b4513", "brown"), ("#000080", "navy"),
        ("#f5f5dc", "beige"), ("#40e0d0", "turquoise"), ("#800000", "maroon"), ("#808000", "olive"), ("#008080", "teal"), ("#d4af37", "gold"),
        ("#36454f", "grey"), ("#f5deb3", "beige"), ("#87ceeb", "blue"), ("#228b22", "green"), ("#dc143c", "red"), ("#4b0082", "purple"),
    ],
)  # fmt: skip
def test_known_colors(color, name):
    assert color_name(color) == name
    assert color_name(color.removeprefix("#").upper()) == name


def test_names_agree_with_those_of_css():
    """`darkgreen` is green, `skyblue` blue. Where CSS names a shade by another word, nothing is said."""
    asked, agreed = 0, 0
    for css_name in ImageColor.colormap:
        basic = [name for name in COLOR_NAMES if css_name.replace("gray", "grey").endswith(name)]
        if basic:
            asked += 1
            agreed += color_name(hex_of(*ImageColor.getrgb(css_name))) in basic
    assert asked > 80
    assert agreed >= 0.75 * asked


@given(CHANNEL, CHANNEL, CHANNEL)
def test_every_color_has_a_name(red, green, blue):
    assert color_name(hex_of(red, green, blue)) in COLOR_NAMES


@given(CHANNEL)
def test_greys_are_black_grey_or_white(level):
    assert color_name(hex_of(level, level, level)) in ("black", "grey", "white")


@given(CHANNEL, st.tuples(*[st.integers(-2, 2)] * 3))
def test_nearly_greys_have_no_hue(level, noise):
    red, green, blue = (min(255, max(0, level + each)) for each in noise)
    if level >= 40:  # darker, two steps are a hue
        assert color_name(hex_of(red, green, blue)) in ("black", "grey", "white")


@pytest.mark.parametrize("color", ["", "red", "#fff", "#12345g", "#1234567", "##123456"])
def test_what_is_no_color(color):
    with pytest.raises(ValueError, match="is no colour; write it as #rrggbb"):
        color_name(color)
