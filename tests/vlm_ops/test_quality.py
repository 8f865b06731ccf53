"""The parts of quality, on drawn pictures whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw, ImageFilter

from schemas.recipes import OpSpec
from tests.conftest import encode, photo
from tests.vlm_ops.test_ops import batch_of
from vlm_ops.ops import load_ops
from vlm_ops.quality import Quality, dominant_colors, measure


def measured(picture: Image.Image) -> Quality:
    return measure(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))


def textured(seed: int = 0, low: int = 0, high: int = 256, size: tuple[int, int] = (200, 150)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(low, high, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def test_the_more_blurred_the_less_sharp() -> None:
    picture = textured()
    found = [measured(picture.filter(ImageFilter.GaussianBlur(radius))).sharpness for radius in (0, 1, 2, 4)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.8 and found[-1] < 0.1


def test_a_sharp_subject_on_a_plain_or_blurred_ground_is_sharp() -> None:
    subject = textured(1, size=(100, 75))
    plain, blurred = Image.new("RGB", (200, 150), "white"), textured(2).filter(ImageFilter.GaussianBlur(5))
    for ground in (plain, blurred):
        ground.paste(subject, (50, 40))
        assert measured(ground).sharpness >= measured(subject).sharpness - 0.05


def test_exposure_tells_too_dark_and_too_light_from_right() -> None:
    assert measured(textured(low=90, high=170)).exposure == 1
    assert measured(textured(low=0, high=25)).exposure < 0.2
    assert measured(textured(low=235)).exposure < 0.2
    half_dark = measured(textured(low=20, high=60)).exposure
    assert measured(textured(low=0, high=25)).exposure < half_dark < 1


def test_a_product_on_white_is_well_exposed() -> None:
    picture = Image.new("RGB", (200, 200), "white")
    picture.paste(textured(low=80, high=180, size=(60, 60)), (70, 70))
    assert measured(picture).exposure == 1
    assert measured(Image.new("RGB", (200, 200), "white")).exposure < 0.1


def test_contrast() -> None:
    halves = Image.new("RGB", (100, 100), "black")
    halves.paste("white", (0, 0, 50, 100))
    assert measured(halves).contrast == 1
    assert measured(Image.new("RGB", (100, 100), "grey")).contrast == 0
    grey = Image.new("RGB", (100, 100), (100, 100, 100))
    grey.paste((151, 151, 151), (0, 0, 50, 100))
    assert measured(grey).contrast == pytest.approx(0.2)


def test_plain_background() -> None:
    picture = Image.new("RGB", (200, 150), (240, 240, 250))
    picture.paste(textured(size=(100, 80)), (50, 40))
    assert measured(picture).plain_background == 1
    picture.paste(textured(size=(200, 40)), (0, 0))
    assert 0.4 < measured(picture).plain_background < 0.7
    assert measured(textured()).plain_background < 0.3


@pytest.mark.parametrize(
    ("box", "share"),
    [
        ((0, 30, 200, 170), 0.3),
        ((0, 30, 200, 200), 0.15),
        ((20, 0, 180, 200), 0.2),
        ((20, 10, 180, 190), 1 - 0.8 * 0.9),
        ((0, 0, 200, 200), 0.0),
    ],
    ids=["letterbox", "one side", "pillars", "frame", "none"],
)
@pytest.mark.parametrize("color", ["black", "white", "red"])
def test_border(box: tuple[int, int, int, int], share: float, color: str) -> None:
    picture = Image.new("RGB", (200, 200), color)
    picture.paste(textured(low=90, high=140, size=(box[2] - box[0], box[3] - box[1])), box[:2])
    assert measured(picture).border == pytest.approx(share, abs=0.02)
    assert measured(picture).score <= (1 - share) + 0.02


def test_a_plain_background_is_no_border() -> None:
    picture = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(picture).ellipse((40, 40, 160, 160), fill="navy")
    assert measured(picture).border == 0
    assert measured(Image.new("RGB", (200, 200), "white")).border == 0


@given(arrays.arrays(np.uint8, st.tuples(st.just(3), st.integers(1, 40), st.integers(1, 40))))
def test_everything_is_in_range_whatever_the_picture(picture: np.ndarray) -> None:
    quality = measure(picture)
    assert all(0 <= value <= 1 for value in (*vars(quality).values(), quality.score)), quality


def test_the_op_gives_parts_and_score() -> None:
    ops = load_ops([OpSpec("quality")])
    sharp = encode(textured(3), "PNG")
    blurred = encode(textured(3).filter(ImageFilter.GaussianBlur(4)), "PNG")
    columns = {name: array.to_pylist() for name, array in ops[0](batch_of([sharp, blurred], ops)).items()}
    assert columns["quality_score"][0] > columns["quality_score"][1] + 0.3
    assert set(columns["quality_parts"][0]) == {"sharpness", "exposure", "contrast", "plain_background", "border"}
    empty = ops[0](batch_of([], ops))
    assert {name: (array.type, len(array)) for name, array in empty.items()} == {
        field.name: (field.type, 0) for field in ops[0].columns
    }


def test_quality_does_not_depend_on_the_batch() -> None:
    ops = load_ops([OpSpec("quality")])
    datas = [encode(photo(seed, width, height), "PNG") for seed, (width, height) in enumerate([(300, 90), (80, 400)])]
    both = ops[0](batch_of(datas, ops))["quality_parts"].to_pylist()
    assert both == [ops[0](batch_of([data], ops))["quality_parts"].to_pylist()[0] for data in datas]


def test_dominant_colors_of_two_halves() -> None:
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 0, 64, 16))
    found = dominant_colors(picture)
    assert [(color["hex"], round(color["share"], 2)) for color in found] == [("#ff0000", 0.75), ("#0000ff", 0.25)]
