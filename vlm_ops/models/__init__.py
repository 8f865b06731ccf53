"""A model spec -> a loaded model. One module a family; this one holds the contract and the table.

A family is a module with three functions:

    describe(spec, settings) -> ModelInfo                      cheap: reads no weights
    load_image_model(spec, settings, outputs) -> ImageModel
    load_text_model(spec, settings) -> TextModel

and, where its models can be trained on or trained further, three more, of which two give torch modules:

    load_image_backbone(spec) -> ImageBackbone
    load_text_backbone(spec) -> TextBackbone
    load_tokenizer(spec) -> Tokenizer                          light: imports no torch

and, where its models come from the network:

    fetch(spec, directory, settings) -> str | None             puts a model into a directory, and gives the spec that it
                                                               has there; None: it is on this machine already

Specs are `family` or `family:argument`. A family of another package is named by its import path:
`python:package.module` or `python:package.module:argument`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from vlm_ops.models.settings import CPU, ModelSettings, resolved
from vlm_ops.preprocessing import Preprocessing

if TYPE_CHECKING:
    import torch

_FAMILIES = {
    "compact": "vlm_ops.models.compact",
    "compact-large": "vlm_ops.models.compact",
    "dir": "vlm_ops.models.directory",
    "hf": "vlm_ops.models.huggingface",
    "open_clip": "vlm_ops.models.open_clip_family",
    "torchvision": "vlm_ops.models.torchvision_family",
}


@dataclass(frozen=True)
class ModelInfo:
    """What a spec stands for.

    Attributes:
        spec: The model spec.
        revision: Changes whenever the weights or the arithmetic do.
        produces: What its image side gives: any of `features`, `grid`, `labels`, `embedding`, `caption`, `match`.
        encodes_text: Whether it has a text side.
        map_dim: How many dimensions of the grid, from the first on, are the last feature map; None: all.
        takes: Which settings of captions it follows: any of `caption_prompt`, `max_new_tokens`, `num_beams`.
    """

    spec: str
    revision: str
    produces: frozenset[str]
    encodes_text: bool = True
    map_dim: int | None = None
    takes: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.spec}@{self.revision}"


@dataclass(frozen=True)
class Caption:
    """A sentence for an image.

    Attributes:
        source: `generated`, or `labels` where a class name says it better.
        score: In [0, 1], how sure the model is.
    """

    text: str
    source: str
    score: float


@dataclass(frozen=True)
class ImageEncoding:
    """What one forward pass gives for n images; None for what was not asked for or is not made.

    Attributes:
        features: float32[n, feature_dim], pooled.
        grid: float32[n, cells, grid_dim], the last feature map of a CNN row by row, or the patch tokens
            of a transformer.
        probabilities: float32[n, num_labels], rows sum to 1.
        embeddings: float32[n, embedding_dim], L2-normalised.
        captions: One of each image.
        caption_sec: Seconds of the pass that the captions alone took.
    """

    features: np.ndarray | None = None
    grid: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    embeddings: np.ndarray | None = None
    captions: Sequence[Caption] | None = None
    caption_sec: float | None = None


class ImageModel(Protocol):
    """Encodes images. Safe to call from several threads."""

    info: ModelInfo
    preprocessing: Preprocessing
    label_names: Sequence[str]

    def encode_images(self, pixels: Any) -> ImageEncoding:
        """Encodes uint8[n, 3, size, size] RGB; n may be 0. The same batch gives the same bits.

        Where the model's preprocessing fits by `contain`: a list of n uint8[3, h, w].
        """
        ...


class TextModel(Protocol):
    """Encodes texts into the embedding space of the family's images, where it has one."""

    info: ModelInfo

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32[n, embedding_dim], L2-normalised, in the order of the texts."""
        ...


class ImageBackbone(Protocol):
    """The image side as a torch module in evaluation mode, for training on it and for export.

    Attributes:
        feature_dim, grid_dim: Of what it gives.
        embedding_dim: Of its own image–text embedding; 0 where it has none.
    """

    preprocessing: Preprocessing
    feature_dim: int
    grid_dim: int
    embedding_dim: int

    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8[n, 3, size, size] -> `features` float32[n, feature_dim], `grid` float32[n, cells, grid_dim] and,
        where it has one, `embedding` float32[n, embedding_dim]. Differentiable."""
        ...


