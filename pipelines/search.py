"""`beamsight search`: text or an image finds images."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.options import SearchOptions, model_settings
from schemas.catalog import CatalogLayout
from schemas.manifests import IndexManifest
from schemas.tables import RESULTS
from vlm_ops import storage
from vlm_ops.faiss_index import OpenIndex, open_index
from vlm_ops.models import ModelInfo, describe_model, load_image_model, load_text_model
from vlm_ops.models.settings import ModelSettings, resolve_device


@dataclass(frozen=True)
class Answer:
    """One query and its results: rows of the index with `score`, best first."""

    query: str
    is_image: bool
    results: list[dict[str, Any]]


def run(options: SearchOptions) -> int:
    """Answers the queries.

    Raises:
        FileNotFoundError: There is no catalog, or no such query file.
        ValueError: The catalog was built by another encoder, or a query image cannot be decoded.
    """
    settings = model_settings(options)
    if options.device != "auto":  # which takes torch, and seconds, to find out
        resolve_device(options.device)
    catalog = CatalogLayout(storage.normalise(options.catalog))
    texts = list(options.query) + (_read_queries(options.queries, options) if options.queries else [])
    index = open_index(catalog, options.storage_options)
    encoder = _encoder(index.manifest, options.model, catalog, settings)
    queries = [(text, False) for text in texts] + [(image, True) for image in options.image]
    vectors = np.concatenate(
        [_encode_texts(texts, encoder, index.manifest.d, settings), _encode_images(options, encoder, index.manifest.d)]
    )
    found = index.search(vectors, options.k, _chosen(index, catalog, options))
    answers = [Answer(query, is_image, rows) for (query, is_image), rows in zip(queries, found, strict=True)]
    for answer in answers:
        print(as_json(answer) if options.json or options.queries else as_table(answer))
    if options.html:
        _write_gallery(options.html, answers, options)
    return 0


def _chosen(index: OpenIndex, catalog: CatalogLayout, options: SearchOptions) -> np.ndarray | None:
    """The images for which --where holds; None without it."""
    if options.where is None:
        return None
    from vlm_ops.filters import matching_ids, open_tags  # heavy, and not always needed

    tags = open_tags(catalog, options.storage_options)
    return matching_ids(index.rows, tags, options.where, options.param)


def as_json(answer: Answer) -> str:
    """One JSON line: the query and its results with the fields of `schemas.tables.RESULTS`."""
    results = [{name: row.get(name) for name in RESULTS.names} for row in answer.results]
    return json.dumps({"query": answer.query, "results": results}, ensure_ascii=False)


def as_table(answer: Answer) -> str:
    """Score, labels and URI, one result a line."""
    lines = [f"{answer.query}"]
    for row in answer.results:
        labels = ", ".join(label["name"] for label in (row.get("labels") or [])[:2])
        caption = row.get("caption")
        lines.append(f"  {row['score']:6.3f}  {(caption or labels)[:44]:<44}  {row['uri']}")
    return "\n".join(lines if answer.results else [*lines, "  no images"])


def _encoder(manifest: IndexManifest, wanted: str | None, catalog: CatalogLayout, settings: ModelSettings) -> ModelInfo:
    info = describe_model(wanted or manifest.encoder, settings)
    if info.name != manifest.encoder_name:
        raise ValueError(
            f"the catalog {catalog.root} was built by encoder {manifest.encoder_name}, but the queries would be encoded by "
            f"{info.name}; their vectors cannot be compared: use the catalog's encoder, or build the catalog again with this one"
        )
    return info


def _encode_texts(texts: Sequence[str], encoder: ModelInfo, d: int, settings: ModelSettings) -> np.ndarray:
    if not texts:
        return np.empty((0, d), np.float32)
    return load_text_model(encoder.spec, replace(settings, device="cpu")).encode_texts(texts)


def _encode_images(options: SearchOptions, encoder: ModelInfo, d: int) -> np.ndarray:
    if not options.image:
        return np.empty((0, d), np.float32)
    from pipelines.query_images import encode_query_images  # heavy, and text queries do not need it

    model = load_image_model(encoder.spec, model_settings(options), frozenset({"embedding"}))
    embeddings = encode_query_images(model, options.image, options.storage_options, "search with").embeddings
    assert embeddings is not None
    return embeddings


def _read_queries(uri: str, options: SearchOptions) -> list[str]:
    try:
        text = storage.read_bytes(storage.normalise(uri), options.storage_options).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no query file {uri!r}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the query file {uri!r} is not UTF-8 text: {error}") from error
    queries = [line.strip() for line in text.splitlines() if line.strip()]
    if not queries:
        raise ValueError(f"the query file {uri!r} holds no queries; write one a line")
    return queries


def _write_gallery(uri: str, answers: Sequence[Answer], options: SearchOptions) -> None:
    from vlm_ops.pages import Section, card, render_gallery, thumbnail

    sections = []
    for answer in answers:
        picture = None
        if answer.is_image:
            picture = thumbnail(storage.read_bytes(storage.normalise(answer.query), options.storage_options))
        sections.append(Section(answer.query, [card(row, options.storage_options) for row in answer.results], picture))
    facts = [("catalog", options.catalog), ("queries", len(answers)), ("results a query", options.k)]
    page = render_gallery("Beamsight search", facts, sections)
    storage.write_bytes(storage.normalise(uri), page.encode(), options.storage_options)
    print(f"gallery    {uri}", file=sys.stderr)


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("search", sys.argv[1:]))
