"""Categories in the space of the default model, by the built-in taxonomy and the calibration that ships."""

from __future__ import annotations

import numpy as np
import pytest

from schemas.tags import ImageEvidence
from schemas.taxonomy import Taxonomy
from vlm_ops.categories import CategoryScorer
from vlm_ops.category_calibration import CategoryCalibration
from vlm_ops.models import describe_model, load_text_model
from vlm_ops.taxonomies import load_taxonomy


@pytest.fixture(scope="module")
def iab() -> Taxonomy:
    return load_taxonomy("iab-content-3.1")


def test_the_calibration_that_ships_is_that_of_the_default_model() -> None:
    calibration = CategoryCalibration.of_model(describe_model("compact").name)
    assert calibration.is_fitted, "the model has changed: run recipes/calibrate_categories.py"
    assert not CategoryCalibration.of_model("compact@other").is_fitted
    assert not CategoryCalibration.of_model("hf:../x@1").is_fitted


def picture_of(text: str, scorer: CategoryScorer) -> np.ndarray:
    """float32[1, d], where a picture of it would lie."""
    vector = load_text_model("compact").encode_texts([text])
    return (vector - scorer.prompts.mean(axis=0) + scorer.calibration.mean("image", vector.shape[1])).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a dog runs through the grass", "Pets > Dogs"),
        ("a pair of black leather shoes", "Style & Fashion"),
        ("a plate of food", "Food & Drink"),
        ("a surfer rides a wave", "Sports > Extreme Sports > Surfing and Bodyboarding"),
    ],
)
def test_sentences_in_place_of_pictures(text: str, path: str, iab: Taxonomy) -> None:
    """In the space of the default model, a text lies where a picture of it would."""
    made = CategoryScorer.compute(iab, "compact")
    (found,) = made.assign(picture_of(text, made), [ImageEvidence(1, "uri")])
    assert path in {" > ".join(each.path) for each in found}, found
    assert not any(node.path[0] == "Sensitive Topics" for node in made.nodes)


def test_a_caption_that_contradicts_its_picture_is_told(iab: Taxonomy) -> None:
    made = CategoryScorer.compute(iab, "compact")
    lemons = picture_of("fresh fruit and vegetables on a market stall", made)

    def told(caption: str, source: str = "generated") -> str | None:
        _, (contradiction,) = made.assign_and_compare(
            lemons, [ImageEvidence(1, "uri", caption=caption, caption_source=source)]
        )
        return contradiction

    assert told("a brown dog is running with a black dog") == (
        "the caption speaks of another category than the picture: Pets, not Food & Drink"
    )
    assert told("a pile of fresh fruit and vegetables") is None
    assert told("a brown dog is running with a black dog", "labels") is None