class ClassifyingBackbone(ImageBackbone, Protocol):
    """An image backbone whose classes are a linear function of its features.

    Attributes:
        class_names: k names.
        class_weights: float32[k, feature_dim], the classifier's matrix.
    """

    class_names: Sequence[str]
    class_weights: torch.Tensor

    def of_features(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """What follows from features float32[n, feature_dim] alone: `labels`, probabilities float32[n, k], and, where it
        has one, `embedding`."""
        ...


class TextBackbone(Protocol):
    """The text side as a torch module in evaluation mode, for training on it and for export."""

    text_dim: int

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """L2-normalised float32[n, text_dim]. Differentiable."""
        ...


class Tokenizer(Protocol):
    """Texts -> what a text backbone takes."""

    def __call__(self, texts: Sequence[str]) -> Mapping[str, np.ndarray]:
        """`ids` and `mask`, both int64[n, t], padded to the longest and cut at the model's limit."""
        ...


class MatchingModel(ImageModel, Protocol):
    """A model that produces `match`: it says whether a text describes an image."""

    def match(self, encoding: ImageEncoding, rows: Sequence[int], texts: Sequence[str]) -> np.ndarray:
        """float32[m]: the probability that texts[i] describes image rows[i] of an encoding, where as many pairs
        match as do not."""
        ...


class _Family(Protocol):
    def describe(self, spec: str, settings: ModelSettings) -> ModelInfo: ...
    def load_image_model(self, spec: str, settings: ModelSettings, outputs: frozenset[str]) -> ImageModel: ...
    def load_text_model(self, spec: str, settings: ModelSettings) -> TextModel: ...
    def load_image_backbone(self, spec: str) -> ImageBackbone: ...
    def load_text_backbone(self, spec: str) -> TextBackbone: ...
    def load_tokenizer(self, spec: str) -> Tokenizer: ...
    def fetch(self, spec: str, directory: Path, settings: ModelSettings) -> str | None: ...


def describe_model(spec: str, settings: ModelSettings | None = None) -> ModelInfo:
    """What a spec stands for, without loading it.

    Raises:
        ValueError: The spec names no known family, or nothing within it, or a model that cannot be run by the settings.
    """
    return _family(spec).describe(spec, settings or ModelSettings())


def require_text_side(
    spec: str, remedy: str = "name one that has, such as 'compact'", settings: ModelSettings | None = None
) -> None:
    """Raises:
    ValueError: The spec is unknown, or has no text side; the message ends with the remedy.
    """
    if not describe_model(spec, settings).encodes_text:
        raise ValueError(f"model {spec!r} has no text side; {remedy}")


def load_image_model(
    spec: str, settings: ModelSettings | None = None, outputs: frozenset[str] | None = None
) -> ImageModel:
    """Loads the image side of a model.

    Args:
        outputs: What its encodings must hold, of what it produces (None: all of it); the rest may be left
            out, and its weights unloaded.

    Raises:
        ValueError: The spec is unknown, or the model cannot be run by the settings here.
    """
    run = resolved(settings or ModelSettings())
    wanted = describe_model(spec, run).produces if outputs is None else outputs
    return _family(spec).load_image_model(spec, run, wanted)


def load_text_model(spec: str, settings: ModelSettings = CPU) -> TextModel:
    """Loads the text side of a model; on the CPU, unless told otherwise, which serves a few queries sooner than a GPU
    could be woken.

    Raises:
        ValueError: The spec is unknown, has no text side, or cannot be run by the settings here.
    """
    run = resolved(settings)
    require_text_side(spec, settings=run)
    return _family(spec).load_text_model(spec, run)


def fetch_model(spec: str, directory: Path, settings: ModelSettings | None = None) -> str | None:
    """Puts what a model needs into a directory, for machines without network.

    Returns:
        The spec that it has there; None where nothing needs to be fetched.

    Raises:
        ValueError: The spec is unknown, it cannot be fetched, or the directory holds something else.
    """
    family, settings = _family(spec), settings or ModelSettings()
    if not hasattr(family, "fetch"):
        family.describe(spec, settings)
        return None
    return family.fetch(spec, directory, settings)


def load_image_backbone(spec: str) -> ImageBackbone:
    """The image side as a torch module on the CPU.

    Raises:
        ValueError: The spec is unknown, or its family cannot be trained further.
    """
    return _trainable(spec, "load_image_backbone")(spec)


def load_text_backbone(spec: str) -> TextBackbone:
    """The text side as a torch module on the CPU.

    Raises:
        ValueError: The spec is unknown, has no text side, or its family cannot be trained further.
    """
    require_text_side(spec)
    return _trainable(spec, "load_text_backbone")(spec)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer of a text backbone.

    Raises:
        ValueError: The spec is unknown, or its family cannot be trained on.
    """
    return _trainable(spec, "load_tokenizer")(spec)


def _trainable(spec: str, function: str):  # type: ignore[no-untyped-def]
    family = _family(spec)
    if not hasattr(family, function):
        raise ValueError(f"model {spec!r} cannot be trained on; name a model of another family")
    return getattr(family, function)


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
