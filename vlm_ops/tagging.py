"""One part of the images, from its rows to its tags: read -> evidence -> categories, suitability, texts, slots -> rows."""

from __future__ import annotations

import atexit
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.catalog import CatalogLayout
from schemas.tags import TAGS, TEXT_FIELDS, AdSlot, Category, ImageEvidence, Suitability, TagRecipe, TagTexts
from vlm_ops import storage
from vlm_ops.ad_slots import ad_slots
from vlm_ops.categories import CategoryScorer
from vlm_ops.color_names import color_name
from vlm_ops.image_evidence import batches, embeddings_of, evidence_of, row_hashes
from vlm_ops.promotional_text import promotional_text
from vlm_ops.rights import rights
from vlm_ops.suitability import TopicEmbeddings, judge
from vlm_ops.tag_parts import TagSummary, TagWork, read_tag_summary, rows_by_image, write_tags
from vlm_ops.tag_texts import write_texts

_BATCH_SIZE = 1024
NEAR_DUPLICATE = "near duplicate of an image with other tags"


@dataclass(frozen=True)
class TagConfig:
    """Everything a worker needs; travels pickled.

    Attributes:
        catalog: The catalog's root URI.
        scorer: Of the categories; None where the catalog has no embeddings.
        looks: What sensitive topics look like to the encoder; None where that was not measured.
        text_model: Model spec of the language model that writes; None for the templates.
        device: Where it runs.
        on: The day whose rules for ad slots are followed.
        num_processes: Processes to start for the work; 0 does it where it is asked for.
    """

    catalog: str
    recipe: TagRecipe
    run_id: str
    scorer: CategoryScorer | None
    looks: TopicEmbeddings | None
    text_model: str | None
    device: str
    on: date
    num_processes: int = 0
    storage_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageTags:
    """What is said of one image."""

    evidence: ImageEvidence
    categories: tuple[Category, ...]
    suitability: Suitability
    texts: TagTexts
    slots: tuple[AdSlot, ...]

    @property
    def review_reasons(self) -> tuple[str, ...]:
        promotional = [f"promotional text: {text!r}" for text in promotional_text(self.evidence.texts or ())]
        return tuple(dict.fromkeys([*self.suitability.doubts, *self.texts.doubts, *promotional]))


class Tagger:
    """Rules and models of one process."""

    def __init__(self, config: TagConfig) -> None:
        self.config = config
        self._provenance = {
            "taxonomy_name": config.recipe.taxonomy,
            "taxonomy_version": config.recipe.taxonomy_version,
            "taxonomy_hash": config.recipe.taxonomy_hash,
            "tag_recipe_id": config.recipe.recipe_id,
            "run_id": config.run_id,
        }
        self._writer = None
        if config.text_model:
            from vlm_ops.text_writer import TextWriter  # heavy, and seldom needed

            self._writer = TextWriter.load(config.text_model, config.device)

    def tag(self, work: TagWork) -> TagSummary:
        """Tags a part of the images and writes the part of the tags; or finds the one that is there: an earlier run has
        written it, or this one before the runner handed the work out again."""
        catalog, options = CatalogLayout(self.config.catalog), self.config.storage_options
        if found := read_tag_summary(catalog, work.name, options):
            return found
        stage_sec: dict[str, float] = {}
        return write_tags(catalog, work, self._rows(catalog, work, stage_sec), stage_sec, options, self.config.run_id)

    def _rows(
        self, catalog: CatalogLayout, work: TagWork, stage_sec: dict[str, float]
    ) -> Iterator[tuple[pa.RecordBatch, int]]:
        earlier = rows_by_image(catalog, work.earlier, self.config.storage_options)
        with storage.open_for_reading(f"{catalog.images}/{work.images_part}", self.config.storage_options) as file:
            for rows in batches(pq.ParquetFile(file), _BATCH_SIZE):
                hashes = row_hashes(rows)
                ids = zip(rows.column("image_id").to_pylist(), hashes, strict=True)
                made: list[dict[str, Any] | None] = [earlier.get(key) for key in ids]
                missing = [row for row, stored in enumerate(made) if stored is None]
                new = self.rows_of(rows.take(pa.array(missing, pa.int64())), stage_sec) if missing else []
                for row, values in zip(missing, new, strict=True):
                    made[row] = values | {"row_hash": hashes[row]}
                yield pa.RecordBatch.from_pylist([row for row in made if row], TAGS), len(made) - len(missing)

    def rows_of(self, rows: pa.RecordBatch, stage_sec: dict[str, float]) -> list[dict[str, Any]]:
        """Rows of `images` -> rows of `tags`, but for their `row_hash`."""
        clock = _Clock(stage_sec)
        evidences = evidence_of(rows)
        positions, embeddings = embeddings_of(rows)
        clock.book("read")
        categories: list[tuple[Category, ...]] = [()] * len(evidences)
        contradictions: list[str | None] = [None] * len(evidences)
        if self.config.scorer is not None and len(positions):
            found = self.config.scorer.assign_and_compare(embeddings, [evidences[row] for row in positions])
            for row, each, contradiction in zip(positions, *found, strict=True):
                categories[row], contradictions[row] = each, contradiction
        clock.book("categories")
        suitability = judge(evidences, _one_a_row(embeddings, positions, len(evidences)), self.config.looks)
        clock.book("suitability")
        texts = [write_texts(evidence, each) for evidence, each in zip(evidences, categories, strict=True)]
        texts = [
            replace(each, doubts=(*each.doubts, contradiction))
            if contradiction and "generated" in each.sources.values()
            else each
            for each, contradiction in zip(texts, contradictions, strict=True)
        ]
        clock.book("texts")
        if self._writer is not None:
            texts = self._writer.write(evidences, categories, texts)
            clock.book("text model")
        all_tags = [
            ImageTags(evidence, each, level, written, ad_slots(evidence, self.config.on))
            for evidence, each, level, written in zip(evidences, categories, suitability, texts, strict=True)
        ]
        made = [self._row(tags) | self._provenance for tags in all_tags]
        clock.book("slots and rows")
        return made

    def _row(self, tags: ImageTags) -> dict[str, Any]:
        evidence, focus = tags.evidence, tags.evidence.focus
        return {
            "image_id": evidence.image_id,
            "uri": evidence.uri,
            **_text_columns(tags.texts),
            "categories": [vars(category) for category in tags.categories],
            "sensitive_topics": [vars(topic) for topic in tags.suitability.topics],
            "suitability": tags.suitability.level,
            "suitability_evidence": tags.suitability.evidence,
            "dominant_colors": [
                {"hex": code, "share": share, "name": color_name(code)} for code, share in evidence.colors
            ],
            "focus": None if focus is None else {"x": focus[0], "y": focus[1]},
            "ad_slots": [{**vars(slot), "crop": slot.crop and vars(slot.crop)} for slot in tags.slots],
            "text_share": evidence.text_share,
            "num_faces": None if evidence.faces is None else len(evidence.faces),
            "rights": rights(evidence.metadata),
            **review(tags.review_reasons),
            "tag_source": {name: tags.texts.sources.get(name) for name in TEXT_FIELDS},
        }


