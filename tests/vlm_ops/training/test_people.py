"""Which pictures show people, learnt from captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm_ops.mentions import names_people
from vlm_ops.training.data import CaptionedImages
from vlm_ops.training.people import fit_people

SENTENCES = ("a man on a bike", "two women talk", "a dog in the snow", "a pair of men's shoes")


def photos(n: int, seed: int) -> CaptionedImages:
    """The first number of the features says whether there are people, in noise."""
    rng = np.random.default_rng(seed)
    shown = rng.random(n) < 0.5
    features = rng.normal(size=(n, 8)).astype(np.float32)
    features[:, 0] += np.where(shown, 3, -3)
    captions = [[0, 1] if each else [2, 3] for each in shown]
    return CaptionedImages({"features": features}, captions, SENTENCES)


def test_it_tells_pictures_with_people_from_others() -> None:
    validation = photos(400, 1)
    log_probs = np.random.default_rng(2).normal(-1.5, 0.1, 400).astype(np.float32)
    evidence = fit_people(photos(400, 0), validation, log_probs)
    assert evidence is not None
    with torch.inference_mode():
        found = evidence(torch.from_numpy(validation.images["features"]), torch.from_numpy(log_probs)).numpy() > 0
    shown = np.array([rows == [0, 1] for rows in validation.captions])
    assert found[shown].mean() == pytest.approx(0.95, abs=0.01)  # as many may be missed
    assert found[~shown].mean() < 0.1


def test_the_surer_sentence_needs_less_evidence() -> None:
    validation = photos(400, 1)
    log_probs = np.linspace(-2, -1, 400).astype(np.float32)
    evidence = fit_people(photos(400, 0), validation, log_probs)
    assert evidence is not None
    doubtful = torch.zeros(2, 8)
    with torch.inference_mode():
        hesitant, sure = evidence(doubtful, torch.tensor([-2.0, -1.0])).tolist()
    assert sure - hesitant == pytest.approx(1 / np.std(log_probs, ddof=1), rel=1e-3)


def test_without_people_there_is_nothing_to_learn() -> None:
    data = CaptionedImages({"features": np.zeros((20, 8), np.float32)}, [[2]] * 20, SENTENCES)
    assert fit_people(data, data, np.zeros(20)) is None


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [("A Man runs", True), ("children play", True), ("a pair of men's shoes", False), ("a mannequin", False)],
)
def test_what_names_people(sentence: str, expected: bool) -> None:
    assert names_people(sentence) is expected
