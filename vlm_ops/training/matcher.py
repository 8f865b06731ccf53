"""Teaches a matcher to tell an image's own captions from others: binary cross-entropy with negatives drawn at
random and with hard ones, which are those of the step that the matcher itself finds likeliest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vlm_ops.metrics import accuracy, area_under_curve
from vlm_ops.models.matcher import Matcher
from vlm_ops.training.data import CaptionedImages, chunks, features_at_the_start, labelled_pairs

_CHUNK = 256


@dataclass(frozen=True)
class MatchingConfig:
    """What is particular to this task.

    Attributes:
        captions_per_image: Own captions of each image in a step, drawn at random.
        random_negatives: Captions of other images, for each own one.
        hard_negatives: The likeliest of `hard_candidates` captions of other images, for each own one.
    """

    captions_per_image: int = 2
    random_negatives: int = 1
    hard_negatives: int = 1
    hard_candidates: int = 16


class MatcherTask:
    """Trains a matcher; `metric` is the area under the ROC curve, own captions against as many others."""

    metric = "AUC"

    def __init__(
        self,
        model: Matcher,
        data: CaptionedImages,
        validation: CaptionedImages,
        config: MatchingConfig,
        device: str = "cpu",
    ) -> None:
        self.module = model
        self.backbones = [each for each in (model.image_backbone, model.text_backbone) if each is not None]
        self.identity: Mapping[str, Any] = {**asdict(config), "data": data.fingerprint}
        self._data, self._validation, self._config, self._device = data, validation, config, device
        labelled_pairs(validation)  # what cannot be measured says so before it is trained
        model.standardise_by(features_at_the_start(data, model.image_backbone, device))

    def num_images(self) -> int:
        return len(self._data)

    def loss(self, images: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        config, device = self._config, self._device
        chosen = self._data.draw_captions(images, config.captions_per_image, rng)
        owners = np.repeat(np.arange(len(images)), [len(each) for each in chosen])
        distinct, place = np.unique(np.concatenate(chosen), return_inverse=True)
        image_vectors = self.module.image_vectors(self._data.drawn_inputs(images, rng, device))
        text_vectors = self.module.text_vectors(self._data.text_inputs(distinct, device))
        # A caption is no negative of an image that has it as well.
        captions = [set(self._data.captions[image]) for image in images]
        is_own = np.array([[text in own for text in distinct] for own in captions])
        pairs = [
            (owners, place, 1.0),
            (*_drawn(is_own, owners, config.random_negatives, rng), 0.0),
            (*self._hard(is_own, owners, image_vectors, text_vectors, rng), 0.0),
        ]
        rows = torch.from_numpy(np.concatenate([each[0] for each in pairs])).to(device)
        columns = torch.from_numpy(np.concatenate([each[1] for each in pairs])).to(device)
        targets = torch.cat([torch.full((len(each[0]),), each[2]) for each in pairs]).to(device)
        return F.binary_cross_entropy_with_logits(self.module(image_vectors[rows], text_vectors[columns]), targets)

    def _hard(
        self,
        is_own: np.ndarray,
        owners: np.ndarray,
        image_vectors: torch.Tensor,
        text_vectors: torch.Tensor,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest of some drawn negatives of each own pair."""
        count, candidates = self._config.hard_negatives, self._config.hard_candidates
        rows, columns = _drawn(is_own, owners, candidates, rng)
        if not count or not len(rows):
            return rows[:0], columns[:0]
        with torch.no_grad():
            images, texts = torch.from_numpy(rows).to(self._device), torch.from_numpy(columns).to(self._device)
            logits = self.module(image_vectors[images], text_vectors[texts]).float().cpu().numpy()
        best = np.argsort(-logits.reshape(-1, candidates), axis=1)[:, :count]
        return (
            np.take_along_axis(rows.reshape(-1, candidates), best, axis=1).ravel(),
            np.take_along_axis(columns.reshape(-1, candidates), best, axis=1).ravel(),
        )

    def validate(self, module: Any) -> float:
        return area_under_curve(*self.scores(module))

    def scores(self, module: Any) -> tuple[np.ndarray, np.ndarray]:
        """Logits of validation pairs, own captions and as many others, and whether they match."""
        data, device = self._validation, self._device
        images, sentences, targets = labelled_pairs(data)
        with torch.inference_mode():
            image_vectors = torch.cat(
                [module.image_vectors(data.image_inputs(chunk, device)) for chunk in chunks(len(data), _CHUNK)]
            )
            text_vectors = torch.cat(
                [module.text_vectors(data.text_inputs(chunk, device)) for chunk in chunks(len(data.sentences), _CHUNK)]
            )
            logits = [
                module(image_vectors[images[chunk]], text_vectors[sentences[chunk]])
                for chunk in chunks(len(images), _CHUNK)
            ]
        return torch.cat(logits).float().cpu().numpy(), targets


def _drawn(
    is_own: np.ndarray, owners: np.ndarray, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """`count` captions of other images for each own pair, with replacement: (rows, columns) of `is_own`."""
    rows, columns = [], []
    for owner in owners:
        others = np.flatnonzero(~is_own[owner])
        if len(others):
            rows.append(np.full(count, owner))
            columns.append(rng.choice(others, count))
    empty = np.empty(0, np.int64)
    return (np.concatenate(rows), np.concatenate(columns)) if rows else (empty, empty)


def matching_figures(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """How well own captions and others are told apart."""
    return {"AUC": area_under_curve(probabilities, targets), "accuracy": accuracy(probabilities, targets)}
