"""Text of any origin -> plain text, and plain text -> shorter text that ends where a word ends.

Lengths are counted in code points, as `len` and the limits of feeds and databases count them. A grapheme cluster
(what a reader takes for one character: an emoji of several parts, a letter with its marks; Unicode Annex 29,
https://www.unicode.org/reports/tr29/) is never cut.
"""

from __future__ import annotations

import html
import unicodedata

import regex

# What a text is made of is read no further: no written field is nearly as long.
MAX_READ = 20_000
# Joiners and variation selectors that emoji and some scripts cannot do without.
_KEPT = r"\u200c\u200d\ufe0e\ufe0f"
INVISIBLE = regex.compile(
    rf"(?V1)[[\p{{Cc}}\p{{Cf}}\p{{Cs}}\p{{Co}}\p{{Cn}}\p{{Default_Ignorable_Code_Point}}\ufffc\ufffd]--[{_KEPT}]]"
)
_SPACE_CONTROLS = str.maketrans(dict.fromkeys("\t\n\v\f\r\x1c\x1d\x1e\x1f\x85", " "))
MARKUP = regex.compile(r"</?[A-Za-z!?]")
_TAG = regex.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style)\b[^<>]*>.*?(?:</\1\s*>|\Z)|<[/!?]?[A-Za-z][^<>]*>", regex.DOTALL | regex.I
)
_LAYERS = 5  # of HTML in HTML
_SPACELESS = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Yi}\u30fc\uff70"
)
# Beside these a text may end although no space follows.
_LOOSE = regex.compile(rf"(?V1)[{_SPACELESS}\u3000-\u303f\uff01-\uff65\p{{So}}\p{{Sk}}\ufe0f]")
_CLUSTER = regex.compile(r"\X")
_SENTENCE_END = regex.compile(r"(?:[.!?؟։।]+[\"')\]”’»]*(?=\s|\Z)|[。！？]+[」』”）]*)")
_ABBREVIATION = regex.compile(r"(?:\b\p{L}|\b(?:approx|dr|etc|inc|jr|ltd|mr|mrs|ms|no|prof|sr|st|vs))\.\Z", regex.I)
_CLOSING_SIGNS = ".!?\"')]”’»"
_LOOSE_SIGNS = ",;:–—-/&(+|·•、，；：\u200c\u200d"


def word_set(text: str) -> frozenset[str]:
    """The words of a text that is a list."""
    return frozenset(text.split())


# English words that no phrase ends with, and before which one may end.
BEFORE_A_PHRASE = word_set(
    """
    about above across after against along alongside among and around as at atop before behind below beneath
    beside between beyond but by down during for from in inside into like near next of off on onto or out
    outside over past that through to toward towards under underneath until up upon via where which while whilst
    who with within without
    """
)
_BINDING = frozenset(("and", "but", "of", "or"))  # what stands before them wants what comes behind
INSIDE_A_PHRASE = word_set(
    """
    a an another any are be being each every few has have her his is its many my no our several some such that
    the their these this those very was were your
    """
)
ADJECTIVES = word_set(
    """
    alone asleep bald bare barefoot beautiful beige big black blonde blond blue blurry bright brown calm chubby
    clear closed clean cold colorful colourful curly cute dark deep different dirty dry elderly empty fancy fast
    few first full funny furry golden good gray grassy great green grey happy hard heavy high huge hot icy large
    last late light little long low mad many multicolored muddy naked narrow new nice old older
    orange pale pink plain pretty purple quick ready red rocky rough round sandy same scenic second shallow
    shirtless short silly silver similar single skinny small smaller snowy soft steep strange sunny tall tan
    thick thin third tiny upset various warm wet white wide wild wooden yellow young younger
    """
)
# Words in -ing that are things, not doings.
THINGS_IN_ING = word_set(
    """
    awning building ceiling clothing darling duckling dwelling earring evening icing king lightning lodging
    morning pudding railing ring scaffolding sibling sling spring stocking string swing thing wedding wing
    """
)


def plain(value: object) -> str:
    """Text without markup, control, bidirectional or invisible characters, in NFC, its spaces folded.

    Anything but a string is no text and gives the empty one.
    """
    if not isinstance(value, str):
        return ""
    is_cut = len(value) > MAX_READ
    text = value[:MAX_READ]
    if not (text.isascii() and text.isprintable()) or "<" in text or "&" in text:
        text = _without_markup(text)
    text = " ".join(text.split()).lstrip("\u200c\u200d\ufe0e\ufe0f").rstrip("\u200c\u200d").strip()
    if is_cut and text and not _LOOSE.match(text[-1]):
        text = text.rpartition(" ")[0]  # its last word may be cut
    return text


