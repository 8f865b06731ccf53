"""What a run and an index say of themselves, as JSON files in the catalog."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from schemas.recipes import Recipe
from schemas.samples import to_json


@dataclass(frozen=True)
class RunManifest:
    """Outcome of one build run: `runs/<run id>/manifest.json`.

    Attributes:
        status: `committed`, or `refused` when too many images failed and nothing was published.
        table_version: Version of the images table after the run.
        num_images: Rows that the run's parts hold.
        num_images_computed: Those of them that the run computed itself.
        num_failures: Failures by reason.
        num_failed_images: Failures that cost an image.
        failure_rate: Share of images (or of shards, where larger) that failed.
        examples: Some of the failures, as text.
        sample_parts: Names of some of the parts that the run computed, for its report.
        stage_sec: Thread-seconds by stage.
    """

    run_id: str
    status: str
    started_at: str
    finished_at: str
    recipe: Recipe
    inputs: tuple[str, ...]
    table_version: int
    num_shards: int
    num_shards_reused: int
    num_images: int
    num_images_computed: int
    num_failed_images: int
    num_failures: dict[str, int]
    failure_rate: float
    examples: tuple[str, ...] = ()
    sample_parts: tuple[str, ...] = ()
    stage_sec: dict[str, float] = field(default_factory=dict)
    wall_sec: float = 0.0
    beamsight_version: str = ""

    def to_json(self) -> str:
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> RunManifest:
        values: dict[str, Any] = json.loads(text)
        values["recipe"] = Recipe.from_dict(values["recipe"])
        return cls(
            **{
                **values,
                "inputs": tuple(values["inputs"]),
                **{name: tuple(values[name]) for name in ("examples", "sample_parts")},
            }
        )

    @property
    def reasons(self) -> str:
        """Failures by reason, for a person."""
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.num_failures.items())) or "none"

    @property
    def stages(self) -> list[tuple[str, float]]:
        """Stages and their thread-seconds, in the order of the work."""
        first = [stage for stage in ("read", "decode", "model") if stage in self.stage_sec]
        ops = [stage for stage in self.stage_sec if stage not in (*first, "write")]
        last = ["write"] if "write" in self.stage_sec else []
        return [(stage, self.stage_sec[stage]) for stage in (*first, *ops, *last)]


@dataclass(frozen=True)
class IndexManifest:
    """What an index was built from: `indexes/<n>/manifest.json`, written last.

    Attributes:
        number: The n of `indexes/<n>`.
        table_version: Version of the images table that was indexed.
        encoder: Model spec of the encoder of the vectors.
        encoder_revision: Its revision; queries must be encoded by the same.
        factory: FAISS factory string.
        ntotal: Vectors in the index.
        d: Their dimension.
        nprobe: Lists visited a query, for IVF indexes.
    """

    number: int
    table_version: int
    encoder: str
    encoder_revision: str
    factory: str
    ntotal: int
    d: int
    nprobe: int
    created_at: str

    @property
    def encoder_name(self) -> str:
        return f"{self.encoder}@{self.encoder_revision}"

    def to_json(self) -> str:
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> IndexManifest:
        return cls(**json.loads(text))
