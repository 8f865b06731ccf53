"""Text in pictures: the op `ocr`, by the PP-OCR networks that the package `rapidocr` ships.

Only the package's two files of weights are read, so nothing can be downloaded. A network gives each pixel's probability of
being text (differentiable binarization: Liao et al., "Real-time Scene Text Detection with Differentiable Binarization",
AAAI 2020); a line is the smallest rectangle around what belongs together, at any angle. A second network reads the lines
of all pictures of a batch, those of like length together. Lines that stand on their head are not turned.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.tables import op_columns
from vlm_ops.models.backbones import sha256_of
from vlm_ops.models.onnx_engine import OnnxEngine
from vlm_ops.ops import ImageBatch, package_folder, type_of
from vlm_ops.preprocessing import Preprocessing

READING = Preprocessing(size=736, fit="contain")
MIN_SCORE = 0.5  # less sure lines are left out

_STRIDE = 32  # sides that the first network takes are multiples of it
_MIN_PIXEL_PROBABILITY = 0.3
_MIN_LINE_PROBABILITY = 0.5
_GROWTH = 1.6  # the network marks the core of a line; this brings back the rest
_MIN_SIDE = 3  # of a line's core, in pixels
_LINE_HEIGHT, _LINE_WIDTH = 48, 320  # that the second network was trained on; longer lines are wider
_WIDTH_STEP = 160
_MAX_LINE_WIDTH = 3200
_LINES_AT_ONCE = 6
_MIN_LENGTH = 2  # of a text: most lone characters that are found in photos are no text
_UPRIGHT = 1.5  # lines so much higher than wide are turned


@dataclass(frozen=True)
class TextLine:
    """A line of text.

    Attributes:
        score: Mean probability of its characters.
        corners: float32[4, 2], clockwise from where the text begins, in shares of width and height.
    """

    text: str
    score: float
    corners: np.ndarray

    @property
    def box(self) -> dict[str, float]:
        left, top = self.corners.min(axis=0).tolist()
        right, bottom = self.corners.max(axis=0).tolist()
        return {"left": left, "top": top, "right": right, "bottom": bottom}


class OcrOp:
    """Lines of text, and the share of the area that they cover."""

    name = "ocr"
    capability = None
    columns = op_columns("ocr")
    preprocessing = READING
    requires = ("rapidocr",)

    def __init__(self, model: object = None) -> None:
        self._reader = text_reader()

    @classmethod
    def revision(cls) -> str:
        weights = [sha256_of(path)[:8] for path in _weights()]
        return f"pp-ocr-{'-'.join(weights)}-1"

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        found = self._reader.read(batch.contents(READING))
        texts = [[{"text": line.text, "score": line.score, "box": line.box} for line in lines] for lines in found]
        shares = [text_share(lines) for lines in found]
        return {
            "texts": pa.array(texts, type_of(self, "texts")),
            "text_share": pa.array(shares, pa.float32()),
        }


class TextReader:
    """Both networks. Safe to call from several threads."""

    def __init__(self, detector: Path, recogniser: Path) -> None:
        import cv2

        cv2.setNumThreads(1)  # batches are parallel already
        self._detector = OnnxEngine(detector)
        self._recogniser = OnnxEngine(recogniser)
        # As the package has it: blank first, the space last.
        self._characters = np.array(["", *self._recogniser.metadata["character"].splitlines(), " "], dtype=object)

    def read(self, pictures: Sequence[np.ndarray]) -> list[list[TextLine]]:
        """The lines of each picture, in reading order; those that are doubtful, or one character long, are left out.

        Args:
            pictures: uint8[3, h, w] each, RGB.
        """
        found: list[list[tuple[np.ndarray, np.ndarray]]] = []
        for picture in pictures:
            bgr = np.ascontiguousarray(picture[::-1].transpose(1, 2, 0))
            found.append([(corners, _straightened(bgr, corners)) for corners in self._detect(bgr)])
        read = iter(self._recognise([line for lines in found for _, line in lines]))
        result: list[list[TextLine]] = []
        for picture, lines in zip(pictures, found, strict=True):
            size = np.array([picture.shape[2], picture.shape[1]], np.float32)
            texts = [(corners / size, *next(read)) for corners, _ in lines]
            result.append(
                [
                    TextLine(text, score, corners)
                    for corners, text, score in texts
                    if score >= MIN_SCORE and len(text) >= _MIN_LENGTH
                ]
            )
        return result

    def _detect(self, bgr: np.ndarray) -> list[np.ndarray]:
        """float32[4, 2] of each line: its corners in pixels."""
        import cv2

        height, width = bgr.shape[:2]
        shape = tuple(max(_STRIDE, round(side / _STRIDE) * _STRIDE) for side in (height, width))
        resized = bgr if shape == (height, width) else cv2.resize(bgr, shape[::-1])
        (probabilities,) = self._detector.run({"x": _normalised(resized)[None]})
        lines = _lines_in(probabilities[0, 0])
        scale = np.array([width / shape[1], height / shape[0]], np.float32)
        limits = np.array([width - 1, height - 1], np.float32)
        lines = [_clockwise((corners * scale).round().clip(0, limits)) for corners in lines]
        lines = [corners for corners in lines if min(_sides(corners)) > _MIN_SIDE]
        return _in_reading_order(lines)

    def _recognise(self, lines: Sequence[np.ndarray]) -> list[tuple[str, float]]:
        """Text and score of each line, an upright uint8[h, w, 3] of any size."""
        read: list[tuple[str, float]] = [("", 0.0)] * len(lines)
        by_width: dict[int, list[int]] = {}
        for i, line in enumerate(lines):
            by_width.setdefault(_padded_width(line), []).append(i)
        for width, members in by_width.items():
            for start in range(0, len(members), _LINES_AT_ONCE):
                chunk = members[start : start + _LINES_AT_ONCE]
                (probabilities,) = self._recogniser.run({"x": _of_one_width([lines[i] for i in chunk], width)})
                for i, row in zip(chunk, probabilities, strict=True):
                    read[i] = self._spelled(row)
        return read

    def _spelled(self, probabilities: np.ndarray) -> tuple[str, float]:
        """CTC by the likeliest character at each of its steps: float32[steps, characters] -> text and score."""
        best = probabilities.argmax(axis=1)
        is_read = (best != 0) & np.concatenate([[True], best[1:] != best[:-1]])
        if not is_read.any():
            return "", 0.0
        text = "".join(self._characters[best[is_read]]).strip()
        return text, float(probabilities[is_read, best[is_read]].mean())


@functools.lru_cache(maxsize=1)
def text_reader() -> TextReader:
    """The reader of this process."""
    return TextReader(*_weights())


def text_share(lines: Sequence[TextLine], resolution: int = 512) -> float:
    """The share of a picture that lines cover, in [0, 1]; where they overlap, it counts once."""
    import cv2

    if not lines:
        return 0.0
    mask = np.zeros((resolution, resolution), np.uint8)
    for line in lines:  # each for itself: polygons drawn at once would cancel out where they overlap
        cv2.fillPoly(mask, [(line.corners * (resolution - 1)).round().astype(np.int32)], 1)
    return float(mask.mean())


def _weights() -> tuple[Path, Path]:
    """The files of the detector and of the recogniser.

    Raises:
        ValueError: The package ships others than this version of Beamsight knows.
    """
    folder = package_folder("rapidocr") / "models"
    paths = [sorted(folder.glob(f"*_{part}_*.onnx")) for part in ("det", "rec")]
    if [len(each) for each in paths] != [1, 1]:
        names = ", ".join(path.name for each in paths for path in each) or "none"
        raise ValueError(
            f"op 'ocr' needs one detector and one recogniser in {folder}, and found {names}; "
            "pip install --force-reinstall rapidocr"
        )
    return paths[0][0], paths[1][0]


def _normalised(bgr: np.ndarray) -> np.ndarray:
    """uint8[h, w, 3] -> float32[3, h, w] in [-1, 1]."""
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)


def _lines_in(probabilities: np.ndarray) -> list[np.ndarray]:
    """float32[4, 2] of each line in a map float32[h, w] of text."""
    import cv2

    mask = (probabilities > _MIN_PIXEL_PROBABILITY).astype(np.uint8)
    if not mask.any():
        return []
    lines = []
    dilated = cv2.dilate(mask, np.ones((2, 2), np.uint8))
    contours: Sequence[Any] = cv2.findContours(dilated, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[-2]
    for contour in contours:
        center, (width, height), angle = cv2.minAreaRect(contour)
        if min(width, height) < _MIN_SIDE:
            continue
        if _mean_inside(probabilities, cv2.boxPoints((center, (width, height), angle))) < _MIN_LINE_PROBABILITY:
            continue
        grown = 2 * _GROWTH * width * height / (2 * (width + height))
        lines.append(cv2.boxPoints((center, (width + grown, height + grown), angle)))
    return lines


def _mean_inside(values: np.ndarray, corners: np.ndarray) -> float:
    """The mean of a map within four corners."""
    import cv2

    height, width = values.shape
    left, top = np.floor(corners.min(axis=0)).astype(int).clip(0, [width - 1, height - 1])
    right, bottom = np.ceil(corners.max(axis=0)).astype(int).clip(0, [width - 1, height - 1])
    mask = np.zeros((bottom - top + 1, right - left + 1), np.uint8)
    cv2.fillPoly(mask, [(corners - [left, top]).astype(np.int32)], 1)
    return float(cv2.mean(values[top : bottom + 1, left : right + 1], mask)[0])


def _clockwise(corners: np.ndarray) -> np.ndarray:
    """Four corners from the upper left one on."""
    by_x = corners[np.argsort(corners[:, 0], kind="stable")]
    upper_left, lower_left = by_x[:2][np.argsort(by_x[:2, 1], kind="stable")]
    upper_right, lower_right = by_x[2:][np.argsort(by_x[2:, 1], kind="stable")]
    return np.stack([upper_left, upper_right, lower_right, lower_left]).astype(np.float32)


def _sides(corners: np.ndarray) -> tuple[int, int]:
    """Length along the text, and across."""
    return int(np.linalg.norm(corners[0] - corners[1])), int(np.linalg.norm(corners[0] - corners[3]))


def _in_reading_order(lines: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rows from the top, each from the left. A line whose middle is within the height of a row's first one is of that row."""
    rows: list[list[np.ndarray]] = []
    for line in sorted(lines, key=lambda corners: float(corners[:, 1].mean())):
        middle = line[:, 1].mean()
        if rows and middle <= rows[-1][0][:, 1].mean() + _sides(rows[-1][0])[1] / 2:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda corners: float(corners[:, 0].min()))]


