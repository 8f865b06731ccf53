"""Facts and technical quality of a picture: the op `quality`. Cheap: it is among the default ops.

The parts are measured on the picture at one scale (`PIXELS`), so that they mean the same for a photo of any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import imagehash
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from schemas.tables import op_columns
from vlm_ops.images import preprocess
from vlm_ops.ops import ImageBatch, type_of
from vlm_ops.preprocessing import THUMBNAIL, Preprocessing

PIXELS = Preprocessing(size=224, fit="contain")
NUM_COLORS = 5

_TILE = 16  # pixels along a side
_SHARPEST = 8  # one tile of so many tells how sharp a picture is
_HALF_SHARP = 250.0  # variance of the Laplacian that counts as a sharpness of 0.5
_WELL_EXPOSED = (0.25, 0.75)  # mean luminances
_EXPOSURE_SIGMA = 0.1
_EDGE = 0.02  # of the shorter side
_PLAIN = 12  # levels within which a colour is one colour: JPEG's noise
_PLAIN_LINE = 0.97  # share of a line's pixels that make it one of a border
_PICTURE_LINE = 0.5  # share of pixels that differ, of the line where a picture begins
_LEAST_BORDER = 0.01  # of a side


@dataclass(frozen=True)
class Quality:
    """The parts of a picture's quality, each in [0, 1].

    Attributes:
        sharpness: v / (v + 250) for the variance v of the Laplacian (Pech-Pacheco et al., "Diatom autofocusing in
            brightfield microscopy", ICPR 2000) in the sharpest eighth of the picture: what lies out of focus around a
            sharp subject, or is plain, does not count against it.
        exposure: 1 where the mean luminance is in [0.25, 0.75], and falls off on both sides by a bell curve (as the
            well-exposedness of Mertens et al., "Exposure Fusion", 2007); with and without the background, what is better.
        contrast: The distance of the 5th and the 95th percentile of luminance.
        plain_background: The share of the edge that is one colour.
        border: The share of the area that is a frame or a letterbox: plain lines from a side on, behind which a
            picture begins all at once.
    """

    sharpness: float
    exposure: float
    contrast: float
    plain_background: float
    border: float

    @property
    def score(self) -> float:
        """In [0, 1]: the geometric mean of sharpness (twice), exposure and contrast, times the share that is no border.
        A plain background is neither good nor bad."""
        return (self.sharpness**2 * self.exposure * self.contrast) ** 0.25 * (1 - self.border)


class QualityOp:
    """Facts about the picture: size, format, perceptual hash, dominant colours, quality."""

    name = "quality"
    capability = None
    columns = op_columns("quality")
    preprocessing = PIXELS

    def __init__(self, model: object = None) -> None: ...

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        pictures = batch.contents(PIXELS)
        thumbnails = [_thumbnail(picture) for picture in pictures]
        qualities = [measure(picture) for picture in pictures]
        return {
            "width": pa.array([image.width for image in batch.facts], pa.int32()),
            "height": pa.array([image.height for image in batch.facts], pa.int32()),
            "format": pa.array([image.format for image in batch.facts], pa.string()),
            "phash": pa.array([str(imagehash.phash(thumbnail)) for thumbnail in thumbnails], pa.string()),
            "dominant_colors": pa.array(
                [dominant_colors(thumbnail) for thumbnail in thumbnails], type_of(self, "dominant_colors")
            ),
            "quality_score": pa.array([quality.score for quality in qualities], pa.float32()),
            "quality_parts": pa.array([vars(quality) for quality in qualities], type_of(self, "quality_parts")),
        }


def measure(picture: np.ndarray) -> Quality:
    """The quality of uint8[3, h, w]."""
    luminance = _luminance(picture)
    plain, background = _plain_edge(picture)
    histogram = np.array(Image.fromarray(luminance).histogram())
    return Quality(
        sharpness=_sharpness(luminance),
        exposure=_exposure(histogram, background if plain >= 0.5 else None),
        contrast=_contrast(histogram),
        plain_background=plain,
        border=_border(luminance),
    )


def _thumbnail(picture: np.ndarray) -> Image.Image:
    pixels = preprocess(torch.from_numpy(np.ascontiguousarray(picture)), THUMBNAIL)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def dominant_colors(picture: Image.Image, num_colors: int = NUM_COLORS) -> list[dict[str, Any]]:
    """The most frequent colours of a small RGB picture: `{"hex", "share"}`, largest share first."""
    reduced = picture.quantize(num_colors, method=Image.Quantize.FASTOCTREE)
    palette = reduced.getpalette() or []
    counts = sorted(cast("list[tuple[int, int]]", reduced.getcolors() or []), reverse=True)
    total = sum(count for count, _ in counts)
    colors = []
    for count, index in counts:
        red, green, blue = palette[3 * index : 3 * index + 3]
        colors.append({"hex": f"#{red:02x}{green:02x}{blue:02x}", "share": count / total})
    return colors


def _luminance(picture: np.ndarray) -> np.ndarray:
    """uint8[h, w], by the weights of ITU-R BT.601."""
    red, green, blue = picture.astype(np.uint16)
    return ((77 * red + 150 * green + 29 * blue) >> 8).astype(np.uint8)


def _sharpness(luminance: np.ndarray) -> float:
    height, width = luminance.shape
    if min(height, width) < 3:
        return 0.0
    values = luminance.astype(np.int16)
    middle = values[1:-1, 1:-1]
    laplacian = (values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:] - 4 * middle).astype(
        np.float32
    )
    # Its mean over a tile is next to nothing, so the mean of the squares is the variance.
    variances = np.sort(_means_of_tiles(laplacian * laplacian))[::-1]
    variance = float(variances[: -(-len(variances) // _SHARPEST)].mean())
    return variance / (variance + _HALF_SHARP)


def _means_of_tiles(values: np.ndarray) -> np.ndarray:
    """float32[tiles] of float32[h, w]; what is left over at the right and below belongs to no tile."""
    height, width = (max(1, side // _TILE) for side in values.shape)
    rows, columns = values.shape[0] // height, values.shape[1] // width
    tiles = values[: height * rows, : width * columns].reshape(height, rows, width, columns)
    return tiles.mean(axis=(1, 3)).reshape(-1)


def _exposure(histogram: np.ndarray, background: int | None) -> float:
    means = [_mean(histogram)]
    if background is not None:
        content = histogram.copy()
        content[max(0, background - _PLAIN) : background + _PLAIN + 1] = 0
        if content.any():
            means.append(_mean(content))
    low, high = _WELL_EXPOSED
    off = min(max(low - mean, mean - high, 0.0) for mean in means)
    return float(np.exp(-(off**2) / (2 * _EXPOSURE_SIGMA**2)))


def _mean(histogram: np.ndarray) -> float:
    return float(histogram @ np.arange(256)) / float(histogram.sum()) / 255


def _contrast(histogram: np.ndarray) -> float:
    shares = np.cumsum(histogram) / histogram.sum()
    low, high = np.searchsorted(shares, [0.05, 0.95])
    return float(high - low) / 255


def _plain_edge(picture: np.ndarray) -> tuple[float, int]:
    """The share of the edge that is one colour, and that colour's luminance."""
    height, width = picture.shape[1:]
    depth = max(1, round(_EDGE * min(height, width)))
    sides = (
        picture[:, :depth],
        picture[:, -depth:],
        picture[:, depth:-depth, :depth],
        picture[:, depth:-depth, -depth:],
    )
    edge = np.concatenate([side.reshape(3, -1) for side in sides], axis=1)
    color = _median(edge[:, ::8])  # enough of it, and quicker
    is_plain = np.ones(edge.shape[1], bool)
    for values, level in zip(edge, color.tolist(), strict=True):
        is_plain &= _is_near(values, level)
    return float(is_plain.mean()), int(_luminance(color.reshape(3, 1, 1))[0, 0])


def _median(values: np.ndarray) -> np.ndarray:
    """Of uint8[..., n] along its last axis; of an even number of values the upper one."""
    middle = values.shape[-1] // 2
    return np.partition(values, middle, axis=-1)[..., middle]


def _is_near(values: np.ndarray, level: int) -> np.ndarray:
    return (values >= max(0, level - _PLAIN)) & (values <= min(255, level + _PLAIN))


def _border(luminance: np.ndarray) -> float:
    height, width = luminance.shape
    top, bottom = (_border_lines(lines) for lines in (luminance, luminance[::-1]))
    left, right = (_border_lines(lines) for lines in (luminance.T, luminance.T[::-1]))
    return 1 - (1 - (top + bottom) / height) * (1 - (left + right) / width)


def _border_lines(lines: np.ndarray) -> int:
    """How many lines of uint8[lines, pixels] from the first one on are a border."""
    color = int(_median(lines[0]))
    if _share_of(lines[:1], color)[0] < _PLAIN_LINE:
        return 0
    shares = _share_of(lines, color)
    (ends,) = np.nonzero(shares < _PLAIN_LINE)
    if not len(ends) or ends[0] < max(1, _LEAST_BORDER * len(lines)):
        return 0
    count = int(ends[0])
    begins = shares[count : count + 3].min()  # resizing has softened the line where the picture begins
    return count if begins <= 1 - _PICTURE_LINE else 0


def _share_of(lines: np.ndarray, level: int) -> np.ndarray:
    """The share of each line's pixels that have a luminance."""
    return _is_near(lines, level).mean(axis=1)
