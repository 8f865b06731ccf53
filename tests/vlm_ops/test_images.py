"""Decoding: every format as Pillow shows it, the fast way like the plain one, and no bytes raise anything else."""

from __future__ import annotations

import functools
import io
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from schemas.samples import REASONS, SampleError
from tests.conftest import encode, jpeg, photo, png
from vlm_ops.images import DecodedImage, ImageFacts, decode, decode_plainly, preprocess, resize
from vlm_ops.preprocessing import Preprocessing

Way = Callable[..., DecodedImage]
WAYS = pytest.mark.parametrize(
    "way", [decode, decode_plainly, functools.partial(decode, shorter_side=8)], ids=["fast", "plain", "reduced"]
)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "BMP": {}, "TIFF": {}}


def array(decoded: DecodedImage | torch.Tensor) -> np.ndarray:
    """int16[h, w, 3]"""
    pixels = decoded if isinstance(decoded, torch.Tensor) else decoded.pixels
    assert pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy().astype(np.int16)


def expected(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(np.int16)


def pillow(data: bytes) -> np.ndarray:
    return expected(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def difference(left: np.ndarray, right: np.ndarray) -> int:
    assert left.shape == right.shape
    return int(np.abs(left - right).max())


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# --- formats and modes ---------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("format_", LOSSLESS)
def test_lossless_formats(way: Way, format_: str) -> None:
    image = photo(1, 33, 21)
    decoded = way(encode(image, format_, **LOSSLESS[format_]))
    assert np.array_equal(array(decoded), expected(image))
    assert decoded.facts == ImageFacts(33, 21, format_)


@WAYS
def test_jpeg(way: Way) -> None:
    data = jpeg(1, 30, 21)
    assert difference(array(way(data)), pillow(data)) <= 1
    assert way(data).facts == ImageFacts(30, 21, "JPEG")


@WAYS
@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True}])
def test_kinds_of_jpeg(way: Way, options: dict) -> None:
    data = jpeg(2, 31, 30, **options)
    assert difference(array(way(data)), pillow(data)) <= 1


@WAYS
def test_a_multi_picture_jpeg_is_a_jpeg(way: Way) -> None:
    data = encode(photo(0), "MPO", save_all=True, append_images=[photo(1)])
    decoded = way(data)
    assert decoded.facts == ImageFacts(96, 64, "JPEG")
    assert difference(array(decoded), pillow(data)) <= 1


