"""Banners that are drawn: known words in many fonts, colours and angles, in two languages.

banners(count)      Banner(picture, words, language), the same ones each time
word_accuracy(...)  the share of their words that were read
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_FOLDERS = ("/usr/share/fonts", "/Library/Fonts", "/System/Library/Fonts/Supplemental", "C:/Windows/Fonts")
# Words that are no names of these are symbols, or not meant for Latin.
_NO_TEXT_FONTS = ("math", "symbol", "emoji", "wing", "icon", "display", "cjk", "arab", "hebrew", "devanagari", "thai")
SIZES = ((1200, 628), (1080, 1080), (728, 300), (960, 1200), (640, 360), (970, 250))
TEXTS = {
    "en": (
        "Summer Sale up to 50% off", "Free shipping on all orders", "New arrivals every week", "Buy one get one free",
        "Open daily from 9 to 18", "The best coffee in town", "Fresh bread baked this morning", "Limited time offer",
        "Sign up today and save 20%", "Discover the new collection", "Handmade leather shoes since 1952",
        "Only 3 days left", "Made with organic cotton", "Book your next holiday now", "Family tickets from $49",
        "Grand opening on Saturday", "Learn to paint in ten lessons", "Quality you can trust",
    ),
    "de": (
        "Sommerschlussverkauf bis zu 50% Rabatt", "Kostenloser Versand ab 30 Euro", "Neue Kollektion für Frühling und Herbst",
        "Täglich geöffnet von 9 bis 18 Uhr", "Frische Brötchen jeden Morgen", "Schöne Geschenke für große Freude",
        "Jetzt anmelden und 20% sparen", "Nur noch drei Tage", "Hausgemachte Nudeln und Soßen", "Bücher für junge Leser",
        "Die besten Fahrräder der Stadt", "Günstige Möbel für Küche und Bad", "Eröffnung am Samstag",
        "Qualität aus dem Schwarzwald", "Gemüse vom Bauernhof", "Zwei Jahre Garantie auf alle Geräte",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Banner:
    picture: Image.Image
    words: tuple[str, ...]
    language: str


def banners(count: int, seed: int = 0) -> Iterator[Banner]:
    """As many English ones as German ones."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield _banner(rng, "en" if number % 2 == 0 else "de")


def word_accuracy(read: Iterable[tuple[tuple[str, ...], Iterable[str]]]) -> float:
    """Of (words, lines that were read): the share of the words that stand in the lines, letter by letter."""
    num_read, num_words = 0, 0
    for words, lines in read:
        found = Counter(word for line in lines for word in line.split())
        num_read += sum((Counter(words) & found).values())
        num_words += len(words)
    return num_read / num_words


@functools.lru_cache(maxsize=1)
def fonts() -> tuple[str, ...]:
    """Files of the fonts that are here and have umlauts, at most 40; none where only Pillow's own one is."""
    folders = [Path(folder) for folder in FONT_FOLDERS]
    try:
        import matplotlib

        folders.append(Path(matplotlib.get_data_path()) / "fonts" / "ttf")
    except ImportError:
        pass
    paths = {path.name: str(path) for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*.ttf"))}
    usable = [path for name, path in sorted(paths.items()) if not any(word in name.lower() for word in _NO_TEXT_FONTS)]
    return tuple(path for path in usable if _has_umlauts(path))[:40]


def _has_umlauts(path: str) -> bool:
    font = ImageFont.truetype(path, 20)
    missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
    return all((font.getmask(letter).getbbox(), bytes(font.getmask(letter))) != missing for letter in "äöüß%")


def _banner(rng: np.random.Generator, language: str) -> Banner:
    width, height = SIZES[rng.integers(len(SIZES))]
    picture, text_color = _background(rng, width, height)
    # Pillow's own font, which serves where there is no other, has no umlauts.
    usable = [text for text in TEXTS[language] if fonts() or text.isascii()]
    texts = rng.choice(usable, size=int(rng.integers(1, 4)), replace=False)
    words: list[str] = []
    for number, text in enumerate(texts):
        strip = height / len(texts)
        angle = float(rng.uniform(-20, 20)) if rng.random() < 0.5 else 0.0
        layer = _drawn(rng, str(text), text_color, 0.9 * width, 0.8 * strip, angle)
        x = int(rng.integers(0, max(1, width - layer.width)))
        y = int(number * strip + rng.integers(0, max(1, strip - layer.height)))
        picture.paste(layer, (x, y), layer)
        words += str(text).split()
    noise = rng.normal(0, float(rng.uniform(0, 12)), (height, width, 1))
    noisy = (np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8)
    return Banner(Image.fromarray(noisy), tuple(words), language)


def _drawn(
    rng: np.random.Generator, text: str, color: tuple[int, ...], width: float, height: float, angle: float
) -> Image.Image:
    """A line of text at an angle, on nothing, as large as it may be and at most 90 pixels high."""
    files = fonts()
    path = files[rng.integers(len(files))] if files else None
    size = int(rng.integers(20, 91))
    while True:
        font = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
        box = font.getbbox(text)
        layer = Image.new("RGBA", (math.ceil(box[2]) + 8, math.ceil(box[3]) + 8), (*color, 0))
        ImageDraw.Draw(layer).text((4, 4), text, font=font, fill=(*color, 255))
        layer = layer.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        if (layer.width <= width and layer.height <= height) or size <= 16:
            return layer
        size = int(size * 0.9)


def _background(rng: np.random.Generator, width: int, height: int) -> tuple[Image.Image, tuple[int, ...]]:
    """A plain, shaded or mottled background, and a colour that can be read on it."""
    is_dark = rng.random() < 0.5
    low, high = (0, 90) if is_dark else (165, 256)
    kind = rng.integers(3)
    shape = ((1, 1), (2, 2), (5, 7))[kind]
    patches = rng.integers(low, high, (*shape, 3), dtype=np.uint8)
    picture = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
    low, high = (190, 256) if is_dark else (0, 66)
    return picture, tuple(int(value) for value in rng.integers(low, high, 3))
