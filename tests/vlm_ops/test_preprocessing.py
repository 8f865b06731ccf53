"""Preprocessing as data, and the pixels that keep their aspect ratio."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from schemas.samples import Sample
from tests.conftest import encode, jpeg
from vlm_ops.enrich import decode_batch
from vlm_ops.images import decode, preprocess
from vlm_ops.preprocessing import Preprocessing

CONTAIN = Preprocessing(size=100, fit="contain")


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_contain_keeps_the_aspect_ratio_and_never_enlarges(width: int, height: int) -> None:
    new_width, new_height = CONTAIN.extent(width, height)
    assert 1 <= new_width <= min(width, 100) and 1 <= new_height <= min(height, 100)
    if max(width, height) > 100:
        assert max(new_width, new_height) == 100
        scale = 100 / max(width, height)
        assert abs(new_width - max(1, width * scale)) <= 0.5 and abs(new_height - max(1, height * scale)) <= 0.5


@pytest.mark.parametrize("size", [(640, 480), (333, 1201), (2000, 1501), (90, 40)], ids=str)
def test_contained_pixels_are_those_of_pillow(size: tuple[int, int]) -> None:
    data = jpeg(8, *size)
    decoded = decode(data, shorter_side=CONTAIN.shorter_side)
    actual = preprocess(decoded.pixels, CONTAIN, decoded.facts).permute(1, 2, 0).numpy().astype(int)
    picture = decode(data).pixels.permute(1, 2, 0).numpy()
    expected = np.asarray(Image.fromarray(picture).resize(CONTAIN.extent(*size), Image.Resampling.BICUBIC))
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).mean() < 1.5


def test_a_large_jpeg_is_contained_from_a_reduced_scale_that_is_large_enough() -> None:
    decoded = decode(jpeg(8, 1600, 1200), shorter_side=CONTAIN.shorter_side)
    height, width = decoded.pixels.shape[1:]
    assert min(height, width) >= 100 and width <= 400


def test_a_batch_of_several_shapes_is_padded_and_gives_back_what_is_in_it() -> None:
    sizes = [(200, 50), (60, 80), (30, 300)]
    datas = [encode(Image.new("RGB", size, (9, 99, 199)), "PNG") for size in sizes]
    samples = [Sample(f"u{i}", f"u{i}", f"k{i}", data) for i, data in enumerate(datas)]
    batch, _ = decode_batch(samples, (CONTAIN, Preprocessing(8)), 10**8)
    assert batch.pixels[CONTAIN].shape == (3, 3, 100, 100) and batch.pixels[Preprocessing(8)].shape == (3, 3, 8, 8)
    for size, content in zip(sizes, batch.contents(CONTAIN), strict=True):
        width, height = CONTAIN.extent(*size)
        assert content.shape == (3, height, width) and (content == [[[9]], [[99]], [[199]]]).all()
    assert batch.pixels[CONTAIN][0, :, 25:].max() == 0
    assert [content.shape for content in batch.part(1, 2).contents(CONTAIN)] == [(3, 80, 60)]


def test_an_empty_batch_has_no_contents() -> None:
    batch, _ = decode_batch([], (CONTAIN,), 10**8)
    assert batch.contents(CONTAIN) == []


def test_bilinear_is_bilinear() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (70, 90, 3), np.uint8)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    actual = preprocess(pixels, Preprocessing(32, interpolation="bilinear")).permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(actual - expected).max() <= 1


@pytest.mark.parametrize(
    ("preprocessing", "window"),
    [
        (Preprocessing(224), (0, 0, 1, 1)),
        (CONTAIN, (0, 0, 1, 1)),
        (Preprocessing(224, "cover"), (0.25, 0, 0.75, 1)),
        (Preprocessing(224, "cover", 0.875), (0.28125, 0.0625, 0.71875, 0.9375)),
    ],
    ids=str,
)
def test_what_a_model_sees_of_a_picture(preprocessing: Preprocessing, window: tuple[float, ...]) -> None:
    assert preprocessing.window(400, 200) == pytest.approx(window)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "fill"}, "unknown fit 'fill'; use 'stretch', 'cover' or 'contain'"),
        ({"interpolation": "nearest"}, "unknown interpolation 'nearest'; use bicubic, bilinear, nearest-exact"),
        ({"crop_fraction": 0.0}, r"crop_fraction must be in \(0, 1\], got 0.0"),
        ({"crop_fraction": 1.5}, r"crop_fraction must be in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_preprocessing(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(10, **options)
