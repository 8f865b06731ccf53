"""Aligns image features with text embeddings by a symmetric contrastive loss.

InfoNCE in both directions (Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021). Several captions of one image in a step are all positives of it, so none of
them, nor an equal caption of another image, is used as a negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vlm_ops.metrics import recall_at, text_to_image_ranks
from vlm_ops.models.heads import HeadsConfig, ImageHead, TextHead
from vlm_ops.storage import replacing

_NEVER = -1e4  # a logit that is no candidate
_MAX_SCALE = 100.0
_WARM_UP = 0.05


@dataclass(frozen=True)
class Pairs:
    """Images with their captions, all encoded by the frozen base.

    Attributes:
        features: float32[n, feature_dim].
        embeddings: float32[n, base_embedding_dim], the base's own image–text embeddings.
        captions: For each image the rows of `texts` that are its captions, at least one; equal
            captions share a row.
        texts: float32[m, text_dim].
    """

    features: np.ndarray
    embeddings: np.ndarray
    captions: Sequence[Sequence[int]]
    texts: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.captions) or not all(len(each) for each in self.captions):
            raise ValueError("every image needs a caption, and there must be an image")

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class TrainingConfig:
    """The recipe of a training.

    Attributes:
        num_epochs: Passes over the images.
        batch_size: Images a step.
        captions_per_image: Captions of each image in a step, drawn at random.
        learning_rate, weight_decay: Of AdamW; the rate warms up and follows a cosine.
        temperature: At the start; it is learnt.
        hidden_dim, dropout: Of the image head.
        seed: Same seed, same result on the same machine.
    """

    num_epochs: int = 20
    batch_size: int = 600
    captions_per_image: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    temperature: float = 0.05
    hidden_dim: int = 1024
    dropout: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to: mean loss, and text-to-image R@10 on the validation pairs."""

    number: int
    loss: float
    recall_at_10: float


@dataclass(frozen=True)
class Trained:
    image_head: ImageHead
    text_head: TextHead
    epochs: tuple[Epoch, ...]


