"""The rules of the written fields: one function a field, which says what is wrong with a value.

They hold for what templates write as for what a language model writes. Published rules that they follow:
alternative texts: https://www.w3.org/WAI/tutorials/images/ (short, no "image of", empty for decorative images) and
https://developers.google.com/search/docs/appearance/google-images (descriptive, no stuffing with keywords);
languages: https://www.rfc-editor.org/info/bcp47.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import regex

from schemas.tags import TagTexts
from vlm_ops.mentions import singulars
from vlm_ops.plain_text import INVISIBLE, MARKUP, num_words, sentences

MAX_ALT_TEXT, MAX_TITLE, MAX_CAPTION, MAX_DESCRIPTION, MAX_SLUG = 125, 60, 500, 500, 60
MAX_SENTENCES = 3
MIN_KEYWORDS, MAX_KEYWORDS = 3, 10
MAX_KEYWORD_WORDS, MAX_KEYWORD = 3, 40
_MAX_REPEATS = 3  # of a word in an alternative text
_LEAST_ROW = 8  # words without an article or a preposition, one of them twice: "dog photo beach dog golden retriever"
_MAX_KEYWORDS_WITH_WORD = 2

_URL = re.compile(r"\b(?:https?|ftp|data|javascript):\S|\bwww\.\w", re.I)
_PICTURE = (
    "image|picture|photo|photograph|pic|img|snapshot|graphic|bild|foto|fotografie|aufnahme|photographie|imagen|"
    "fotografía|imagem|fotografia|immagine|afbeelding"
)
LEAD_IN = re.compile(
    r"^(?:(?:this|here|it) is |there is )?(?:an? |the |this |my |our |une? |ein |eine |una? |um |uma |een )?"
    r"(?:close[- ]?up |stock |black and white |old |nice |beautiful )?"
    rf"(?:{_PICTURE})s?(?:\s*:|\s+(?:of|showing|shows|depicting|depicts|with|von|mit|de|di|da|do|van|met|avec)\b|\s+d['’])\s*",
    re.I,
)
FILE_NAME = re.compile(
    r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|avif|hei[cf]|psd|cr2|nef|dng)\b"  # red-shoe.jpg
    r"|^(?:img|dsc[nf]?|pxl|mvimg|dcim|gopr|wp|vid|cimg|sam|pict|screenshot|screen shot|whatsapp image|p)[-_ ]?\d{3,}"
    r"|^[\d\W_]+$"  # 00012_3
    r"|^(?=\S*\d)[0-9a-f]{8,}$|^[0-9a-f]{8}-[0-9a-f-]{27}$"
    r"|^\S*\w_\w\S*$|^(?=\S*\d)[\w]+(?:-\w+){2,}$|^\w+(?:-\w+){4,}$",  # red_shoe, red-shoe-2020, red-shoe-for-big-feet
    re.I,
)
_PLACEHOLDER = re.compile(
    r"^(?:image|picture|photo|photograph|pic|img|logo|icon|graphic|alt|alt text|alternative text|title|caption|"
    r"description|untitled|unnamed|unknown|none|null|nil|nan|n/?a|undefined|placeholder|spacer|blank|default|test|"
    r"image \d+|photo \d+|picture \d+|no (?:image|title|caption|description|alt))[.!]?$",
    re.I,
)
_LONGEST_PLACEHOLDER = 20
_HINTS_AT_FILES = re.compile(r"[\d._-]|^[^\W_]{8,}$")  # what every file name has
_LIST_SEPARATOR = re.compile(r"\s*[,;|/•·#、，；]+\s*|\s+[-–—>]+\s+")
_FUNCTION_WORD = re.compile(
    r"\b(?:a|an|the|and|or|of|in|on|at|to|with|for|by|from|is|are|his|her|its|their|der|die|das|und|mit|le|la|les|et|"
    r"de|du|des|el|los|y|con|en|il|e|di|o|um|uma|het|een|van)\b",
    re.I,
)
_WORD = re.compile(r"[^\W\d_]{2,}")
_SENTENCE_OR_WORD_GONE = re.compile(r"(?:\.\.\.|…)\W*$")
_SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
# RFC 5646, section 2.1, without the irregular tags of old.
_LANGUAGE = re.compile(
    r"(?:[a-z]{2,3}(?:-[a-z]{3}){0,3}|[a-z]{4}|[a-z]{5,8})(?:-[a-z]{4})?(?:-(?:[a-z]{2}|\d{3}))?"
    r"(?:-(?:[a-z0-9]{5,8}|\d[a-z0-9]{3}))*(?:-[0-9a-wy-z](?:-[a-z0-9]{2,8})+)*(?:-x(?:-[a-z0-9]{1,8})+)?",
    re.I,
)
_IRREGULAR_PLURALS = {
    "children": "child", "feet": "foot", "geese": "goose", "men": "man", "mice": "mouse", "people": "person",
    "teeth": "tooth", "women": "woman",
}  # fmt: skip
_LETTER = regex.compile(r"\p{L}")


def violations(texts: TagTexts) -> dict[str, list[str]]:
    """Field -> what is wrong with it; only fields with something wrong."""
    found = {
        "alt_text": alt_text_violations(texts.alt_text, texts.alt_reason),
        "title": title_violations(texts.title),
        "caption": caption_violations(texts.caption),
        "description": description_violations(texts.description),
        "keywords": keywords_violations(texts.keywords),
        "slug": slug_violations(texts.slug),
        "language": language_violations(texts.language),
    }
    return {field: wrong for field, wrong in found.items() if wrong}


def alt_text_violations(text: str, reason: str | None = None) -> list[str]:
    """`reason` says why it is empty: there must be one then, and only then."""
    if not text:
        return [] if reason else ["it is empty, and no reason is given"]
    wrong = _prose_violations(text, MAX_ALT_TEXT)
    if reason:
        wrong.append("a reason is given for its being empty, but it is not")
    if LEAD_IN.match(text):
        wrong.append('it says that it is a picture ("image of")')
    if is_keyword_list(text):
        wrong.append("it is a list of keywords")
    return wrong


def title_violations(text: str) -> list[str]:
    """May be empty, where nothing is known."""
    return _prose_violations(text, MAX_TITLE) if text else []


def caption_violations(text: str | None) -> list[str]:
    if text is None:
        return []
    return _prose_violations(text, MAX_CAPTION) if text else ["it is empty; it is null where there is none"]


def description_violations(text: str) -> list[str]:
    """May be empty, where nothing is known. Of sentences only the number of full stops in a row is counted."""
    if not text:
        return []
    wrong = _prose_violations(text, MAX_DESCRIPTION)
    if (num_sentences := len(sentences(text))) > MAX_SENTENCES:
        wrong.append(f"it has {num_sentences} sentences; at most {MAX_SENTENCES} are allowed")
    return wrong


def keywords_violations(keywords: Sequence[str]) -> list[str]:
    """Of all keywords together; fewer than `MIN_KEYWORDS` are a matter of doubt, not of rules."""
    wrong = [f"{keyword!r}: {each}" for keyword in keywords for each in keyword_violations(keyword)]
    if len(keywords) > MAX_KEYWORDS:
        wrong.append(f"there are {len(keywords)}; at most {MAX_KEYWORDS} are allowed")
    return wrong + [each for i in range(len(keywords)) for each in _joining_violations(keywords[i], keywords[:i])]


def keyword_violations(keyword: str) -> list[str]:
    wrong = _text_violations(keyword, MAX_KEYWORD)
    if keyword != keyword.lower():
        wrong.append("it is not lower case")
    if (count := len(keyword.split())) > MAX_KEYWORD_WORDS:
        wrong.append(f"it has {count} words; at most {MAX_KEYWORD_WORDS} are allowed")
    if re.search(r"[,;|\"]", keyword):
        wrong.append("it holds a separator")
    return wrong


def repeats(keyword: str, other: str) -> bool:
    """Whether all words of one keyword are in another, be it in singular or plural."""
    forms, other_forms = _number_forms(keyword), _number_forms(other)
    if _all_forms(keyword).isdisjoint(_all_forms(other)):
        return False
    fewer, more = sorted((forms, other_forms), key=len)
    return all(any(not word.isdisjoint(each) for each in more) for word in fewer)


@lru_cache(4096)
def _number_forms(keyword: str) -> tuple[frozenset[str], ...]:
    """For each word all that it may be the plural of; hyphens and apostrophes do not count."""
    bare = keyword.replace("-", "").replace("'", "").replace("’", "")
    return tuple(singulars(word) | {_IRREGULAR_PLURALS.get(word, word)} for word in bare.split())


@lru_cache(4096)
def _all_forms(keyword: str) -> frozenset[str]:
    return frozenset().union(*_number_forms(keyword))


def may_join(keyword: str, keywords: Sequence[str]) -> bool:
    """Whether a keyword may stand behind others that keep to the rules."""
    return len(keywords) < MAX_KEYWORDS and not _joining_violations(keyword, keywords) and _is_keyword(keyword)


@lru_cache(4096)  # a corpus has the same ones over and over
def _is_keyword(keyword: str) -> bool:
    return not keyword_violations(keyword)


def _joining_violations(keyword: str, earlier: Sequence[str]) -> list[str]:
    forms = _all_forms(keyword)
    related = [each for each in earlier if not forms.isdisjoint(_all_forms(each))]
    wrong = [f"{keyword!r} repeats {each!r}" for each in related if repeats(keyword, each)]
    if len(related) >= _MAX_KEYWORDS_WITH_WORD:
        for word in _number_forms(keyword):
            if sum(not word.isdisjoint(_all_forms(each)) for each in related) >= _MAX_KEYWORDS_WITH_WORD:
                wrong.append(f"more than {_MAX_KEYWORDS_WITH_WORD} keywords have the word {min(word)!r}")
    return wrong


def slug_violations(slug: str) -> list[str]:
    wrong = _length_violations(slug, MAX_SLUG)
    if not _SLUG.fullmatch(slug):
        wrong.append("it has other characters than a-z, 0-9 and single hyphens between them")
    return wrong


def language_violations(language: str) -> list[str]:
    return [] if _LANGUAGE.fullmatch(language) else [f"{language!r} is no language tag of BCP 47"]


def is_keyword_list(text: str) -> bool:
    """Whether a text is keywords in a row, hashtags, or one word over and over."""
    if text.count("#") > 1:
        return True
    parts = [part for part in _LIST_SEPARATOR.split(text) if part]
    sizes = [num_words(part) for part in parts]
    if not _FUNCTION_WORD.search(text) and (
        (len(parts) > 3 and max(sizes) <= MAX_KEYWORD_WORDS) or (len(parts) == 3 and max(sizes) == 1)
    ):
        return True
    counts = Counter(word.lower() for word in _WORD.findall(text) if not _FUNCTION_WORD.fullmatch(word))
    repeats = max(counts.values(), default=0)
    is_row = text.isascii() and len(text.split()) >= _LEAST_ROW and not _FUNCTION_WORD.search(text)
    return repeats > _MAX_REPEATS or (repeats > 1 and is_row)


def _prose_violations(text: str, limit: int) -> list[str]:
    wrong = _text_violations(text, limit)
    if _SENTENCE_OR_WORD_GONE.search(text):
        wrong.append("it ends with an ellipsis, as a text does that was cut")
    return wrong


def _text_violations(text: str, limit: int) -> list[str]:
    """What holds for every text that people read."""
    wrong = _length_violations(text, limit)
    if not (_WORD if text.isascii() else _LETTER).search(text):
        wrong.append("it has no word in it")
    is_plain_ascii = text.isascii() and text.isprintable()
    if (not is_plain_ascii and INVISIBLE.search(text)) or text != " ".join(text.split()):
        wrong.append("it has control or invisible characters, or more than single spaces")
    if ("<" in text and MARKUP.search(text)) or ("&" in text and html.unescape(text) != text):
        wrong.append("it has HTML in it")
    if (":" in text or "www" in text.lower()) and _URL.search(text):
        wrong.append("it has a URL in it")
    if _HINTS_AT_FILES.search(text) and FILE_NAME.search(text):
        wrong.append("it is a file name")
    if len(text) <= _LONGEST_PLACEHOLDER and _PLACEHOLDER.match(text):
        wrong.append("it is a placeholder")
    return wrong


def _length_violations(text: str, limit: int) -> list[str]:
    return [f"it has {len(text)} characters; at most {limit} are allowed"] if len(text) > limit else []
