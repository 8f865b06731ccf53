"""Teaches a language model to write captions: cross-entropy with label smoothing (Szegedy et al., 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from vlm_ops.caption_metrics import CiderD, bleu, bleu_counts, cider_d, rouge_l
from vlm_ops.models.caption_decoder import Vocabulary, split_words
from vlm_ops.models.captioner import Captioner
from vlm_ops.sentences import class_sentence
from vlm_ops.training.data import CaptionedImages, chunks
from vlm_ops.training.pseudo_images import PseudoImages

_CHUNK = 64
_LEAST_SPREAD = 0.1  # of CIDEr-D over an image's sentences; below it, their differences are noise
_MEAN_LENGTH = 10.0  # words; puts the loss of whole sentences on the scale of that of words


@dataclass(frozen=True)
class CaptioningConfig:
    """What is particular to this task.

    Attributes:
        captions_per_image: Captions of each image in a step, drawn at random; repeated where it has fewer.
        label_smoothing: Share of the probability that is spread over all words.
        pseudo_weight: Of the loss on pseudo-images of the base's classes; 0 leaves them out.
        pseudo_images: Of them in a step.
        pseudo_noise: Added to them, in standard deviations of the features.
        objective: `likelihood` of the captions, or `cider`: CIDEr-D of sentences that the captioner draws itself,
            for one that has learnt to write already (Rennie et al., "Self-Critical Sequence Training", CVPR 2017).
    """

    captions_per_image: int = 3
    objective: str = "likelihood"
    label_smoothing: float = 0.1
    pseudo_weight: float = 0.0
    pseudo_images: int = 16
    pseudo_noise: float = 0.1


class CaptionerTask:
    """Trains a captioner; `metric` is CIDEr-D of greedy captions on the validation data."""

    metric = "CIDEr-D"

    def __init__(
        self,
        model: Captioner,
        data: CaptionedImages,
        validation: CaptionedImages,
        config: CaptioningConfig,
        device: str = "cpu",
        pseudo: PseudoImages | None = None,
    ) -> None:
        self.module = model
        self.backbones = model.backbones
        self.identity: Mapping[str, Any] = {**asdict(config), "data": data.fingerprint}
        self._data, self._validation, self._config, self._device = data, validation, config, device
        self._pseudo = pseudo if config.pseudo_weight else None
        if config.objective == "cider":
            if not hasattr(model.writer, "sample"):
                raise ValueError(
                    "--objective cider is for the compact writer; train this one with --objective likelihood"
                )
            self._reward = CiderD([[data.sentences[row] for row in rows] for rows in data.captions])

    def num_images(self) -> int:
        return len(self._data)

    def loss(self, images: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        config, sentences = self._config, self._data.sentences
        count = config.captions_per_image
        chosen = [
            [sentences[row] for row in np.resize(rows, count)] for rows in self._data.draw_captions(images, count, rng)
        ]
        inputs = self._data.drawn_inputs(images, rng, self._device)
        if config.objective == "cider":
            loss = self._self_critical_loss(inputs, images)
        else:
            loss = self.module.loss(inputs, chosen, config.label_smoothing)
        if self._pseudo is not None:
            rows = rng.permutation(len(self._pseudo.names))[: config.pseudo_images]
            inputs = self._pseudo.image_inputs(rows, config.pseudo_noise, rng, self._device)
            inputs["grid"] = self._pseudo_grid(inputs["features"], rng)
            texts = [[class_sentence(self._pseudo.names[row])] for row in rows]
            loss = loss + config.pseudo_weight * self.module.loss(inputs, texts, config.label_smoothing)
        return loss

    def _pseudo_grid(self, features: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Cells of images that were never seen: each looks like the whole. What a grid holds beyond the features, such
        as colours, is that of some real image."""
        grids = self._data.images["grid"]
        grid = torch.from_numpy(grids[rng.integers(0, len(grids), len(features))]).to(features.device).float()
        width = min(grid.shape[2], features.shape[1])
        grid[:, :, :width] = features[:, None, :width]
        return grid

    def _self_critical_loss(self, inputs: Mapping[str, torch.Tensor], images: np.ndarray) -> torch.Tensor:
        """Makes drawn sentences likelier that score above the others of their image (Luo, "A Better Variant of
        Self-Critical Sequence Training", 2020)."""
        writer, count = self.module.writer, self._config.captions_per_image
        seen = self.module.inputs(inputs)
        ids = writer.sample(seen, count)
        texts = [writer.vocabulary.decode(row[1:]) for rows in ids.tolist() for row in rows]
        rewards = torch.from_numpy(
            self._reward.score(texts, np.repeat(images, count).tolist()).reshape(len(images), count)
        )
        others = (rewards.sum(1, keepdim=True) - rewards) / max(count - 1, 1)
        # A product's short sentence is right or wrong, and CIDEr-D ten or none: unscaled, products alone would count.
        spread = rewards.std(1, keepdim=True, correction=0) + _LEAST_SPREAD
        advantage = ((rewards - others) / spread).float().to(ids.device)
        return -(advantage * writer.log_probs(seen, ids)).mean() / _MEAN_LENGTH

    def validate(self, module: Any) -> float:
        return captioning_figures(module, self._validation, 1, self._device)["CIDEr-D"]


def captioning_figures(module: Any, data: CaptionedImages, num_beams: int, device: str) -> dict[str, float]:
    """CIDEr-D, BLEU-4 and ROUGE-L of what the captioner writes by itself, against the captions of the data."""
    written = [
        hypotheses[0].text
        for chunk in chunks(len(data), _CHUNK)
        for hypotheses in module.write(data.image_inputs(chunk, device), num_beams)
    ]
    references = [[data.sentences[row] for row in rows] for rows in data.captions]
    return {
        "CIDEr-D": float(cider_d(written, references).mean()),
        "BLEU-4": bleu(bleu_counts(written, references)),
        "ROUGE-L": float(rouge_l(written, references).mean()),
    }


def words_of(data: CaptionedImages, min_count: int, class_names: Sequence[str] = ()) -> list[str]:
    """The vocabulary of a captioner: what stands often enough in the captions, and what names the classes."""
    captions = [data.sentences[row] for rows in data.captions for row in rows]
    frequent = Vocabulary.of(captions, min_count).words[len(Vocabulary.SPECIAL) :]
    named = {word for name in class_names for word in split_words(class_sentence(name))}
    return sorted({*frequent, *named})