def _straightened(bgr: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """What is within four corners, as an upright picture."""
    import cv2

    width = max(1, int(max(np.linalg.norm(corners[0] - corners[1]), np.linalg.norm(corners[2] - corners[3]))))
    height = max(1, int(max(np.linalg.norm(corners[0] - corners[3]), np.linalg.norm(corners[1] - corners[2]))))
    target = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    line = cv2.warpPerspective(
        bgr,
        cv2.getPerspectiveTransform(corners, target),
        (width, height),
        borderMode=cv2.BORDER_REPLICATE,
        flags=cv2.INTER_CUBIC,
    )
    return np.rot90(line) if height / width >= _UPRIGHT else line


def _width(line: np.ndarray) -> int:
    """Of uint8[h, w, 3] in the height of the second network."""
    return min(_MAX_LINE_WIDTH, math.ceil(_LINE_HEIGHT * line.shape[1] / line.shape[0]))


def _padded_width(line: np.ndarray) -> int:
    """By the line alone, so that what is read of it does not depend on the others of its batch."""
    return max(_LINE_WIDTH, -(-_width(line) // _WIDTH_STEP) * _WIDTH_STEP)


def _of_one_width(lines: Sequence[np.ndarray], padded_width: int) -> np.ndarray:
    """uint8[h, w, 3] each -> float32[n, 3, 48, padded_width], zeros on the right."""
    import cv2

    batch = np.zeros((len(lines), 3, _LINE_HEIGHT, padded_width), np.float32)
    for row, line in zip(batch, lines, strict=True):
        row[:, :, : _width(line)] = _normalised(cv2.resize(np.ascontiguousarray(line), (_width(line), _LINE_HEIGHT)))
    return batch
