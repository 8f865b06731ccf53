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
    evidence = fit_people(photos(400, 0), validation)
    assert evidence is not None
    with torch.inference_mode():
        found = evidence(torch.from_numpy(validation.images["features"])).numpy() > 0
    shown = np.array([rows == [0, 1] for rows in validation.captions])
    assert found[shown].mean() == pytest.approx(0.9, abs=0.01)  # as many may be missed
    assert found[~shown].mean() < 0.01


def test_without_people_there_is_nothing_to_learn() -> None:
    data = CaptionedImages({"features": np.zeros((20, 8), np.float32)}, [[2]] * 20, SENTENCES)
    assert fit_people(data, data) is None


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [("A Man runs", True), ("children play", True), ("a pair of men's shoes", False), ("a mannequin", False)],
)
def test_what_names_people(sentence: str, expected: bool) -> None:
    assert names_people(sentence) is expected
