"""What the captioner is taught by, and what its figures are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_ops.caption_metrics import cider_d
from vlm_ops.models.caption_decoder import CaptionDecoder, DecoderConfig
from vlm_ops.models.captioner import Captioner, Hypothesis
from vlm_ops.training.captioner import CaptionerTask, CaptioningConfig, best_sentences, captioning_figures, words_of
from vlm_ops.training.data import CaptionedImages
from vlm_ops.training.loop import LoopConfig, fit
from vlm_ops.training.pseudo_images import PseudoImages

SENTENCES = ("a dog runs", "a dog plays", "two cats sleep", "cats sleep on a bed", "a bird")
WORDS = sorted({word for text in SENTENCES for word in text.split()})


def images(n: int = 12) -> CaptionedImages:
    """Dogs, cats and a bird, told apart by their features."""
    captions = [[[0, 1], [2, 3], [4]][number % 3] for number in range(n)]
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(3, 5))
    features = np.stack([kinds[number % 3] for number in range(n)]) + 0.05 * rng.normal(size=(n, 5))
    grid = np.repeat(features[:, None], 4, axis=1)
    inputs = {"features": features.astype(np.float32), "grid": grid.astype(np.float16)}
    return CaptionedImages(inputs, captions, SENTENCES)


def captioner(words: Sequence[str] = WORDS) -> Captioner:
    torch.manual_seed(0)
    return Captioner(CaptionDecoder(DecoderConfig(5, 5, 0, 4, words, width=32, num_heads=2, dropout=0.0)))


class Parrot:
    """Writes what it is told to, and remembers what it was taught."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self.texts = iter(texts)
        self.backbones: list[torch.nn.Module] = []
        self.taught: list[tuple[dict[str, torch.Tensor], list[list[str]], float]] = []
        self.writer = self

    def write(
        self, inputs: Mapping[str, torch.Tensor], num_beams: int, num_wanted: int | None = None
    ) -> list[list[Hypothesis]]:
        return [[Hypothesis(next(self.texts), -1.0)] for _ in inputs["features"]]

    def loss(
        self, inputs: Mapping[str, torch.Tensor], captions: list[list[str]], label_smoothing: float
    ) -> torch.Tensor:
        self.taught.append((dict(inputs), captions, label_smoothing))
        return torch.tensor(float(len(self.taught)))


def test_every_image_is_taught_as_many_of_its_own_captions() -> None:
    parrot, data = Parrot(), images()
    task = CaptionerTask(parrot, data, data, CaptioningConfig(captions_per_image=3, label_smoothing=0.2))  # type: ignore[arg-type]
    task.loss(np.array([5, 0, 1]), np.random.default_rng(0))
    ((inputs, captions, smoothing),) = parrot.taught
    assert [len(each) for each in captions] == [3, 3, 3] and smoothing == 0.2
    assert [set(each) for each in captions] == [{SENTENCES[4]}, set(SENTENCES[:2]), set(SENTENCES[2:4])]
    np.testing.assert_array_equal(inputs["features"], data.images["features"][[5, 0, 1]])


