"""The losses against naive ones, what crowding does to an order, and that a task learns what images and texts share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vlm_ops.models.dual_encoder import _MAX_CROWDING, _TEXT_SHARE, Crowding, DualEncoder, HeadsConfig
from vlm_ops.training.data import CaptionedImages, labelled_pairs
from vlm_ops.training.dual_encoder import (
    ContrastiveConfig,
    DualEncoderTask,
    _mixed_loss,
    _pair_scores,
    calibrated,
    contrastive_loss,
    retrieval_figures,
    similarities,
)
from vlm_ops.training.loop import LoopConfig, fit
from vlm_ops.training.pseudo_images import PseudoImages

SHAPES = HeadsConfig(24, 4, 12, hidden_dim=32, dropout=0.0, caption_bank=16, image_bank=8)


def images(n: int = 40, seed: int = 0) -> CaptionedImages:
    """Images and captions that share a hidden meaning, which neither side shows plainly."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99)
    to_features, to_texts = mixing.normal(size=(5, 24)), mixing.normal(size=(5, 12))
    meaning = rng.normal(size=(n, 5))
    texts = np.repeat(meaning, 2, axis=0) @ to_texts + 0.05 * rng.normal(size=(2 * n, 12))
    inputs = {"features": meaning @ to_features, "embedding": rng.normal(size=(n, 4))}
    return CaptionedImages(
        {name: values.astype(np.float32) for name, values in inputs.items()},
        [[2 * i, 2 * i + 1] for i in range(n)],
        [f"sentence {row}" for row in range(2 * n)],
        {"vectors": (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)},
    )


def unit(n: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- losses ---------------------------------------------------------------------------------------


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


def test_an_equal_caption_of_another_image_is_no_negative() -> None:
    """Images 0 and 1 share text 7; image 0 has text 3 as well."""
    logits = torch.randn(3, 4, requires_grad=True)
    contrastive_loss(logits, torch.tensor([0, 0, 1, 2]), torch.tensor([7, 3, 7, 5])).backward()
    assert logits.grad is not None
    pushed = logits.grad > 0
    assert pushed.tolist() == [
        [False, False, False, True],
        [False, True, False, True],
        [True, True, True, False],
    ]
    pulled = logits.grad < 0
    assert pulled.tolist() == [
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]


def test_what_is_mixed_is_mixed_alike() -> None:
    model = DualEncoder(SHAPES).eval()
    data = images(6)
    owners = np.array([0, 0, 1, 2, 2, 2])  # of three images
    inputs = data.image_inputs(np.array([4, 1, 3]))
    texts = unit(6, 12, seed=1)
    scale = torch.tensor(7.0)
    found = _mixed_loss(model, inputs, texts, owners, scale, np.random.default_rng(5))

    rng = np.random.default_rng(5)
    partner, share = rng.permutation(3), rng.uniform(0.25, 0.75, (3, 1))
    first, last = [0, 2, 3], [1, 2, 5]
    image_vectors, text_vectors = [], []
    for i in range(3):
        s, p = float(np.float32(share[i, 0])), int(partner[i])
        mixed = {name: s * values[[i]] + (1 - s) * values[[p]] for name, values in inputs.items()}
        image_vectors.append(model.project_images(mixed)[0])
        text_vectors.append(F.normalize(s * texts[first[i]] + (1 - s) * texts[last[p]], dim=0))
    logits = 7 * torch.stack(image_vectors) @ torch.stack(text_vectors).T
    expected = sum(F.cross_entropy(each, torch.arange(3)) for each in (logits, logits.T)) / 2
    torch.testing.assert_close(found, expected)


def test_pixels_are_mixed_as_features_are() -> None:
    """Of eight images in eight rows of eight pixels, where a share could fall upon a column."""

    class Means(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"features": pixels.float().flatten(1).matmul(weights), "embedding": pixels[:, 0, 0, :4].float()}

    weights = torch.randn(192, 24, generator=torch.Generator().manual_seed(0)) / 100
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8), np.uint8))
    seeing, blind = DualEncoder(SHAPES, Means()).eval(), DualEncoder(SHAPES).eval()
    blind.load_state_dict(seeing.state_dict())
    rest = unit(8, 12, seed=1), np.arange(8), torch.tensor(7.0)
    losses = [
        _mixed_loss(model, inputs, *rest, np.random.default_rng(5))
        for model, inputs in ((seeing, {"pixels": pixels}), (blind, Means()(pixels)))
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_weights_of_the_losses_add_up() -> None:
    data = images()
    rng = np.random.default_rng(0)
    pseudo = PseudoImages(
        ["a", "b"], rng.normal(size=(2, 24)).astype(np.float32), np.ones(24, np.float32),
        rng.normal(size=(2, 4)).astype(np.float32), unit(2, 12, 3).numpy(), unit(2, 12, 4).numpy(),
    )  # fmt: skip
    losses = {}
    for weight in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        config = ContrastiveConfig(pseudo_weight=weight)
        task = DualEncoderTask(DualEncoder(SHAPES), data, data, config, "cpu", pseudo)
        losses[weight] = task.loss(np.arange(8), np.random.default_rng(0)).item()
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * (losses[1.0] - losses[0.0]), rel=1e-4)
    assert losses[1.0] > losses[0.0]


