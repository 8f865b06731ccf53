"""`dir:PATH`: a model that `beamsight train` has written.

A directory holds `config.json` (the base model and the shapes), `model.safetensors` (the weights), a
model card and the curves of its training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlm_ops.models import ImageEncoding, ModelInfo, describe_model
from vlm_ops.models import load_image_model as load_image
from vlm_ops.models import load_text_model as load_text
from vlm_ops.models.onnx_engine import OnnxEngine, cached_file, export

CONFIG, WEIGHTS, CARD, CURVES = "config.json", "model.safetensors", "README.md", "curves.svg"


def describe(spec: str) -> ModelInfo:
    path, config = _read(spec)
    base = describe_model(config["base"])
    if base.revision != config["base_revision"]:
        raise ValueError(
            f"model {spec!r} was trained on {config['base']}@{config['base_revision']}, but {base.name} is installed here; "
            "install the version that it was trained on, or train it again"
        )
    # By its full path, so that a catalog finds its encoder from any working directory.
    return ModelInfo(f"dir:{path}", _hash_of(str(path / WEIGHTS)), base.produces | {"embedding"})


def load_image_model(spec: str, device: str) -> AlignedImageModel:
    return AlignedImageModel(describe(spec), device)


def load_text_model(spec: str, device: str) -> AlignedTextModel:
    return AlignedTextModel(describe(spec), device)


class AlignedImageModel:
    """The base model, with the embedding of the trained image head in place of its own."""

    def __init__(self, info: ModelInfo, device: str) -> None:
        _, config = _read(info.spec)
        self.info = info
        self._base = load_image(config["base"], device)
        self.preprocessing = self._base.preprocessing
        self.label_names = self._base.label_names
        self._head = _head_engine(info, "image")

    def encode_images(self, pixels: np.ndarray) -> ImageEncoding:
        encoding = self._base.encode_images(pixels)
        assert encoding.features is not None and encoding.embeddings is not None
        inputs = {"features": encoding.features, "embeddings": encoding.embeddings}
        return replace(encoding, embeddings=self._head.run(inputs)[0])


class AlignedTextModel:
    """The base's text model under the trained text head."""

    def __init__(self, info: ModelInfo, device: str) -> None:
        _, config = _read(info.spec)
        self.info = info
        self._base = load_text(config["base"], device)
        self._head = _head_engine(info, "text")

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._head.run({"texts": self._base.encode_texts(texts)})[0]


def _read(spec: str) -> tuple[Path, dict[str, Any]]:
    path = Path(spec.removeprefix("dir:")).expanduser().resolve()
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no model in {str(path)!r}: there is no {CONFIG}; `beamsight train` writes one") from error
    except ValueError as error:
        raise ValueError(f"the model in {str(path)!r} cannot be read: {CONFIG}: {error}") from error
    if config.get("kind") != "dual-encoder":
        raise ValueError(f"the model in {str(path)!r} is a {config.get('kind')!r}, which this version cannot load")
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"the model in {str(path)!r} is not whole: there is no {WEIGHTS}")
    return path, config


@lru_cache(maxsize=8)
def _hash_of(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def _head_engine(info: ModelInfo, side: str) -> OnnxEngine:
    """The head as an ONNX graph, exported once: a search then needs no torch."""
    return OnnxEngine(cached_file(f"aligned-{info.revision}-{side}.onnx", lambda path: _export_head(info, side, path)))


def _export_head(info: ModelInfo, side: str, path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from vlm_ops.models.heads import HeadsConfig, ImageHead, TextHead

    directory, config = _read(info.spec)
    shapes = HeadsConfig(**config["heads"])
    head = ImageHead(shapes) if side == "image" else TextHead(shapes)
    weights = load_file(directory / WEIGHTS)
    head.load_state_dict(
        {name.removeprefix(f"{side}."): w.float() for name, w in weights.items() if name.startswith(f"{side}.")}
    )
    if side == "text":
        inputs = {"texts": torch.zeros(2, shapes.text_dim)}
    else:
        inputs = {
            "features": torch.zeros(2, shapes.feature_dim),
            "embeddings": torch.zeros(2, shapes.base_embedding_dim),
        }
    export(head, inputs, {name: {0: "n"} for name in inputs}, path)
