"""The ops: a batch of decoded images -> columns.

An op is a class with a `name`, a `capability` it asks of its model (None: it needs no model), the
`columns` it fills, the `preprocessing` it wants its pixels in, and
`__call__(batch) -> {column: Arrow array}`. Of its model's encoding it reads its capability, or what it
declares as `outputs`: nothing, where the model's preprocessing is all that it wants. Ops that share
a model share one forward pass, and ops that share a preprocessing share one resize. An op that looks at pixels in
a second form names it in `also_wants`. An op of another package is named by its import path, `package.module:Class`.

An op whose weights or code come in packages that are not always there names them in `requires`, and `revision()`
says what it computes by: a recipe holds it, so that other weights make another recipe.

What an op fills is copied to further images with the same bytes. One that reads more than the pixels declares
so: `reads = ("source_captions",)` are the columns of the reader on which its own depend.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import pyarrow as pa

from schemas.recipes import DEFAULT_OPS, OP_GROUPS, OpSpec
from schemas.samples import Sample
from schemas.tables import READER_COLUMNS, images_schema, op_columns
from vlm_ops.images import ImageFacts
from vlm_ops.models import ImageEncoding, ImageModel, MatchingModel, ModelInfo, describe_model, load_image_model
from vlm_ops.models.settings import CAPTION_SETTINGS, ModelSettings, recorded, with_recorded
from vlm_ops.preprocessing import Preprocessing

NUM_LABELS = 5


_T = TypeVar("_T")


@dataclass(frozen=True)
class ImageBatch:
    """n decoded images, ready for the ops.

    Attributes:
        samples: What they were decoded from.
        facts: Original size and format of each.
        pixels: For each preprocessing that an op asked for, uint8[n, 3, size, size]; for one that fits by `contain`
            as large as the largest, each in the upper left corner (see `contents`). The pixels of the full picture
            are not kept, so that memory does not depend on the photos' size.
        stage_sec: Seconds by stage, added to as the ops run.
    """

    samples: Sequence[Sample]
    facts: Sequence[ImageFacts]
    pixels: Mapping[Preprocessing, np.ndarray]
    stage_sec: dict[str, float]
    _shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    def encoding(self, model: ImageModel) -> ImageEncoding:
        """The model's one forward pass over this batch, shared by its ops."""
        return self.shared(id(model), lambda: self._encode(model))

    def _encode(self, model: ImageModel) -> ImageEncoding:
        started = time.perf_counter()
        form = model.preprocessing
        encoding = model.encode_images(self.contents(form) if form.fit == "contain" else self.pixels[form])
        self.book("model", time.perf_counter() - started - (encoding.caption_sec or 0.0))
        if encoding.caption_sec is not None:
            self.book(CaptionOp.name, encoding.caption_sec)
        return encoding

    def book(self, stage: str, seconds: float) -> None:
        """Adds to the seconds of a stage."""
        self.stage_sec[stage] = self.stage_sec.get(stage, 0.0) + seconds

    def shared(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What several ops need of this batch, made by the first that asks."""
        if key not in self._shared:
            self._shared[key] = make()
        return cast(_T, self._shared[key])

    def contents(self, preprocessing: Preprocessing) -> list[np.ndarray]:
        """uint8[3, h, w] of each image, without what it was padded with: views."""
        extents = [preprocessing.extent(image.width, image.height) for image in self.facts]
        rows = self.pixels[preprocessing] if extents else ()
        return [row[:, :height, :width] for row, (width, height) in zip(rows, extents, strict=True)]

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


class ModelOp:
    """An op that reads its model's encoding."""

    name: str
    capability: str | None
    columns: tuple[pa.Field, ...]

    def __init__(self, model: ImageModel | None) -> None:
        if model is None:
            raise ValueError(f"op {self.name!r} needs a model")
        self.model = model
        self.preprocessing = model.preprocessing


class FeaturesOp(ModelOp):
    """Pooled CNN features."""

    name = capability = "features"
    columns = op_columns("features")

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        return {"features": vectors(batch.encoding(self.model).features)}


class LabelsOp(ModelOp):
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
        return {"labels": pa.array(rows, type_of(self, "labels"))}


class CaptionOp(ModelOp):
    """A generated sentence; null where the model has written nothing."""

    name = capability = "caption"
    columns = op_columns("caption")

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        captions = batch.encoding(self.model).captions
        assert captions is not None
        said = [each if each.text else None for each in captions]  # a model may end before its first word
        return {
            "caption": pa.array([each and each.text for each in said], pa.string()),
            "caption_source": pa.array([each and each.source for each in said], pa.string()),
            "caption_score": pa.array([each and each.score for each in said], pa.float32()),
        }


class CaptionMatchOp(ModelOp):
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


class EmbeddingOp(ModelOp):
    """The image–text embedding that search uses."""

    name = capability = "embedding"
    columns = op_columns("embedding")

    def __call__(self, batch: ImageBatch) -> dict[str, pa.Array]:
        return {"image_embedding": vectors(batch.encoding(self.model).embeddings)}


# Those that need no module beside this one by themselves, the others by their import paths.
_OPS: dict[str, type[Any] | str] = {
    "quality": "vlm_ops.quality:QualityOp",
    **{op.name: op for op in (FeaturesOp, LabelsOp, CaptionOp, EmbeddingOp, CaptionMatchOp)},
    "safety": "vlm_ops.safety:SafetyOp",
    "ocr": "vlm_ops.text_reading:OcrOp",
    "faces": "vlm_ops.faces:FacesOp",
    "focus": "vlm_ops.focus:FocusOp",
}


def op_class(name: str) -> type[Any]:
    """The class of a built-in op, or of one named by its import path, `package.module:Class`.

    Raises:
        ValueError: There is no op of this name.
    """
    found = _OPS.get(name, name)
    if not isinstance(found, str):
        return found
    module, separator, attribute = found.partition(":")
    if not separator:
        known = ", ".join((*_OPS, *OP_GROUPS))
        raise ValueError(f"unknown op {name!r}; known ops: {known}, or package.module:Class")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot load op {name!r}: {error}") from error


@dataclass(frozen=True)
class ModelChoice:
    """Which models serve the ops of a recipe, and how they are run.

    Attributes:
        spec: Of the ops that `of_ops` does not name.
        of_ops: Model specs by the names of ops.
        settings: Of all of them.
    """

    spec: str
    of_ops: Mapping[str, str] = field(default_factory=dict)
    settings: ModelSettings = field(default_factory=ModelSettings)

    def spec_of(self, op_name: str) -> str:
        return self.of_ops.get(op_name, self.spec)

    def describe(self, op_name: str) -> ModelInfo:
        return describe_model(self.spec_of(op_name), self.settings)


def default_ops(models: ModelChoice) -> tuple[str, ...]:
    """The usual ops, as far as their models serve them, and those for which a model was named.

    Raises:
        ValueError: There is no such model.
    """
    capabilities = {name: op_class(name).capability for name in DEFAULT_OPS}
    if not models.of_ops and not describe_model(models.spec, models.settings).produces:
        raise ValueError(f"model {models.spec!r} encodes texts alone and serves no op; name a model of images")
    return tuple(
        name
        for name, capability in capabilities.items()
        if capability is None or name in models.of_ops or capability in models.describe(name).produces
    )


def plan_ops(names: Iterable[str], models: ModelChoice | str) -> tuple[OpSpec, ...]:
    """Op names and their models -> the ops of a recipe, checked without loading weights.

    Args:
        names: Ops, and groups of them: `default` (see `default_ops`), or one of `OP_GROUPS`.
        models: The models; one that serves all ops may be named by its spec.

    Raises:
        ValueError: An op is unknown, named twice, or reads an unknown column; its model cannot serve it, or its packages
            are not installed; a model or setting is given that no op reads.
    """
    models = ModelChoice(models) if isinstance(models, str) else models
    specs: list[OpSpec] = []
    for name in _without_groups(names, models):
        capability = op_class(name).capability
        for column in getattr(op_class(name), "reads", ()):
            if column not in READER_COLUMNS:
                known = ", ".join(READER_COLUMNS)
                raise ValueError(f"op {name!r} reads column {column!r}, which is none of the reader's: {known}")
        if any(spec.name == name for spec in specs):
            raise ValueError(f"op {name!r} is named twice in --ops")
        revision = _installed_revision(name)
        if capability is None:
            specs.append(OpSpec(name, revision=revision))
            continue
        info = models.describe(name)
        if capability not in info.produces:
            can = ", ".join(sorted(info.produces)) or "texts alone"
            raise ValueError(f"model {models.spec_of(name)!r} cannot serve op {name!r}; it serves: {can}")
        settings = recorded(models.settings, name)
        if info.produces == {"caption"}:  # it is no tower
            settings = tuple(pair for pair in settings if pair[0] != "engine")
        _check_taken(info, settings)
        revision = info.revision if revision is None else f"{info.revision}+{revision}"
        specs.append(OpSpec(name, info.spec, revision, settings))
    _check_read(models, [spec.name for spec in specs])
    return tuple(specs)


def _check_taken(info: ModelInfo, settings: Iterable[tuple[str, Any]]) -> None:
    """Finds what a captioner would not follow."""
    for name, value in settings:
        if name in CAPTION_SETTINGS and name not in info.takes:
            takes = ", ".join(f"--{each}" for each in sorted(info.takes)) or "none of these settings"
            raise ValueError(f"model {info.spec!r} does not follow --{name} {value}; it takes {takes}")


def _check_read(models: ModelChoice, names: Sequence[str]) -> None:
    """Finds what was given in vain."""
    for name, spec in models.of_ops.items():
        if name not in names:
            raise ValueError(f"model {spec!r} was named for op {name!r}, which is not computed; add it to --ops")
    given = [name for name in CAPTION_SETTINGS if getattr(models.settings, name) is not None]
    if given and "caption" not in names:
        raise ValueError(f"--{given[0]} is for captions, which are not computed; add caption to --ops")


def _without_groups(names: Iterable[str], models: ModelChoice) -> Iterator[str]:
    for name in names:
        yield from default_ops(models) if name == "default" else OP_GROUPS.get(name, (name,))


def check_installed(specs: Iterable[OpSpec], settings: ModelSettings | None = None) -> None:
    """Finds out before any work whether models and packages of a recipe are the installed ones.

    Args:
        settings: Where models run, and whether code of their repositories may.

    Raises:
        ValueError: A model is unknown here, a package is missing, or one has another revision than the recipe's.
    """
    for spec in specs:
        _check_revision(spec, with_recorded(settings or ModelSettings(), spec.settings))


def _check_revision(spec: OpSpec, settings: ModelSettings) -> None:
    (installed,) = plan_ops([spec.name], ModelChoice(spec.model or "", settings=settings))
    if installed.revision != spec.revision:
        of_what = f"model {spec.model}" if spec.model else f"op {spec.name}"
        here = f"{spec.model or spec.name}@{installed.revision}"
        raise ValueError(
            f"the recipe asks for {of_what}@{spec.revision}, but {here} is installed here; "
            "install the same version of beamsight and of its model packages on launcher and workers, or, where the model's files "
            "have changed, put them back or build the catalog anew"
        )


def _installed_revision(name: str) -> str | None:
    """What the packages of an op make it compute by; None for an op that stands on none.

    Raises:
        ValueError: One is missing.
    """
    op = op_class(name)
    for package in getattr(op, "requires", ()):
        if find_spec(package) is None:
            raise ValueError(
                f"op {name!r} needs the package {package!r}, which is not installed; pip install 'beamsight[tagging]'"
            )
    return op.revision() if hasattr(op, "revision") else None


def load_ops(specs: Iterable[OpSpec], settings: ModelSettings | None = None) -> list[Op]:
    """Loads each model once and makes the ops, in the recipe's order.

    Args:
        settings: Where models run; what they compute, the recipe says.

    Raises:
        ValueError: The model that is installed here has another revision than the recipe's.
    """
    specs, settings = list(specs), settings or ModelSettings()
    check_installed(specs, settings)
    outputs: dict[str, set[str]] = {}
    asked: dict[str, dict[str, Any]] = {}
    for spec in specs:
        if spec.model is not None:
            op = op_class(spec.name)
            outputs.setdefault(spec.model, set()).update(getattr(op, "outputs", {op.capability}))
            asked.setdefault(spec.model, {}).update(spec.settings)
    models: dict[str, ImageModel] = {}
    ops: list[Op] = []
    for spec in specs:
        model = None
        if spec.model is not None:
            if spec.model not in models:
                run = with_recorded(settings, asked[spec.model].items())
                models[spec.model] = load_image_model(spec.model, run, frozenset(outputs[spec.model]))
            model = models[spec.model]
        ops.append(op_class(spec.name)(model))
    return ops


def wanted_pixels(ops: Iterable[Op]) -> tuple[Preprocessing, ...]:
    """The forms in which the ops want their pixels, each once."""
    return tuple(dict.fromkeys(form for op in ops for form in (op.preprocessing, *getattr(op, "also_wants", ()))))


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


def type_of(op: Any, column: str) -> pa.DataType:
    return next(field.type for field in op.columns if field.name == column)


def package_folder(package: str) -> Path:
    """Where a package is, without importing it."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations, package
    return Path(spec.submodule_search_locations[0])
