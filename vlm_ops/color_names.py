"""Names of colours, for people who search and for shops."""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

# The eleven basic colour terms of Berlin and Kay (Basic Color Terms, 1969), and a few that shops use. A name has an anchor
# for each of the shades that people call by it; a colour has the name of its nearest anchor.
_ANCHORS = {
    "black": ("000000", "101010"),
    "white": ("ffffff", "f4f4f2"),
    "grey": ("303030", "505458", "808080", "a8a8a8", "c8c8c8", "708090", "3c4044", "2f4f4f", "dcdcdc"),
    "red": ("ff0000", "d01020", "b01818", "dc143c", "e84040", "ff4848", "8b0000"),
    "orange": ("ff8000", "ffa500", "ff6a10", "e8862c", "ffb060"),
    "yellow": ("ffff00", "ffd800", "f5e050", "ffff90", "d8c820", "fffaa0"),
    "green": ("008000", "00c000", "20ff20", "90ee90", "2e8b57", "105018", "6b9e30", "9acd32", "98d898", "00ff7f", "004020", "88a088", "50704c"),
    "blue": ("0000ff", "1e60d0", "4090e8", "87ceeb", "b0d0f0", "4868a0", "0000c0", "6a8cc8", "00a0f0", "5f8fb0", "5f9ea0", "b0e0e6"),
    "purple": ("800080", "9932cc", "8050b8", "4b0082", "c090e0", "a020f0", "d8bfd8", "5a3070", "9370db", "e6e6fa"),
    "pink": ("ffc0cb", "ff69b4", "ff1493", "e87098", "f0a0c0", "ffb0e0", "db7093", "ff40d0", "f4c6cc"),
    "brown": ("8b4513", "5c3a1e", "a0703c", "6f4e37", "a0522d", "3c2415", "b08050", "8a6a4a", "cd853f", "bc8f8f", "f4a460"),
    "beige": ("f5f0d8", "e0cfa8", "d2b48c", "ede0c8", "c8b898"),
    "navy": ("000080", "101c40", "1b2a52", "0a1030"),
    "turquoise": ("40e0d0", "00ced1", "20b2aa", "00ffff", "a0e8e4", "30a0a0"),
    "teal": ("008080", "105860"),
    "maroon": ("800000", "5c1020", "701c34"),
    "olive": ("808000", "6b6b2c", "55602f", "bdb76b"),
    "gold": ("d4af37", "c0922c", "daa520"),
}  # fmt: skip
# Below this chroma people see no hue. In OKLab, whose whitest white and blackest black are 1 apart.
_NO_CHROMA = 0.012
_ACHROMATIC = ("black", "grey", "white")
_HEX = re.compile(r"#?([0-9a-fA-F]{6})")

_SRGB = np.arange(256) / 255
_LINEAR = np.where(_SRGB <= 0.04045, _SRGB / 12.92, ((_SRGB + 0.055) / 1.055) ** 2.4)
# Of linear sRGB to the responses of the eye's cones, and of their cube roots to OKLab (https://bottosson.github.io/posts/oklab/).
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@lru_cache(maxsize=65536)
def color_name(color: str) -> str:
    """The name of a colour, one of `COLOR_NAMES`: "#8b4513" -> "brown".

    Args:
        color: Six hex digits of sRGB, with or without a `#`.

    Raises:
        ValueError: It is no such colour.
    """
    match = _HEX.fullmatch(color)
    if match is None:
        raise ValueError(f"{color!r} is no colour; write it as #rrggbb")
    lab = _oklab([match[1]])[0]
    names, anchors = _anchors(achromatic=bool(np.hypot(lab[1], lab[2]) < _NO_CHROMA))
    return names[int(np.argmin(np.sum((anchors - lab) ** 2, axis=1)))]


COLOR_NAMES = tuple(_ANCHORS)


@lru_cache(maxsize=2)
def _anchors(achromatic: bool) -> tuple[list[str], np.ndarray]:
    """The name of each anchor, and where it is in OKLab, float64[m, 3]."""
    pairs = [
        (name, anchor)
        for name, anchors in _ANCHORS.items()
        if not achromatic or name in _ACHROMATIC
        for anchor in anchors
    ]
    return [name for name, _ in pairs], _oklab([anchor for _, anchor in pairs])


def _oklab(colors: list[str]) -> np.ndarray:
    """float64[n, 3]: lightness in [0, 1], green to red, blue to yellow. Equal distances look about equally different."""
    channels = np.frombuffer(bytes.fromhex("".join(colors)), np.uint8).reshape(-1, 3)
    return np.asarray(np.cbrt(_LINEAR[channels] @ _TO_CONES.T) @ _TO_OKLAB.T)
