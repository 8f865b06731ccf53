"""Runs a torch backbone as a model of the contract: through ONNX Runtime or through torch, as the settings say.

Shared by the families whose models are torch modules: `hf`, `torchvision`, fine-tuned directories. They say
how a module is loaded; where its graph is in the cache already, it never is, and nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vlm_ops.models import ImageBackbone, ImageEncoding, ModelInfo, TextBackbone, Tokenizer
from vlm_ops.models.onnx_engine import OnnxEngine, cached_file, export, quantise
from vlm_ops.models.settings import CPU, ModelSettings
from vlm_ops.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

# Small: a batch whose activations stay in the cache is up to twice as fast an image as one of 32, and no model, engine or
# dtype is more than 8 % faster with another size (docs/decisions/0013-engines-and-precision.md).
_CPU_BATCH = 4
# In int8 one by one: activations share a scale, so that an image's numbers would depend on its neighbours.
_INT8_BATCH = 1
# Of float32 and int8 features of noise; below, the model does not bear it.
_LEAST_COSINE = 0.95
# Of the size in float32: a graph whose weights are all rounded to int8 has about a quarter.
_LITTLE_GAINED = 0.6
_TEXT_BATCH = 64
_CPU_TEXT_BATCH = 8  # texts of more alike a length, with less padding
# What a backbone gives of an image, and where an encoding holds it.
FIELDS = {"features": "features", "grid": "grid", "labels": "probabilities", "embedding": "embeddings"}
# The norm, L2 or L1, that rows of these have. Where it was computed in half precision, it is a little off.
_UNIT_NORMS = {"embedding": 2, "labels": 1}

Arrays = Mapping[str, np.ndarray]
Forward = Callable[[Arrays], Sequence[np.ndarray]]


class BackboneImageModel:
    """An `ImageBackbone` as an `ImageModel`.

    Args:
        info: Graphs are cached by its family and revision.
        load: Gives the backbone; one that is at hand goes as `lambda: backbone`. Besides what `ImageBackbone` says,
            it may give `labels`, the probabilities of `label_names`.
        settings: How to run it, resolved.
        outputs: What to compute, of what `info` says is produced. Without any, nothing is loaded.
    """

    def __init__(
        self,
        info: ModelInfo,
        preprocessing: Preprocessing,
        load: Callable[[], ImageBackbone],
        settings: ModelSettings,
        outputs: frozenset[str],
        label_names: Sequence[str] = (),
    ) -> None:
        self.info = info
        self.preprocessing = preprocessing
        self.label_names = label_names
        made = tuple(name for name in FIELDS if name in info.produces)
        self._names = tuple(name for name in made if name in outputs)
        self._batch_size = None if not settings.is_cpu else _INT8_BATCH if settings.dtype == "int8" else _CPU_BATCH
        self._is_exact = settings.dtype == "float32"
        if not self._names:  # wanted for its preprocessing alone
            return
        noise = np.random.default_rng(0).integers(0, 256, (2, 3, preprocessing.size, preprocessing.size), np.uint8)
        self._forward = make_forward(
            f"{_family(info)}-{info.revision}",
            lambda: _chosen(load(), made),
            {"pixels": noise},
            {"pixels": {0: "n"}},
            settings,
            [made.index(name) for name in self._names],
        )

    def encode_images(self, pixels: np.ndarray) -> ImageEncoding:
        if not self._names:
            return ImageEncoding()
        if len(pixels) == 0:  # the shapes of an image's outputs, with no image
            blank = self._encode(np.zeros((1, *pixels.shape[1:]), np.uint8))
            return ImageEncoding(**{field: array[:0] for field, array in blank.items()})
        return ImageEncoding(**self._encode(pixels))

    def _encode(self, pixels: np.ndarray) -> dict[str, Any]:
        step = self._batch_size or len(pixels)
        chunks = [np.ascontiguousarray(pixels[start : start + step]) for start in range(0, len(pixels), step)]
        outputs = zip(*(self._forward({"pixels": chunk}) for chunk in chunks), strict=True)
        arrays = {name: np.concatenate(parts) for name, parts in zip(self._names, outputs, strict=True)}
        # One number that is none makes all of an image's so; only then is it looked at which image that is.
        if not all(np.isfinite(array[..., 0]).all() for array in arrays.values()):
            raise FloatingPointError(
                f"{self.info.spec} gives numbers that are not finite: its weights are broken, or --dtype is too small for it"
            )
        for name in arrays.keys() & _UNIT_NORMS.keys() if not self._is_exact else ():
            arrays[name] /= np.linalg.norm(arrays[name], _UNIT_NORMS[name], axis=1, keepdims=True)
        return {FIELDS[name]: array for name, array in arrays.items()}


class BackboneTextModel:
    """A `TextBackbone` as a `TextModel`.

    Args:
        info: Graphs are cached by its family and revision.
        load: Gives the backbone; one that is at hand goes as `lambda: backbone`.
        settings: How to run it, resolved. int8 and compiling are for images.
    """

    def __init__(
        self,
        info: ModelInfo,
        tokenize: Tokenizer,
        load: Callable[[], TextBackbone],
        settings: ModelSettings,
    ) -> None:
        self.info = info
        self._tokenize = tokenize
        self._batch_size = _CPU_TEXT_BATCH if settings.is_cpu else _TEXT_BATCH
        dims = {0: "n", 1: "t"}
        self._forward = make_forward(
            f"{_family(info)}-{info.revision}-text",
            load,
            tokenize(["a dog runs", "two black dogs are running through the snow"]),
            {"ids": dims, "mask": dims},
            replace(settings, compile=False, dtype="float32" if settings.dtype == "int8" else settings.dtype),
        )

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        if len(texts) == 0:  # the shape of a text's embedding, with no text
            return self._encode([""])[:0]
        # Texts of like length go together, so that little is padding.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        step = self._batch_size
        chunks = [order[start : start + step] for start in range(0, len(order), step)]
        sorted_embeddings = np.concatenate([self._encode([texts[i] for i in chunk]) for chunk in chunks])
        embeddings = np.empty_like(sorted_embeddings)
        embeddings[order] = sorted_embeddings
        return embeddings

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        return self._forward(self._tokenize(texts))[0]


def tokenizer_of(tokenizer: Any) -> Tokenizer:
    """The `Tokenizer` that a `tokenizers.Tokenizer` is, once it was told to cut and to pad."""

    def tokenize(texts: Sequence[str]) -> dict[str, np.ndarray]:
        encodings = tokenizer.encode_batch(list(texts))
        return {
            "ids": np.array([encoding.ids for encoding in encodings], np.int64),
            "mask": np.array([encoding.attention_mask for encoding in encodings], np.int64),
        }

    return tokenize


def make_forward(
    name: str,
    load: Callable[[], Any],
    example: Arrays,
    dynamic_dims: Mapping[str, Mapping[int, str]],
    settings: ModelSettings,
    outputs: Sequence[int] = (0,),
) -> Forward:
    """What runs a torch module by settings; safe to call from several threads.

    Args:
        name: Of the cached graph.
        load: Gives the module: tensors, in the order of `example` -> a tensor or a tuple of them. Torch takes it over
            (see `TorchEngine`).
        example: Inputs by name; each dynamic dimension larger than 1.
        dynamic_dims: As for `onnx_engine.export`.
        settings: Resolved. Where ONNX Runtime is the engine without having been asked for, a module that cannot be
            exported runs through torch, and a line is logged.
        outputs: Which of the module's tensors are wanted; the graph holds all of them, and computes these.

    Raises:
        ValueError: The module cannot be exported, and ONNX Runtime was asked for, or int8; or it does not bear int8; or
            it cannot be compiled here.
    """
    if settings.engine == "torch":
        return _torch_forward(load(), settings, outputs, example)
    graph = f"{name}-torch{version('torch')}"
    try:
        path = cached_file(f"{graph}.onnx", lambda path: _export(load(), example, dynamic_dims, path))
    except _NotExportableError as error:
        if settings.dtype == "int8" or not settings.may_run_by_torch:
            asked = "--dtype int8" if settings.dtype == "int8" else "--engine onnxruntime"
            raise ValueError(
                f"{name} cannot be exported to ONNX, so that {asked} cannot be had ({error}); use --engine torch"
            ) from error
        logger.warning("%s runs through torch, more slowly: it cannot be exported to ONNX: %s", name, error)
        return _torch_forward(load(), settings, outputs, example)
    if settings.dtype == "int8":
        float_path = path
        path = cached_file(
            f"{graph}-int8.ort{version('onnxruntime')}.onnx", lambda path: _quantise(name, float_path, example, path)
        )
    return OnnxEngine(path, outputs).run


def _torch_forward(module: Any, settings: ModelSettings, outputs: Sequence[int], example: Arrays) -> Forward:
    from vlm_ops.models.torch_engine import TorchEngine

    engine = TorchEngine(module, settings, outputs)
    if settings.compile:
        engine.compile(example)
    return engine.run


def sha256_of(path: Path) -> str:
    """Hex digits that stand for a file's content; a file of weights is read once a process for it."""
    return _sha256_of(str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256_of(path: str, modified_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _NotExportableError(Exception):
    """An architecture that the exporter or ONNX Runtime cannot take."""


def _export(module: Any, example: Arrays, dynamic_dims: Mapping[str, Mapping[int, str]], path: Path) -> None:
    """Exports a module, and believes the graph only where it gives what the module gives."""
    import torch

    from vlm_ops.models.torch_engine import TorchEngine

    one = _first_row(example)
    try:
        export(module, {name: torch.from_numpy(array) for name, array in example.items()}, dynamic_dims, path)
        actual = OnnxEngine(path).run(one)
    except Exception as error:  # the exporter and ONNX Runtime share no class of errors
        raise _NotExportableError(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}") from error
    for got, expected in zip(actual, TorchEngine(module, CPU).run(one), strict=True):
        tolerance = 1e-3 * max(1.0, float(np.abs(expected).max()))
        if got.shape != expected.shape or not np.allclose(got, expected, atol=tolerance):
            raise _NotExportableError("the exported graph gives other values")
    if len(list(path.parent.glob(f"{path.name}*"))) > 1:
        raise _NotExportableError("its graph is larger than 2 GB")


def _quantise(name: str, graph: Path, example: Arrays, path: Path) -> None:
    """Quantises a graph, and believes the result only where its first output, on which the others rest, is near.

    Raises:
        ValueError: It is not, or there is nothing to quantise.
    """
    try:
        quantise(graph, path)
    except ValueError as error:
        raise ValueError(f"{name} gains nothing by --dtype int8: {error}; leave it out") from error
    one = _first_row(example)
    exact, actual = (OnnxEngine(each, (0,)).run(one)[0].ravel() for each in (graph, path))
    cosine = float(exact @ actual / max(np.linalg.norm(exact) * np.linalg.norm(actual), 1e-12))
    if not cosine >= _LEAST_COSINE:
        raise ValueError(
            f"{name} does not bear --dtype int8: its features are too far from those in float32 (cosine {cosine:.3f} on "
            f"noise, where {_LEAST_COSINE} is the least); use --dtype bfloat16 or float32"
        )
    share = path.stat().st_size / graph.stat().st_size
    if share > _LITTLE_GAINED:
        logger.warning(
            "%s is mostly convolutions, which stay in float32: --dtype int8 makes it hardly faster (%.0f %% of its size)",
            name,
            100 * share,
        )


def _first_row(example: Arrays) -> dict[str, np.ndarray]:
    return {name: array[:1] for name, array in example.items()}


def _chosen(backbone: Any, names: Iterable[str]) -> Any:
    """torch module: pixels -> a tuple of the named outputs, so that an export leaves the others out."""
    import torch

    class Chosen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, pixels: Any) -> tuple[Any, ...]:
            outputs = self.backbone(pixels)
            return tuple(outputs[name] for name in names)

    return Chosen().eval()


def _family(info: ModelInfo) -> str:
    """`hf` of `hf:PATH`, `package.module` of `python:package.module:ARGUMENT`."""
    return info.spec.removeprefix("python:").partition(":")[0]
