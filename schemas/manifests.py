"""What a run and an index say of themselves, as JSON files in the catalog."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from schemas.recipes import Recipe
from schemas.samples import to_json


@dataclass(frozen=True)
class RunManifest:
    """Outcome of one run: `runs/<run id>/manifest.json`.

    Attributes:
        action: `build` or `retry`.
        status: `committed`, or `refused` when too many images failed and nothing was published.
        table_version: Version of the images table after the run; -1 where nothing was published.
        num_images: Rows that the run's parts hold.
        num_images_computed: Those of them that the run computed itself.
        num_images_copied: Those of them that it copied from an image with the same bytes.
        num_bytes_read: Size of the shards and files that the run read itself.
        parts: Of a refused run, all its parts: the next run goes on from them.
        num_added, num_changed, num_removed: Images of the catalog, as in CommitRecord.
        num_failures: Failures by reason.
        num_failed_images: Failures that cost an image.
        num_lost_images: Images that the catalog had, and that damaged shards gave no more.
        failure_rate: Share of images (or of shards, where larger) that failed.
        examples: Some of the failures, as text.
        sample_parts: Names of some of the parts that the run computed, for its report.
        stage_sec: Thread-seconds by stage.
    """

    run_id: str
    action: str
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
    parts: tuple[str, ...] = ()
    num_lost_images: int = 0
    num_images_copied: int = 0
    num_bytes_read: int = 0
    num_added: int = 0
    num_changed: int = 0
    num_removed: int = 0
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
                **{name: tuple(values[name]) for name in ("examples", "sample_parts", "parts")},
            }
        )

    @property
    def reasons(self) -> str:
        """Failures by reason, for a person."""
        return ", ".join(f"{reason} {count}" for reason, count in sorted(self.num_failures.items())) or "none"

    @property
    def stages(self) -> list[tuple[str, float]]:
        """Stages and their thread-seconds, in the order of the work."""
        first = [stage for stage in ("read", "copy", "decode", "model") if stage in self.stage_sec]
        ops = [stage for stage in self.stage_sec if stage not in (*first, "write")]
        last = ["write"] if "write" in self.stage_sec else []
        return [(stage, self.stage_sec[stage]) for stage in (*first, *ops, *last)]


@dataclass(frozen=True)
class CommitRecord:
    """What a commit says of itself, in the log of the images table. One commit makes a whole state of the
    catalog visible: its images, and by this record its failures and its index.

    Attributes:
        run_id: The run that committed.
        action: `build`, `retry`, `index` or `rollback`.
        committed_at: ISO time.
        recipe: Of the rows.
        index: The run that made the index, which is its name in `indexes/`; None where there is none.
        failures_version: Version of the failures table that belongs to the state.
        num_images: Images in the catalog after the commit.
        num_failures: Rows of its failures.
        num_added: Images that were not there before.
        num_changed: Images whose bytes, or whose recipe, changed.
        num_removed: Images that are there no more.
        of_run: For a rollback, the run whose state it brought back.
    """

    run_id: str
    action: str
    committed_at: str
    recipe: Recipe
    index: str | None
    failures_version: int
    num_images: int
    num_failures: int
    num_added: int
    num_changed: int
    num_removed: int
    of_run: str | None = None

    def to_json(self) -> str:
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> CommitRecord:
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "recipe": Recipe.from_dict(values["recipe"])})


@dataclass(frozen=True)
class IndexManifest:
    """What an index was built from: `indexes/<run id>/manifest.json`, written last.

    Attributes:
        run_id: The run that made it.
        encoder: Model spec of the encoder of the vectors.
        encoder_revision: Its revision; queries must be encoded by the same.
        factory: FAISS factory string.
        ntotal: Vectors in the index.
        d: Their dimension.
        nprobe: Lists visited a query, for IVF indexes.
    """

    run_id: str
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
