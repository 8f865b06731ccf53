"""What a written caption is worth while a captioner trains on its own sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from vlm_ops.caption_metrics import CiderD, Ngram
from vlm_ops.training.data import CaptionedImages, chunks

_CHUNK = 256
_MOST_NEIGHBOURS = 40
_SHARE_OF_NEIGHBOURS = 0.01  # of a small corpus, where the fortieth is like nothing
# Own captions alone reward what an image was learnt by heart as; neighbours alone, what is true of everything.
_CONSENSUS_WEIGHT = 2.0


class CaptionReward:
    """CIDEr-D against an image's own captions, plus CIDEr against the captions of the images most like it.

    A captioner of a small corpus knows its images by heart, and what it is told of their few captions holds for no other
    image. What the captions of similar images agree on does (Devlin et al., "Exploring Nearest Neighbor Approaches for
    Image Captioning", 2015).
    """

    def __init__(self, data: CaptionedImages) -> None:
        sentences = [[data.sentences[row] for row in rows] for rows in data.captions]
        self._cider = CiderD(sentences)
        vectors = data.images.get("embedding", data.images.get("features"))
        # Of a base that is fine-tuned nothing is known yet by which images could be alike.
        self._consensus = [] if vectors is None else self._consensus_of(data, vectors)

    def __call__(self, texts: Sequence[str], images: Sequence[int]) -> np.ndarray:
        """float64[m]: of texts[i] for image images[i] of the training data."""
        rewards = self._cider.score(texts, images)
        if self._consensus:
            pairs = zip(texts, images, strict=True)
            rewards += _CONSENSUS_WEIGHT * np.array([self._agreement(text, image) for text, image in pairs])
        return rewards

    def _agreement(self, text: str, image: int) -> float:
        """CIDEr is the mean cosine with the references, and so the product with their mean."""
        consensus = self._consensus[image]
        return 10 * sum(value * consensus.get(ngram, 0.0) for ngram, value in self._cider.unit_vector(text).items())

    def _consensus_of(self, data: CaptionedImages, vectors: np.ndarray) -> list[dict[Ngram, float]]:
        """Of each image, the mean vector of its neighbours' captions."""
        units = [self._cider.unit_vector(sentence) for sentence in data.sentences]
        count = min(_MOST_NEIGHBOURS, int(_SHARE_OF_NEIGHBOURS * len(data)))
        return [
            _mean([units[row] for other in others for row in data.captions[other]])
            for others in nearest(vectors, count)
        ]


def nearest(vectors: np.ndarray, count: int) -> np.ndarray:
    """int64[n, count]: for each of the vectors float32[n, d], those others with the largest cosine, in any order."""
    normed = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)
    rows = []
    for chunk in chunks(len(vectors), _CHUNK):
        similarities = normed[chunk] @ normed.T
        similarities[np.arange(len(similarities)), np.arange(chunk.start, chunk.start + len(similarities))] = -np.inf
        rows.append(np.argpartition(-similarities, count, axis=1)[:, :count])
    return np.concatenate(rows)


def _mean(vectors: Sequence[Mapping[Ngram, float]]) -> dict[Ngram, float]:
    """Without the n-grams that one vector alone has: these are most of them, and no agreement."""
    counts = Counter(ngram for vector in vectors for ngram in vector)
    sums: dict[Ngram, float] = {}
    for vector in vectors:
        for ngram, value in vector.items():
            if counts[ngram] > 1:
                sums[ngram] = sums.get(ngram, 0.0) + value
    return {ngram: value / len(vectors) for ngram, value in sums.items()}
