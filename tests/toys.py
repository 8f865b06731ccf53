"""A toy model family and a toy op, named by import path: `python:tests.toys` and `tests.toys:BrightnessOp`.

The model is deterministic by content: its "features" are mean colours. It fails on any batch that
holds a purely magenta picture, as a real model may fail on a poisonous image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from schemas.tables import column
from vlm_ops.models import ImageEncoding, ModelInfo
from vlm_ops.ops import ImageBatch
from vlm_ops.preprocessing import THUMBNAIL, Preprocessing

MAGENTA = (255, 0, 255)


def describe(spec: str) -> ModelInfo:
    return ModelInfo(spec, "1", frozenset({"features", "labels", "embedding", "caption"}))


def load_image_model(spec: str, device: str) -> ToyImageModel:
    return ToyImageModel(describe(spec))


def load_text_model(spec: str, device: str) -> ToyTextModel:
    return ToyTextModel(describe(spec))


class ToyImageModel:
    preprocessing = Preprocessing(size=8, fit="cover", crop_fraction=0.5)
    label_names = ("red", "green", "blue")

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.num_calls = 0

    def encode_images(self, pixels: np.ndarray) -> ImageEncoding:
        self.num_calls += 1
        mean = pixels.reshape(len(pixels), 3, 64).mean(axis=2).astype(np.float32)
        if (np.abs(mean - MAGENTA) < 3).all(axis=1).any():
            raise RuntimeError("magenta is poison")
        total = (mean + 1).sum(axis=1, keepdims=True)
        probabilities = (mean + 1) / total
        norm = np.linalg.norm(probabilities, axis=1, keepdims=True)
        captions = [f"a {self.label_names[row.argmax()]} picture" for row in probabilities]
        return ImageEncoding(
            mean, probabilities, probabilities / norm, captions, probabilities.max(axis=1, initial=0.0)
        )


class ToyTextModel:
    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.empty((len(texts), 3), np.float32)
        for i, text in enumerate(texts):
            words = [float(name in text) for name in ToyImageModel.label_names]
            spread = list(hashlib.sha256(text.encode()).digest()[:3])
            vectors[i] = words if any(words) else spread
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class BrightnessOp:
    """Mean brightness: a column that no built-in op has."""

    name = "tests.toys:BrightnessOp"
    capability = None
    columns = (column("brightness", pa.float32(), "brightness", "[0, 1]", "Mean brightness."),)
    preprocessing = THUMBNAIL

    def __init__(self, model: object = None) -> None: ...

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        return {"brightness": pa.array(batch.pixels[THUMBNAIL].mean(axis=(1, 2, 3)) / 255, pa.float32())}
