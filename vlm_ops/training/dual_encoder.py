"""Aligns image features with text embeddings by a symmetric contrastive loss.

InfoNCE in both directions (Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021). Several captions of one image in a step are all positives of it, so none of
them, nor an equal caption of another image, is used as a negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from vlm_ops.metrics import RECALL_AT, area_under_curve, image_to_text_ranks, recall_at, text_to_image_ranks
from vlm_ops.models.calibration import Calibration
from vlm_ops.models.dual_encoder import DualEncoder
from vlm_ops.training.calibration import calibrate
from vlm_ops.training.data import CaptionedImages, caption_owners, chunks, features_at_the_start, labelled_pairs
from vlm_ops.training.pseudo_images import PseudoImages

_NEVER = -1e4  # a logit that is no candidate
_MAX_SCALE = 100.0
_CHUNK = 256


@dataclass(frozen=True)
class ContrastiveConfig:
    """What is particular to this task.

    Attributes:
        captions_per_image: Captions of each image in a step, drawn at random.
        temperature: At the start; it is learnt.
        mixing: Weight of the loss on images and captions mixed in pairs; 0 leaves it out.
        pseudo_weight: Of the loss on pseudo-images of the base's classes; 0 leaves them out.
        pseudo_images: Of them in a step.
        pseudo_noise: Added to them, in standard deviations of the features.
    """

    captions_per_image: int = 2
    temperature: float = 0.05
    mixing: float = 0.0
    pseudo_weight: float = 0.0
    pseudo_images: int = 300
    pseudo_noise: float = 0.1


class DualEncoderTask:
    """Trains a dual encoder; `metric` is text-to-image R@10 on the validation data."""

    metric = "R@10"

    def __init__(
        self,
        model: DualEncoder,
        data: CaptionedImages,
        validation: CaptionedImages,
        config: ContrastiveConfig,
        device: str = "cpu",
        pseudo: PseudoImages | None = None,
    ) -> None:
        self.module = _WithScale(model, config.temperature)
        self.backbones = [each for each in (model.image_backbone, model.text_backbone) if each is not None]
        self.identity: Mapping[str, Any] = {**asdict(config), "data": data.fingerprint}
        self._data, self._validation, self._config, self._device = data, validation, config, device
        self._pseudo = pseudo if config.pseudo_weight else None
        labelled_pairs(validation)  # what cannot be measured says so before it is trained
        model.image.standardise_by(features_at_the_start(data, model.image_backbone, device))

    def num_images(self) -> int:
        return len(self._data)

    def loss(self, images: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        chosen = self._data.draw_captions(images, self._config.captions_per_image, rng)
        owners = np.repeat(np.arange(len(images)), [len(each) for each in chosen])
        rows = np.concatenate(chosen)
        # Equal sentences are encoded once.
        distinct, place = np.unique(rows, return_inverse=True)
        model, device = self.module.model, self._device
        inputs = self._data.drawn_inputs(images, rng, device)
        image_vectors = model.project_images(inputs)
        text_vectors = model.project_texts(self._data.text_inputs(distinct, device))[torch.from_numpy(place).to(device)]
        scale = self.module.scale()
        loss = contrastive_loss(
            scale * image_vectors @ text_vectors.T,
            torch.from_numpy(owners).to(device),
            torch.from_numpy(rows).to(device),
        )
        if self._config.mixing:
            mixed = _mixed_loss(model, inputs, text_vectors, owners, scale, rng)
            loss = loss + self._config.mixing * mixed
        if self._pseudo is not None:
            loss = loss + self._config.pseudo_weight * self._pseudo_loss(self._pseudo, rng)
        return loss

    def _pseudo_loss(self, pseudo: PseudoImages, rng: np.random.Generator) -> torch.Tensor:
        """Each of some classes against the others, by its sentence or by its bare name."""
        chosen = rng.permutation(len(pseudo.names))[: self._config.pseudo_images]
        inputs = pseudo.image_inputs(chosen, self._config.pseudo_noise, rng, self._device)
        vectors = pseudo.sentence_vectors if rng.random() < 0.5 else pseudo.name_vectors
        model = self.module.model
        texts = model.text(torch.from_numpy(vectors[chosen]).to(self._device))
        logits = self.module.scale() * model.image(inputs["features"], inputs.get("embedding")) @ texts.T
        own = torch.arange(len(chosen), device=self._device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def validate(self, module: Any) -> float:
        similarity, owners = similarities(module.model, self._validation, self._device)
        return recall_at(text_to_image_ranks(similarity, owners), 10)

    def measure_crowding(self, model: DualEncoder) -> None:
        """To be called once the heads are trained: from then on `encode_images` takes it off."""
        with torch.inference_mode():
            images, texts = _projections(model, self._data, self._device)
            if self._pseudo is not None:
                vectors = torch.from_numpy(self._pseudo.sentence_vectors).to(self._device)
                texts = torch.cat([texts, model.text(vectors)])
        # Outside of inference mode, for the bank becomes part of the module.
        model.crowding.measure_by(images.clone(), texts.clone())


class _WithScale(nn.Module):
    """A dual encoder with the logit scale of its training."""

    def __init__(self, model: DualEncoder, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def scale(self) -> torch.Tensor:
        return self.log_scale.exp().clamp(max=_MAX_SCALE)


def contrastive_loss(logits: torch.Tensor, owners: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE with the positives of a row kept out of each other's way.

    Args:
        logits: float32[n, m], image by text.
        owners: int64[m], the image (row) of each text.
        texts: int64[m], which text it is; equal texts have equal numbers.

    Returns:
        The mean of the image-to-text and text-to-image cross-entropies.
    """
    mine = owners[None, :] == torch.arange(len(logits), device=logits.device)[:, None]
    # A text that is also a caption of this image, standing here for another one, is no negative.
    equal = (mine.float() @ (texts[:, None] == texts[None, :]).float()) > 0
    masked = logits.masked_fill(equal & ~mine, _NEVER)
    text_to_image = F.cross_entropy(masked.T, owners)
    # One term a positive: it against all negatives, without the image's other positives.
    negatives = masked.masked_fill(mine, _NEVER).logsumexp(dim=1)
    positives = logits[owners, torch.arange(len(owners), device=logits.device)]
    image_to_text = F.softplus(negatives[owners] - positives).mean()
    return (image_to_text + text_to_image) / 2


