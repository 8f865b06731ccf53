"""Metrics of generated captions against several references each, as the COCO toolkit computes them.

The toolkit (Chen et al. 2015, "Microsoft COCO Captions") needs Java for its tokens and gives BLEU of a whole corpus
only. Here is no Java, and each metric keeps a value or a row per image, so that a bootstrap can resample images. The
tests compare everything with the toolkit.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

MAX_N = 4  # the longest n-grams of BLEU-4 and of CIDEr
Ngram = tuple[str, ...]

# --- Tokens -----------------------------------------------------------------------------------------------------------

PUNCTUATION = frozenset(["'", '"', "`", ".", "?", "!", ",", ":", "-", ";", "..."])
"""Tokens that the toolkit removes. "!!", "&" or "$" are words to it, and so are brackets: it means to remove them,
but looks for "-LRB-" among lower-cased tokens."""

_REWRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TWO_WORDS = {
    "cannot": ["can", "not"],
    "gimme": ["gim", "me"],
    "gonna": ["gon", "na"],
    "gotta": ["got", "ta"],
    "lemme": ["lem", "me"],
    "wanna": ["wan", "na"],
    "'tis": ["'t", "is"],
    "'twas": ["'t", "was"],
}
_TYPOGRAPHY = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": " - ", "—": " - ", "…": " ... "}
    | {"¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 "}
)
_LETTER, _ALNUM = r"[^\W\d_]", r"[^\W_]"
_PART = rf"(?:\d+(?:[.,:]\d+)+|{_ALNUM}+)"
_TOKEN = re.compile(
    rf"""
      (?:{_LETTER}\.)+(?!{_ALNUM})                                                    # u.s. and p.m.
    | (?:mrs?|ms|dr|prof|rev|gen|gov|sen|capt|col|lt|sgt|st|mt|ft|ave|blvd|rd|bldg|dept|[js]r|inc|corp|co|ltd|vs|etc
        |jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\.(?!{_ALNUM})
    | no\.(?=\ *\d)                                                                   # no. 5, but not: he says no.
    | {_ALNUM}+?(?=n't(?!{_ALNUM})) | n't(?!{_ALNUM})                                 # don't
    | 'n' | '(?:s|d|m|re|ve|ll|em|n|till?|cause|tis|twas|\d0s)(?!{_ALNUM})            # man's, they'll, rock 'n' roll
    | y'(?={_ALNUM})                                                                  # y'all
    | (?:[dlo]'{_LETTER}{{2,}}|ma'am|c'mon|cap'n|ne'er|hallowe'en)(?!{_ALNUM})        # o'clock
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                                                        # AT&T
    | [\#@]{_LETTER}\w*                                                               # #sunset
    | {_PART}(?:[-_/]{_PART})+                                                        # t-shirt, and/or, 1/2
    | {_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)+                                  # flickr.com; also: runs.then
    | \d*(?:[.,:]\d+)+                                                                # 3,000 and 5:30
    | {_ALNUM}+
    | \.\.\. | [!?]+ | _+ | \*+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenize(caption: str) -> list[str]:
    """Lower-case words of a caption without its punctuation, as COCO's PTB tokenizer has them.

    Clitics are words ("man's" is "man", "'s"; "don't" is "do", "n't"), hyphenated words stay whole. Rare things of
    other texts than captions (most URLs, smileys, markup) may be cut otherwise than by the Stanford tokenizer.
    """
    text = unicodedata.normalize("NFC", caption).translate(_TYPOGRAPHY)
    found = (_REWRITTEN.get(token, token) for token in _TOKEN.findall(text))
    words = (token.lower() for token in found if token not in PUNCTUATION)
    return list(chain.from_iterable(_TWO_WORDS.get(word, (word,)) for word in words))


def count_ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    """How often each n-gram of 1 to 4 words occurs."""
    shifted = [tokens[i:] for i in range(MAX_N)]
    return Counter(chain.from_iterable(zip(*shifted[:n], strict=False) for n in range(1, MAX_N + 1)))


def _require_pairs(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raises ValueError unless there is a candidate an image."""
    if len(candidates) != len(references):
        raise ValueError(f"{len(candidates)} candidates for {len(references)} images; give one candidate an image")
    _require_references(references)


def _require_references(references: Sequence[Sequence[str]]) -> None:
    """Raises ValueError unless each image has a list of sentences."""
    for image, sentences in enumerate(references):
        if isinstance(sentences, str) or not len(sentences):
            raise ValueError(f"references[{image}] is {sentences!r}; give a list of at least one sentence")


# --- BLEU -------------------------------------------------------------------------------------------------------------


def bleu_counts(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What BLEU needs of each image; the rows of any choice of images go into `bleu`.

    Args:
        candidates: A sentence an image.
        references: Sentences of the same images, at least one each.

    Returns:
        int64[n, 10]: candidate n-grams that are in a reference for n = 1 to 4 (as often at most as in the reference
        that has them most often), candidate n-grams, length of the candidate in words, length of the reference
        closest to it in length (of two, the shorter).

    Raises:
        ValueError: Not as many candidates as images, or an image without references.
    """
    _require_pairs(candidates, references)
    counts = np.zeros((len(candidates), 2 * MAX_N + 2), np.int64)
    for row, candidate, sentences in zip(counts, candidates, references, strict=True):
        tokens, wanted = tokenize(candidate), [tokenize(sentence) for sentence in sentences]
        row[:MAX_N] = _num_matches(tokens, wanted)
        row[MAX_N:-2] = [max(0, len(tokens) - n) for n in range(MAX_N)]
        row[-2] = len(tokens)
        row[-1] = min((abs(len(each) - len(tokens)), len(each)) for each in wanted)[1]
    return counts


def _num_matches(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    """Clipped n-gram matches for n = 1 to 4."""
    counts = [count_ngrams(reference) for reference in references]
    matches = [0] * MAX_N
    for ngram, count in count_ngrams(candidate).items():
        matches[len(ngram) - 1] += min(count, max([each[ngram] for each in counts]))
    return matches


def bleu(counts: np.ndarray, n: int = MAX_N) -> float:
    """Corpus BLEU-n (Papineni et al. 2002), 0 to 1, with the toolkit's terms against a division by zero.

    They leave a corpus without any match of some length, or of captions shorter than n words, a little above 0.

    Args:
        counts: int[num_images, 10] of `bleu_counts`.
    """
    sums = counts.sum(axis=0)
    precisions = (sums[:n] + 1e-15) / (sums[MAX_N : MAX_N + n] + 1e-9)
    ratio = (sums[-2] + 1e-15) / (sums[-1] + 1e-9)
    brevity_penalty = math.exp(min(0.0, 1 - 1 / ratio))
    return float(brevity_penalty * precisions.prod() ** (1 / n))


# --- ROUGE-L ----------------------------------------------------------------------------------------------------------


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]], beta: float = 1.2) -> np.ndarray:
    """ROUGE-L of each image (Lin 2004), 0 to 1: the best precision and the best recall over its references.

    Args:
        candidates, references: As in `bleu_counts`.
        beta: How many times recall weighs more than precision.

    Returns:
        float64[n]; their mean is the corpus's.

    Raises:
        ValueError: As in `bleu_counts`.
    """
    _require_pairs(candidates, references)
    return np.array([_rouge_l(*pair, beta) for pair in zip(candidates, references, strict=True)], float)


def _rouge_l(candidate: str, references: Sequence[str], beta: float) -> float:
    tokens, wanted = tokenize(candidate), [tokenize(sentence) for sentence in references]
    lengths = [common_length(tokens, each) for each in wanted]
    if not any(lengths):
        return 0.0
    precision = max(lengths) / len(tokens)
    recall = max(length / max(len(each), 1) for length, each in zip(lengths, wanted, strict=True))
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a word of `second` at a time for all of `first` at once.

    Hyyrö (2004), "Bit-parallel LCS-length computation revisited".
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for word in second:
        hits = row & places.get(word, 0)
        row = (row + hits) | (row - hits)
    return len(first) - (row & everywhere).bit_count()


# --- CIDEr-D ----------------------------------------------------------------------------------------------------------


class _Vector(NamedTuple):
    """The n-grams of a sentence with what CIDEr-D asks of them for n = 1 to 4."""

    counts: Counter[Ngram]
    norms: list[float]
    num_bigrams: int


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) against fixed references; an image may have any number of candidates.

    An n-gram weighs the more the fewer of these images have it in a reference (with one image, each weighs 0).

    Args:
        references: Sentences of each image, at least one each.
        sigma: By how many words a candidate has to be too long or too short to lose 0.4 of its score.

    Raises:
        ValueError: An image without references.
    """

    def __init__(self, references: Sequence[Sequence[str]], sigma: float = 6.0) -> None:
        _require_references(references)
        self._sigma = sigma
        counts = [[count_ngrams(tokenize(sentence)) for sentence in sentences] for sentences in references]
        images_with = Counter(chain.from_iterable(set().union(*each) for each in counts))
        self._weight_of_unseen = math.log(max(len(references), 1))
        self._weights = {ngram: self._weight_of_unseen - math.log(count) for ngram, count in images_with.items()}
        self._references = [[self._vector(sentence) for sentence in each] for each in counts]

    def score(self, candidates: Sequence[str], images: Sequence[int]) -> np.ndarray:
        """Score of each candidate against the references of its image.

        Args:
            candidates: Sentences.
            images: The index of each candidate's image among `references`.

        Returns:
            float64[n], 0 to 10; a reported CIDEr of 0.58 is a mean of 0.58 of these.

        Raises:
            ValueError: Not as many images as candidates.
        """
        if len(candidates) != len(images):
            raise ValueError(f"{len(candidates)} candidates of {len(images)} images; give the image of each candidate")
        vectors = [self._vector(count_ngrams(tokenize(candidate))) for candidate in candidates]
        return np.array([self._score(*pair) for pair in zip(vectors, images, strict=True)], float)

    def unit_vector(self, sentence: str) -> dict[Ngram, float]:
        """A sentence's n-grams, weighted so that the product of two sentences is the mean over n = 1 to 4 of their cosines:
        a tenth of CIDEr, which lacks what the D adds: no gain by repeated words or by another length."""
        counts = count_ngrams(tokenize(sentence))
        norms = self._vector(counts).norms
        weights = ((ngram, count * self._weights.get(ngram, self._weight_of_unseen)) for ngram, count in counts.items())
        return {ngram: weight / norms[len(ngram) - 1] / MAX_N**0.5 for ngram, weight in weights if weight}

    def _score(self, candidate: _Vector, image: int) -> float:
        references = self._references[image]
        return 10 * sum(self._similarity(candidate, each) for each in references) / len(references)

    def _similarity(self, candidate: _Vector, reference: _Vector) -> float:
        """Mean over n = 1 to 4 of the cosine, in which nothing counts more often than the reference has it."""
        products = [0.0] * MAX_N
        for ngram, count in candidate.counts.items():  # not the intersection, whose order changes from run to run
            if wanted := reference.counts.get(ngram):
                products[len(ngram) - 1] += min(count, wanted) * wanted * self._weights[ngram] ** 2
        norms = zip(candidate.norms, reference.norms, strict=True)
        cosines = [product / (a * b) for product, (a, b) in zip(products, norms, strict=True) if product]
        excess = candidate.num_bigrams - reference.num_bigrams
        return sum(cosines) / MAX_N * math.exp(-(excess**2) / (2 * self._sigma**2))

    def _vector(self, counts: Counter[Ngram]) -> _Vector:
        squares = [0.0] * MAX_N
        num_bigrams = 0
        for ngram, count in counts.items():
            squares[len(ngram) - 1] += (count * self._weights.get(ngram, self._weight_of_unseen)) ** 2
            num_bigrams += count if len(ngram) == 2 else 0
        return _Vector(counts, [math.sqrt(square) for square in squares], num_bigrams)


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each image, with the weights of these references.

    Args:
        candidates, references: As in `bleu_counts`.

    Returns:
        float64[n] as of `CiderD.score`; their mean is the corpus's.

    Raises:
        ValueError: As in `bleu_counts`.
    """
    _require_pairs(candidates, references)
    return CiderD(references).score(candidates, range(len(candidates)))
