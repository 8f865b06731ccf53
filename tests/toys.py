"""A toy model family and toy ops, named by import path: `python:tests.toys`, `tests.toys:BrightnessOp` and `tests.toys:JournalOp`.

The model is deterministic by content: its "features" are mean colours. It fails on any batch that
holds a purely magenta picture, as a real model may fail on a poisonous image.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from schemas.tables import column
from vlm_ops.models import Caption, ImageEncoding, ModelInfo
from vlm_ops.models.settings import ModelSettings
from vlm_ops.ops import ImageBatch
from vlm_ops.preprocessing import THUMBNAIL, Preprocessing

MAGENTA = (255, 0, 255)
NAMES = ("red", "green", "blue")
PREPROCESSING = Preprocessing(size=8, fit="cover", crop_fraction=0.5)


def describe(spec: str, settings: ModelSettings | None = None) -> ModelInfo:
    return ModelInfo(spec, "1", frozenset({"features", "grid", "labels", "embedding", "caption", "match"}))


def load_image_model(spec: str, settings: ModelSettings, outputs: frozenset[str]) -> ToyImageModel:
    return ToyImageModel(describe(spec))


def load_text_model(spec: str, settings: ModelSettings) -> ToyTextModel:
    return ToyTextModel(describe(spec))


def load_image_backbone(spec: str) -> ToyImageBackbone:
    return ToyImageBackbone()


def load_text_backbone(spec: str) -> ToyTextBackbone:
    return ToyTextBackbone()


def load_tokenizer(spec: str):
    return tokenize


class ToyImageModel:
    """Features are the mean colour, the grid that of the four quarters."""

    preprocessing = PREPROCESSING
    label_names = NAMES

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.num_calls = 0

    def encode_images(self, pixels: np.ndarray) -> ImageEncoding:
        self.num_calls += 1
        time.sleep(float(os.environ.get("BEAMSIGHT_TOY_SECONDS", 0)))  # as slow a model as a test wants
        made = {name: values.numpy() for name, values in ToyImageBackbone()(torch.from_numpy(pixels.copy())).items()}
        if (np.abs(made["features"] - MAGENTA) < 3).all(axis=1).any():
            raise RuntimeError("magenta is poison")
        captions = [
            Caption(f"a {NAMES[row.argmax()]} picture", "generated", float(row.max())) for row in made["labels"]
        ]
        return ImageEncoding(made["features"], made["grid"], made["labels"], made["embedding"], captions)

    def match(self, encoding: ImageEncoding, rows: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        """1 where the text names the strongest colour, else 0."""
        assert encoding.features is not None
        best = encoding.features[list(rows)].argmax(axis=1) if len(texts) else []
        return np.array([float(NAMES[label] in text) for label, text in zip(best, texts, strict=True)], np.float32)


class ToyTextModel:
    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        tokens = tokenize(texts)
        return ToyTextBackbone()(torch.from_numpy(tokens["ids"]), torch.from_numpy(tokens["mask"])).numpy()


class ToyImageBackbone(torch.nn.Module):
    preprocessing = PREPROCESSING
    feature_dim, grid_dim, embedding_dim = 3, 3, 3
    class_names = NAMES
    class_weights = torch.eye(3) * 2 - 1

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        values = pixels.float()
        cells = values.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5))
        features = values.mean((2, 3))
        return {"features": features, "grid": cells.flatten(2).transpose(1, 2), **self.of_features(features)}

    def of_features(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        labels = (features + 1) / (features + 1).sum(1, keepdim=True)
        return {"labels": labels, "embedding": torch.nn.functional.normalize(labels, dim=1)}


class ToyTextBackbone(torch.nn.Module):
    text_dim = 3

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(ids.float() * mask, dim=1)


def tokenize(texts: Sequence[str]) -> Mapping[str, np.ndarray]:
    """Which colours a text names; where it names none, three numbers of its own."""
    ids = np.empty((len(texts), 3), np.int64)
    for i, text in enumerate(texts):
        words = [int(name in text) for name in NAMES]
        ids[i] = words if any(words) else list(hashlib.sha256(text.encode()).digest()[:3])
    return {"ids": ids, "mask": np.ones_like(ids)}


class BrightnessOp:
    """Mean brightness: a column that no built-in op has."""

    name = "tests.toys:BrightnessOp"
    capability = None
    columns = (column("brightness", pa.float32(), "brightness", "[0, 1]", "Mean brightness."),)
    preprocessing = THUMBNAIL

    def __init__(self, model: object = None) -> None: ...

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        return {"brightness": pa.array(batch.pixels[THUMBNAIL].mean(axis=(1, 2, 3)) / 255, pa.float32())}


class JournalOp:
    """Fills no column, and tells what is computed where: a line when it is loaded, and one for each image, in the file
    that the environment names. Lines of a few bytes are appended whole, whichever process writes them."""

    name = "tests.toys:JournalOp"
    capability = None
    columns = ()
    preprocessing = THUMBNAIL

    def __init__(self, model: object = None) -> None:
        self._write(["load"])

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        self._write([sample.uri for sample in batch.samples])
        return {}

    def _write(self, events: Sequence[str]) -> None:
        with open(os.environ["BEAMSIGHT_JOURNAL"], "a") as journal:
            journal.write("".join(f"{os.getpid()} {event}\n" for event in events))