def _without_markup(text: str) -> str:
    for _ in range(_LAYERS):
        before = text
        text = INVISIBLE.sub("", text.translate(_SPACE_CONTROLS))
        text = _TAG.sub(" ", html.unescape(text))
        if text == before:
            break
    else:
        text = text.replace("&", " ").replace("<", " ")
    if MARKUP.search(text):
        text = text.replace("<", " ")
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text))


def folded(text: str) -> str:
    """Without case and accents, and as compatible characters: "Prix RÉDUIT" -> "prix reduit"."""
    text = text.casefold()
    if text.isascii():
        return text
    return "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))


def shorten(text: str, limit: int) -> str:
    """The beginning of a plain text, at most `limit` code points, that ends with a sentence, a phrase, or a word.

    In scripts that write no spaces between words it ends at punctuation, or between two grapheme clusters. Empty where the
    first word is longer than that.
    """
    if len(text) <= limit:
        return text
    sentence = max((end for end in _sentence_ends(text[: limit + 1]) if end <= limit), default=0)
    if sentence >= limit // 3:
        return text[:sentence].rstrip()
    ends = _word_ends(text, limit)
    phrase = next((end for end in ends if end >= limit // 2 and _ends_a_phrase(text, end)), None)
    return _without_loose_end(text[: phrase or next(iter(ends), 0)])


def word_is_cut(text: str, end: int) -> bool:
    """Whether `text[:end]` ends in the middle of a word or of a grapheme cluster of `text`."""
    if not 0 < end < len(text) or text[end - 1].isspace():
        return False
    if end not in _cluster_ends(text, end):
        return True
    behind = text[end:].lstrip(_LOOSE_SIGNS + _CLOSING_SIGNS)
    return not (_may_end(text, end) or not behind or behind[0].isspace())


def sentences(text: str) -> list[str]:
    """The sentences of a plain text, with their ends."""
    found, start = [], 0
    for end in _sentence_ends(text):
        found.append(text[start:end].strip())
        start = end
    return [each for each in (*found, text[start:].strip()) if each]


def is_mostly_latin(text: str) -> bool:
    """Whether at least half of the letters are Latin; also of a text without letters."""
    if text.isascii():
        return True
    letters = [char for char in text if char.isalpha()]
    return 2 * sum(char.isascii() or "LATIN" in unicodedata.name(char, "") for char in letters) >= len(letters)


def is_doing(word: str) -> bool:
    """Whether a lower-case English word is what somebody does: `running`, not `building`."""
    return word.endswith("ing") and len(word) > 4 and word not in THINGS_IN_ING


def num_words(text: str) -> int:
    """Words of a plain text; in scripts without spaces, two characters are taken for one."""
    return sum(1 + len(_SPACELESS_CHARACTER.findall(word)) // 3 for word in text.split())


_SPACELESS_CHARACTER = regex.compile(rf"[{_SPACELESS}]")


def _sentence_ends(text: str) -> list[int]:
    ends = (match.end() for match in _SENTENCE_END.finditer(text))
    # A mark behind the stop belongs to it.
    whole = (end for end in ends if not unicodedata.category(text[end : end + 1] or " ").startswith("M"))
    return [end for end in whole if not _ABBREVIATION.search(text, max(0, end - 10), end)]


def _cluster_ends(text: str, limit: int) -> list[int]:
    """Ends of grapheme clusters up to `limit` of a longer text."""
    # Whether a cluster ends is decided by the character behind it; the last one here may go on.
    return [match.end() for match in _CLUSTER.finditer(text[: limit + 1]) if match.end() <= limit]


def _word_ends(text: str, limit: int) -> list[int]:
    """Where a longer text may end within `limit`, last place first."""
    return [end for end in reversed(_cluster_ends(text, limit)) if _may_end(text, end)]


def _may_end(text: str, end: int) -> bool:
    last, following = text[end - 1], text[end]
    return following.isspace() or bool(_LOOSE.match(last) or _LOOSE.match(following))


def _ends_a_phrase(text: str, end: int) -> bool:
    if text[end - 1] in ",;:、，；：":
        return True
    following = text[end : end + 20].split(maxsplit=1)
    word = following[0].lower() if following else ""
    if is_doing(word):
        return text[:end].rpartition(" ")[2].lower() not in ADJECTIVES  # "with red lettering"
    return word in BEFORE_A_PHRASE and word not in _BINDING


def _leads_on(word: str) -> bool:
    return word in BEFORE_A_PHRASE or word in INSIDE_A_PHRASE or is_doing(word)


def _without_loose_end(text: str) -> str:
    while True:
        text = text.rstrip(" " + _LOOSE_SIGNS)
        head, _, last = text.rpartition(" ")
        if not head or not _leads_on(last.lower()):
            return text
        text = head
