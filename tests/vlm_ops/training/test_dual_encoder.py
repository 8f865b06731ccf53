"""The contrastive loss against a naive one, and what a training must keep: seed, kill, direction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_ops.training.dual_encoder import Epoch, Pairs, TrainingConfig, contrastive_loss, train

CONFIG = TrainingConfig(num_epochs=6, batch_size=16, hidden_dim=32, dropout=0.2)


def pairs(n: int = 40, seed: int = 0) -> Pairs:
    """Images and captions that share a hidden meaning, which neither side shows plainly."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99)
    to_features, to_texts = mixing.normal(size=(5, 24)), mixing.normal(size=(5, 12))
    meaning = rng.normal(size=(n, 5))
    texts = np.repeat(meaning, 2, axis=0) @ to_texts + 0.05 * rng.normal(size=(2 * n, 12))
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    features = (meaning @ to_features).astype(np.float32)
    embeddings = rng.normal(size=(n, 4)).astype(np.float32)
    return Pairs(features, embeddings, [[2 * i, 2 * i + 1] for i in range(n)], texts.astype(np.float32))


def weights(trained: object) -> dict[str, torch.Tensor]:
    return {**trained.image_head.state_dict(), **trained.text_head.state_dict()}  # type: ignore[attr-defined]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_loss_equals_the_naive_one(data: st.DataObject) -> None:
    num_images = data.draw(st.integers(2, 4))
    owners = [*range(num_images), *data.draw(st.lists(st.integers(0, num_images - 1), max_size=4))]
    texts = data.draw(st.lists(st.integers(0, 5), min_size=len(owners), max_size=len(owners)))
    logits = (
        torch.randn(num_images, len(owners), generator=torch.Generator().manual_seed(len(texts)), dtype=torch.float64)
        * 3
    )
    captions = {image: {t for t, o in zip(texts, owners, strict=True) if o == image} for image in range(num_images)}
    to_image, to_text = [], []
    for j, (text, owner) in enumerate(zip(texts, owners, strict=True)):
        own = logits[owner, j]
        rivals = [logits[i, j] for i in range(num_images) if i != owner and text not in captions[i]]
        to_image.append(torch.logsumexp(torch.stack([own, *rivals]), 0) - own)
        others = [
            logits[owner, k] for k in range(len(owners)) if owners[k] != owner and texts[k] not in captions[owner]
        ]
        to_text.append(torch.logsumexp(torch.stack([own, *others]), 0) - own)
    expected = (torch.stack(to_image).mean() + torch.stack(to_text).mean()) / 2
    found = contrastive_loss(logits, torch.tensor(owners), torch.tensor(texts))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_training_learns_what_images_and_texts_share(tmp_path: Path) -> None:
    config = TrainingConfig(num_epochs=60, batch_size=20, hidden_dim=32, dropout=0.0, learning_rate=5e-3)
    trained = train(pairs(120), pairs(60, seed=1), config, tmp_path / "c.pt")
    assert trained.epochs[-1].loss < trained.epochs[0].loss / 2
    assert trained.epochs[-1].recall_at_10 > 0.9 > 0.5 > 10 / 60


def test_same_seed_same_result(tmp_path: Path) -> None:
    first, second, other = (
        train(pairs(), pairs(20, 1), config, tmp_path / f"{number}.pt")
        for number, config in enumerate((CONFIG, CONFIG, TrainingConfig(**{**vars(CONFIG), "seed": 1})))
    )
    assert first.epochs == second.epochs
    assert all(
        torch.equal(first_, second_)
        for first_, second_ in zip(weights(first).values(), weights(second).values(), strict=True)
    )
    assert first.epochs != other.epochs


def test_a_killed_training_goes_on_to_the_same_result(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(epoch: Epoch) -> None:
        if epoch.number == 3:
            raise KilledError

    whole = train(pairs(), pairs(20, 1), CONFIG, tmp_path / "whole.pt")
    with pytest.raises(KilledError):
        train(pairs(), pairs(20, 1), CONFIG, tmp_path / "killed.pt", kill)
    seen: list[int] = []
    resumed = train(pairs(), pairs(20, 1), CONFIG, tmp_path / "killed.pt", lambda epoch: seen.append(epoch.number))
    assert seen == [4, 5, 6] and resumed.epochs == whole.epochs
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))


def test_the_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    train(pairs(), pairs(20, 1), CONFIG, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="is the checkpoint of another training .*; remove it to start anew"):
        train(pairs(41), pairs(20, 1), CONFIG, tmp_path / "c.pt")


def test_images_without_captions_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="every image needs a caption"):
        Pairs(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), [[]], np.zeros((0, 3), np.float32))
