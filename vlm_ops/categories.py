"""Zero-shot categories: what is known of an image -> nodes of a taxonomy, each with a probability.

A node stands for what pictures of it show: a few prompts, as texts in the image–text space of the catalog's model.
Everything known of an image is brought into that space too: its embedding as it is; class names by their
probabilities; captions, titles and alt texts as the mean of their words, whose vectors are looked up, because a text
model would take longer over one sentence than everything else over a hundred images. Each of these, less what all
images have in common, times the weight it has earned in calibration, adds up to one vector; its products with all
prompts become probabilities by softmax over the prompts and over some that belong to no category. A node's
probability is the sum over its prompts and those below it, so a child is never likelier than its parent; a prompt of
two nodes counts for both. See docs/decisions/0011-categories.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from schemas.recipes import DEFAULT_MAX_CATEGORIES, DEFAULT_MIN_SCORE
from schemas.tags import Category, ImageEvidence
from schemas.taxonomy import Node, Taxonomy
from vlm_ops.category_calibration import CategoryCalibration, fit, softmax
from vlm_ops.models import TextModel, describe_model, load_text_model, require_text_side
from vlm_ops.models.onnx_engine import cached_file
from vlm_ops.models.settings import CPU, ModelSettings

# What came with an image and says in words what it shows; labels and shop categories are names of other taxonomies.
METADATA_FIELDS = ("title", "name", "product_name", "headline", "alt", "alt_text", "description")
# Pictures that belong to no category: they take the probability that would else go to the least wrong one.
BACKGROUND_PROMPTS = (
    "a person", "a man", "a woman", "a child", "a group of people", "a crowd of people", "people sitting",
    "people standing on a street", "people talking to each other", "a man in a blue shirt",
    "a woman looking at the camera", "a boy running", "a girl in a pink dress", "a person jumping",
    "a man standing in front of a building", "a city street", "a street sign", "a traffic light", "a fence",
    "a plain white background", "an object", "a thing", "a blurry photo", "a wall", "water", "the sky", "snow", "sand",
    "grass and trees", "a soldier in uniform", "a gun", "a tank or a cannon", "a warplane", "a prison", "smoke and fire",
)  # fmt: skip
_LABEL_TEXT = "a photo of a {}"
_WORD = re.compile(r"[^\W\d_]{2,}")
_STOP_WORDS = frozenset(
    [
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "with",
        "and",
        "or",
        "to",
        "is",
        "are",
        "was",
        "be",
        "his",
        "her",
        "its",
        "their",
        "it",
        "two",
        "three",
        "one",
        "while",
        "through",
        "by",
        "for",
        "from",
        "up",
        "down",
        "into",
        "over",
        "out",
        "as",
        "another",
        "other",
        "some",
        "this",
        "that",
        "there",
        "who",
        "which",
        "front",
        "each",
        "has",
        "have",
    ]
)
_MAX_WORDS = 200  # of a text that came with an image; a page's worth says no more
# When a caption contradicts its picture. Of the photos of flickr8k/dev 2.9 % do; by the first tier alone 1.7 %, and a third
# of grocery's that have a generated caption: dogs with yellow balls that are lemons.
_CAPTION_SHARPNESS, _SURE, _RULED_OUT, _SEEN = 120.0, 0.5, 0.05, 0.3
_SPEAKING_SHARE = 0.15  # of what speaks for a category; evidence of less is not named
_TEXTS_PER_BATCH = 64
_MAX_CACHED_TEXTS = 200_000  # 300 MB of vectors of 388 dimensions


@dataclass(frozen=True)
class CategoryScorer:
    """Assigns categories. Made once by `compute`, on the launcher; what a worker needs is in it.

    Attributes:
        text_model: Spec of the model whose space it is.
        prompts: float32[p, d], L2-normalised: the texts of all nodes, and behind them those of none.
        members: bool[p, m]: which prompts are a node's or stand below it.
        nodes: The m nodes that can be assigned, parents before children.
        parents: int[m]: number of each node's parent in `nodes`, -1 of a root.
        visible: bool[p]: whether a picture can show it; if not, only texts that came with the image speak for it.
    """

    taxonomy: Taxonomy
    text_model: str
    calibration: CategoryCalibration
    threshold: float
    max_categories: int
    nodes: tuple[Node, ...]
    parents: np.ndarray
    prompts: np.ndarray
    members: np.ndarray
    visible: np.ndarray
    fingerprint: str
    texts: TextVectors = field(repr=False)

    @staticmethod
    def compute(
        taxonomy: Taxonomy,
        text_model: str,
        calibration: CategoryCalibration | None = None,
        threshold: float = DEFAULT_MIN_SCORE,
        max_categories: int = DEFAULT_MAX_CATEGORIES,
        settings: ModelSettings = CPU,
    ) -> CategoryScorer:
        """The scorer of a taxonomy in a model's space. Texts are encoded once and kept in the user's cache.

        Args:
            text_model: Spec of the model that made the catalog's embeddings.
            calibration: None: the one that comes with the model, or that of models without any.
            settings: How the model encodes texts.

        Raises:
            ValueError: The model is unknown or has no text side, the calibration is another model's, or threshold or
                number make no sense.
        """
        require_text_side(text_model, "its images cannot be compared with categories", settings)
        if not 0 <= threshold <= 1:
            raise ValueError(f"the threshold must be in [0, 1], got {threshold}")
        if max_categories < 1:
            raise ValueError(f"at least one category must be allowed, got {max_categories}")
        model = describe_model(text_model, settings).name
        calibration = calibration or CategoryCalibration.of_model(model)
        if calibration.model not in ("", model):
            raise ValueError(
                f"the calibration was made with {calibration.model}, and the catalog with {model}; calibrate again with "
                "images of this model"
            )
        nodes = _assignable(taxonomy)
        numbers = {node.id: number for number, node in enumerate(nodes)}
        listed, members, visible = _prompts_of(nodes, numbers)
        vectors = _encoded((*listed, *BACKGROUND_PROMPTS), text_model, model, settings)
        num_background = len(BACKGROUND_PROMPTS)
        members = np.concatenate([members, np.zeros((num_background, len(nodes)), bool)])
        visible = np.concatenate([visible, np.ones(num_background, bool)])
        parents = np.array([numbers[node.parent] if node.parent else -1 for node in nodes], np.int64)
        decides = [
            taxonomy.hash, list(zip(listed, members.tolist(), visible.tolist(), strict=False)), BACKGROUND_PROMPTS,
            METADATA_FIELDS, model, calibration.to_json(), threshold, max_categories,
        ]  # fmt: skip
        fingerprint = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]
        return CategoryScorer(
            taxonomy, text_model, calibration, threshold, max_categories, nodes, parents, vectors, members, visible,
            fingerprint, TextVectors(text_model, vectors.shape[1], settings),
        )  # fmt: skip

    def assign(self, embeddings: np.ndarray, evidences: Sequence[ImageEvidence]) -> list[tuple[Category, ...]]:
        """Categories of n images, likeliest first, at most `max_categories` of those that reach the threshold.

        Args:
            embeddings: float32[n, d]; a row of NaN where an image has none: it gets no category.
        """
        return self.assign_and_compare(embeddings, evidences)[0]

    def assign_and_compare(
        self, embeddings: np.ndarray, evidences: Sequence[ImageEvidence]
    ) -> tuple[list[tuple[Category, ...]], list[str | None]]:
        """What `assign` gives, and for each image how its generated caption contradicts the picture; None where it does
        not."""
        spoken = self.evidence_vectors(embeddings, evidences)
        has_embedding = ~np.isnan(embeddings).any(axis=1)
        is_told = spoken["source_metadata"].any(axis=1)
        found: list[tuple[Category, ...]] = [()] * len(evidences)
        for scorer, rows in ((self, has_embedding & is_told), (self._of_pictures, has_embedding & ~is_told)):
            if rows.any():
                assigned = scorer._assigned({kind: values[rows] for kind, values in spoken.items()})
                for row, categories in zip(np.flatnonzero(rows), assigned, strict=True):
                    found[row] = categories
        is_generated = has_embedding & np.array([each.caption_source == "generated" for each in evidences], bool)
        return found, self._of_pictures._contradictions(spoken, is_generated)

    def _contradictions(self, spoken: Mapping[str, np.ndarray], is_generated: np.ndarray) -> list[str | None]:
        """Where the caption alone is sure of a category, of the first or second tier, that picture and class names all but
        rule out."""
        told: list[str | None] = [None] * len(is_generated)
        rows = np.flatnonzero(is_generated)
        if not len(rows) or not self.calibration.is_fitted:  # else nobody has seen what similarities mean
            return told
        picture = np.sum([self.calibration.weights[kind] * spoken[kind][rows] for kind in ("image", "labels")], axis=0)
        caption = _CAPTION_SHARPNESS * spoken["caption"][rows]
        of_picture, of_caption = (softmax(vectors @ self.prompts.T) @ self._weights for vectors in (picture, caption))
        everywhere = np.arange(len(rows))
        for tier in (2, 1):  # the first, where both differ, is said at last
            nodes = np.array([number for number, node in enumerate(self.nodes) if len(node.path) == tier])
            if not len(nodes):
                continue
            said, shown = nodes[of_caption[:, nodes].argmax(axis=1)], nodes[of_picture[:, nodes].argmax(axis=1)]
            is_so = of_caption[everywhere, said] > _SURE
            is_so &= (of_picture[everywhere, said] < _RULED_OUT) & (of_picture[everywhere, shown] > _SEEN)
            for i in np.flatnonzero(is_so):
                names = self.nodes[said[i]].name, self.nodes[shown[i]].name
                told[rows[i]] = f"the caption speaks of another category than the picture: {names[0]}, not {names[1]}"
        return told

    @cached_property
    def _of_pictures(self) -> CategoryScorer:
        """For images that came without texts: only what pictures show, which is half of the work."""
        nodes = np.flatnonzero(self.members[self.visible].any(axis=0))
        numbers = {int(node): number for number, node in enumerate(nodes)}
        return replace(
            self,
            nodes=tuple(self.nodes[node] for node in nodes),
            parents=np.array([numbers.get(int(self.parents[node]), -1) for node in nodes], np.int64),
            prompts=self.prompts[self.visible],
            members=self.members[self.visible][:, nodes],
            visible=self.visible[self.visible],
        )

    def _assigned(self, spoken: Mapping[str, np.ndarray]) -> list[tuple[Category, ...]]:
        prompts = self.prompt_probabilities(spoken)
        probabilities = self.node_probabilities(prompts)
        # Parents stand before children in `nodes`, and the sort is stable: of equals the parent comes first.
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : self.max_categories]
        is_likely = np.take_along_axis(probabilities, order, axis=1) >= self.threshold
        rows, columns = np.nonzero(is_likely)[0], order[is_likely]
        found: list[list[Category]] = [[] for _ in probabilities]
        for row, column, evidence in zip(rows, columns, self._spoke(spoken, prompts, rows, columns), strict=True):
            node = self.nodes[column]
            found[row].append(Category(node.id, node.path, float(probabilities[row, column]), evidence))
        return [tuple(each) for each in found]

    def evidence_vectors(self, embeddings: np.ndarray, evidences: Sequence[ImageEvidence]) -> dict[str, np.ndarray]:
        """For each kind of evidence float32[n, d]: what it says, less what it says of all images; zero where it is
        missing."""
        labels = [[(_LABEL_TEXT.format(label.name), label.score) for label in each.labels] for each in evidences]
        captions = [[(word, 1.0) for word in words_of(each.caption or "")] for each in evidences]
        metadata = [[(word, 1.0) for word in _words_beside(each)] for each in evidences]
        raw = {
            "image": np.where(np.isnan(embeddings), 0, embeddings).astype(np.float32),
            "labels": self.texts.weighted_sums(labels, as_mean=False),
            "caption": self.texts.weighted_sums(captions),
            "source_metadata": self.texts.weighted_sums(metadata),
        }
        is_there = {
            "image": ~np.isnan(embeddings).any(axis=1),
            "labels": np.array([bool(each) for each in labels], bool),
            "caption": np.array([bool(each) for each in captions], bool),
            "source_metadata": np.array([bool(each) for each in metadata], bool),
        }
        return {
            kind: np.where(is_there[kind][:, None], values - self.calibration.mean(kind, values.shape[1]), 0)
            for kind, values in raw.items()
        }

    def prompt_probabilities(self, spoken: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32[n, p], rows sum to 1: the softmax over all prompts of the weighted evidence."""
        weighted = {kind: self.calibration.weights[kind] * values for kind, values in spoken.items()}
        logits = np.sum(list(weighted.values()), axis=0) @ self.prompts.T
        if not self.visible.all():
            beside = weighted["source_metadata"]
            hidden = np.where(np.asarray(beside.any(axis=1))[:, None], beside @ self.prompts[~self.visible].T, -np.inf)
            logits[:, ~self.visible] = hidden
        return softmax(logits)

    def node_probabilities(self, prompts: np.ndarray) -> np.ndarray:
        """float32[n, m]: calibrated, and no child's above its parent's."""
        sums = np.minimum(prompts @ self._weights, 1)
        probabilities = self.calibration.probability(sums)
        for number, parent in enumerate(self.parents):  # sums of equal numbers may differ in the last digit
            if parent >= 0:
                np.minimum(probabilities[:, number], probabilities[:, parent], out=probabilities[:, number])
        return probabilities

    @cached_property
    def _weights(self) -> np.ndarray:
        """`members` as float32[p, m]."""
        return self.members.astype(np.float32)

    def _spoke(
        self, spoken: Mapping[str, np.ndarray], prompts: np.ndarray, rows: np.ndarray, columns: np.ndarray
    ) -> list[tuple[str, ...]]:
        """For each pair of image and node the evidence for it, strongest first: by how much it brings the image
        nearer to the node's likeliest prompt than all images are."""
        best = np.where(self.members.T[columns], prompts[rows], -1).argmax(axis=1)
        kinds = list(spoken)
        gains = np.stack(
            [self.calibration.weights[kind] * (spoken[kind][rows] * self.prompts[best]).sum(axis=1) for kind in kinds],
            axis=1,
        )
        gains[~self.visible[best], : kinds.index("source_metadata")] = 0
        least = _SPEAKING_SHARE * np.maximum(gains, 0).sum(axis=1, keepdims=True)
        order = np.argsort(-gains, axis=1, kind="stable")
        return [
            tuple(kinds[kind] for kind in order[i] if gains[i, kind] > 0 and gains[i, kind] >= least[i])
            for i in range(len(rows))
        ]


