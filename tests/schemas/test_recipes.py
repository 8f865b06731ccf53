"""The recipe's id changes with everything that decides what a row contains, and with nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from schemas.recipes import OpSpec, Recipe
from schemas.samples import to_json

RECIPE = Recipe((OpSpec("quality"), OpSpec("embedding", "compact", "r1")), 10**8, 2 * 10**8)


@pytest.mark.parametrize(
    "change",
    [
        {"ops": RECIPE.ops[::-1]},
        {"ops": RECIPE.ops[:1]},
        {"ops": (OpSpec("quality"), OpSpec("embedding", "compact", "r2"))},
        {"max_image_bytes": 10**7},
        {"max_image_pixels": 10**7},
        {"schema_version": RECIPE.schema_version + 1},
    ],
)
def test_id_follows_the_content(change: dict) -> None:
    assert re.fullmatch("[0-9a-f]{12}", RECIPE.recipe_id)
    assert replace(RECIPE, **change).recipe_id != RECIPE.recipe_id


def test_json_there_and_back() -> None:
    again = Recipe.from_dict(json.loads(to_json(RECIPE)))
    assert again == RECIPE and again.recipe_id == RECIPE.recipe_id


def test_ops_by_name() -> None:
    assert RECIPE.op("embedding") == OpSpec("embedding", "compact", "r1")
    assert RECIPE.op("caption") is None
