"""The ops: a batch of decoded images -> columns.

An op is a class with a `name`, a `capability` it asks of its model (None: it needs no model), the
`columns` it fills, the `preprocessing` it wants its pixels in, and
`__call__(batch) -> {column: Arrow array}`. Of its model's encoding it reads its capability, or what it
declares as `outputs`: nothing, where the model's preprocessing is all that it wants. Ops that share
a model share one forward pass, and ops that share a preprocessing share one resize. An op of another
package is named by its import path, `package.module:Class`.

What an op fills is copied to further images with the same bytes. One that reads more than the pixels declares
so: `reads = ("source_captions",)` are the columns of the reader on which its own depend.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image

from schemas.recipes import DEFAULT_OPS, OpSpec
from schemas.samples import Sample
from schemas.tables import READER_COLUMNS, images_schema, op_columns
from vlm_ops.images import ImageFacts
from vlm_ops.models import ImageEncoding, ImageModel, MatchingModel, ModelInfo, describe_model, load_image_model
from vlm_ops.preprocessing import THUMBNAIL, Preprocessing

NUM_LABELS = 5
NUM_COLORS = 5


@dataclass(frozen=True)
class ImageBatch:
    """n decoded images, ready for the ops.

    Attributes:
        samples: What they were decoded from.
        facts: Original size and format of each.
        pixels: For each preprocessing that an op asked for, uint8[n, 3, size, size]. The pixels of
            the full picture are not kept, so that memory does not depend on the photos' size.
        stage_sec: Seconds by stage, added to as the ops run.
    """

    samples: Sequence[Sample]
    facts: Sequence[ImageFacts]
    pixels: Mapping[Preprocessing, np.ndarray]
    stage_sec: dict[str, float]
    _encodings: dict[int, ImageEncoding] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    def encoding(self, model: ImageModel) -> ImageEncoding:
        """The model's one forward pass over this batch, shared by its ops."""
        if id(model) not in self._encodings:
            started = time.perf_counter()
            self._encodings[id(model)] = model.encode_images(self.pixels[model.preprocessing])
            self.stage_sec["model"] = self.stage_sec.get("model", 0.0) + time.perf_counter() - started
        return self._encodings[id(model)]

    def part(self, start: int, end: int) -> ImageBatch:
        """Images `start` to `end`, with nothing computed yet."""
        pixels = {preprocessing: values[start:end] for preprocessing, values in self.pixels.items()}
        return ImageBatch(self.samples[start:end], self.facts[start:end], pixels, self.stage_sec)


class Op(Protocol):
    """What an op must offer; see the module's docstring."""

    name: str
    capability: str | None
    columns: tuple[pa.Field, ...]
    preprocessing: Preprocessing

    def __init__(self, model: ImageModel | None) -> None: ...

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]: ...


class QualityOp:
    """Facts about the picture: size, format, perceptual hash, dominant colours."""

    name = "quality"
    capability = None
    columns = op_columns("quality")
    preprocessing = THUMBNAIL

    def __init__(self, model: ImageModel | None = None) -> None: ...

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        thumbnails = [Image.fromarray(pixels) for pixels in batch.pixels[THUMBNAIL].transpose(0, 2, 3, 1)]
        return {
            "width": pa.array([image.width for image in batch.facts], pa.int32()),
            "height": pa.array([image.height for image in batch.facts], pa.int32()),
            "format": pa.array([image.format for image in batch.facts]),
            "phash": pa.array([str(imagehash.phash(thumbnail)) for thumbnail in thumbnails]),
            "dominant_colors": pa.array(
                [dominant_colors(thumbnail) for thumbnail in thumbnails], _type_of(self, "dominant_colors")
            ),
        }


class _ModelOp:
    """An op that reads its model's encoding."""

    name: str
    capability: str | None
    columns: tuple[pa.Field, ...]

    def __init__(self, model: ImageModel | None) -> None:
        if model is None:
            raise ValueError(f"op {self.name!r} needs a model")
        self.model = model
        self.preprocessing = model.preprocessing


class FeaturesOp(_ModelOp):
    """Pooled CNN features."""

    name = capability = "features"
    columns = op_columns("features")

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        return {"features": vectors(batch.encoding(self.model).features)}


class LabelsOp(_ModelOp):
    """The likeliest class labels."""

    name = capability = "labels"
    columns = op_columns("labels")

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        probabilities = batch.encoding(self.model).probabilities
        assert probabilities is not None
        names = self.model.label_names
        top = np.argsort(-probabilities, axis=1, kind="stable")[:, :NUM_LABELS]
        rows = [
            [{"name": names[label], "score": float(row[label])} for label in best]
            for row, best in zip(probabilities, top, strict=True)
        ]
        return {"labels": pa.array(rows, _type_of(self, "labels"))}


class CaptionOp(_ModelOp):
    """A generated sentence."""

    name = capability = "caption"
    columns = op_columns("caption")

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        captions = batch.encoding(self.model).captions
        assert captions is not None
        return {
            "caption": pa.array([each.text for each in captions], pa.string()),
            "caption_source": pa.array([each.source for each in captions], pa.string()),
            "caption_score": pa.array([each.score for each in captions], pa.float32()),
        }


class CaptionMatchOp(_ModelOp):
    """How well captions fit: those that came with the image, and the generated one where there is one."""

    name = "caption_match"
    capability = "match"
    columns = op_columns("caption_match")
    reads = ("source_captions",)

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        encoding = batch.encoding(self.model)
        pairs = [(row, text) for row, sample in enumerate(batch.samples) for text in sample.captions]
        generated = [(row, each.text) for row, each in enumerate(encoding.captions or ())]
        rows, texts = [row for row, _ in pairs + generated], [text for _, text in pairs + generated]
        scores = iter(cast(MatchingModel, self.model).match(encoding, rows, texts).tolist())
        own = [[next(scores) for _ in sample.captions] for sample in batch.samples]
        return {
            "source_caption_match": pa.array(own, pa.list_(pa.float32())),
            "caption_match": pa.array(list(scores) or [None] * len(batch), pa.float32()),
        }


