"""Negatives are never own captions, and the hard ones are those that the matcher believes in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.vlm_ops.training.test_dual_encoder import images
from vlm_ops.models.matcher import Matcher, MatcherConfig
from vlm_ops.training.data import CaptionedImages, labelled_pairs
from vlm_ops.training.loop import LoopConfig, fit
from vlm_ops.training.matcher import MatcherTask, MatchingConfig, _drawn, matching_figures

SHAPES = MatcherConfig(24, 12, width=16, dropout=0.0)


def with_captions(captions: list[list[int]]) -> CaptionedImages:
    data = images(max(len(captions), 6))
    inputs = {name: values[: len(captions)] for name, values in data.images.items()}
    return CaptionedImages(inputs, captions, data.sentences, data.texts)


class Watched(Matcher):
    """Remembers which pairs it was asked about, by the numbers of images and texts."""

    def __init__(self) -> None:
        super().__init__(SHAPES)
        self.calls: list[list[tuple[int, int]]] = []
        self.logits: list[np.ndarray] = []
        self.known: list[list[bytes]] = []

    def image_vectors(self, inputs):  # type: ignore[no-untyped-def]
        return self._know(super().image_vectors(inputs))

    def text_vectors(self, inputs):  # type: ignore[no-untyped-def]
        return self._know(super().text_vectors(inputs))

    def _know(self, vectors: torch.Tensor) -> torch.Tensor:
        self.known = [*self.known[-1:], [row.tobytes() for row in vectors.detach().numpy()]]
        return vectors

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        numbers = [
            [known.index(row.tobytes()) for row in vectors.detach().numpy()]
            for known, vectors in zip(self.known, (images, texts), strict=True)
        ]
        self.calls.append(list(zip(*numbers, strict=True)))
        logits = super().forward(images, texts)
        self.logits.append(logits.detach().numpy())
        return logits


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True), min_size=2, max_size=5), st.data())
def test_negatives_are_never_own_captions(captions: list[list[int]], data: st.DataObject) -> None:
    torch.manual_seed(0)
    matcher = Watched()
    validation = images(6)
    config = MatchingConfig(captions_per_image=data.draw(st.integers(1, 3)), random_negatives=2, hard_negatives=2)
    task = MatcherTask(matcher, with_captions(captions), validation, config)
    chosen = np.array(data.draw(st.permutations(range(len(captions)))))
    found: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "binary_cross_entropy_with_logits", lambda logits, targets: found.update(targets=targets))
        task.loss(chosen, np.random.default_rng(0))
    # The texts of a step are numbered in the order of their rows.
    pairs, targets = matcher.calls[-1], found["targets"].tolist()
    count = int(sum(targets))
    assert targets == [1.0] * count + [0.0] * (len(pairs) - count)
    drawn = sorted({row for image, row in positive_rows(task, chosen)})
    assert [(image, drawn[text]) for image, text in pairs[:count]] == positive_rows(task, chosen)
    assert all(drawn[text] not in captions[chosen[image]] for image, text in pairs[count:])


def positive_rows(task: MatcherTask, chosen: np.ndarray) -> list[tuple[int, int]]:
    drawn = task._data.draw_captions(chosen, task._config.captions_per_image, np.random.default_rng(0))
    return [(image, int(row)) for image, rows in enumerate(drawn) for row in rows]


def test_hard_negatives_are_the_likeliest_of_their_candidates() -> None:
    torch.manual_seed(0)
    matcher = Watched()
    config = MatchingConfig(captions_per_image=2, random_negatives=1, hard_negatives=3, hard_candidates=10)
    task = MatcherTask(matcher, images(), images(6), config)
    task.loss(np.arange(12), np.random.default_rng(0))
    (candidates, pairs), logits = matcher.calls, matcher.logits[0].reshape(24, 10)
    assert len(candidates) == 240 and len(pairs) == 24 + 24 + 3 * 24
    hard = np.array(pairs[48:]).reshape(24, 3, 2)
    best = np.argsort(-logits, axis=1)[:, :3]
    expected = np.take_along_axis(np.array(candidates).reshape(24, 10, 2), best[:, :, None], axis=1)
    assert np.array_equal(hard, expected)


def test_images_are_mirrored_where_they_are_known_so() -> None:
    plain = images()
    mirrored = {name: values + 100 for name, values in plain.images.items()}
    data = CaptionedImages(plain.images, plain.captions, plain.sentences, plain.texts, mirrored)
    matcher = Matcher(SHAPES)
    task = MatcherTask(matcher, data, images(6), MatchingConfig())
    seen: list[torch.Tensor] = []
    matcher.image_vectors = lambda inputs: seen.append(inputs["features"]) or Matcher.image_vectors(matcher, inputs)  # type: ignore[method-assign]
    task.loss(np.arange(40), np.random.default_rng(0))
    turned = seen[0][:, 0].numpy() > 50
    assert 10 < turned.sum() < 30
    expected = np.where(turned[:, None], mirrored["features"], plain.images["features"])
    np.testing.assert_array_equal(seen[0].numpy(), expected)


def test_an_image_that_has_all_captions_has_no_negatives() -> None:
    is_own = np.array([[True, True], [True, False]])
    rows, columns = _drawn(is_own, np.array([0, 1, 1]), 3, np.random.default_rng(0))
    assert rows.tolist() == [1] * 6 and columns.tolist() == [1] * 6
    task = MatcherTask(Matcher(SHAPES), with_captions([[0, 1], [1, 0]]), images(6), MatchingConfig())
    assert torch.isfinite(task.loss(np.array([1, 0]), np.random.default_rng(0)))


def test_scores_are_those_of_the_labelled_pairs() -> None:
    matcher = Matcher(SHAPES).eval()
    data = with_captions([[5, 0], [1], [2, 0], [3], [4], [0]])
    scores, targets = MatcherTask(matcher, images(), data, MatchingConfig()).scores(matcher)
    rows, sentences, expected_targets = labelled_pairs(data)
    with torch.no_grad():
        expected = matcher(
            matcher.image_vectors(data.image_inputs(rows)), matcher.text_vectors(data.text_inputs(sentences))
        )
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)
    assert np.array_equal(targets, expected_targets)


def test_it_learns_what_belongs_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = MatcherTask(
        Matcher(MatcherConfig(24, 12, width=64, dropout=0.0)), images(200), images(60, 1), MatchingConfig()
    )
    module, epochs = fit(task, LoopConfig(num_epochs=40, batch_size=50, learning_rate=5e-3), tmp_path / "c.pt")
    assert epochs[-1].score > 0.85 and epochs[-1].score == task.validate(module)


def test_features_are_standardised() -> None:
    data = images()
    task = MatcherTask(Matcher(SHAPES), data, images(6), MatchingConfig())
    torch.testing.assert_close(task.module.mean, torch.from_numpy(data.images["features"]).mean(0))
    torch.testing.assert_close(task.module.std, torch.from_numpy(data.images["features"]).std(0) + 1e-3)


def test_figures() -> None:
    figures = matching_figures(np.array([0.9, 0.4, 0.6, 0.1]), np.array([1.0, 1.0, 0.0, 0.0]))
    assert figures == {"AUC": 0.75, "accuracy": 0.5}


def test_what_cannot_be_measured_is_not_trained() -> None:
    with pytest.raises(ValueError, match="all images have the same captions"):
        MatcherTask(Matcher(SHAPES), images(), with_captions([[0], [0]]), MatchingConfig())
