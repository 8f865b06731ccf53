"""Metrics of captions against the COCO toolkit's, and what holds for any captions."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_ops.caption_metrics import (
    CiderD,
    bleu,
    bleu_counts,
    cider_d,
    common_length,
    count_ngrams,
    rouge_l,
    tokenize,
)
from vlm_ops.metrics import bootstrap

TOKENS = {
    "A dog runs.": "a dog runs",
    "A man's dog doesn't like it, and can’t sit!": "a man 's dog does n't like it and ca n't sit",
    "They're here; I'm glad he'd've won.": "they 're here i 'm glad he 'd 've won",
    "Two boys' kites": "two boys kites",
    "A red-haired girl in a t-shirt - smiling -- sits": "a red-haired girl in a t-shirt smiling sits",
    "Its sign says “STOP” or \"GO\" or 'WAIT'": "its sign says stop or go or wait",
    "Is it 5:30 p.m. ? 3,000 or 1/2 ...": "is it 5:30 p.m. 3,000 or 1/2",
    "Mr. Smith of the U.S. at Main St., No. 5 . No.": "mr. smith of the u.s. at main st. no. 5 no",
    "A player ( #7 ) pays $5 & 50% at AT&T": "a player -lrb- # 7 -rrb- pays $ 5 & 50 % at at&t",
    "one cannot swim, he is gonna try": "one can not swim he is gon na try",
    "Rock 'n' roll at ten o'clock in the '70s, y'all": "rock 'n' roll at ten o'clock in the '70s y' all",
    "an ice cream and/or a café table, wow!! hmm...": "an ice cream and/or a café table wow !! hmm",
    "a dog ,a cat;a bird:nothing": "a dog a cat a bird nothing",
    "A dog.A cat runs.": "a dog.a cat runs",
    "The 2-year-old's 4x4 — the 1st of the 1990's": "the 2-year-old 's 4x4 the 1st of the 1990 's",
    "slip n 'slide, snow_board, 10:30am": "slip n slide snow_board 10:30 am",
}

CANDIDATES = ["A dog runs on the grass.", "two men's hats", "", "A boy, a boy, a boy and a boy sit on a bench", "dog"]
REFERENCES = [
    ["A brown dog runs on grass.", "The dog is running on the green grass", "A dog plays."],
    ["Two men with hats stand in the street .", "Men wear hats"],
    ["Nobody is here.", "An empty room"],
    ["A boy and a girl sit on a bench.", "Children sit on a wooden bench in a park on a sunny day."],
    ["A dog"],
]

WORDS = ["a", "dog", "man", "man's", "red", "t-shirt", "runs", "on", "the", "grass", "and", "sits", "."]
captions = st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join)
sentences = st.lists(st.sampled_from(WORDS[:-1]), min_size=4, max_size=14).map(" ".join)
images = st.lists(st.tuples(captions, st.lists(sentences, min_size=1, max_size=4)), min_size=1, max_size=8)
Images = list[tuple[str, list[str]]]


def random_captions(num_images: int) -> tuple[list[str], list[list[str]]]:
    """Captions of frequent and rare words, and of lengths from 0 to 20."""
    rng = np.random.default_rng(0)

    def caption(min_words: int) -> str:
        return " ".join(f"w{rank}" for rank in rng.zipf(1.4, rng.integers(min_words, 20)))

    references = [[caption(1) for _ in range(rng.integers(1, 6))] for _ in range(num_images)]
    near = [sentences[0].split() + caption(0).split()[:3] for sentences in references]
    return [" ".join(words) if rng.random() < 0.7 else caption(0) for words in near], references


def tokenized(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Captions as the toolkit takes them: references and candidates by image, of words parted by spaces."""
    gts = {image: [" ".join(tokenize(each)) for each in sentences] for image, sentences in enumerate(references)}
    return gts, {image: [" ".join(tokenize(each))] for image, each in enumerate(candidates)}


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caption", TOKENS)
def test_tokens(caption: str) -> None:
    assert tokenize(caption) == TOKENS[caption].split()


