"""A trained captioner: its base, and a sentence for each image.

Where the base aligns images and texts, it has the last word: the sentence is the best, by its judgement, of the first
that the writer has found, unless "a photo of a {class}" for one of the likeliest classes fits better by a margin. Away
from the scenes of its training a writer tells of what it knows; a plain class name is then nearer the truth. It also writes
hesitantly there, so that the margin is the larger the surer it is. A sentence that names people counts only where the
features show some, and the more easily the surer the writer is of it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm_ops.mentions import names_people
from vlm_ops.models import Caption, ImageEncoding, ImageModel, ModelInfo
from vlm_ops.models.aligned import CosineMatcher
from vlm_ops.models.backbones import FIELDS
from vlm_ops.models.directory import ModelDirectory
from vlm_ops.models.onnx_engine import cached_file
from vlm_ops.models.settings import ModelSettings
from vlm_ops.sentences import class_sentence

if TYPE_CHECKING:
    from vlm_ops.models.captioner import Hypothesis

_LABELS = 3  # of the likeliest classes, how many speak
# By how much a class sentence must fit better, for each unit of log-probability that the writer is surer than usual.
_MARGIN_OF_SURENESS = 0.2


def describe(directory: ModelDirectory, spec: str) -> ModelInfo:
    base = directory.base
    produces = directory.base_produces | {"caption"}
    takes = frozenset({"num_beams"})
    return ModelInfo(spec, directory.revision, produces, base.encodes_text, base.map_dim, takes)


def load_image_model(
    directory: ModelDirectory, info: ModelInfo, settings: ModelSettings, outputs: frozenset[str]
) -> ImageModel:
    if "caption" not in outputs:
        return directory.base_image_model(info, settings, outputs)
    return CaptioningImageModel(directory, info, settings, outputs)


class CaptioningImageModel:
    """The base's encodings, with captions."""

    def __init__(
        self, directory: ModelDirectory, info: ModelInfo, settings: ModelSettings, outputs: frozenset[str]
    ) -> None:
        import torch

        from vlm_ops.models.writers import load_writer

        self.info = info
        self._writer = load_writer(directory, settings.device)
        self._reads = tuple(directory.config["reads"])  # of the encoding; nothing where it sees the pixels
        judged = {"match", "labels", "embedding", *(["features"] if directory.config["knows_people"] else [])}
        needed = {*self._reads, *(judged & directory.base_produces)}
        self._outputs = outputs
        self._base = directory.base_image_model(info, settings, (outputs - {"caption"}) | needed)
        self.preprocessing = self._base.preprocessing
        self.label_names = self._base.label_names
        self._num_beams = settings.num_beams or directory.config["num_beams"]
        self._judge = _Judge(self._base, directory) if isinstance(self._base, CosineMatcher) else None
        self._torch, self._device = torch, settings.device
        # One batch at a time on a GPU: other threads decode meanwhile. On a CPU each thread uses its own core.
        self._lock = threading.Lock() if not settings.is_cpu else None

    def encode_images(self, pixels: np.ndarray) -> ImageEncoding:
        encoding = self._base.encode_images(pixels)
        started = time.perf_counter()
        inputs = {name: getattr(encoding, FIELDS[name]) for name in self._reads} or {"pixels": pixels}
        written = self._write(inputs)
        captions = self._judge(encoding, written) if self._judge else [_likeliest(each) for each in written]
        # The grid is large, and nobody asked for it.
        grid = encoding.grid if "grid" in self._outputs else None
        return replace(encoding, grid=grid, captions=captions, caption_sec=time.perf_counter() - started)

    def match(self, encoding: ImageEncoding, rows: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        return self._base.match(encoding, rows, texts)  # type: ignore[attr-defined]

    def _write(self, inputs: dict[str, np.ndarray]) -> list[list[Hypothesis]]:
        tensors = {
            name: self._torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
            for name, values in inputs.items()
        }
        if self._lock is None:
            return self._writer.write(tensors, self._num_beams)
        with self._lock:
            return self._writer.write(tensors, self._num_beams)


class _Judge:
    """Chooses among written sentences and class names, by the calibrated cosine of image and sentence."""

    def __init__(self, base: CosineMatcher, directory: ModelDirectory) -> None:
        self._base = base
        self._margin = directory.config["label_margin"]
        self._usual_log_prob = directory.config["usual_log_prob"]
        self._num_judged = directory.config["num_judged"]
        self._sentences = [class_sentence(name) for name in base.label_names]
        self._label_sentences = frozenset(self._sentences)
        self._vectors = _vectors_of(base, directory.base, self._sentences) if self._sentences else None
        self._people = _people_evidence(directory) if directory.config["knows_people"] else None

    def __call__(self, encoding: ImageEncoding, written: Sequence[Sequence[Hypothesis]]) -> list[Caption]:
        # Encoding a sentence costs as much as writing it, so the last beams are not asked.
        asked = [hypotheses[: self._num_judged] for hypotheses in self._without_invented_people(encoding, written)]
        texts = [each.text for hypotheses in asked for each in hypotheses]
        surer = [each.log_prob - self._usual_log_prob for hypotheses in asked for each in hypotheses]
        rows = [row for row, hypotheses in enumerate(asked) for _ in hypotheses]
        cosines = self._base.cosines(encoding, rows, texts)
        captions = []
        end = 0
        for row, hypotheses in enumerate(asked):
            start, end = end, end + len(hypotheses)
            best = max(range(start, end), key=lambda i: cosines[i], default=-1)
            label = self._best_label(encoding, row)
            if label is not None and (
                best < 0 or label[1] - cosines[best] > self._margin + _MARGIN_OF_SURENESS * surer[best]
            ):
                captions.append(Caption(self._sentences[label[0]], "labels", self._score(label[1])))
            else:
                # The writer has learnt such sentences from pseudo-images, and may write one by itself.
                source = "labels" if texts[best] in self._label_sentences else "generated"
                captions.append(Caption(texts[best], source, self._score(cosines[best])))
        return captions

    def _without_invented_people(
        self, encoding: ImageEncoding, written: Sequence[Sequence[Hypothesis]]
    ) -> Sequence[Sequence[Hypothesis]]:
        """The sentences that name people only where the picture shows some; none may be left where a label can speak."""
        if self._people is None or self._vectors is None:
            return written
        assert encoding.features is not None
        rows = [row for row, hypotheses in enumerate(written) for _ in hypotheses]
        log_probs = [each.log_prob for hypotheses in written for each in hypotheses]
        may = iter(self._people(encoding.features[rows], np.array(log_probs, np.float32)))
        return [[each for each in hypotheses if next(may) or not names_people(each.text)] for hypotheses in written]

    def _best_label(self, encoding: ImageEncoding, row: int) -> tuple[int, float] | None:
        """(class, cosine) of the sentence that fits best, of the likeliest classes."""
        if self._vectors is None or encoding.probabilities is None:
            return None
        assert encoding.embeddings is not None
        likeliest = np.argsort(-encoding.probabilities[row])[:_LABELS]
        cosines = self._vectors[likeliest] @ encoding.embeddings[row]
        best = int(cosines.argmax())
        return int(likeliest[best]), float(cosines[best])

    def _score(self, cosine: float) -> float:
        return float(self._base.probability(np.array([cosine]))[0])


def _people_evidence(directory: ModelDirectory) -> Callable[[np.ndarray, np.ndarray], list[bool]]:
    """(features float32[n, feature_dim], log-probabilities float32[n] of sentences) -> whether these may name people."""
    import torch

    from vlm_ops.models.people import PeopleEvidence

    weights = directory.weights("people")
    evidence = directory.fill(PeopleEvidence(len(weights["mean"])), "people")

    def shown(features: np.ndarray, log_probs: np.ndarray) -> list[bool]:
        with torch.inference_mode():
            return (evidence(torch.from_numpy(features), torch.from_numpy(log_probs)) > 0).tolist()

    return shown


def _likeliest(hypotheses: Sequence[Hypothesis]) -> Caption:
    return Caption(hypotheses[0].text, "generated", float(np.exp(min(0.0, hypotheses[0].log_prob))))


def _vectors_of(base: CosineMatcher, info: ModelInfo, sentences: Sequence[str]) -> np.ndarray:
    """float32[k, d] of the class sentences, from the cache once they were encoded."""
    key = hashlib.sha256("\0".join((info.revision, *sentences)).encode()).hexdigest()[:12]

    def make(path: Path) -> None:
        np.save(path, base.encode_texts(sentences))

    return np.load(cached_file(f"sentences-{key}.npy", make))
