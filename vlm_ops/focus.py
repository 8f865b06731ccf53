"""Where to crop: the op `focus`, from what a CNN reacts to and from the faces.

The energy of a cell is the squared length of its vector in the last feature map, less that of the weakest cells: where a
network that names things has seen something (as Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017,
take activations for attention). A face counts as much as all the rest together. The point to keep is the middle of the strongest
part; the crop for an aspect ratio is the largest box of it that holds most energy, and where it can, all of the faces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from schemas.tables import BOX_SIDES, CROP_ASPECTS, op_columns
from vlm_ops.faces import PIXELS as FACE_PIXELS
from vlm_ops.faces import FacesOp, face_detector
from vlm_ops.models import ImageModel
from vlm_ops.ops import ImageBatch, ModelOp, type_of
from vlm_ops.preprocessing import Preprocessing

_RESOLUTION = 64  # cells along a side, in which energy is added up
_BACKGROUND = 0.5  # the share of the cells that are background at least
_FACE_WEIGHT = 1.0  # of all faces, where the energy of the map is 1


class FocusOp(ModelOp):
    """A point that a crop should keep, and the best crop for each aspect ratio."""

    name = "focus"
    capability = "grid"
    columns = op_columns("focus")
    requires = FacesOp.requires
    also_wants = (FACE_PIXELS,)

    def __init__(self, model: ImageModel | None) -> None:
        super().__init__(model)
        self._detector = face_detector()

    @classmethod
    def revision(cls) -> str:
        return FacesOp.revision()

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        grid = batch.encoding(self.model).grid if len(batch) else ()
        assert grid is not None
        points: list[dict[str, float]] = []
        crops: list[list[dict[str, object]]] = []
        for cells, facts, faces in zip(grid, batch.facts, self._detector.faces_of(batch), strict=True):
            energy = energy_map(cells[:, : self.model.info.map_dim], self.preprocessing, facts.width, facts.height)
            energy = with_faces(energy, faces.boxes)
            x, y = focus_point(energy)
            points.append({"x": x, "y": y})
            boxes = best_crops(energy, faces.boxes, facts.width / facts.height)
            crops.append(
                [{"aspect": name, "box": dict(zip(BOX_SIDES, box, strict=True))} for name, box in boxes.items()]
            )
        return {
            "focus": pa.array(points, type_of(self, "focus")),
            "crops": pa.array(crops, type_of(self, "crops")),
        }


def energy_map(cells: np.ndarray, preprocessing: Preprocessing, width: int, height: int) -> np.ndarray:
    """float32[r, r], sums to 1: where in the full picture the energy is.

    Args:
        cells: float32[rows * rows, dim], the last feature map row by row.
        preprocessing: What the map was computed of; what a centre crop leaves out has no energy.
        width, height: Of the picture.
    """
    rows = math.isqrt(len(cells))
    energy = np.square(cells.astype(np.float32)).sum(axis=1)[: rows * rows].reshape(rows, rows)
    energy = (energy - np.quantile(energy, _BACKGROUND)).clip(0, None)
    if not energy.any():
        energy = np.ones_like(energy)
    left, top, right, bottom = preprocessing.window(width, height)
    across = _overlaps(rows, left, right)
    down = _overlaps(rows, top, bottom)
    spread = (down @ energy @ across.T).astype(np.float32)
    return spread / spread.sum()


def with_faces(energy: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """A map that sums to 1, with the faces: float32[k, 4] boxes, weighted by the roots of their areas."""
    if not len(faces):
        return energy
    added = np.zeros_like(energy)
    for left, top, right, bottom in faces:
        shape = np.outer(_covered(len(energy), top, bottom), _covered(len(energy), left, right))
        added += shape / shape.sum() * math.sqrt((right - left) * (bottom - top))
    both = energy + _FACE_WEIGHT * added / added.sum()
    return both / both.sum()


def focus_point(energy: np.ndarray) -> tuple[float, float]:
    """x and y in shares: the middle of what is in the window of half the width and height that holds most energy, so that
    of two subjects the stronger one is meant, and not the empty place between them.

    Args:
        energy: float32[r, r].
    """
    side = len(energy) // 2
    total = np.pad(energy.astype(np.float64), ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    held = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    candidates = np.argwhere(held >= held.max() * (1 - 1e-6))
    top, left = candidates[
        np.abs(candidates - side / 2).sum(axis=1).argmin()
    ]  # of equal ones that nearest to the centre
    window = energy[top : top + side, left : left + side] / energy[top : top + side, left : left + side].sum()
    steps = np.arange(side) + 0.5
    x = (left + float(window.sum(axis=0) @ steps)) / len(energy)
    y = (top + float(window.sum(axis=1) @ steps)) / len(energy)
    return float(x), float(y)


def best_crops(
    energy: np.ndarray, faces: np.ndarray, aspect: float, wanted: Mapping[str, float] = CROP_ASPECTS
) -> dict[str, tuple[float, float, float, float]]:
    """For each aspect ratio the largest box, left, top, right and bottom in shares, where it holds most.

    Args:
        energy: float32[r, r], sums to 1.
        faces: float32[k, 4], boxes in shares.
        aspect: Width by height of the picture.
    """
    boxes = {}
    for name, ratio in wanted.items():
        width, height = min(1.0, ratio / aspect), min(1.0, aspect / ratio)
        left = best_start(energy.sum(axis=0), width, faces[:, [0, 2]])
        top = best_start(energy.sum(axis=1), height, faces[:, [1, 3]])
        boxes[name] = (left, top, min(1.0, left + width), min(1.0, top + height))
    return boxes


def best_start(energy: np.ndarray, length: float, faces: np.ndarray) -> float:
    """Where a window along one axis begins: most faces whole, then most energy, then nearest to the energy's middle.

    Args:
        energy: float32[r], sums to 1.
        length: Of the window, as a share of the axis.
        faces: float32[k, 2], where each begins and ends.
    """
    if length >= 1:
        return 0.0
    starts = np.linspace(0, 1 - length, 4 * len(energy) + 1)
    total = np.concatenate([[0.0], np.cumsum(energy, dtype=np.float64)])
    edges = np.linspace(0, 1, len(energy) + 1)
    held = np.interp(starts + length, edges, total) - np.interp(starts, edges, total)
    whole = np.zeros(len(starts))
    for begin, end in faces:
        whole += (end - begin) * ((starts <= begin) & (starts + length >= end))
    center = float(energy @ ((edges[1:] + edges[:-1]) / 2))
    off = np.abs(starts + length / 2 - center)
    return float(starts[np.lexsort((off, -held.round(6), -whole.round(6)))[0]])


def _overlaps(rows: int, begin: float, end: float) -> np.ndarray:
    """float[r, rows]: how much of each of r cells along the picture is each of a map's, which lies from begin to end."""
    edges = begin + (end - begin) * np.linspace(0, 1, rows + 1)
    return np.stack([_covered(_RESOLUTION, edges[i], edges[i + 1]) for i in range(rows)], axis=1)


def _covered(resolution: int, begin: float, end: float) -> np.ndarray:
    """float[resolution]: the share of each cell of [0, 1] that lies between begin and end."""
    edges = np.linspace(0, 1, resolution + 1)
    return (np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin)).clip(0, None) * resolution