def test_tokens_are_those_of_the_stanford_tokenizer(tmp_path: Path) -> None:
    toolkit = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        pytest.skip("needs java")
    (tmp_path / "captions.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    jar = Path(toolkit.__file__).with_name(toolkit.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    options = ["-preserveLines", "-lowerCase", str(tmp_path / "captions.txt")]
    lines = subprocess.run([*command, *options], capture_output=True, check=True).stdout.decode().splitlines()
    for caption, line in zip(TOKENS, lines, strict=True):
        assert tokenize(caption) == [word for word in line.split() if word not in toolkit.PUNCTUATIONS]


@given(st.text(max_size=60))
def test_tokens_of_any_text_are_lower_case_words(text: str) -> None:
    assert all(word and word == word.lower() and not word.isspace() for word in tokenize(text))


@given(captions)
def test_tokens_of_tokens_are_the_same(caption: str) -> None:
    assert tokenize(" ".join(tokenize(caption))) == tokenize(caption)


def test_ngrams() -> None:
    assert count_ngrams(["a", "a", "b"]) == {
        ("a",): 2,
        ("b",): 1,
        ("a", "a"): 1,
        ("a", "b"): 1,
        ("a", "a", "b"): 1,
    }


# --- as in the toolkit ------------------------------------------------------------------------------------------------

CORPORA = pytest.mark.parametrize(
    "corpus", [(CANDIDATES, REFERENCES), random_captions(200), random_captions(1)], ids=["written", "random", "single"]
)
Corpus = tuple[list[str], list[list[str]]]


@CORPORA
def test_bleu_is_the_toolkits(corpus: Corpus) -> None:
    scorer = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    expected, expected_each = scorer.compute_score(*tokenized(*corpus), verbose=0)
    counts = bleu_counts(*corpus)
    assert [bleu(counts, n) for n in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-6)
    assert [bleu(row[None]) for row in counts] == pytest.approx(expected_each[3], abs=1e-6)


@CORPORA
def test_rouge_l_is_the_toolkits(corpus: Corpus) -> None:
    scorer = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    expected, expected_each = scorer.compute_score(*tokenized(*corpus))
    np.testing.assert_allclose(rouge_l(*corpus), expected_each, atol=1e-6)
    assert rouge_l(*corpus).mean() == pytest.approx(expected, abs=1e-6)


@CORPORA
def test_cider_d_is_the_toolkits(corpus: Corpus) -> None:
    scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    expected, expected_each = scorer.compute_score(*tokenized(*corpus))
    np.testing.assert_allclose(cider_d(*corpus), expected_each, atol=1e-6)
    assert cider_d(*corpus).mean() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(images)
def test_all_are_the_toolkits_on_any_captions(cases: Images) -> None:
    bleus = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    rouges = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()
    ciders = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    corpus = [each[0] for each in cases], [each[1] for each in cases]
    gts, res = tokenized(*corpus)
    assert bleu(bleu_counts(*corpus)) == pytest.approx(bleus.compute_score(gts, res, verbose=0)[0][3], abs=1e-6)
    np.testing.assert_allclose(rouge_l(*corpus), rouges.compute_score(gts, res)[1], atol=1e-6)
    np.testing.assert_allclose(cider_d(*corpus), ciders.compute_score(gts, res)[1], atol=1e-6)


# --- what holds for any captions --------------------------------------------------------------------------------------


@given(st.lists(sentences, min_size=1, max_size=6), st.lists(sentences, max_size=3))
def test_a_reference_as_candidate_is_perfect(candidates: list[str], others: list[str]) -> None:
    references = [[*others, candidate] for candidate in candidates]
    assert bleu(bleu_counts(candidates, references)) == pytest.approx(1)
    assert rouge_l(candidates, references) == pytest.approx(1)


def test_the_only_reference_as_candidate_has_cider_ten() -> None:
    candidates = [each[0] for each in REFERENCES if len(tokenize(each[0])) >= 4]
    assert cider_d(candidates, [[each] for each in candidates]) == pytest.approx(10)


@settings(deadline=None)
@given(images, st.randoms(use_true_random=False))
def test_order_of_images_does_not_matter(cases: Images, random: Random) -> None:
    order = list(range(len(cases)))
    random.shuffle(order)
    candidates, references = [each[0] for each in cases], [each[1] for each in cases]
    shuffled = [candidates[i] for i in order], [references[i] for i in order]
    np.testing.assert_array_equal(bleu_counts(*shuffled), bleu_counts(candidates, references)[order])
    np.testing.assert_array_equal(rouge_l(*shuffled), rouge_l(candidates, references)[order])
    np.testing.assert_allclose(cider_d(*shuffled), cider_d(candidates, references)[order], atol=1e-12)


@settings(deadline=None)
@given(images)
def test_order_of_references_does_not_matter(cases: Images) -> None:
    candidates, references = [each[0] for each in cases], [each[1] for each in cases]
    turned = [each[::-1] for each in references]
    np.testing.assert_array_equal(bleu_counts(candidates, turned), bleu_counts(candidates, references))
    np.testing.assert_array_equal(rouge_l(candidates, turned), rouge_l(candidates, references))
    np.testing.assert_allclose(cider_d(candidates, turned), cider_d(candidates, references), atol=1e-12)


@given(captions, st.lists(sentences, min_size=1, max_size=4), sentences)
def test_another_reference_never_lowers_matches_or_rouge(caption: str, references: list[str], another: str) -> None:
    assert rouge_l([caption], [[*references, another]]) >= rouge_l([caption], [references]) - 1e-12
    more, fewer = bleu_counts([caption], [[*references, another]]), bleu_counts([caption], [references])
    assert (more[:, :4] >= fewer[:, :4]).all()


@settings(deadline=None)
@given(images)
def test_values_are_within_bounds(cases: Images) -> None:
    candidates, references = [each[0] for each in cases], [each[1] for each in cases]
    counts = bleu_counts(candidates, references)
    assert (counts[:, :4] <= counts[:, 4:8]).all()
    assert 0 <= bleu(counts) <= 1
    assert ((rouge_l(candidates, references) >= 0) & (rouge_l(candidates, references) <= 1 + 1e-12)).all()
    assert ((cider_d(candidates, references) >= 0) & (cider_d(candidates, references) <= 10 + 1e-9)).all()


@given(st.text("abc", max_size=70), st.text("abc", max_size=70))
def test_common_length_is_the_naive_one(first: str, second: str) -> None:
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if one == other else max(table[i, j + 1], table[i + 1, j])
    assert common_length(first, second) == table[-1, -1]


# --- edges ------------------------------------------------------------------------------------------------------------


def test_empty_candidates_score_nothing() -> None:
    empty = ["", " ", " . ", "!", "'"]
    assert bleu_counts(empty, REFERENCES)[:, :9].sum() == 0
    assert bleu(bleu_counts(empty, REFERENCES)) == 0
    assert not rouge_l(empty, REFERENCES).any()
    assert not cider_d(empty, REFERENCES).any()


def test_nothing_is_in_common_with_an_empty_reference() -> None:
    for candidate in ("", "a dog runs on grass"):
        assert bleu_counts([candidate], [["."]])[0, :4].sum() == 0
        assert rouge_l([candidate], [["."]]) == 0
        assert cider_d([candidate, "a cat"], [["."], ["a cat"]])[0] == 0


def test_no_images() -> None:
    assert bleu_counts([], []).shape == (0, 10)
    assert rouge_l([], []).shape == cider_d([], []).shape == (0,)


def test_brevity_counts_against_the_closest_reference() -> None:
    references = [["a b c d e f", "a b c d e f g h", "a b c d e f g h i j k l"]]
    assert bleu_counts(["a b c d e f g"], references)[0, -2:].tolist() == [7, 6]
    assert bleu_counts(["a b c d e f g h i j k"], references)[0, -1] == 12
    assert bleu(bleu_counts(["a b c d e"], references)) == pytest.approx(np.exp(1 - 6 / 5))


def test_many_candidates_of_an_image() -> None:
    metric = CiderD(REFERENCES)
    alone = cider_d(CANDIDATES, REFERENCES)
    found = metric.score([CANDIDATES[3], CANDIDATES[0], "a zebra", CANDIDATES[3]], [3, 0, 3, 3])
    np.testing.assert_array_equal(found[[0, 1, 3]], alone[[3, 0, 3]])
    assert found[2] < found[0]
    assert metric.score([], []).shape == (0,)


def test_a_product_of_unit_vectors_is_cider_where_no_word_repeats_and_lengths_agree() -> None:
    metric = CiderD([["a dog runs over grass"], ["two cats sleep on beds"], ["a dog sleeps"]])
    first, second = metric.unit_vector("a dog runs over beds"), metric.unit_vector("a dog runs over grass")
    product = sum(value * second.get(ngram, 0.0) for ngram, value in first.items())
    assert 10 * product == pytest.approx(metric.score(["a dog runs over beds"], [0])[0])
    assert metric.unit_vector("") == {}


def test_bleu_rows_are_resampled() -> None:
    counts = bleu_counts(*random_captions(60))
    found = bootstrap(counts, bleu, num_resamples=100)
    assert found.value == bleu(counts)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("metric", [bleu_counts, rouge_l, cider_d])
def test_what_does_not_fit_is_refused(metric: Callable[[list[str], list], np.ndarray]) -> None:
    with pytest.raises(ValueError, match="2 candidates for 1 images; give one candidate an image"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=r"references\[1\] is \[\]; give a list of at least one sentence"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match=r"references\[0\] is 'a dog'; give a list of at least one sentence"):
        metric(["a"], ["a dog"])


def test_each_candidate_needs_its_image() -> None:
    with pytest.raises(ValueError, match="2 candidates of 1 images; give the image of each candidate"):
        CiderD([["a"]]).score(["a", "b"], [0])
