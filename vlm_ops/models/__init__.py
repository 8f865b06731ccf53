"""A model spec -> a loaded model. One module a family; this one holds the contract and the table.

A family is a module with three functions:

    describe(spec) -> ModelInfo              cheap: reads no weights
    load_image_model(spec, device) -> ImageModel
    load_text_model(spec, device) -> TextModel

Specs are `family` or `family:argument`. A family of another package is named by its import path:
`python:package.module` or `python:package.module:argument`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from vlm_ops.preprocessing import Preprocessing

_FAMILIES = {"compact": "vlm_ops.models.compact", "dir": "vlm_ops.models.directory"}


@dataclass(frozen=True)
class ModelInfo:
    """What a spec stands for.

    Attributes:
        spec: The model spec.
        revision: Changes whenever the weights or the arithmetic do.
        produces: Ops the model can serve: any of `features`, `labels`, `embedding`, `caption`.
    """

    spec: str
    revision: str
    produces: frozenset[str]

    @property
    def name(self) -> str:
        return f"{self.spec}@{self.revision}"


@dataclass(frozen=True)
class ImageEncoding:
    """Everything one forward pass gives for n images; None for what the model does not produce.

    Attributes:
        features: float32[n, feature_dim].
        probabilities: float32[n, num_labels], rows sum to 1.
        embeddings: float32[n, embedding_dim], L2-normalised.
        captions: n sentences.
        caption_scores: float32[n] in [0, 1].
    """

    features: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    captions: Sequence[str] | None = None
    caption_scores: np.ndarray | None = None


class ImageModel(Protocol):
    """Encodes images. Safe to call from several threads."""

    info: ModelInfo
    preprocessing: Preprocessing
    label_names: Sequence[str]

    def encode_images(self, pixels: np.ndarray) -> ImageEncoding:
        """Encodes uint8[n, 3, size, size] RGB; n may be 0. The same batch gives the same bits."""
        ...


class TextModel(Protocol):
    """Encodes texts into the embedding space of the family's images."""

    info: ModelInfo

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32[n, embedding_dim], L2-normalised, in the order of the texts."""
        ...


class _Family(Protocol):
    def describe(self, spec: str) -> ModelInfo: ...
    def load_image_model(self, spec: str, device: str) -> ImageModel: ...
    def load_text_model(self, spec: str, device: str) -> TextModel: ...


def describe_model(spec: str) -> ModelInfo:
    """What a spec stands for, without loading it.

    Raises:
        ValueError: The spec names no known family, or nothing within it.
    """
    return _family(spec).describe(spec)


def load_image_model(spec: str, device: str = "auto") -> ImageModel:
    """Loads the image side of a model.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ValueError: The spec is unknown, or the device is not there.
    """
    return _family(spec).load_image_model(spec, resolve_device(device))


def load_text_model(spec: str, device: str = "auto") -> TextModel:
    """Loads the text side of a model.

    Raises:
        ValueError: The spec is unknown, or the device is not there.
    """
    return _family(spec).load_text_model(spec, device)


def resolve_device(device: str) -> str:
    """`cpu` or `cuda`. Never falls back in silence.

    Raises:
        ValueError: The device is unknown, or CUDA was asked for and is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; use auto, cpu or cuda")
    if device == "cpu":
        return "cpu"
    import torch  # heavy: only where it is used

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ValueError("--device cuda was asked for, but no CUDA device is available here; use --device cpu or auto")
    return "cpu"


def _family(spec: str) -> _Family:
    name, _, argument = spec.partition(":")
    if name == "python":
        module = argument.partition(":")[0]
    elif name in _FAMILIES:
        module = _FAMILIES[name]
    else:
        raise ValueError(
            f"unknown model {spec!r}; known models: {', '.join(sorted(_FAMILIES))}, or python:package.module"
        )
    try:
        return cast(_Family, importlib.import_module(module))
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot load model {spec!r}: {error}") from error
