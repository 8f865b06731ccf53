"""The recipe: everything that decides what a row contains, hashed into `recipe_id`."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from schemas.samples import to_json

# Raised when a column changes its meaning, so that older rows are computed anew.
SCHEMA_VERSION = 2

DEFAULT_OPS = ("quality", "features", "labels", "caption", "embedding")
# What a word stands for where ops are named; `default` too, which depends on the model.
OP_GROUPS = {"default": DEFAULT_OPS, "tagging": ("safety", "ocr", "faces", "focus")}
DEFAULT_MODEL = "compact"
DEFAULT_MAX_IMAGE_BYTES = 100_000_000
DEFAULT_MAX_IMAGE_PIXELS = 200_000_000

# Of tagging.
DEFAULT_TAXONOMY = "iab-content-3.1"
DEFAULT_MAX_CATEGORIES = 5
DEFAULT_MIN_SCORE = 0.35


@dataclass(frozen=True)
class OpSpec:
    """One op of a recipe. `model` is None for ops without a model, `revision` for those without weights; `settings` are
    those of the model that change what rows hold, as far as they are not the usual ones."""

    name: str
    model: str | None = None
    revision: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def told(self) -> str:
        """Model, revision and settings, for a person."""
        return f"{self.model}@{self.revision}" + "".join(f" {name}={value}" for name, value in self.settings)


@dataclass(frozen=True)
class Recipe:
    """What is computed for every image, in this order, within these limits.

    Attributes:
        ops: The ops.
        max_image_bytes: Larger encoded images fail as `too_many_bytes`.
        max_image_pixels: Larger images fail as `too_many_pixels`.
        caption_field: Where captions are looked for; None: in the usual fields.
        image_column: Parquet column of the images; None: found.
        schema_version: Version of the table schemas.
    """

    ops: tuple[OpSpec, ...]
    max_image_bytes: int
    max_image_pixels: int
    caption_field: str | None = None
    image_column: str | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def recipe_id(self) -> str:
        values = asdict(self)
        for op in values["ops"]:
            if not op["settings"]:  # there were none once, and what they decide about has not changed
                del op["settings"]
        return hashlib.sha256(to_json(values).encode()).hexdigest()[:12]

    def op(self, name: str) -> OpSpec | None:
        return next((op for op in self.ops if op.name == name), None)

    @property
    def encoder(self) -> OpSpec | None:
        """The op whose vectors are indexed; None where there is none."""
        embedding = self.op("embedding")
        return embedding if embedding and embedding.model and embedding.revision else None

    def differences(self, other: Recipe) -> list[str]:
        """What changes from this recipe to another one, for a person."""
        mine = {op.name: op for op in self.ops}
        theirs = {op.name: op for op in other.ops}
        told = [f"op {name} added" for name in theirs if name not in mine]
        told += [f"op {name} left out" for name in mine if name not in theirs]
        told += list(
            dict.fromkeys(
                _told_change(mine[name], op) if op.model else f"op {name} {mine[name].revision} -> {op.revision}"
                for name, op in theirs.items()
                if name in mine and mine[name] != op
            )
        )
        for name in ("max_image_bytes", "max_image_pixels", "caption_field", "image_column", "schema_version"):
            old, new = getattr(self, name), getattr(other, name)
            if old != new:
                told.append(f"{name} {old} -> {new}")
        return told or ["order of the ops"]

    @classmethod
    def from_dict(cls, values: dict) -> Recipe:
        return cls(**{**values, "ops": tuple(_op_from(op) for op in values["ops"])})


def _op_from(values: dict) -> OpSpec:
    return OpSpec(**{**values, "settings": tuple(tuple(pair) for pair in values.get("settings", ()))})


def _told_change(old: OpSpec, new: OpSpec) -> str:
    if (old.model, old.revision) != (new.model, new.revision):
        return f"model {old.told} -> {new.told}"
    settings = (" ".join(f"{name}={value}" for name, value in op.settings) or "as usual" for op in (old, new))
    return f"model {new.model}: {' -> '.join(settings)}"
