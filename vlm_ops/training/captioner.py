"""Teaches a language model to write captions: cross-entropy with label smoothing (Szegedy et al., 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from vlm_ops.caption_metrics import bleu, bleu_counts, cider_d, rouge_l
from vlm_ops.models.caption_decoder import Vocabulary, split_words
from vlm_ops.models.captioner import Captioner, Hypothesis
from vlm_ops.sentences import class_sentence
from vlm_ops.training.data import CaptionedImages, chunks
from vlm_ops.training.pseudo_images import PseudoImages
from vlm_ops.training.rewards import CaptionReward

_CHUNK = 64
# Of the captions that most images have. With fewer, such as a product's two short sentences, CIDEr-D is ten or none, and
# an image is learnt by likelihood alone.
_SHARE_OF_CAPTIONS = 0.5
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
        objective: `likelihood` of the captions, or `cider`: what `CaptionReward` gives for the captioner's own sentences, for
            one that has learnt to write already (Rennie et al., "Self-Critical Sequence Training", CVPR 2017).
        self_critical_beams: Sentences an image that `cider` compares.
        likelihood_weight: Of the captions' likelihood beside `cider`, so that what is learnt stays.
    """

    captions_per_image: int = 3
    objective: str = "likelihood"
    label_smoothing: float = 0.1
    pseudo_weight: float = 0.0
    pseudo_images: int = 16
    pseudo_noise: float = 0.1
    self_critical_beams: int = 5
    likelihood_weight: float = 0.1


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
            if not hasattr(model.writer, "log_probs"):
                raise ValueError(
                    "--objective cider is for the compact writer; train this one with --objective likelihood"
                )
            self._reward = CaptionReward(data)
            counts = np.array([len(each) for each in data.captions])
            self._is_compared = counts >= _SHARE_OF_CAPTIONS * np.median(counts)

    def num_images(self) -> int:
        return len(self._data)

    def loss(self, images: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        config, sentences = self._config, self._data.sentences
        count = config.captions_per_image
        chosen = [
            [sentences[row] for row in np.resize(rows, count)] for rows in self._data.draw_captions(images, count, rng)
        ]
        inputs: Mapping[str, torch.Tensor] = self._data.drawn_inputs(images, rng, self._device)
        names_colors = hasattr(self.module.writer, "color_loss")
        if config.objective == "cider" or names_colors:  # all losses read the same images
            inputs = self.module.inputs(inputs)
        loss = self.module.loss(inputs, chosen, config.label_smoothing)
        if names_colors:  # of photos alone: pseudo-images have no colours of their own
            loss = loss + self.module.writer.color_loss(inputs, chosen, config.label_smoothing)
        if self._pseudo is not None:
            rows = rng.permutation(len(self._pseudo.names))[: config.pseudo_images]
            pseudo = self._pseudo.image_inputs(rows, config.pseudo_noise, rng, self._device)
            pseudo["grid"] = self._pseudo_grid(pseudo["features"], rng)
            texts = [[class_sentence(self._pseudo.names[row])] for row in rows]
            loss = loss + config.pseudo_weight * self.module.loss(pseudo, texts, config.label_smoothing)
        if config.objective == "cider":
            return self._self_critical_loss(inputs, images) + config.likelihood_weight * loss
        return loss

    def _pseudo_grid(self, features: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Cells of images that were never seen: each looks like the whole. What a grid holds beyond the features, such
        as colours, is that of some real image."""
        grids = self._data.images["grid"]
        grid = torch.from_numpy(grids[rng.integers(0, len(grids), len(features))]).to(features.device).float()
        width = min(grid.shape[2], features.shape[1])
        grid[:, :, :width] = features[:, None, :width]
        return grid

    def _self_critical_loss(self, seen: Mapping[str, torch.Tensor], images: np.ndarray) -> torch.Tensor:
        """Makes those of the captioner's best sentences likelier that score above their mean. Beam search finds them, as
        Cornia et al. do ("Meshed-Memory Transformer for Image Captioning", CVPR 2020): words drawn at random come from
        the tail that label smoothing leaves, and teach to avoid what is never written anyway."""
        writer, count = self.module.writer, self._config.self_critical_beams
        rows = np.flatnonzero(self._is_compared[images])
        if not len(rows):
            return torch.zeros(())
        seen, images = {name: values[rows] for name, values in seen.items()}, images[rows]
        writer.eval()
        found = [[each.text for each in hypotheses] for hypotheses in writer.write(seen, count)]
        writer.train()
        texts = [(each * count)[:count] for each in found]  # a small language may have fewer sentences
        scores = self._reward([text for each in texts for text in each], np.repeat(images, count).tolist())
        rewards = torch.from_numpy(scores.reshape(len(images), count)).float()
        # Unscaled, the images would count for more the more their captions have in common.
        spread = rewards.std(1, keepdim=True, correction=0) + _LEAST_SPREAD
        log_probs = writer.log_probs(seen, writer.encode(texts))
        advantage = ((rewards - rewards.mean(1, keepdim=True)) / spread).to(log_probs)
        return -(advantage * log_probs).mean() / _MEAN_LENGTH

    def validate(self, module: Any) -> float:
        sentences = best_sentences(module, self._validation, 1, self._device)
        return captioning_figures(sentences, self._validation)["CIDEr-D"]


def best_sentences(
    module: Any, data: CaptionedImages, num_beams: int, device: str, num_wanted: int | None = None
) -> list[Hypothesis]:
    """What the captioner writes of each image by itself.

    Args:
        num_wanted: As for `Writer.write`.
    """
    return [
        hypotheses[0]
        for chunk in chunks(len(data), _CHUNK)
        for hypotheses in module.write(data.image_inputs(chunk, device), num_beams, num_wanted)
    ]


def captioning_figures(sentences: Sequence[Hypothesis], data: CaptionedImages) -> dict[str, float]:
    """CIDEr-D, BLEU-4 and ROUGE-L of a sentence for each image, against the captions of the data."""
    written = [each.text for each in sentences]
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