@WAYS
def test_of_an_animation_the_first_frame(way: Way) -> None:
    frames = [photo(seed, 40, 30).quantize(16) for seed in range(3)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    decoded = way(data)
    assert np.array_equal(array(decoded), expected(frames[0]))
    assert decoded.facts == ImageFacts(40, 30, "GIF")


@WAYS
@pytest.mark.parametrize(
    ("mode", "format_"), [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG"), ("CMYK", "TIFF")]
)
def test_other_modes(way: Way, mode: str, format_: str) -> None:
    image = photo(3, 30, 20)
    data = encode(image.quantize(32) if mode == "P" else image.convert(mode), format_)
    assert Image.open(io.BytesIO(data)).mode == mode
    assert difference(array(way(data)), pillow(data)) <= 1


def transparent(mode: str) -> tuple[bytes, np.ndarray]:
    """A picture fading out to the right, encoded; and what it looks like on white."""
    image = photo(4, 32, 16)
    alpha = Image.fromarray(np.tile(np.linspace(255, 0, 32).astype(np.uint8), (16, 1)))
    base = image.convert("L") if mode == "LA" else image
    layered = base.convert(mode)
    layered.putalpha(alpha)
    white = Image.new("RGB", image.size, "white")
    white.paste(base.convert("RGB"), mask=alpha)
    return encode(layered, "PNG"), expected(white)


@WAYS
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(way: Way, mode: str) -> None:
    data, on_white = transparent(mode)
    assert difference(array(way(data)), on_white) <= 1
    assert (array(way(data))[:, -1] == 255).all()


@WAYS
def test_transparent_colours_are_white(way: Way) -> None:
    palette = Image.new("P", (4, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putdata([0, 1, 0, 1])
    with_index = array(way(encode(palette, "PNG", transparency=1)))
    assert with_index[0].tolist() == [[10, 20, 30], [255, 255, 255]] * 2
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((1, 0), (9, 9, 9))
    assert array(way(encode(rgb, "PNG", transparency=(9, 9, 9))))[0].tolist() == [[1, 2, 3], [255, 255, 255]]
    gif = array(way(encode(palette, "GIF", transparency=0)))
    assert gif[0].tolist() == [[255, 255, 255], [200, 0, 0]] * 2


@WAYS
@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_brightness(way: Way, format_: str) -> None:
    values = np.linspace(0, 65535, 300).astype(np.uint16).reshape(10, 30)
    pixels = array(way(encode(Image.fromarray(values), format_)))
    assert difference(pixels, np.repeat(values[..., None] / 257, 3, axis=2).astype(np.int16)) <= 1
    assert pixels[0, 0].tolist() == [0, 0, 0] and pixels[-1, -1].tolist() == [255, 255, 255]


@WAYS
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 9.0), (0.0, 1e6)])
def test_floats_are_stretched_to_their_range(way: Way, low: float, high: float) -> None:
    values = np.linspace(low, high, 256, dtype=np.float32).reshape(8, 32)
    pixels = array(way(encode(Image.fromarray(values), "TIFF")))
    assert difference(pixels[..., 0].ravel(), np.arange(256, dtype=np.int16)) <= 1


# --- orientation ---------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientations(way: Way, format_: str, orientation: int) -> None:
    image, exif = photo(5, 36, 20), Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {0x0112: orientation}} if format_ == "TIFF" else {"exif": exif}
    data = encode(image, format_, **LOSSLESS.get(format_, {"quality": 95}), **options)
    upright, decoded = pillow(data), way(data)
    assert difference(array(decoded), upright) <= 1
    assert decoded.facts == ImageFacts(upright.shape[1], upright.shape[0], format_)
    assert upright.shape[:2] == ((36, 20) if orientation in (5, 6, 7, 8) else (20, 36))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_facts_are_those_of_the_original(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(6, 400, 240, exif=exif)
    plain, reduced = decode_plainly(data), decode(data, shorter_side=30)
    assert plain.facts == decode(data).facts == reduced.facts
    height, width = reduced.pixels.shape[1:]
    assert (width * 4, height * 4) == (plain.facts.width, plain.facts.height)
    mean = np.abs(array(resize(plain.pixels, height, width)) - array(reduced)).mean()
    assert mean < 2, "the reduced picture is turned otherwise"


@WAYS
def test_a_broken_exif_block_is_passed_over(way: Way) -> None:
    data = encode(photo(0), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff" + b"\xff" * 30)
    assert way(data).facts == ImageFacts(96, 64, "JPEG")


# --- the fast way and the plain one --------------------------------------------------------------


def by_pillow(data: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """The naive way: Pillow decodes at full scale, resizes, and crops."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    size = preprocessing.size
    if preprocessing.fit == "stretch":
        return expected(image.resize((size, size), Image.Resampling.BICUBIC))
    scale = preprocessing.shorter_side / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return expected(image.crop((left, top, left + size, top + size)))


PREPROCESSINGS = [Preprocessing(64), Preprocessing(64, "cover"), Preprocessing(56, "cover", 0.875)]


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS, ids=str)
@pytest.mark.parametrize(
    "data",
    [jpeg(7, 200, 130), jpeg(7, 120, 250), jpeg(7, 40, 30), jpeg(7, 64, 64), png(7, 90, 100)],
    ids=["wide", "tall", "small", "equal", "png"],
)
def test_preprocessing_is_that_of_pillow(data: bytes, preprocessing: Preprocessing) -> None:
    fast = preprocess(decode(data, shorter_side=preprocessing.shorter_side).pixels, preprocessing)
    assert fast.shape == (3, preprocessing.size, preprocessing.size)
    assert difference(array(fast), array(preprocess(decode_plainly(data).pixels, preprocessing))) <= 1
    assert difference(array(fast), by_pillow(data, preprocessing)) <= 1


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS, ids=str)
@pytest.mark.parametrize("size", [(640, 480), (480, 1200), (2000, 1501)], ids=str)
def test_a_large_jpeg_at_reduced_scale_looks_the_same(size: tuple[int, int], preprocessing: Preprocessing) -> None:
    data = jpeg(8, *size)
    decoded = decode(data, shorter_side=preprocessing.shorter_side)
    assert 2 * preprocessing.shorter_side <= min(decoded.pixels.shape[1:]) <= min(size) / 2
    assert decoded.facts == ImageFacts(*size, "JPEG")
    off = np.abs(array(preprocess(decoded.pixels, preprocessing)) - by_pillow(data, preprocessing))
    assert off.mean() < 0.5 and off.max() <= 16


def test_cover_keeps_the_middle() -> None:
    bands = Image.new("RGB", (90, 30), "red")
    bands.paste("lime", (30, 0, 60, 30))
    pixels = array(preprocess(decode(encode(bands, "PNG")).pixels, Preprocessing(30, "cover")))
    assert (pixels == [0, 255, 0]).all()
    stretched = array(preprocess(decode(encode(bands, "PNG")).pixels, Preprocessing(30)))
    assert stretched[15, [2, 15, 27]].tolist() == [[255, 0, 0], [0, 255, 0], [255, 0, 0]]


@pytest.mark.parametrize("fit", ["stretch", "cover"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 500_000), (500_000, 1), (3, 70)], ids=str)
def test_any_shape_becomes_the_models_input_at_no_great_cost(shape: tuple[int, int], fit: str) -> None:
    # Resized as it is, a line of half a million pixels would be a picture of 75 gigabytes.
    prepared = preprocess(torch.full((3, *shape), 77, dtype=torch.uint8), Preprocessing(224, fit, 1.0))
    assert prepared.shape == (3, 224, 224) and prepared.unique().tolist() == [77]


# --- bad bytes -----------------------------------------------------------------------------------

BMP = encode(photo(9), "BMP")
GIF = encode(photo(9).quantize(64), "GIF")
TIFF = encode(photo(9), "TIFF")
WEBP = encode(photo(9), "WEBP")


@WAYS
@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        (b"", "empty_file", "zero bytes"),
        (b"<html><body>404</body></html>", "not_an_image", "not a JPEG, .* image; begins with b'<html><body>404<'"),
        (b"\0" * 1000, "not_an_image", "begins with"),
        (b"%PDF-1.7 ...", "not_an_image", "begins with b'%PDF"),
        (jpeg(9)[:-30], "truncated_image", "truncated"),
        (jpeg(9)[: len(jpeg(9)) // 2], "truncated_image", "truncated"),
        (jpeg(9, progressive=True)[:-200], "truncated_image", "truncated"),
        (jpeg(9)[:100], "truncated_image", "damaged header: Truncated"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF" + b"junk" * 50, "corrupt_image", "damaged header; begins with"),
        (png(9)[:-2000], "truncated_image", "truncated"),
        (png(9)[:20], "truncated_image", "damaged header: Truncated"),
        (png(9)[:16] + b"\xff" + png(9)[17:], "corrupt_image", r"damaged header; begins with b'\\x89PNG"),
        (png(9)[:3000] + b"\xff" * 50 + png(9)[3050:], "corrupt_image", "broken data stream"),
        (png_of_size(200, 200), "truncated_image", "truncated"),
        (png_of_size(0, 200), "corrupt_image", "damaged header"),
        (GIF[:-100], "truncated_image", "truncated"),
        (BMP[:-100], "truncated_image", "truncated"),
        (TIFF[:-100], "truncated_image", "truncated"),
        (WEBP[:-100], "corrupt_image", "decoder"),
    ],
)
def test_bad_bytes_have_a_reason(way: Way, data: bytes, reason: str, message: str) -> None:
    with pytest.raises(SampleError, match=message) as caught:
        way(data)
    assert caught.value.reason == reason


def with_damaged_data(data: bytes) -> bytes:
    """The same JPEG, its header whole, with half of its coded data skipped over."""
    start = data.rindex(b"\xff\xda") + 20
    return data[:start] + data[start + (len(data) - start) // 2 :]


@pytest.mark.parametrize(
    "data",
    [
        jpeg(9), jpeg(9, progressive=True), jpeg(9, restart_marker_blocks=2), encode(photo(7).convert("L"), "JPEG"),
        encode(photo(9).convert("CMYK"), "JPEG"), jpeg(9, 400, 300),
    ],
    ids=["baseline", "progressive", "restarts", "grey", "cmyk", "large"],
)  # fmt: skip
@pytest.mark.parametrize("shorter_side", [None, 20])
def test_damaged_coded_data_of_a_jpeg_is_told(data: bytes, shorter_side: int | None) -> None:
    broken = with_damaged_data(data)
    decode_plainly(broken)  # Pillow is expected to be silent here
    with pytest.raises(SampleError, match="Corrupt JPEG data: ") as caught:
        decode(broken, shorter_side=shorter_side)
    assert caught.value.reason == "corrupt_image"
    assert decode(data, shorter_side=shorter_side).pixels.numel()


@pytest.mark.parametrize("stray", [b"\0\0\0", b"\x11\x22"])
def test_stray_bytes_that_cost_no_pixel_are_no_damage(stray: bytes) -> None:
    data = jpeg(9)
    assert np.array_equal(array(decode(data[:-2] + stray + data[-2:])), array(decode(data)))


@pytest.mark.parametrize("size", [(2000, 1500), (1537, 913)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_reduced_jpeg_is_that_of_pillow(size: tuple[int, int], mode: str) -> None:
    data = encode(photo(9, *size).convert(mode), "JPEG")
    image = Image.open(io.BytesIO(data))
    image.draft(mode, (400, 400))
    assert np.array_equal(array(decode(data, shorter_side=200)), np.asarray(image.convert("RGB")))


@WAYS
@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_what_follows_an_image_does_not_matter(way: Way, format_: str) -> None:
    data = encode(photo(0), format_)
    assert np.array_equal(array(way(data + b"\0" * 4096)), array(way(data)))


@WAYS
@pytest.mark.parametrize("size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1)], ids=str)
def test_a_decompression_bomb_is_refused_by_its_header(way: Way, size: tuple[int, int]) -> None:
    started = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(SampleError, match="{}x{} pixels; the limit is 200000000 ".format(*size)) as caught:
        way(png_of_size(*size))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason == "too_many_pixels"
    assert peak < 1e6 and time.perf_counter() - started < 1


@WAYS
@pytest.mark.parametrize("data", [jpeg(0), png(0)], ids=["jpeg", "png"])
def test_the_limit_on_pixels(way: Way, data: bytes) -> None:
    assert way(data, max_pixels=96 * 64).facts.width == 96
    with pytest.raises(SampleError, match=r"96x64 pixels; the limit is 6143 \(--max_image_pixels\)") as caught:
        way(data, max_pixels=96 * 64 - 1)
    assert caught.value.reason == "too_many_pixels"


def test_nothing_is_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    for data in (png(0, 400, 300), encode(photo(0).quantize(8), "PNG", transparency=bytes(range(8)))):
        decode(data)
    assert not recwarn.list


EXIF = Image.Exif()
EXIF[0x0112] = 6
SEEDS = {
    "jpeg": jpeg(10, 40, 30, exif=EXIF),
    "progressive": jpeg(10, 40, 30, progressive=True),
    "cmyk": encode(photo(10, 40, 30).convert("CMYK"), "JPEG"),
    "png": encode(photo(10, 40, 30), "PNG", exif=EXIF),
    "palette": encode(photo(10, 40, 30).quantize(16), "PNG", transparency=3),
    "webp": encode(photo(10, 40, 30), "WEBP"),
    "gif": encode(photo(10, 40, 30), "GIF"),
    "bmp": encode(photo(10, 40, 30), "BMP"),
    "tiff": encode(photo(10, 40, 30), "TIFF", compression="tiff_lzw", tiffinfo={0x0112: 6}),
}
DAMAGES = st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=12), st.integers(0, 12)), min_size=1, max_size=4)


def assert_decodes_or_tells(data: bytes) -> None:
    for way in (decode, decode_plainly, functools.partial(decode, shorter_side=5)):
        try:
            decoded = way(data, max_pixels=10**6)
        except SampleError as error:
            assert error.reason in REASONS and error.message
        else:
            assert array(decoded).shape[2] == 3 and decoded.facts.width * decoded.facts.height <= 10**6


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), start=st.sampled_from([b"", *(data[:40] for data in SEEDS.values())]))
def test_random_bytes_decode_or_fail_with_a_reason(data: bytes, start: bytes) -> None:
    assert_decodes_or_tells(start + data)


@settings(max_examples=400, deadline=None)
@given(seed=st.sampled_from(sorted(SEEDS)), damages=DAMAGES, cut=st.none() | st.integers(0, 5000))
def test_damaged_images_decode_or_fail_with_a_reason(seed: str, damages: list, cut: int | None) -> None:
    data = SEEDS[seed]
    for place, patch, num_replaced in damages:
        place %= len(data) + 1
        data = data[:place] + patch + data[place + num_replaced :]
    assert_decodes_or_tells(data[:cut])