class EmbeddingOp(_ModelOp):
    """The image–text embedding that search uses."""

    name = capability = "embedding"
    columns = op_columns("embedding")

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        return {"image_embedding": vectors(batch.encoding(self.model).embeddings)}


_OPS: dict[str, type[Any]] = {
    op.name: op for op in (QualityOp, FeaturesOp, LabelsOp, CaptionOp, EmbeddingOp, CaptionMatchOp)
}


def op_class(name: str) -> type[Any]:
    """The class of a built-in op, or of one named by its import path, `package.module:Class`.

    Raises:
        ValueError: There is no op of this name.
    """
    if name in _OPS:
        return _OPS[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(f"unknown op {name!r}; known ops: {', '.join(_OPS)}, or package.module:Class")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load op {name!r}: {error}") from error


def default_ops(model_spec: str) -> tuple[str, ...]:
    """The usual ops, as far as a model serves them.

    Raises:
        ValueError: There is no such model.
    """
    produces = describe_model(model_spec).produces
    return tuple(name for name in DEFAULT_OPS if op_class(name).capability in {None, *produces})


def plan_ops(names: Iterable[str], model_spec: str) -> tuple[OpSpec, ...]:
    """Op names and the spec of their model -> the ops of a recipe, checked without loading weights.

    Raises:
        ValueError: An op is unknown, named twice, or reads an unknown column, or the model cannot serve it.
    """
    specs: list[OpSpec] = []
    for name in names:
        capability = op_class(name).capability
        for column in getattr(op_class(name), "reads", ()):
            if column not in READER_COLUMNS:
                known = ", ".join(READER_COLUMNS)
                raise ValueError(f"op {name!r} reads column {column!r}, which is none of the reader's: {known}")
        if any(spec.name == name for spec in specs):
            raise ValueError(f"op {name!r} is named twice in --ops")
        if capability is None:
            specs.append(OpSpec(name))
            continue
        info = describe_model(model_spec)
        if capability not in info.produces:
            can = ", ".join(sorted(info.produces))
            raise ValueError(f"model {model_spec!r} cannot serve op {name!r}; it serves: {can}")
        specs.append(OpSpec(name, info.spec, info.revision))
    return tuple(specs)


def check_installed(specs: Iterable[OpSpec]) -> None:
    """Finds out before any work whether the models of a recipe are the installed ones.

    Raises:
        ValueError: A model is unknown here, or has another revision than the recipe's.
    """
    for spec in specs:
        if spec.model is not None:
            _check_revision(spec, describe_model(spec.model))


def _check_revision(spec: OpSpec, info: ModelInfo) -> None:
    if info.revision != spec.revision:
        raise ValueError(
            f"the recipe asks for model {spec.model}@{spec.revision}, but {info.name} is installed here; "
            "install the same version of beamsight and of its model packages on launcher and workers"
        )


def load_ops(specs: Iterable[OpSpec], device: str = "auto") -> list[Op]:
    """Loads each model once and makes the ops, in the recipe's order.

    Raises:
        ValueError: The model that is installed here has another revision than the recipe's.
    """
    specs = list(specs)
    outputs: dict[str, set[str]] = {}
    for spec in specs:
        if spec.model is not None:
            op = op_class(spec.name)
            outputs.setdefault(spec.model, set()).update(getattr(op, "outputs", {op.capability}))
    models: dict[str, ImageModel] = {}
    ops: list[Op] = []
    for spec in specs:
        model = None
        if spec.model is not None:
            if spec.model not in models:
                models[spec.model] = load_image_model(spec.model, device, frozenset(outputs[spec.model]))
            model = models[spec.model]
            _check_revision(spec, model.info)
        ops.append(op_class(spec.name)(model))
    return ops


def reader_columns(ops: Iterable[Op]) -> tuple[str, ...]:
    """The columns of the reader on which any of the ops depends, besides the image's bytes."""
    return tuple(dict.fromkeys(name for op in ops for name in getattr(op, "reads", ())))


def schema_of(specs: Iterable[OpSpec]) -> pa.Schema:
    """Schema of the `images` table that these ops fill."""
    return images_schema(field for spec in specs for field in op_class(spec.name).columns)


def vectors(values: np.ndarray | None) -> pa.ListArray:
    """float32[n, d] -> an Arrow list array over the same memory."""
    assert values is not None
    n, d = values.shape
    flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * d), flat)


def dominant_colors(picture: Image.Image, num_colors: int = NUM_COLORS) -> list[dict[str, Any]]:
    """The most frequent colours of a small RGB picture: `{"hex", "share"}`, largest share first."""
    reduced = picture.quantize(num_colors, method=Image.Quantize.FASTOCTREE)
    palette = reduced.getpalette() or []
    counts = sorted(cast("list[tuple[int, int]]", reduced.getcolors() or []), reverse=True)
    total = sum(count for count, _ in counts)
    colors = []
    for count, index in counts:
        red, green, blue = palette[3 * index : 3 * index + 3]
        colors.append({"hex": f"#{red:02x}{green:02x}{blue:02x}", "share": count / total})
    return colors


def _type_of(op: Any, column: str) -> pa.DataType:
    return next(field.type for field in op.columns if field.name == column)