def _mixed_loss(
    model: DualEncoder,
    inputs: dict[str, torch.Tensor],
    text_vectors: torch.Tensor,
    owners: np.ndarray,
    scale: torch.Tensor,
    rng: np.random.Generator,
) -> torch.Tensor:
    """InfoNCE of images mixed in pairs against captions mixed alike (Zhang et al., "mixup", ICLR 2018): between
    the few images of a small corpus, what lies between them is learnt too."""
    first = np.unique(owners, return_index=True)[1]
    last = np.append(first[1:], len(owners)) - 1
    n, device = len(first), text_vectors.device
    partner = rng.permutation(n)
    share = torch.from_numpy(rng.uniform(0.25, 0.75, (n, 1)).astype(np.float32)).to(device)
    mixed = {
        name: torch.lerp(values[partner].float(), values.float(), share.view(n, *[1] * (values.ndim - 1)))
        for name, values in inputs.items()
    }
    texts = share * text_vectors[first] + (1 - share) * text_vectors[last[partner]]
    logits = scale * model.project_images(mixed) @ F.normalize(texts, dim=1).T
    own = torch.arange(n, device=device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _projections(model: DualEncoder, data: CaptionedImages, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of all images and of all sentences, as the loss compares them."""
    images = [model.project_images(data.image_inputs(chunk, device)) for chunk in chunks(len(data), _CHUNK)]
    texts = [model.project_texts(data.text_inputs(chunk, device)) for chunk in chunks(len(data.sentences), _CHUNK)]
    return torch.cat(images), torch.cat(texts)


def similarities(model: DualEncoder, data: CaptionedImages, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """(float32[num_captions, n] cosine of each caption with each image, int64[num_captions] its own image)."""
    owners, rows = caption_owners(data)
    with torch.inference_mode():
        images, texts = _projections(model, data, device)
        scores = model.crowding.texts(texts) @ model.crowding.images(images).T
    return scores.cpu().numpy()[rows], owners


def calibrated(model: DualEncoder, data: CaptionedImages, device: str = "cpu") -> Calibration:
    """Turns cosines into match probabilities: own captions against as many of other images."""
    return calibrate(*_pair_scores(model, data, device))


def retrieval_figures(model: DualEncoder, data: CaptionedImages, device: str = "cpu") -> dict[str, float]:
    """Recall both ways, and how well own pairs and others are told apart."""
    similarity, owners = similarities(model, data, device)
    figures: dict[str, float] = {}
    for name, ranks in (
        ("text→image", text_to_image_ranks(similarity, owners)),
        ("image→text", image_to_text_ranks(similarity, owners)),
    ):
        figures |= {f"{name} R@{k}": recall_at(ranks, k) for k in RECALL_AT}
    return {**figures, "AUC": area_under_curve(*_pair_scores(model, data, device))}


def _pair_scores(model: DualEncoder, data: CaptionedImages, device: str) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, targets) of own captions and of as many others."""
    similarity, _ = similarities(model, data, device)
    images, sentences, targets = labelled_pairs(data)
    caption_of = np.empty(len(data.sentences), np.int64)  # any of those with this sentence
    caption_of[caption_owners(data)[1]] = np.arange(data.num_captions)
    return similarity[caption_of[sentences], images], targets
