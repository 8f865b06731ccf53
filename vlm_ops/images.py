"""Encoded bytes to RGB pixels, within limits, and on to a model's input.

Two ways lead to the same pixels. JPEG in RGB or greyscale goes through simplejpeg, a binding of
libjpeg-turbo (releases the GIL, and tells of damage that the library only warns of); everything
else goes through Pillow. A JPEG much larger than needed is decoded at reduced scale (DCT scaling).
`decode_plainly` is the obvious way, and the reference that the tests compare with.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as F

from schemas.recipes import DEFAULT_MAX_IMAGE_PIXELS
from schemas.samples import SampleError
from vlm_ops.preprocessing import Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# The limit on pixels is `max_pixels` below, checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

# What no file but an image begins with: where Pillow makes nothing of it, it is a damaged one.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
# `preprocess` looks at no more of a long strip than this many times its shorter side.
_MAX_ASPECT = 16
# EXIF orientations that exchange width and height.
_TRANSPOSED = (5, 6, 7, 8)
# Of libjpeg's warnings those after which it goes on with pixels of its own invention (its jerror.h).
_DAMAGE_WARNINGS = ("premature end of data segment", "bad Huffman code", "bad arithmetic code", "instead of RST")
# What Pillow and its decoders raise on bytes that are not what they claim to be.
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError, struct.error,
    ZeroDivisionError, NotImplementedError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class ImageFacts:
    """Width and height of the upright original, in pixels; format as one of FORMATS."""

    width: int
    height: int
    format: str


@dataclass(frozen=True)
class DecodedImage:
    """RGB pixels, uint8[3, h, w], upright (maybe smaller than the original), and the original's facts."""

    pixels: torch.Tensor
    facts: ImageFacts


def preprocess(pixels: torch.Tensor, preprocessing: Preprocessing, original: ImageFacts | None = None) -> torch.Tensor:
    """uint8[3, h, w] of any size -> uint8[3, size, size], or for `contain` uint8[3, height, width] of its extent.

    Args:
        original: Whose width and height count for `contain`, where the pixels were decoded at a reduced scale.
    """
    interpolation = preprocessing.interpolation
    if preprocessing.fit == "contain":
        width, height = (original.width, original.height) if original else (pixels.shape[2], pixels.shape[1])
        width, height = preprocessing.extent(width, height)
        return resize(pixels, height, width, interpolation)
    shorter = preprocessing.shorter_side
    if preprocessing.fit == "stretch":
        return _center_crop(resize(pixels, shorter, shorter, interpolation), preprocessing)
    height, width = pixels.shape[1:]
    longest = _MAX_ASPECT * min(height, width)
    if max(height, width) > longest:  # a line of a million pixels would be resized to gigabytes
        pixels = F.center_crop(pixels, [min(height, longest), min(width, longest)])
        height, width = pixels.shape[1:]
    # The longer side is rounded down, as torchvision and transformers do it.
    longer = int(shorter * max(height, width) / min(height, width))
    resized = resize(pixels, *((longer, shorter) if height > width else (shorter, longer)), interpolation)
    return _center_crop(resized, preprocessing)


