"""How suitable an image is for advertising beside it: IAB's sensitive topics, and the level of risk.

Topics are those of the Content Taxonomy 3.1, levels those of the Brand Safety Floor + Suitability Framework that GARM
and IAB have published (https://www.brandsafetyinstitute.com/resources/frameworks/brand-safety-floor-suitability). What
points to them is in `sensitive_terms.yaml`. What is not sure gives no level: it goes to a person.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import yaml

from schemas.tags import ImageEvidence, SensitiveTopic, Suitability
from vlm_ops.models import load_text_model
from vlm_ops.plain_text import folded

LEVELS = ("floor", "high", "medium", "low")
"""Levels of risk, worst first."""
DOUBT = "doubt"

# Of Yahoo's open_nsfw (https://github.com/yahoo/open_nsfw): its authors take a score under 0.2 for safe, and one over 0.8
# for adult content. It cannot tell nudity from sexual acts, so only where it is all but certain is it taken for the latter.
SAFE_SCORE = 0.2
ADULT_SCORE = 0.8
EXPLICIT_SCORE = 0.95
_ADULT_TOPIC = "Rm3SiT"
_ADULT_LEVELS = ((EXPLICIT_SCORE, "floor"), (ADULT_SCORE, "high"), (SAFE_SCORE, DOUBT))

# A class of the model speaks from the first on, and is worth a look from the second.
_LABEL_SCORE = 0.6
_DOUBTFUL_LABEL_SCORE = 0.35
# What OCR reads with less is too often another word; and short words come out of textures.
_OCR_SCORE = 0.8
_OCR_LEAST_CHARACTERS = 4

# Keys of source metadata that say what the picture shows. Others, such as a colour named "Wine", do not.
_TELLING_KEYS = (
    "title", "name", "product_name", "productname", "headline", "alt", "alt_text", "alttext", "caption", "captions", "description",
    "keywords", "tags", "label", "labels", "category", "categories", "subcategory",
)  # fmt: skip
_MAX_CHARACTERS = 5000  # of a text that is searched


@dataclass(frozen=True)
class Topic:
    """A sensitive topic; `labels` give the level that a class name asks for, `prompts` say what it looks like."""

    id: str
    name: str
    labels: Mapping[str, str]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class _Hit:
    """Something that points to a topic, with the level that it asks for, or `doubt`."""

    topic: Topic
    level: str
    evidence: str
    score: float


@dataclass(frozen=True)
class _Term:
    """A row of words. Those without a topic are harmless."""

    words: tuple[str, ...]
    topic: Topic | None
    level: str


@dataclass(frozen=True)
class Rules:
    """What points to which topic: the content of `sensitive_terms.yaml`.

    Attributes:
        rules_id: Changes whenever they or the thresholds do.
    """

    topics: tuple[Topic, ...]
    terms: Mapping[str, tuple[_Term, ...]]  # by their first word, longest first
    weakened_before: frozenset[str]
    weakened_after: frozenset[str]
    least_similarity: Mapping[str, float]  # by model spec
    rules_id: str


@lru_cache(maxsize=1)
def suitability_rules() -> Rules:
    """The rules that Beamsight ships."""
    source = resources.files("vlm_ops").joinpath("sensitive_terms.yaml").read_text(encoding="utf-8")
    return _parse(source)


@dataclass(frozen=True)
class TopicEmbeddings:
    """What topics look like, in the embedding space of a catalog's images.

    Attributes:
        embeddings: float32[m, d], L2-normalised.
        prompts: The m texts that they are of.
        topics: The topic of each.
        least_similarity: From which on an image is worth a look.
    """

    embeddings: np.ndarray
    prompts: tuple[str, ...]
    topics: tuple[Topic, ...]
    least_similarity: float


@lru_cache(maxsize=4)
def topic_embeddings(model_spec: str) -> TopicEmbeddings | None:
    """The prompts of the topics, encoded; None for an encoder of which nobody has measured how similar is similar."""
    rules = suitability_rules()
    if model_spec not in rules.least_similarity:
        return None
    pairs = [(topic, prompt) for topic in rules.topics for prompt in topic.prompts]
    prompts = tuple(prompt for _, prompt in pairs)
    embeddings = load_text_model(model_spec).encode_texts(prompts)
    return TopicEmbeddings(embeddings, prompts, tuple(topic for topic, _ in pairs), rules.least_similarity[model_spec])


def judge(
    evidences: Sequence[ImageEvidence], embeddings: np.ndarray | None = None, looks: TopicEmbeddings | None = None
) -> list[Suitability]:
    """The suitability of each image, by all that is known of it.

    The level is the worst that something sure asks for. It is `low` only where everything was looked for and nothing was
    found. Where something is doubtful or was not looked for, there is no level (None) unless what is sure is `floor` or
    `high` already; `doubts` say why, and name what is sensitive, for a person to look at.

    Args:
        embeddings: float32[n, d] of the images, L2-normalised; zeros where an image has none.
        looks: What the topics look like to the encoder of the embeddings; without, they are not compared.
    """
    rules = suitability_rules()
    seen: list[list[_Hit]] = [[] for _ in evidences]
    if embeddings is not None and looks is not None and len(evidences):
        similarities = embeddings @ looks.embeddings.T
        for row, column in np.argwhere(similarities >= looks.least_similarity).tolist():
            similarity = float(similarities[row, column])
            said = f"looks like {looks.prompts[column]!r} {similarity:.2f}"
            seen[row].append(_Hit(looks.topics[column], DOUBT, said, similarity))
    return [_judge(evidence, [*_hits(rules, evidence), *more]) for evidence, more in zip(evidences, seen, strict=True)]


def _judge(evidence: ImageEvidence, hits: Sequence[_Hit]) -> Suitability:
    topics = _topics(hit for hit in hits if hit.level != DOUBT)
    sure_ids = {topic.id for topic in topics}
    level = min((hit.level for hit in hits if hit.level != DOUBT), key=LEVELS.index, default="low")
    open_questions = [f"maybe {hit.topic.name}: {hit.evidence}" for hit in hits if hit.topic.id not in sure_ids]
    open_questions += _not_looked_for(evidence)
    said = [f"{topic.name}: {', '.join(topic.evidence)}" for topic in topics]
    return Suitability(
        level if level in ("floor", "high") or not open_questions else None,
        topics,
        tuple(said) or (() if open_questions else ("nothing sensitive was found",)),
        tuple(dict.fromkeys([*(f"sensitive: {each}" for each in said), *open_questions])),
    )


def _topics(hits: Iterable[_Hit]) -> tuple[SensitiveTopic, ...]:
    """One of each topic, the surest first."""
    by_topic: dict[str, list[_Hit]] = {}
    for hit in hits:
        by_topic.setdefault(hit.topic.id, []).append(hit)
    topics = [
        SensitiveTopic(id_, group[0].topic.name, max(hit.score for hit in group), tuple(dict.fromkeys(hit.evidence for hit in group)))
        for id_, group in by_topic.items()
    ]  # fmt: skip
    return tuple(sorted(topics, key=lambda topic: -topic.score))


def _not_looked_for(evidence: ImageEvidence) -> Iterator[str]:
    if evidence.nsfw_score is None:
        yield "adult content was not looked for (--ops safety)"
    if evidence.texts is None:
        yield "text in the picture was not looked for (--ops ocr)"
    if not (evidence.labels or evidence.caption or evidence.source_captions):
        yield "what the picture shows was not looked for (--ops labels,caption)"


def _hits(rules: Rules, evidence: ImageEvidence) -> Iterator[_Hit]:
    """All that points to a topic."""
    yield from _adult_hits(rules, evidence.nsfw_score)
    for label in evidence.labels:
        if label.score >= _DOUBTFUL_LABEL_SCORE:
            sure = label.score >= _LABEL_SCORE
            for topic, level, _ in _of_label(label.name):
                yield _Hit(topic, level if sure else DOUBT, f"label {label.name!r} {label.score:.2f}", label.score)
    for where, text in _words_of_people(evidence):
        for topic, level, words in _of_text(text):
            yield _Hit(topic, level, f"{where} {words!r}", 1.0)
    for found in evidence.texts or ():
        for topic, level, words in _of_text(found.text):
            sure = found.score >= _OCR_SCORE and len(words) >= _OCR_LEAST_CHARACTERS
            yield _Hit(topic, level if sure else DOUBT, f"OCR {words!r} {found.score:.2f}", found.score)
    if evidence.caption is not None and evidence.caption_source != "labels":  # those have spoken for themselves
        for topic, _, words in _of_text(evidence.caption):  # models see things that are not there
            yield _Hit(topic, DOUBT, f"generated caption {words!r}", evidence.caption_score or 0.0)


def _adult_hits(rules: Rules, score: float | None) -> Iterator[_Hit]:
    level = next((level for least, level in _ADULT_LEVELS if score is not None and score >= least), None)
    if level is not None and score is not None:
        topic = next(topic for topic in rules.topics if topic.id == _ADULT_TOPIC)
        yield _Hit(topic, level, f"adult content score {score:.2f}", score)


def _words_of_people(evidence: ImageEvidence) -> Iterator[tuple[str, str]]:
    """(where from, text) of captions and metadata that came with the image."""
    for text in evidence.source_captions:
        yield "source caption", text
    for key, value in evidence.metadata.items():
        if str(key).lower() in _TELLING_KEYS:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    yield f"source {str(key).lower()}", text


# --- Terms ------------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+")
_Found = tuple[Topic, str, str]


@lru_cache(maxsize=4096)  # of few class names
def _of_label(name: str) -> tuple[_Found, ...]:
    levels = [(topic, topic.labels[name]) for topic in suitability_rules().topics if name in topic.labels]
    if levels:
        return tuple((topic, level, name) for topic, level in levels if level != "none")
    return _of_text(name)


def _of_text(text: str) -> tuple[_Found, ...]:
    """(topic, level, words) of each term in a text."""
    rules = suitability_rules()
    parts = _plain_words(text)
    found = []
    at = 0
    while at < len(parts):
        term = next(
            (term for term in rules.terms.get(parts[at], ()) if parts[at : at + len(term.words)] == term.words), None
        )
        end = at + (len(term.words) if term else 1)
        if term is not None and term.topic is not None and not _is_weakened(rules, parts, at, end):
            found.append((term.topic, term.level, " ".join(term.words)))
        at = end
    return tuple(found)


def _is_weakened(rules: Rules, parts: Sequence[str], start: int, end: int) -> bool:
    before = parts[start - 1] if start else ""
    after = parts[end] if end < len(parts) else ""
    return before in rules.weakened_before or after in rules.weakened_after


def _plain_words(text: str) -> tuple[str, ...]:
    """Words without case, accents, hyphens and possessive s."""
    return tuple(_WORD.findall(folded(text[:_MAX_CHARACTERS]).replace("'s", "")))


def _forms(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """A term and its plural."""
    yield words
    *others, last = words
    if last.endswith(("s", "x", "z", "ch", "sh")):
        yield (*others, f"{last}es")
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        yield (*others, f"{last[:-1]}ies")
    else:
        yield (*others, f"{last}s")


def _parse(source: str) -> Rules:
    content = yaml.safe_load(source)
    topics = []
    terms: dict[tuple[str, ...], _Term] = {}
    for each in content["topics"]:
        topic = Topic(each["id"], each["name"], each.get("labels", {}), tuple(each.get("prompts", ())))
        topics.append(topic)
        for level, phrases in each["terms"].items():
            for words in map(_plain_words, phrases):
                for form in _forms(words):
                    terms[form] = _Term(form, topic, level)
    for phrase in content["harmless"]:
        for form in _forms(_plain_words(phrase)):
            terms[form] = _Term(form, None, "")
    by_first: dict[str, list[_Term]] = {}
    for form, term in sorted(terms.items(), key=lambda item: -len(item[0])):
        by_first.setdefault(form[0], []).append(term)
    weakened: dict[str, Any] = content["weakened_by"]
    thresholds = (_ADULT_LEVELS, _LABEL_SCORE, _DOUBTFUL_LABEL_SCORE, _OCR_SCORE, _OCR_LEAST_CHARACTERS, _TELLING_KEYS)
    return Rules(
        tuple(topics),
        {first: tuple(group) for first, group in by_first.items()},
        frozenset(weakened["before"]),
        frozenset(weakened["after"]),
        content["least_similarity"],
        hashlib.sha256(f"{source}{thresholds}".encode()).hexdigest()[:12],
    )