def calibrate(
    taxonomy: Taxonomy,
    text_model: str,
    embeddings: np.ndarray,
    evidences: Sequence[ImageEvidence],
    truths: Sequence[Collection[str]],
    settings: ModelSettings = CPU,
) -> CategoryCalibration:
    """What each kind of evidence is worth and what a score means, from labelled images.

    Args:
        embeddings: float32[n, d].
        truths: Ids of each image's categories, none where they are not known.

    Raises:
        ValueError: An id is no node's, or too few images have a category.
    """
    neutral = CategoryCalibration.neutral(describe_model(text_model, settings).name)
    scorer = CategoryScorer.compute(taxonomy, text_model, neutral, settings=settings)
    numbers = {node.id: number for number, node in enumerate(scorer.nodes)}
    known = [i for i, truth in enumerate(truths) if truth]
    for truth in truths:
        for id_ in truth:
            if id_ not in numbers:
                raise ValueError(f"category {id_!r} of {taxonomy.name} cannot be assigned; map the label to another")
    spoken = scorer.evidence_vectors(embeddings[known], [evidences[i] for i in known])
    targets = np.zeros((len(known), len(scorer.nodes)), bool)
    for row, i in enumerate(known):
        targets[row, [numbers[id_] for id_ in truths[i]]] = True
    return fit(scorer.calibration, spoken, scorer.prompts, scorer.members, scorer.parents, targets, scorer.visible)