def _center_crop(pixels: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    size, rounded = preprocessing.size, round if preprocessing.crop_rounding == "round" else int
    if pixels.shape[1:] == (size, size):
        return pixels
    top, left = (rounded((side - size) / 2) for side in pixels.shape[1:])
    return pixels[:, top : top + size, left : left + size]


def resize(pixels: torch.Tensor, height: int, width: int, interpolation: str = "bicubic") -> torch.Tensor:
    """Antialiased resize of uint8[3, h, w]; equal to Pillow's to within one level."""
    if pixels.shape[1:] == (height, width):
        return pixels
    return F.resize(pixels, [height, width], interpolation=F.InterpolationMode(interpolation), antialias=True)


def decode(data: bytes, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS, shorter_side: int | None = None) -> DecodedImage:
    """Decodes an image, the fast way where there is one.

    Args:
        data: The encoded image.
        max_pixels: Limit on width times height.
        shorter_side: The shorter side that is needed. A JPEG at least twice as large is decoded
            at a reduced scale that still has it twice. None decodes at full scale.

    Raises:
        SampleError: The bytes are no image, are damaged, or exceed the limit.
    """
    image = _open(data, max_pixels)
    if image.format != "JPEG":
        return _decode_with_pillow(image)
    orientation = _orientation(image)
    width, height = image.size
    if orientation in _TRANSPOSED:
        width, height = height, width
    facts = ImageFacts(width, height, _format(image))
    with _as_sample_error():
        if shorter_side and min(image.size) >= 4 * shorter_side:
            image.draft(image.mode, (2 * shorter_side, 2 * shorter_side))
        pixels = _decode_jpeg(data, image)
        return DecodedImage(_to_pixels(image) if pixels is None else _turn(pixels, orientation), facts)


def _decode_jpeg(data: bytes, image: Image.Image) -> torch.Tensor | None:
    """A JPEG, at the scale that Pillow chose for it, as uint8[3, h, w]; None where Pillow is to decode it.

    That is where it has other colours than RGB and grey, where libjpeg only warns of what costs no
    pixel (stray bytes between two markers), where it stops (Pillow's message is the clearer one),
    and where the end marker is missing (Pillow knows whether anything else is).

    Raises:
        SampleError: Its coded data is damaged. Neither Pillow nor torchvision tells: they return grey or garbage.
    """
    is_plain = image.mode in ("RGB", "L")
    # Of other colours Pillow makes pixels; here they are only checked, at the smallest scale.
    width, height = image.size if is_plain else (1, 1)
    try:
        array = simplejpeg.decode_jpeg(
            data, "RGB" if is_plain else "CMYK", min_height=height, min_width=width, strict=True
        )
    except ValueError as error:
        if any(warning in str(error) for warning in _DAMAGE_WARNINGS):
            raise SampleError("corrupt_image", str(error)) from error
        return None
    return torch.from_numpy(array).permute(2, 0, 1) if is_plain else None


def decode_plainly(data: bytes, max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS) -> DecodedImage:
    """Decodes an image with Pillow alone, at full scale.

    Raises:
        SampleError: As `decode`.
    """
    return _decode_with_pillow(_open(data, max_pixels))


def _decode_with_pillow(image: Image.Image) -> DecodedImage:
    with _as_sample_error():
        pixels = _to_pixels(image)
    return DecodedImage(pixels, ImageFacts(pixels.shape[2], pixels.shape[1], _format(image)))


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header, and nothing else."""
    if not data:
        raise SampleError("empty_file", "zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        start = data[:16]
        if start.startswith(_SIGNATURES):
            raise SampleError("corrupt_image", f"damaged header; begins with {start!r}") from None
        raise SampleError("not_an_image", f"not a {', '.join(FORMATS)} image; begins with {start!r}") from None
    except _DECODER_ERRORS as error:
        raise _sample_error(error, "damaged header: ") from error
    width, height = image.size
    if width * height > max_pixels:
        raise SampleError("too_many_pixels", f"{width}x{height} pixels; the limit is {max_pixels} (--max_image_pixels)")
    if width < 1 or height < 1:
        raise SampleError("corrupt_image", f"{width}x{height} pixels")
    return image


class _as_sample_error:
    """Turns what decoders raise on bad bytes into a SampleError; memory errors go through."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _DECODER_ERRORS):
            raise _sample_error(error) from error


def _sample_error(error: BaseException, prefix: str = "") -> SampleError:
    message = str(error) or type(error).__name__
    truncated = "truncated" in message.lower() or "premature" in message.lower() or isinstance(error, EOFError)
    return SampleError("truncated_image" if truncated else "corrupt_image", prefix + message)


def _format(image: Image.Image) -> str:
    # A multi-picture JPEG (stereo and phone cameras) is a JPEG to everybody else.
    return "JPEG" if image.format == "MPO" else str(image.format)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DECODER_ERRORS:
        return 1
    return orientation if orientation in range(1, 9) else 1


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Applies an EXIF orientation to uint8[3, h, w]."""
    if orientation in _TRANSPOSED:
        pixels = pixels.transpose(1, 2)
    flips = [dim for dim, orientations in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in orientations]
    return pixels.flip(flips) if flips else pixels.contiguous()


def _to_pixels(image: Image.Image) -> torch.Tensor:
    """First frame, upright, as uint8[3, h, w] RGB; transparency is laid on white."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.load()
        # Not before it is loaded: to find the orientation Pillow loads a PNG itself, and a damaged one
        # that is loaded twice is half a picture without an error. A TIFF it turns when it loads it.
        orientation = _orientation(image)
    rgb = _to_rgb(image)
    if orientation != 1:
        rgb = rgb.transpose(_TURNS[orientation])
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _sixteen_bit_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _sixteen_bit_to_rgb(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey to 255; here the top 8 bits are kept. Floats are taken as [0, 1]
    where they fit in it, and stretched to their range otherwise."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        low, high = (
            (0.0, 1.0)
            if image.mode == "F" and values.min() >= 0 and values.max() <= 1
            else (values.min(), values.max())
        )
        values = (values - low) / max(high - low, 1e-12) * 65535
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    return ImageOps.grayscale(grey).convert("RGB")