def test_colours_are_learnt_of_photos_alone() -> None:
    class Painter(Parrot):
        def inputs(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
            return inputs

        def color_loss(
            self, inputs: Mapping[str, torch.Tensor], captions: list[list[str]], label_smoothing: float
        ) -> torch.Tensor:
            painted.append((inputs["features"], captions, label_smoothing))
            return torch.tensor(100.0)

    painter, data = Painter(), images()
    painted: list[tuple[torch.Tensor, list[list[str]], float]] = []
    features = np.arange(15, dtype=np.float32).reshape(3, 5)
    pseudo = PseudoImages(["otter", "vase", "oboe"], features, np.ones(5, np.float32), None, features, features)
    config = CaptioningConfig(pseudo_weight=0.5, pseudo_images=2, label_smoothing=0.2)
    task = CaptionerTask(painter, data, data, config, "cpu", pseudo)  # type: ignore[arg-type]
    assert task.loss(np.arange(4), np.random.default_rng(0)).item() == 1 + 100 + 0.5 * 2
    ((seen, captions, smoothing),) = painted
    np.testing.assert_array_equal(seen, data.images["features"][:4])
    assert captions == painter.taught[0][1] and smoothing == 0.2


def test_pseudo_images_are_taught_their_sentences() -> None:
    parrot, data = Parrot(), images()
    features = np.arange(15, dtype=np.float32).reshape(3, 5)
    pseudo = PseudoImages(["otter", "vase", "oboe"], features, np.ones(5, np.float32), None, features, features)
    config = CaptioningConfig(pseudo_weight=0.5, pseudo_images=2, pseudo_noise=0.0)
    task = CaptionerTask(parrot, data, data, config, "cpu", pseudo)  # type: ignore[arg-type]
    loss = task.loss(np.arange(4), np.random.default_rng(0))
    assert loss.item() == 1 + 0.5 * 2
    inputs, captions, _ = parrot.taught[1]
    rows = (inputs["features"][:, 0] / 5).long().tolist()
    sentences = ["a photo of an otter", "a photo of a vase", "a photo of an oboe"]
    assert captions == [[sentences[row]] for row in rows] and len(set(rows)) == 2
    # Every cell looks the same.
    assert inputs["grid"].shape == (2, 4, 5)
    assert all(torch.equal(inputs["grid"][:, cell], inputs["features"]) for cell in range(4))


def test_figures_are_those_of_what_it_writes_by_itself() -> None:
    data = images(70)
    perfect = [SENTENCES[rows[0]] for rows in data.captions]
    references = [[SENTENCES[row] for row in rows] for rows in data.captions]
    sentences = best_sentences(Parrot(perfect), data, 1, "cpu")
    assert [each.text for each in sentences] == perfect
    figures = captioning_figures(sentences, data)
    assert set(figures) == {"CIDEr-D", "BLEU-4", "ROUGE-L"}
    assert figures["ROUGE-L"] == pytest.approx(1) and figures["CIDEr-D"] == pytest.approx(
        cider_d(perfect, references).mean()
    )
    assert captioning_figures([Hypothesis("nothing of that", -1.0)] * 70, data)["CIDEr-D"] == 0


def test_it_learns_to_tell_pictures_apart(tmp_path: Path) -> None:
    data = images()
    task = CaptionerTask(captioner(), data, data, CaptioningConfig(captions_per_image=1))
    module, epochs = fit(task, LoopConfig(num_epochs=40, batch_size=12, learning_rate=5e-3), tmp_path / "c.pt")
    written = [each[0].text for each in module.write(data.image_inputs(slice(0, 3)), 3)]
    assert written[0] in SENTENCES[:2] and written[1] in SENTENCES[2:4] and written[2] == SENTENCES[4]
    assert epochs[-1].score == pytest.approx(
        captioning_figures(best_sentences(module, data, 1, "cpu"), data)["CIDEr-D"]
    )
    assert epochs[-1].score > 5 * max(epochs[0].score, 0.1)


def test_cider_makes_its_own_sentences_better() -> None:
    data = images()
    model = captioner()
    likelihood = CaptionerTask(model, data, data, CaptioningConfig(captions_per_image=1))
    cider = CaptionerTask(model, data, data, CaptioningConfig(objective="cider", likelihood_weight=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scores = []
    for task, num_steps in ((likelihood, 8), (cider, 30)):
        for step in range(num_steps):
            loss = task.loss(np.arange(12), np.random.default_rng(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores.append(task.validate(model.eval()))
    assert scores[1] > 1.5 * scores[0] > 0


def test_cider_is_of_images_with_as_many_captions_as_most() -> None:
    data = images()
    few = replace(data, captions=[[*rows, 4] if number < 9 else [4] for number, rows in enumerate(data.captions)])
    task = CaptionerTask(captioner(), few, few, CaptioningConfig(objective="cider", likelihood_weight=0.0))
    rng = np.random.default_rng(0)
    assert task.loss(np.arange(9, 12), rng).item() == 0
    assert task.loss(np.arange(12), rng).item() == pytest.approx(task.loss(np.arange(9), rng).item()) != 0


def test_sentences_of_equal_reward_teach_nothing() -> None:
    data = images()
    model = captioner(words=["nonsense"])
    task = CaptionerTask(model, data, data, CaptioningConfig(objective="cider", likelihood_weight=0.0))
    assert task.loss(np.arange(12), np.random.default_rng(0)).item() == 0


def test_cider_is_for_writers_that_weigh_sentences() -> None:
    data = images()
    with pytest.raises(
        ValueError, match="--objective cider is for the compact writer; train this one with --objective"
    ):
        CaptionerTask(Parrot(), data, data, CaptioningConfig(objective="cider"))  # type: ignore[arg-type]


def test_the_vocabulary_has_frequent_words_and_those_of_the_classes() -> None:
    data = images()  # four times "a bird", "a dog runs" and so on
    assert words_of(data, 4) == WORDS
    assert words_of(data, 5) == ["a", "cats", "dog", "sleep"]
    assert words_of(data, 5, ["otter", "grey Dog"]) == [
        "a",
        "an",
        "cats",
        "dog",
        "grey",
        "of",
        "otter",
        "photo",
        "sleep",
    ]