class TextVectors:
    """Vectors of texts, each encoded once in the life of a process. Safe to use from several threads."""

    def __init__(self, spec: str, dim: int, settings: ModelSettings = CPU) -> None:
        self._spec, self._dim, self._settings = spec, dim, settings
        self._numbers: dict[str, int] = {}
        self._vectors = np.empty((0, dim), np.float32)
        self._model: TextModel | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"_spec": self._spec, "_dim": self._dim, "_settings": self._settings}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**{name.lstrip("_"): value for name, value in state.items()})  # type: ignore[misc]

    def weighted_sums(self, weighted: Sequence[Sequence[tuple[str, float]]], as_mean: bool = True) -> np.ndarray:
        """float32[n, d]: of each row the sum of its texts' vectors by their weights, or their mean; zero where it has
        none."""
        numbers, vectors = self._look_up({text for row in weighted for text, _ in row})
        flat = [(row, numbers[text], weight) for row, texts in enumerate(weighted) for text, weight in texts]
        if not flat:
            return np.zeros((len(weighted), self._dim), np.float32)
        rows, texts, weights = map(np.array, zip(*flat, strict=True))
        used, texts = np.unique(texts, return_inverse=True)
        table = np.zeros((len(weighted), len(used)), np.float32)
        np.add.at(table, (rows, texts), weights)
        if as_mean:
            table /= np.maximum(np.bincount(rows, minlength=len(weighted)), 1)[:, None]
        return table @ vectors[used]

    def _look_up(self, texts: set[str]) -> tuple[dict[str, int], np.ndarray]:
        with self._lock:
            missing = sorted(texts - self._numbers.keys())
            if missing:
                if len(self._numbers) + len(missing) > _MAX_CACHED_TEXTS:
                    self._numbers, self._vectors = {}, self._vectors[:0]
                    missing = sorted(texts)
                self._model = self._model or load_text_model(self._spec, self._settings)
                made = [
                    self._model.encode_texts(missing[start : start + _TEXTS_PER_BATCH])
                    for start in range(0, len(missing), _TEXTS_PER_BATCH)
                ]
                first = len(self._numbers)
                self._vectors = np.concatenate([self._vectors[:first], *made])
                # A new dictionary: another thread may be reading the old one.
                self._numbers = {**self._numbers, **{text: first + i for i, text in enumerate(missing)}}
            return self._numbers, self._vectors