def train(
    pairs: Pairs,
    validation: Pairs,
    config: TrainingConfig,
    checkpoint: Path,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Trained:
    """Trains both heads; goes on from the checkpoint of a run that was killed.

    Args:
        checkpoint: Written after each epoch, whole or not at all.

    Raises:
        ValueError: The checkpoint is of another recipe or other data.
    """
    torch.manual_seed(config.seed)
    shapes = heads_config(pairs, config)
    image_head, text_head = ImageHead(shapes), TextHead(shapes)
    image_head.standardise_by(torch.from_numpy(pairs.features))
    log_scale = torch.nn.Parameter(torch.tensor(float(np.log(1 / config.temperature))))
    optimizer = torch.optim.AdamW(
        [*image_head.parameters(), *text_head.parameters(), log_scale],
        lr=config.learning_rate, weight_decay=config.weight_decay,
    )  # fmt: skip
    steps = -(-len(pairs) // config.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=steps * config.num_epochs + 1, pct_start=_WARM_UP
    )
    parts = {"image": image_head, "text": text_head, "optimizer": optimizer, "schedule": schedule}
    epochs = _resume(checkpoint, parts, log_scale, _identity(pairs, config))
    for number in range(len(epochs), config.num_epochs):
        image_head.train()
        text_head.train()
        losses = []
        for images, texts, owners in _steps(pairs, config, number):
            rows = torch.from_numpy(images)
            image_vectors = image_head(torch.from_numpy(pairs.features)[rows], torch.from_numpy(pairs.embeddings)[rows])
            text_vectors = text_head(torch.from_numpy(pairs.texts[texts]))
            scale = log_scale.exp().clamp(max=_MAX_SCALE)
            loss = contrastive_loss(
                scale * image_vectors @ text_vectors.T, torch.from_numpy(owners), torch.from_numpy(texts)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        epochs.append(Epoch(number + 1, float(np.mean(losses)), validate(image_head, text_head, validation)))
        _save(checkpoint, parts, log_scale, epochs, _identity(pairs, config))
        on_epoch(epochs[-1])
    return Trained(image_head.eval(), text_head.eval(), tuple(epochs))


def contrastive_loss(logits: torch.Tensor, owners: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE with the positives of a row kept out of each other's way.

    Args:
        logits: float32[n, m], image by text.
        owners: int64[m], the image (row) of each text.
        texts: int64[m], which text it is; equal texts have equal numbers.

    Returns:
        The mean of the image-to-text and text-to-image cross-entropies.
    """
    mine = owners[None, :] == torch.arange(len(logits))[:, None]
    # A text that is also a caption of this image, standing here for another one, is no negative.
    equal = (mine.float() @ (texts[:, None] == texts[None, :]).float()) > 0
    masked = logits.masked_fill(equal & ~mine, _NEVER)
    text_to_image = F.cross_entropy(masked.T, owners)
    # One term a positive: it against all negatives, without the image's other positives.
    negatives = masked.masked_fill(mine, _NEVER).logsumexp(dim=1)
    positives = logits[owners, torch.arange(len(owners))]
    image_to_text = F.softplus(negatives[owners] - positives).mean()
    return (image_to_text + text_to_image) / 2


def validate(image_head: ImageHead, text_head: TextHead, pairs: Pairs) -> float:
    """Text-to-image R@10."""
    image_head.eval()
    text_head.eval()
    with torch.inference_mode():
        images = image_head(torch.from_numpy(pairs.features), torch.from_numpy(pairs.embeddings))
        texts = text_head(torch.from_numpy(pairs.texts))
    owners = np.repeat(np.arange(len(pairs)), [len(each) for each in pairs.captions])
    rows = np.concatenate([np.asarray(each) for each in pairs.captions])
    return recall_at(text_to_image_ranks((texts[rows] @ images.T).numpy(), owners), 10)


def heads_config(pairs: Pairs, config: TrainingConfig) -> HeadsConfig:
    """Shapes of the heads for these pairs."""
    return HeadsConfig(
        pairs.features.shape[1], pairs.embeddings.shape[1], pairs.texts.shape[1], config.hidden_dim, config.dropout
    )


def _steps(pairs: Pairs, config: TrainingConfig, epoch: int) -> Any:
    """(images int64[n], texts int64[m], owners int64[m]) of each step: rows of the pairs, and for
    each text the position of its image in the step. The order depends on seed and epoch alone."""
    rng = np.random.default_rng((config.seed, epoch))
    order = rng.permutation(len(pairs))
    for start in range(0, len(order), config.batch_size):
        images = order[start : start + config.batch_size]
        chosen = [rng.permutation(np.asarray(pairs.captions[image]))[: config.captions_per_image] for image in images]
        owners = np.repeat(np.arange(len(images)), [len(each) for each in chosen])
        yield images, np.concatenate(chosen), owners


def _identity(pairs: Pairs, config: TrainingConfig) -> dict[str, Any]:
    """What a checkpoint must have been made from, to be gone on from."""
    return {**asdict(config), "num_images": len(pairs), "feature_sum": float(pairs.features.sum(dtype=np.float64))}


def _save(
    path: Path, parts: dict[str, Any], log_scale: torch.Tensor, epochs: Sequence[Epoch], identity: dict[str, Any]
) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"log_scale": log_scale.detach(), "random": torch.get_rng_state(), "identity": identity}
    state["epochs"] = [asdict(epoch) for epoch in epochs]
    with replacing(str(path)) as scratch:
        torch.save(state, scratch)


def _resume(path: Path, parts: dict[str, Any], log_scale: torch.Tensor, identity: dict[str, Any]) -> list[Epoch]:
    if not path.is_file():
        return []
    state = torch.load(path, weights_only=True)
    if state["identity"] != identity:
        raise ValueError(f"{path} is the checkpoint of another training (other data or flags); remove it to start anew")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    with torch.no_grad():
        log_scale.copy_(state["log_scale"])
    torch.set_rng_state(state["random"])
    return [Epoch(**epoch) for epoch in state["epochs"]]