# --- crowding -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowding() -> Crowding:
    made = Crowding(HeadsConfig(24, 4, 12, caption_bank=64, image_bank=32))
    made.measure_by(unit(500, 12, seed=0), unit(700, 12, seed=1))
    return made


def test_all_corrected_vectors_have_norm_1(crowding: Crowding) -> None:
    for vectors in (crowding.images(unit(50, 12, 2)), crowding.texts(unit(50, 12, 3))):
        assert vectors.shape == (50, 16)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(50))


def test_their_dot_product_orders_by_cosine_less_crowding(crowding: Crowding) -> None:
    images, texts = unit(40, 12, 2), unit(30, 12, 3)
    # A soft maximum of cosines with a bank, from its mean, limited.
    around = []
    for bank, vectors, share in ((crowding.of_captions, images, 1.0), (crowding.of_images, texts, _TEXT_SHARE)):
        soft = bank._of(vectors)
        cosines = vectors @ bank.vectors.T
        assert (soft > cosines.max(dim=1).values).all()
        around.append(share * (soft - bank.mean).clamp(-_MAX_CROWDING, _MAX_CROWDING))
    expected = texts @ images.T - around[0][None, :] - around[1][:, None]
    found = crowding.texts(texts) @ crowding.images(images).T
    # Up to one factor for all.
    factor = (found / expected).median()
    torch.testing.assert_close(found, factor * expected, atol=1e-5, rtol=1e-4)
    plain = (texts @ images.T).argsort(dim=1, descending=True)
    assert torch.equal(found.argsort(dim=1, descending=True), expected.argsort(dim=1, descending=True))
    assert not torch.equal(found.argsort(dim=1, descending=True), plain)


def test_crowding_is_centred_on_the_training_data(crowding: Crowding) -> None:
    assert crowding.of_captions(unit(500, 12, seed=0)).mean().abs() < 0.01
    assert crowding.of_images(unit(700, 12, seed=1)).mean().abs() < 0.01


def test_a_bank_larger_than_the_data_holds_all_of_them() -> None:
    made = Crowding(HeadsConfig(24, 4, 12, caption_bank=64, image_bank=32))
    images, captions = unit(5, 12, seed=0), unit(10, 12, seed=1)
    made.measure_by(images, captions)
    assert {tuple(row) for row in made.of_captions.vectors.tolist()} == {tuple(row) for row in captions.tolist()}
    assert {tuple(row) for row in made.of_images.vectors.tolist()} == {tuple(row) for row in images.tolist()}