def words_of(text: str) -> list[str]:
    """Words that say what a text is about, in lower case."""
    return [word for word in _WORD.findall(text[: 20 * _MAX_WORDS].lower()) if word not in _STOP_WORDS][:_MAX_WORDS]


def _words_beside(evidence: ImageEvidence) -> list[str]:
    """Words of the texts that came with an image."""
    texts = [value for name in METADATA_FIELDS if isinstance(value := evidence.metadata.get(name), str)]
    return words_of(" ".join([*texts, *evidence.source_captions]))


def _assignable(taxonomy: Taxonomy) -> tuple[Node, ...]:
    """Nodes that may be assigned, parents before children: none that is sensitive, or under one that is."""
    by_id = taxonomy.by_id
    kept: list[Node] = []
    left_out: set[str] = set()
    for node in sorted(taxonomy.nodes, key=lambda node: len(node.path)):
        if node.sensitive or node.parent in left_out:
            left_out.add(node.id)
        else:
            kept.append(by_id[node.id])
    if not kept:
        raise ValueError(f"every node of {taxonomy.name} is sensitive, so that none can be assigned")
    return tuple(kept)


def _prompts_of(nodes: Sequence[Node], numbers: Mapping[str, int]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts of all nodes, none twice; bool[p, m], which are whose; bool[p], whether a picture can show it."""
    described = {ancestor for node in nodes if node.prompts for ancestor in _up(node, nodes, numbers)}
    owners: dict[str, set[int]] = {}
    shown: set[str] = set()
    for node in nodes:
        texts = node.prompts or (() if numbers[node.id] in described else _name_prompts(node))
        for text in texts:
            owners.setdefault(text, set()).update(_up(node, nodes, numbers))
            if node.visible:
                shown.add(text)
    members = np.zeros((len(owners), len(nodes)), bool)
    for row, owning in enumerate(owners.values()):
        members[row, list(owning)] = True
    return list(owners), members, np.array([text in shown for text in owners], bool)


def _name_prompts(node: Node) -> tuple[str, ...]:
    """Of a node that nobody has described: its name, and with its parent's, which tells what is meant by it."""
    name = node.name.lower()
    return (f"a photo of {name}", f"{name}, {node.path[-2].lower()}" if node.parent else name)


def _up(node: Node, nodes: Sequence[Node], numbers: Mapping[str, int]) -> Iterator[int]:
    """Numbers of the node and of all above it."""
    number: int | None = numbers[node.id]
    while number is not None:
        yield number
        parent = nodes[number].parent
        number = numbers[parent] if parent else None


def _encoded(texts: Sequence[str], spec: str, model: str, settings: ModelSettings) -> np.ndarray:
    """float32[p, d], kept in the user's cache by texts and model."""
    key = hashlib.sha256(json.dumps([model, list(texts)]).encode()).hexdigest()[:16]

    def make(path: Path) -> None:
        encoder = load_text_model(spec, settings)
        batches = [
            encoder.encode_texts(texts[i : i + _TEXTS_PER_BATCH]) for i in range(0, len(texts), _TEXTS_PER_BATCH)
        ]
        np.save(path, np.concatenate(batches))

    return np.load(cached_file(f"category-prompts-{key}.npy", make))
