"""What training keeps of an image beside features and embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.toys import PREPROCESSING, ToyImageModel, describe
from vlm_ops.models import ImageEncoding
from vlm_ops.models.settings import CPU
from vlm_ops.ops import ImageBatch, load_ops, op_class, plan_ops
from vlm_ops.training.inputs import GRID_OP, MIRRORED_OP, PIXELS_OP, GridOp, MirroredOp, PixelsOp, grid_bytes

MODEL = ToyImageModel(describe("python:tests.toys"))
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), np.uint8)


@pytest.fixture
def batch() -> ImageBatch:
    return ImageBatch([None] * 3, [None] * 3, {PREPROCESSING: PIXELS}, {})  # type: ignore[list-item]


def grids(column: pa.Array) -> np.ndarray:
    return np.stack([np.frombuffer(each, np.float16).reshape(4, 3) for each in column.to_pylist()])


def test_ops_are_found_by_their_names() -> None:
    assert [op_class(name) for name in (GRID_OP, MIRRORED_OP, PIXELS_OP)] == [GridOp, MirroredOp, PixelsOp]


def test_the_grid_in_half_precision(batch: ImageBatch) -> None:
    found = grids(GridOp(MODEL)(batch)["grid"])
    np.testing.assert_array_equal(found, MODEL.encode_images(PIXELS).grid.astype(np.float16))


def test_outliers_stay_finite() -> None:
    grid = np.zeros((1, 4, 3), np.float32)
    grid[0, 0, :2] = 1e6, -1e6
    assert grids(grid_bytes(grid))[0, 0].tolist() == [65504, -65504, 0]


def test_the_image_turned_left_to_right(batch: ImageBatch) -> None:
    found = MirroredOp(MODEL)(batch)
    expected = MODEL.encode_images(PIXELS[..., ::-1])
    np.testing.assert_array_equal(np.array(found["mirrored_features"].to_pylist(), np.float32), expected.features)
    np.testing.assert_array_equal(np.array(found["mirrored_embedding"].to_pylist(), np.float32), expected.embeddings)
    np.testing.assert_array_equal(grids(found["mirrored_grid"]), expected.grid.astype(np.float16))
    assert [found[field.name].type for field in MirroredOp.columns] == [field.type for field in MirroredOp.columns]


def test_what_a_model_does_not_make_is_null(batch: ImageBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ToyImageModel(MODEL.info)
    features = np.ones((3, 2), np.float32)
    monkeypatch.setattr(model, "encode_images", lambda pixels: ImageEncoding(features=features))
    found = MirroredOp(model)(batch)
    assert found["mirrored_features"].to_pylist() == features.tolist()
    assert found["mirrored_embedding"].null_count == found["mirrored_grid"].null_count == 3


def test_the_pixels_themselves(batch: ImageBatch) -> None:
    (column,) = PixelsOp(MODEL)(batch).values()
    found = [np.frombuffer(each, np.uint8).reshape(3, 8, 8) for each in column.to_pylist()]
    np.testing.assert_array_equal(np.stack(found), PIXELS)


def test_pixels_need_no_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that is to be fine-tuned is neither loaded nor exported to prepare its input."""
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr("vlm_ops.models.compact.load_image_backbone", lambda spec: pytest.fail("it was loaded"))
    (op,) = load_ops(plan_ops([PIXELS_OP], "compact:conse"), CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), np.uint8)
    (column,) = op(ImageBatch([None], [None], {op.preprocessing: pixels}, {})).values()  # type: ignore[list-item]
    assert column.to_pylist() == [pixels.tobytes()]
    assert not list(tmp_path.iterdir())
