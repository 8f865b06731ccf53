"""Ops that keep what training reads of an image beside features and embeddings. They are named by import path,
and write to the cache of `beamsight train` alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from schemas.tables import column
from vlm_ops.models import ImageModel
from vlm_ops.ops import ImageBatch, vectors

GRID_OP = f"{__name__}:GridOp"
MIRRORED_OP = f"{__name__}:MirroredOp"
PIXELS_OP = f"{__name__}:PixelsOp"


class GridOp:
    """The feature map in half precision, as bytes: of a photo's 49 cells in 1,280 channels, 125 KB."""

    name = GRID_OP
    capability = "grid"
    columns = (column("grid", pa.large_binary(), "grid", "float16[cells, grid_dim]", "Last feature map."),)

    def __init__(self, model: ImageModel) -> None:
        self.model = model
        self.preprocessing = model.preprocessing

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        grid = batch.encoding(self.model).grid
        assert grid is not None
        return {"grid": grid_bytes(grid)}


class MirroredOp:
    """Features, embedding and grid of the image turned left to right, where the model makes them."""

    name = MIRRORED_OP
    capability = "features"
    columns = (
        column("mirrored_features", pa.list_(pa.float32()), "mirrored", "float32[feature_dim]", "Pooled features."),
        column("mirrored_embedding", pa.list_(pa.float32()), "mirrored", "float32[embedding_dim]", "Embedding."),
        column("mirrored_grid", pa.large_binary(), "mirrored", "float16[cells, grid_dim]", "Last feature map."),
    )

    def __init__(self, model: ImageModel) -> None:
        self.model = model
        self.preprocessing = model.preprocessing

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        encoding = self.model.encode_images(np.ascontiguousarray(batch.pixels[self.preprocessing][..., ::-1]))
        made = {"mirrored_features": vectors(encoding.features)}
        if encoding.embeddings is not None:
            made["mirrored_embedding"] = vectors(encoding.embeddings)
        if encoding.grid is not None:
            made["mirrored_grid"] = grid_bytes(encoding.grid)
        return {field.name: made.get(field.name, pa.nulls(len(batch), field.type)) for field in self.columns}


class PixelsOp:
    """The model's input itself, for a backbone that is fine-tuned: of 224 by 224 pixels, 150 KB."""

    name = PIXELS_OP
    capability = "features"
    outputs = frozenset[str]()  # the model need not run, nor be exported for it
    columns = (column("pixels", pa.large_binary(), "pixels", "uint8[3, size, size]", "Model input."),)

    def __init__(self, model: ImageModel) -> None:
        self.preprocessing = model.preprocessing

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        return {"pixels": pa.array([each.tobytes() for each in batch.pixels[self.preprocessing]], pa.large_binary())}


def grid_bytes(grid: np.ndarray) -> pa.Array:
    """float[n, cells, grid_dim] -> float16 bytes of each image."""
    largest = np.finfo(np.float16).max
    half = np.clip(grid, -largest, largest).astype(np.float16)
    return pa.array([each.tobytes() for each in half], pa.large_binary())
