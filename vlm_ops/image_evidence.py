"""Rows of the `images` table -> all that is known of each image, for the rules of tagging."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.samples import to_json
from schemas.tags import Box, FoundText, ImageEvidence, Label

EVIDENCE_COLUMNS = (
    "image_id", "uri", "key", "width", "height", "format", "num_bytes", "caption", "caption_source", "caption_score", "labels", "source_captions",
    "source_metadata", "texts", "text_share", "nsfw_score", "faces", "focus", "crops", "dominant_colors", "quality_score",
    "quality_parts",
)  # fmt: skip
# What decides the others: the ops give equal images equal rows.
ROW_COLUMNS = ("uri", "key", "content_sha256", "recipe_id", "source_captions", "source_metadata")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def evidence_of(rows: pa.RecordBatch) -> list[ImageEvidence]:
    """One of each row; columns that an older part lacks count as null."""
    return [_evidence(row) for row in rows.select([n for n in EVIDENCE_COLUMNS if n in rows.schema.names]).to_pylist()]


def metadata_of(text: str | None) -> Mapping[str, Any]:
    """`source_metadata` parsed; what is no JSON object says nothing."""
    try:
        values = json.loads(text) if text else {}
        if text and _SURROGATE.search(text):  # half a character, which nothing can be written with
            values = json.loads(json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def row_hashes(rows: pa.RecordBatch) -> list[str]:
    """16 hex digits a row, of what decides all of its columns."""
    columns = [rows.column(name).to_pylist() for name in ROW_COLUMNS]
    return [hashlib.sha256(to_json(values).encode()).hexdigest()[:16] for values in zip(*columns, strict=True)]


def embeddings_of(rows: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """(positions int64[m] of the rows that have an embedding, their embeddings float32[m, d])."""
    if "image_embedding" not in rows.schema.names:
        return np.empty(0, np.int64), np.empty((0, 0), np.float32)
    values = rows.column("image_embedding")
    positions = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
    vectors = values.drop_null().flatten().to_numpy()
    return positions, vectors.reshape(len(positions), -1) if len(positions) else np.empty((0, 0), np.float32)


def columns_needed() -> tuple[str, ...]:
    """What is read of a part."""
    return tuple(dict.fromkeys([*EVIDENCE_COLUMNS, *ROW_COLUMNS, "image_embedding"]))


def _evidence(row: Mapping[str, Any]) -> ImageEvidence:
    texts, faces, focus = row.get("texts"), row.get("faces"), row.get("focus")
    parts = row.get("quality_parts") or {}
    return ImageEvidence(
        image_id=row["image_id"],
        uri=row["uri"],
        key=row.get("key") or "",
        width=row.get("width"),
        height=row.get("height"),
        format=row.get("format"),
        num_bytes=row.get("num_bytes"),
        caption=row.get("caption"),
        caption_source=row.get("caption_source"),
        caption_score=row.get("caption_score"),
        labels=tuple(Label(label["name"], label["score"]) for label in row.get("labels") or ()),
        source_captions=tuple(text for text in row.get("source_captions") or () if text),
        metadata=metadata_of(row.get("source_metadata")),
        texts=None if texts is None else tuple(FoundText(t["text"], t["score"], Box(**t["box"])) for t in texts),
        text_share=row.get("text_share"),
        nsfw_score=row.get("nsfw_score"),
        faces=None if faces is None else tuple(Box(**face["box"]) for face in faces),
        focus=None if focus is None else (focus["x"], focus["y"]),
        crops={crop["aspect"]: Box(**crop["box"]) for crop in row.get("crops") or ()},
        colors=tuple((color["hex"], color["share"]) for color in row.get("dominant_colors") or ()),
        quality_score=row.get("quality_score"),
        plain_background=parts.get("plain_background"),
        border=parts.get("border"),
    )


def batches(parquet: Any, batch_size: int) -> Iterator[pa.RecordBatch]:
    """The needed columns of a part, some rows at a time."""
    present = [name for name in columns_needed() if name in parquet.schema_arrow.names]
    yield from parquet.iter_batches(batch_size=batch_size, columns=present)