class TaggerProcesses:
    """A tagger in processes of its own: its rules are Python's work, of which the threads of a process share one core."""

    def __init__(self, config: TagConfig) -> None:
        # There is a process for each core; threads of numpy's would only compete. Processes inherit it at their start.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._pool = ProcessPoolExecutor(config.num_processes, get_context("spawn"), _load, (config,))
        weakref.finalize(self, self._pool.shutdown, wait=False)

    def tag(self, work: TagWork) -> TagSummary:
        """As `Tagger.tag`."""
        return self._pool.submit(_tag, work).result()


def tagger_of(config: TagConfig) -> Tagger | TaggerProcesses:
    """What tags the parts, here or in processes of its own."""
    return TaggerProcesses(config) if config.num_processes else Tagger(config)


_tagger: Tagger  # of a process that TaggerProcesses has started


def _load(config: TagConfig) -> None:
    global _tagger
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _tagger = Tagger(config)
    # What was loaded stays; looking through it again and again would take a quarter of the time.
    gc.freeze()
    atexit.register(gc.unfreeze)


def _tag(work: TagWork) -> TagSummary:
    return _tagger.tag(work)


def _leave_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def review(reasons: Sequence[str]) -> dict[str, Any]:
    """The columns that say whether a person should look at an image, and why."""
    return {"review": "needs_review" if reasons else "ok", "review_reasons": list(reasons)}


def _one_a_row(embeddings: np.ndarray, positions: np.ndarray, num_rows: int) -> np.ndarray | None:
    """float32[num_rows, d], zeros where an image has no embedding; None where none has."""
    if not len(positions):
        return None
    rows = np.zeros((num_rows, embeddings.shape[1]), np.float32)
    rows[positions] = embeddings
    return rows


def _text_columns(texts: TagTexts) -> dict[str, Any]:
    return {name: value for name, value in vars(texts).items() if name not in ("sources", "doubts")}


class _Clock:
    """Books the seconds since the last booking under a stage."""

    def __init__(self, stage_sec: dict[str, float]) -> None:
        self._stage_sec = stage_sec
        self._last = time.perf_counter()

    def book(self, stage: str) -> None:
        now = time.perf_counter()
        self._stage_sec[stage] = self._stage_sec.get(stage, 0.0) + now - self._last
        self._last = now
