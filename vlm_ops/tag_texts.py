"""The written fields of an image, made of what is known of it: alternative text, title, caption, description, keywords.

What a page or a shop said of the image comes first, then captions by people, then the generated caption, then labels.
Each field takes the first text that keeps to its rules (`text_rules`); one that does not is left out with a doubt.
Nothing is said that no evidence says.

Alternative texts are in sentence case; one that is made of a caption ends with a full stop, so that a screen reader
pauses there (https://www.w3.org/WAI/tutorials/images/tips/: punctuation as in visible text). Alternative texts and titles
that came with the image keep their own. A picture counts as decorative, with an empty alternative text
(https://www.w3.org/WAI/tutorials/images/decorative/), where it is a spacer or a rule, or one plain colour in which no
class is found, and nobody has said anything of it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from anyascii import anyascii

from schemas.tags import Category, ImageEvidence, TagTexts
from vlm_ops import text_rules
from vlm_ops.caption_words import doings, noun_phrases, reads_english
from vlm_ops.mentions import mentions
from vlm_ops.plain_text import BEFORE_A_PHRASE, INSIDE_A_PHRASE, is_mostly_latin, plain, sentences, shorten
from vlm_ops.sentences import with_article

GENERATED, LABELS, SOURCE_METADATA = "generated", "labels", "source_metadata"

# Below them a text is doubtful: of the calibrated probability that a generated caption describes the image, and of the
# probability of a class that names it.
LOW_CAPTION_SCORE, LOW_LABEL_SCORE = 0.8, 0.5
# A class this likely names an image of which nothing else is said; below, nothing is known.
MIN_LABEL_SCORE = 0.1
# Lines of text that are read, and from which share of the area on the picture is one of text, whose alternative
# is that text (https://www.w3.org/WAI/tutorials/images/textual/).
MIN_TEXT_SCORE, MOSTLY_TEXT_SHARE = 0.9, 0.25
KEYWORD_LABEL_SCORE = 0.5
KEYWORD_CATEGORY_SCORE = 0.5

MAX_SPACER_PIXELS = 8
MIN_RULE_ASPECT = 20
PLAIN_COLOR_SHARE = 0.98

# Names of metadata fields as found in shops, feeds, pages and data sets, without case, spaces, hyphens and underscores.
ALT_FIELDS = ("alt", "alttext")
TITLE_FIELDS = ("title", "name", "productname", "headline")
CAPTION_FIELDS = ("caption",)
DESCRIPTION_FIELDS = ("description",)
KEYWORD_FIELDS = ("keywords", "tags")
LANGUAGE_FIELDS = ("inlanguage", "language", "lang")
KIND_FIELDS = ("producttype", "kind", "label")
CATEGORY_FIELDS = ("subcategory", "category")
COLOR_FIELDS = ("colour", "color")
BRAND_FIELDS = ("brand", "manufacturer", "vendor")
GENDER_FIELDS = ("gender",)
DETAIL_FIELDS = ("material", "pattern", "style", "usage", "gender")

DECORATIVE = "decorative"  # how its reasons begin
# Doubts are counted over a catalog, so they hold no numbers of an image.
FEW_KEYWORDS = f"fewer than {text_rules.MIN_KEYWORDS} keywords have evidence"
NOTHING_KNOWN = "nothing is known of it"
NOTHING_USABLE = "nothing that is known of it can be used"

_FROM_PICTURE = "the text in the picture"
_MAX_LISTED = 100  # keywords of a source that are looked at
_MAX_CAPTIONS = 2  # of people, from which keywords are taken
_LETTERS = re.compile(r"[^\W\d_]{3}")
_BASE_36 = "0123456789abcdefghijklmnopqrstuvwxyz"
_ARTICLE = re.compile(r"^(?:an?|the|there (?:is|are)(?: an?)?)\s+(?:pair of\s+)?(?=\S)", re.I)
_AND_ANOTHER = re.compile(r"\b(?:and|or) (?:an?|the)\b", re.I)
_IS_DOING = re.compile(r"\s(?:is|are)(?=\s[a-z]+ing\b)")
_PARTED = re.compile(r"\s+(?=(?:[.,](?:\s|$)|'s\b|n't\b))")  # as treebanks part words and signs
_UNKNOWN_WORD = re.compile(r"\s*(?:\[UNK\]|<unk>|\bUNK\b)")
_TWICE = re.compile(r"\b(\w+)(?:\s+\1\b)+", re.I)
_KEYWORD_EDGE = " \t.,;:!?\"'()[]{}#*_-–—"


class _Candidate(NamedTuple):
    """A text that a field may take: where it comes from, and its name for a doubt."""

    text: str
    source: str
    origin: str


def write_texts(evidence: ImageEvidence, categories: Sequence[Category], language: str = "en") -> TagTexts:
    """The written fields of an image, every one of which keeps to its rules.

    Args:
        language: Of generated captions and labels, as a tag of BCP 47. Texts that came with the image have the
            language that its metadata states; where they state none, `und` where most letters are not Latin or a
            longer text has no common English word, else this one.
    """
    own = _OwnTexts(evidence)
    if reason := decorative_reason(evidence, own.says_something):
        return _decorative(evidence, reason, language)
    generated = _generated(evidence)
    if generated and not own.agrees_with(generated.text):
        generated = None  # what a shop calls a thing is surer than what a model sees
    doubts: list[str] = []
    alt = _choose("alternative text", _alt_candidates(own, generated, evidence), text_rules.alt_text_violations, doubts)
    title = _choose("title", _title_candidates(own, generated, evidence), text_rules.title_violations, doubts)
    caption = _choose("caption", _caption_candidates(own, generated), text_rules.caption_violations, doubts)
    description = _choose(
        "description", _description_candidates(own, caption, title, evidence), text_rules.description_violations, doubts
    )
    keywords, keyword_source = _keywords(own, generated, evidence, categories)
    chosen = {"alt_text": alt, "title": title, "caption": caption, "description": description}
    sources = {field: each.source for field, each in chosen.items() if each}
    if keyword_source:
        sources["keywords"] = keyword_source
    alt_reason = None
    if not alt:
        alt_reason = NOTHING_USABLE if own.says_something or generated else NOTHING_KNOWN
        doubts.append(alt_reason)
    if _FROM_PICTURE in {each.origin for each in (alt, title) if each}:
        doubts.append("named by the text that was read in it, which may be misread")
    doubts += _doubts_of_generation(evidence, sources)
    if len(keywords) < text_rules.MIN_KEYWORDS:
        doubts.append(FEW_KEYWORDS)
    spoken = alt or title or caption or description
    told = own.language(spoken.text, language) if spoken and spoken.source == SOURCE_METADATA else language
    if told.partition("-")[0] != language.partition("-")[0] and {GENERATED, LABELS} & set(sources.values()):
        doubts.append(f"some fields are in {language}, others in the source's language")
    return TagTexts(
        alt_text=alt.text if alt else "",
        alt_reason=alt_reason,
        title=title.text if title else "",
        caption=caption.text if caption else None,
        description=description.text if description else "",
        keywords=keywords,
        slug=slug((title or alt or _Candidate("", "", "")).text, evidence.image_id),
        language=told,
        sources=sources,
        doubts=tuple(dict.fromkeys(doubts)),
    )


def decorative_reason(evidence: ImageEvidence, is_described: bool = False) -> str | None:
    """Why an image is decorative; None where it is not.

    Args:
        is_described: Somebody has said something of it: then one plain colour is no reason.
    """
    width, height = evidence.width, evidence.height
    if width and height:
        if min(width, height) <= MAX_SPACER_PIXELS:
            return f"{DECORATIVE}: a spacer or rule of {width} x {height} pixels"
        if max(width, height) >= MIN_RULE_ASPECT * min(width, height) and not (is_described or evidence.texts):
            return f"{DECORATIVE}: a rule or border of {width} x {height} pixels"
    if is_described or evidence.texts or not evidence.colors:
        return None
    hex_, share = evidence.colors[0]
    if share > PLAIN_COLOR_SHARE and all(label.score < MIN_LABEL_SCORE for label in evidence.labels):
        return f"{DECORATIVE}: {share:.0%} of it is one plain colour ({hex_})"
    return None


def slug(title: str, image_id: int) -> str:
    """The words of a title and the image's id in base 36, at most 60 characters: `white-dog-in-the-snow-1y2p0ij32e8e7`.

    The id makes it unique in a catalog without a look at other images, and it stays as it is when the catalog grows.
    """
    digits = _base_36(image_id)
    room = text_rules.MAX_SLUG - len(digits) - 1
    words = re.findall(r"[a-z0-9]+", re.sub(r"['’]", "", anyascii(title[:200])).lower())
    kept = ""
    for word in words:
        longer = f"{kept}-{word}" if kept else word
        if len(longer) > room:
            break
        kept = longer
    while (head := kept.rpartition("-"))[0] and (head[2] in BEFORE_A_PHRASE or head[2] in INSIDE_A_PHRASE):
        kept = head[0]
    return f"{kept or (words[0][:room] if words else 'image')}-{digits}"


class _OwnTexts:
    """What came with an image: captions, and metadata by the names that are known for it."""

    def __init__(self, evidence: ImageEvidence) -> None:
        values = {_field_name(str(name)): value for name, value in reversed(list(evidence.metadata.items()))}
        self._values = values
        self.alt = self._texts(ALT_FIELDS)
        self.titles = self._texts(TITLE_FIELDS)
        self.descriptions = self._texts(DESCRIPTION_FIELDS)
        captions = [plain(caption) for caption in evidence.source_captions]
        self.captions = [
            *(_Candidate(text, SOURCE_METADATA, "the source's caption") for text in captions if text),
            *self._texts(CAPTION_FIELDS),
        ]
        self.kind = self._value(KIND_FIELDS)
        self.color = self._value(COLOR_FIELDS)
        self.brand = self._value(BRAND_FIELDS)
        self.gender = self._value(GENDER_FIELDS)
        self.details = [text for name in DETAIL_FIELDS if (text := _name(values.get(name)))]
        self.categories = [text for name in CATEGORY_FIELDS if (text := _name(values.get(name)))]

    @property
    def says_something(self) -> bool:
        return bool(self.alt or self.titles or self.captions or self.descriptions or self.kind)

    def agrees_with(self, caption: str) -> bool:
        """Whether a caption names the kind of thing that the source says it is; true where the source says none."""
        return not self.kind or mentions(caption, (self.kind, *self.categories))

    @property
    def keywords(self) -> Iterator[str]:
        for name in KEYWORD_FIELDS:
            value = self._values.get(name)
            if isinstance(value, str):
                value = re.split(r"[,;|\n]|\s+(?=#)", plain(value))
            if isinstance(value, (list, tuple)):
                yield from (text for each in value[:_MAX_LISTED] if (text := plain(each)))

    def language(self, text: str, default: str) -> str:
        """That of the texts, by the metadata, or by a look at one of them."""
        for name in LANGUAGE_FIELDS:
            value = self._values.get(name)
            if isinstance(value, str) and not text_rules.language_violations(tag := value.strip().replace("_", "-")):
                return _canonical_language(tag)
        return default if is_mostly_latin(text) and reads_english(text) else "und"

    def _texts(self, names: Iterable[str]) -> list[_Candidate]:
        found = ((name, plain(self._values.get(name))) for name in names if name in self._values)
        return [_Candidate(text, SOURCE_METADATA, f"the source's {name!r}") for name, text in found if text]

    def _value(self, names: Iterable[str]) -> str:
        return next((text for name in names if (text := _name(self._values.get(name)))), "")


def _alt_candidates(own: _OwnTexts, generated: _Candidate | None, evidence: ImageEvidence) -> Iterator[_Candidate]:
    limit = text_rules.MAX_ALT_TEXT
    for each in own.alt:
        yield each._replace(text=shorten(_without_lead_in(_tidy(each.text)), limit))
    for each in own.captions:
        yield each._replace(text=_sentence(each.text, limit))
    for each in own.titles:
        yield each._replace(text=shorten(_without_lead_in(each.text), limit))
    for each in own.descriptions:
        yield each._replace(text=_sentence(next(iter(sentences(each.text)), ""), limit))
    if text := _text_of_picture(evidence):
        yield _Candidate(f'Text: "{shorten(text, limit - 8)}"', GENERATED, _FROM_PICTURE)
    if generated:
        yield generated._replace(text=_sentence(generated.text, limit))
    if own.kind:
        yield _Candidate(_attributes(own), SOURCE_METADATA, "the source's kind")
    if named := _named_by_label(evidence):
        yield named
    listed = [text for text, _ in zip(own.keywords, range(3), strict=False)]
    if listed:
        text = " and ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)
        yield _Candidate(_capitalized(shorten(text, limit)), SOURCE_METADATA, "the source's keywords")


def _title_candidates(own: _OwnTexts, generated: _Candidate | None, evidence: ImageEvidence) -> Iterator[_Candidate]:
    limit = text_rules.MAX_TITLE
    for each in own.titles:
        yield each._replace(text=shorten(each.text, limit))
    for each in (*own.alt, *own.captions, *own.descriptions):
        yield each._replace(text=_as_title(next(iter(sentences(each.text)), ""), limit))
    if text := _text_of_picture(evidence):
        yield _Candidate(shorten(text, limit), GENERATED, _FROM_PICTURE)
    if generated:
        yield generated._replace(text=_as_title(generated.text, limit))
    if own.kind:
        yield _Candidate(shorten(_attributes(own), limit), SOURCE_METADATA, "the source's kind")
    if named := _named_by_label(evidence):
        yield named._replace(text=_as_title(named.text, limit))


def _caption_candidates(own: _OwnTexts, generated: _Candidate | None) -> Iterator[_Candidate]:
    for each in (*own.captions, *([generated] if generated else [])):
        yield each._replace(text=_sentence(each.text, text_rules.MAX_CAPTION, keep_lead_in=each is not generated))


def _description_candidates(
    own: _OwnTexts, caption: _Candidate | None, title: _Candidate | None, evidence: ImageEvidence
) -> Iterator[_Candidate]:
    limit = text_rules.MAX_DESCRIPTION
    for each in own.descriptions:
        usable = [one for one in sentences(_tidy(each.text)) if not text_rules.caption_violations(shorten(one, limit))]
        yield each._replace(text=shorten(" ".join(usable[: text_rules.MAX_SENTENCES]), limit))
    if caption and caption.source != SOURCE_METADATA and title and title.source == SOURCE_METADATA:
        caption = title  # what a shop calls a thing is surer than what a model sees
    first = caption or title
    if first:
        parts = [_with_stop(first.text)]
        if own.kind and not mentions(first.text, (_attributes(own),)):
            parts.append(_with_stop(_attributes(own)))
        if text := shorten(_read_text(evidence), limit // 4):
            yield first._replace(text=shorten(" ".join([*parts, f'Text in the picture: "{text}".']), limit))
        yield first._replace(text=shorten(" ".join(parts), limit))
        yield first._replace(text=shorten(_with_stop(first.text), limit))


def _keywords(
    own: _OwnTexts, generated: _Candidate | None, evidence: ImageEvidence, categories: Sequence[Category]
) -> tuple[tuple[str, ...], str | None]:
    """Keywords, best supported first, and the source of the first."""
    kept: list[str] = []
    seen = set()
    first_source = None
    for text, source in _keyword_candidates(own, generated, evidence, categories):
        if len(kept) == text_rules.MAX_KEYWORDS:
            break
        if text in seen:
            continue
        seen.add(text)
        keyword = unicodedata.normalize("NFC", " ".join(text.lower().split()).strip(_KEYWORD_EDGE))
        if keyword and text_rules.may_join(keyword, kept):
            kept.append(keyword)
            first_source = first_source or source
    return tuple(kept), first_source


def _keyword_candidates(
    own: _OwnTexts, generated: _Candidate | None, evidence: ImageEvidence, categories: Sequence[Category]
) -> Iterator[tuple[str, str]]:
    yield from ((each, SOURCE_METADATA) for each in own.keywords)
    if own.kind and not own.color and generated:
        yield from ((each, generated.source) for each in noun_phrases(generated.text) if mentions(each, (own.kind,)))
    if own.kind:
        yield f"{own.color} {own.kind}".strip(), SOURCE_METADATA
        yield own.kind, SOURCE_METADATA
    if own.brand:
        yield own.brand, SOURCE_METADATA
    yield from ((each, SOURCE_METADATA) for each in own.categories)
    titles = own.titles[: 0 if own.kind else 1]
    texts: list[_Candidate | None] = [*own.alt, *own.captions[:_MAX_CAPTIONS], *titles, generated]
    yield from _named_in(texts[0])
    if not own.kind:
        yield from ((label.name, LABELS) for label in evidence.labels if label.score >= KEYWORD_LABEL_SCORE)
    for category in categories:
        if category.path and category.score >= KEYWORD_CATEGORY_SCORE:
            yield plain(category.path[-1]).replace(" & ", " and "), LABELS
    for each in texts[1:]:
        yield from _named_in(each)
    yield from ((each, SOURCE_METADATA) for each in (*own.details, *([] if own.kind else [own.color])))


def _named_in(text: _Candidate | None) -> Iterator[tuple[str, str]]:
    """Things and doings that an English text names."""
    if text and reads_english(text.text):
        yield from ((each, text.source) for each in (*noun_phrases(text.text), *doings(text.text)))


def _choose(
    field: str, candidates: Iterable[_Candidate], violations: Callable[[str], list[str]], doubts: list[str]
) -> _Candidate | None:
    """The first candidate that keeps to the rules; why others did not goes to `doubts`."""
    for candidate in candidates:
        if not candidate.text:
            continue
        wrong = violations(candidate.text)
        if not wrong:
            return candidate
        doubts.append(f"{candidate.origin} is not used as {field}: {wrong[0]}")
    return None


def _doubts_of_generation(evidence: ImageEvidence, sources: Mapping[str, str]) -> Iterator[str]:
    written = set(sources.values())
    if GENERATED in written and evidence.caption_score is not None and evidence.caption_score < LOW_CAPTION_SCORE:
        yield f"the caption is unsure: its score is below {LOW_CAPTION_SCORE}"
    if LABELS in {sources.get("alt_text"), sources.get("title")} and evidence.labels:
        score = max(label.score for label in evidence.labels)
        if score < LOW_LABEL_SCORE:
            yield f"named by a class that is not likely: its probability is below {LOW_LABEL_SCORE}"


def _generated(evidence: ImageEvidence) -> _Candidate | None:
    """The generated caption, without the words that only say that it is a picture."""
    text = _without_lead_in(_TWICE.sub(r"\1", _tidy(_UNKNOWN_WORD.sub("", plain(evidence.caption)))))
    if not text:
        return None
    if evidence.caption_source == LABELS:
        if all(label.score < MIN_LABEL_SCORE for label in evidence.labels):
            return None
        return _Candidate(_without_article_of_plural(text), LABELS, "the caption made of labels")
    return _Candidate(text, GENERATED, "the generated caption")


def _text_of_picture(evidence: ImageEvidence) -> str:
    """The text in a picture that shows little else."""
    return _read_text(evidence) if (evidence.text_share or 0.0) >= MOSTLY_TEXT_SHARE else ""


def _read_text(evidence: ImageEvidence) -> str:
    """What OCR is sure of and people could read out: no fragments, and nothing twice."""
    lines = [plain(line.text).replace('"', "'") for line in evidence.texts or () if line.score >= MIN_TEXT_SCORE]
    words = " ".join(line for line in lines if _LETTERS.search(line) and is_mostly_latin(line)).split()
    first: dict[str, str] = {}
    for word in words:
        first.setdefault(word.casefold(), word)
    return " ".join(first.values())


def _named_by_label(evidence: ImageEvidence) -> _Candidate | None:
    if not evidence.labels or evidence.labels[0].score < MIN_LABEL_SCORE:
        return None
    text = _without_article_of_plural(with_article(plain(evidence.labels[0].name)))
    return _Candidate(_capitalized(shorten(text, text_rules.MAX_ALT_TEXT)), LABELS, "the likeliest label")


def _decorative(evidence: ImageEvidence, reason: str, language: str) -> TagTexts:
    doubts = () if evidence.texts is not None else ("taken for decorative, but no text was looked for in it",)
    if evidence.width and evidence.height and min(evidence.width, evidence.height) <= MAX_SPACER_PIXELS:
        doubts = ()
    return TagTexts("", reason, "", None, "", (), slug("", evidence.image_id), language, {}, doubts)


def _attributes(own: _OwnTexts) -> str:
    """`Tshirts (topwear) in white for men, by Acme`"""
    text = own.kind
    about = next((each for each in own.categories if not text_rules.repeats(each.lower(), own.kind.lower())), "")
    if about:
        text += f" ({about.lower()})"
    if own.color:
        text += f" in {own.color.lower()}"
    if own.gender:
        text += f" for {own.gender.lower()}"
    if own.brand:
        text += f", by {own.brand}"
    return _capitalized(text)


def _sentence(text: str, limit: int, keep_lead_in: bool = False) -> str:
    """A caption in sentence case and with a full stop, within a limit."""
    text = _tidy(text)
    if not keep_lead_in:
        text = _without_lead_in(text)
    if len(text) > limit or not text.endswith((".", "!", "?", "。", "！", "？", '"', "'", ")", "”", "」")):
        text = _with_stop(shorten(text, limit - 1))
    return _capitalized(text)


def _with_stop(text: str) -> str:
    if not text or not (text[-1].isalnum() or text[-1] in "'’)”\"") or not is_mostly_latin(text):
        return text
    return f"{text}."


def _as_title(text: str, limit: int) -> str:
    """`a man is riding a bike.` -> `Man riding a bike`"""
    text = _without_lead_in(_tidy(text))
    if reads_english(text) and not _AND_ANOTHER.search(text):
        text = _IS_DOING.sub("", _ARTICLE.sub("", text), count=1)
    text = shorten(text.rstrip(". "), limit)
    return _capitalized(text.rstrip(". "))


def _tidy(text: str) -> str:
    """With signs and possessives where they belong: `the man 's dog .` -> `the man's dog.`"""
    text = _PARTED.sub("", text)
    return text.replace(" ' ", "' ") if text.count(" ' ") == 1 else text


def _without_lead_in(text: str) -> str:
    for _ in range(3):
        shorter = text_rules.LEAD_IN.sub("", text)
        if shorter == text:
            break
        text = shorter
    return text


def _without_article_of_plural(text: str) -> str:
    """`a swimming trunks` -> `swimming trunks`"""
    if re.fullmatch(r"an? .*[^s\W]s", text):
        return text.partition(" ")[2]
    return text


def _capitalized(text: str) -> str:
    """With a first letter that is upper case, unless it is a name such as iPhone."""
    if len(text) > 1 and text[1].isupper():
        return text
    first = text[:1].upper()
    return first + text[1:] if len(first) == 1 else text


@lru_cache(4096)
def _field_name(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _name(value: Any) -> str:
    """A short value of metadata, such as a colour or a kind; hyphens and underscores of identifiers are spaces."""
    text = plain(value)
    if not text or text_rules.title_violations(text):
        return ""
    return text.replace("_", " ") if text.count("-") < 2 else text.replace("_", " ").replace("-", " ")


def _canonical_language(tag: str) -> str:
    """`EN-us` -> `en-US`, by RFC 5646, section 2.1.1."""
    parts = tag.split("-")
    head = parts[0].lower()
    return "-".join(
        [
            head,
            *(
                part.upper() if len(part) == 2 else part.title() if len(part) == 4 else part.lower()
                for part in parts[1:]
            ),
        ]
    )


def _base_36(number: int) -> str:
    number &= 2**63 - 1
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = _BASE_36[digit] + digits
        if not number:
            return digits
