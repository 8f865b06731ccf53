"""Whether a caption names a thing: words of metadata, or words that it had better not use.

Words are compared whole and without case, with their apostrophes: "men's" is not "men", and names nobody.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

# A hyphen inside a word belongs to it, and so does the apostrophe of a possessive: "boys'".
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*(?:(?<=s)'(?!\w))?")
_TYPOGRAPHY = str.maketrans({"’": "'", "‘": "'", "‐": "-", "‑": "-"})
# As treebanks part them, and captioners that have learned from one: "man 's".
_PARTED_POSSESSIVE = re.compile(r"(?<=\w)\s+(?='s\b)")
# Things whose name loses its meaning without the s: "short" names no shorts.
_PLURALS_ONLY = frozenset({"briefs", "flats", "glasses", "shorts", "tights"})
_LONGEST_ENDING = 2


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    text = unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY).lower()
    return _WORD.findall(_PARTED_POSSESSIVE.sub("", text))


def mentions(caption: str, names: Iterable[str]) -> bool:
    """Whether a caption has one of the names among its words, be it in singular or plural.

    Spaces and hyphens do not count: `Tshirts` is mentioned as "t-shirt", "tshirt" and "t shirt", and `Oat-Milk` as
    "oat milk". But "t-shirt" does not mention a shirt.
    """
    wanted = frozenset().union(*(singulars(_joined(words(name))) for name in names)) - {""}
    longest = max(map(len, wanted), default=0) + _LONGEST_ENDING
    parts = words(caption)
    for start in range(len(parts)):
        for end in range(start + 1, len(parts) + 1):
            run = _joined(parts[start:end])
            if len(run) > longest:
                break
            if wanted & singulars(run):
                return True
    return False


def has_any_word(caption: str, unwanted: Iterable[str]) -> bool:
    """Whether a caption has one of these words, as it stands; or one of these rows of words."""
    text = f" {' '.join(words(caption))} "
    return any(f" {' '.join(each)} " in text for each in map(words, unwanted) if each)


def _joined(parts: Sequence[str]) -> str:
    return "".join(parts).replace("-", "")


def singulars(word: str) -> frozenset[str]:
    """A lower-case word and all that it may be the plural of: `dresses` -> `dresses`, `dresse`, `dress`."""
    if not word.endswith("s") or word.endswith("ss") or word in _PLURALS_ONLY:
        return frozenset({word})
    found = {word, word[:-1]}
    if word.endswith("es"):
        found.add(word[:-2])
    if word.endswith("ies"):
        found.add(f"{word[:-3]}y")
    if word.endswith("ves"):
        found |= {f"{word[:-3]}f", f"{word[:-3]}fe"}
    return frozenset(found)


PEOPLE = (
    "adult", "adults", "baby", "boy", "boys", "child", "children", "couple", "crowd", "girl", "girls", "guy", "guys", "he",
    "kid", "kids", "lady", "ladies", "man", "men", "people", "person", "player", "players", "she", "toddler", "woman", "women",
)  # fmt: skip


def names_people(sentence: str) -> bool:
    """Whether a sentence speaks of people; "men's shoes" do not."""
    return has_any_word(sentence, PEOPLE)
