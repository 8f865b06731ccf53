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
    vector = load_text_model("compact").encode_texts([text])
    image = vector - made.prompts.mean(axis=0) + made.calibration.mean("image", vector.shape[1])
    (found,) = made.assign(image.astype(np.float32), [ImageEvidence(1, "uri")])
    assert path in {" > ".join(each.path) for each in found}, found
    assert not any(node.path[0] == "Sensitive Topics" for node in made.nodes)