def test_what_is_near_to_everything_comes_later() -> None:
    """A hub: the image that is the mean of all captions is nobody's best match."""
    captions = F.normalize(unit(200, 12, 0) + 1.2 * unit(1, 12, 9), dim=1)
    images = torch.cat([F.normalize(captions.mean(0, keepdim=True), dim=1), captions + 1.0 * unit(200, 12, 2)])
    images = F.normalize(images, dim=1)
    made = Crowding(HeadsConfig(24, 4, 12, caption_bank=200, image_bank=200))
    made.measure_by(images, captions)
    plain = (captions @ images.T).argmax(1)
    corrected = (made.texts(captions) @ made.images(images).T).argmax(1)
    assert (corrected == 0).sum() < (plain == 0).sum()
    own = torch.arange(1, 201)
    assert (corrected == own).float().mean() > (plain == own).float().mean()


# --- the task -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    torch.manual_seed(0)
    task = DualEncoderTask(DualEncoder(SHAPES), images(120), images(60, seed=1), ContrastiveConfig())
    config = LoopConfig(num_epochs=60, batch_size=20, learning_rate=5e-3)
    module, epochs = fit(task, config, tmp_path_factory.mktemp("trained") / "c.pt")
    assert epochs[-1].loss < epochs[0].loss / 2
    assert epochs[-1].score > 0.9 > 0.5 > 10 / 60
    task.measure_crowding(module.model)
    return module.model


def test_it_learns_what_images_and_texts_share(trained: DualEncoder) -> None:
    data = images(60, seed=1)
    figures = retrieval_figures(trained, data)
    assert set(figures) == {f"{way} R@{k}" for way in ("text→image", "image→text") for k in (1, 5, 10)} | {"AUC"}
    assert figures["text→image R@10"] > 0.9 and figures["image→text R@10"] > 0.9 and figures["AUC"] > 0.95
    scores, targets = _pair_scores(trained, data, "cpu")
    probabilities = calibrated(trained, data)(scores)
    assert ((probabilities > 0.5) == (targets == 1)).mean() > 0.9


def test_similarities_are_those_of_the_encoded_vectors(trained: DualEncoder) -> None:
    data = images(60, seed=1)
    with torch.no_grad():
        image_vectors = trained.encode_images(data.image_inputs(slice(None)))
        text_vectors = trained.encode_texts(data.text_inputs(slice(None)))
    found, owners = similarities(trained, data)
    np.testing.assert_allclose(found, (text_vectors @ image_vectors.T).numpy(), atol=1e-5)
    assert owners.tolist() == [i // 2 for i in range(120)]


def test_pairs_are_scored_as_they_are_labelled(trained: DualEncoder) -> None:
    """Captions stand in another order than their rows, and some are shared."""
    whole = images(6)
    captions = [[5, 0], [1], [2, 0], [3], [4], [0]]
    data = CaptionedImages(whole.images, captions, whole.sentences[:6], {"vectors": whole.texts["vectors"][:6]})
    scores, targets = _pair_scores(trained, data, "cpu")
    rows, sentences, expected_targets = labelled_pairs(data)
    with torch.no_grad():
        image_vectors = trained.encode_images(data.image_inputs(rows))
        text_vectors = trained.encode_texts(data.text_inputs(sentences))
    np.testing.assert_allclose(scores, (image_vectors * text_vectors).sum(1).numpy(), atol=1e-5)
    assert np.array_equal(targets, expected_targets)


def test_the_temperature_has_a_limit() -> None:
    task = DualEncoderTask(DualEncoder(SHAPES), images(), images(), ContrastiveConfig(temperature=0.05))
    assert task.module.scale().item() == pytest.approx(20)
    with torch.no_grad():
        task.module.log_scale.fill_(9.0)
    assert task.module.scale().item() == 100


def test_what_cannot_be_measured_is_not_trained(tmp_path: Path) -> None:
    data = images(2)
    alike = CaptionedImages(data.images, [[0], [0]], data.sentences[:1], {"vectors": data.texts["vectors"][:1]})
    with pytest.raises(ValueError, match="all images have the same captions"):
        DualEncoderTask(DualEncoder(SHAPES), data, alike, ContrastiveConfig())
