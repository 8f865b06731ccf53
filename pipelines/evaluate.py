"""`beamsight evaluate`: how good a model is, on images with captions or labels.

The images go through the same readers, decoders and ops as in `build`, into part files of the user's
cache, so that a second evaluation of the same model and images computes nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipelines.corpora import encode_corpus, matrix
from pipelines.options import EvaluateOptions
from vlm_ops import storage
from vlm_ops.metrics import (
    RECALL_AT,
    Estimate,
    bootstrap,
    image_to_text_ranks,
    recall_at,
    text_to_image_ranks,
    top_k_accuracy,
)
from vlm_ops.models import load_text_model
from vlm_ops.pages import Section, card, render_gallery

_NUM_EXAMPLES = 12
_OPS = ("quality", "embedding")


@dataclass(frozen=True)
class Example:
    """One image of the page: its row, what was asked of it, and how that went."""

    row: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        figures: Estimates by name, such as `text->image R@10`.
        counts: What they were measured on.
        best, worst: Examples for the page.
    """

    task: str
    model: str
    inputs: tuple[str, ...]
    counts: dict[str, int]
    figures: dict[str, Estimate]
    best: list[Example] = field(default_factory=list, repr=False)
    worst: list[Example] = field(default_factory=list, repr=False)


def run(options: EvaluateOptions) -> int:
    """Measures, and prints a table or JSON.

    Raises:
        ValueError: The model makes no embeddings, or no image has a caption or label.
        FileNotFoundError: A pattern matches nothing.
    """
    rows, vectors, model_name = _embeddings(options)
    if options.task == "retrieval":
        evaluation = evaluate_retrieval(rows, vectors, model_name, options)
    else:
        evaluation = evaluate_zero_shot(rows, vectors, model_name, options)
    print(as_json(evaluation) if options.json else as_table(evaluation))
    if options.html:
        storage.write_bytes(
            storage.normalise(options.html), as_page(evaluation, options).encode(), options.storage_options
        )
        print(f"page       {options.html}", file=sys.stderr)
    return 0


def _embeddings(options: EvaluateOptions) -> tuple[list[dict[str, Any]], np.ndarray, str]:
    """(rows, embeddings float32[n, d], model name) of all images of the inputs, in their order."""
    table, recipe = encode_corpus(options, options.input, _OPS)
    embedding = recipe.op("embedding")
    assert embedding is not None
    rows = table.drop_columns(["image_embedding"]).to_pylist()
    return rows, matrix(table, "image_embedding"), f"{embedding.model}@{embedding.revision}"


def evaluate_retrieval(
    rows: Sequence[dict[str, Any]], vectors: np.ndarray, model_name: str, options: EvaluateOptions
) -> Evaluation:
    """Recall and median rank, captions to images and images to captions."""
    kept = [number for number, row in enumerate(rows) if row["source_captions"]]
    num_without = len(rows) - len(kept)
    if not kept:
        raise ValueError(f"no image of {' '.join(options.input)} has a caption; name their field with --caption_field")
    rows, vectors = [rows[number] for number in kept], vectors[kept]
    captions = [caption for row in rows for caption in row["source_captions"]]
    owners = np.array([number for number, row in enumerate(rows) for _ in row["source_captions"]])
    similarity = load_text_model(options.model, options.device).encode_texts(captions) @ vectors.T
    to_image, to_text = text_to_image_ranks(similarity, owners), image_to_text_ranks(similarity, owners)
    figures = {
        **_rank_figures("text->image", to_image, owners),
        **_rank_figures("image->text", to_text, np.arange(len(rows))),
    }
    margin = similarity[np.arange(len(owners)), owners]
    order = np.lexsort((-margin, to_image))
    examples = [Example(rows[owners[i]], f"rank {to_image[i]}: {captions[i]}") for i in order]
    counts = {"images": len(rows), "captions": len(captions), "images without captions": num_without}
    return _evaluation("retrieval", model_name, options, counts, figures, examples)


def evaluate_zero_shot(
    rows: Sequence[dict[str, Any]], vectors: np.ndarray, model_name: str, options: EvaluateOptions
) -> Evaluation:
    """Share of the images whose label is the best, or among the five best, of all labels."""
    labels = [_label(row, options.label_field) for row in rows]
    kept = [number for number, label in enumerate(labels) if label is not None]
    if not kept:
        raise ValueError(
            f"no image of {' '.join(options.input)} has metadata {options.label_field!r}; name it with --label_field"
        )
    rows, vectors = [rows[number] for number in kept], vectors[kept]
    names = sorted({str(labels[number]) for number in kept})
    targets = np.array([names.index(str(labels[number])) for number in kept])
    text_model = load_text_model(options.model, options.device)
    texts = sum(
        text_model.encode_texts([each.replace("{}", name.lower()) for name in names]) for each in options.template
    )
    scores = vectors @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    figures = {
        f"top-{k}": bootstrap(top_k_accuracy(scores, targets, k).astype(float), _mean) for k in (1, 5) if k < len(names)
    }
    own = scores[np.arange(len(targets)), targets]
    best = np.where(np.arange(len(names)) == targets[:, None], -np.inf, scores).max(axis=1, initial=-1.0)
    order = np.argsort(best - own, kind="stable")
    found = scores.argmax(axis=1)
    examples = [
        Example(rows[i], names[targets[i]] + ("" if found[i] == targets[i] else f", taken for {names[found[i]]}"))
        for i in order
    ]
    return _evaluation("zero-shot", model_name, options, {"images": len(rows), "labels": len(names)}, figures, examples)


def as_table(evaluation: Evaluation) -> str:
    """For a person: each figure with its 95 % interval."""
    counts = ", ".join(f"{count} {name}" for name, count in evaluation.counts.items())
    lines = [f"{evaluation.task} of {' '.join(evaluation.inputs)} ({counts})", f"by {evaluation.model}", ""]
    width = max(len(name) for name in evaluation.figures)
    for name, figure in evaluation.figures.items():
        lines.append(
            f"{name:<{width}}  {figure.value:8.3f}  95 % of resamples in [{figure.low:.3f}, {figure.high:.3f}]"
        )
    return "\n".join(lines)


def as_json(evaluation: Evaluation) -> str:
    """For a program."""
    return json.dumps(
        {
            "task": evaluation.task,
            "model": evaluation.model,
            "inputs": evaluation.inputs,
            "counts": evaluation.counts,
            "figures": {name: asdict(figure) for name, figure in evaluation.figures.items()},
        }
    )


def as_page(evaluation: Evaluation, options: EvaluateOptions) -> str:
    """Best and worst examples, to look at."""
    sections = []
    for title, examples in (("Best", evaluation.best), ("Worst", evaluation.worst)):
        cards = [card({**example.row, "caption": example.text}, options.storage_options) for example in examples]
        sections.append(Section(title, cards))
    facts = [("model", evaluation.model), ("inputs", " ".join(evaluation.inputs)), *evaluation.counts.items()]
    table = [
        (name, f"{each.value:.3f}", f"[{each.low:.3f}, {each.high:.3f}]") for name, each in evaluation.figures.items()
    ]
    return render_gallery(f"Beamsight {evaluation.task}", facts, sections, table)


def _evaluation(
    task: str,
    model_name: str,
    options: EvaluateOptions,
    counts: dict[str, int],
    figures: dict[str, Estimate],
    examples: list[Example],
) -> Evaluation:
    """`examples` come best first; each image is shown once at either end."""
    best, worst = _first_of_each(examples), _first_of_each(examples[::-1])
    return Evaluation(task, model_name, options.input, counts, figures, best, worst)


def _first_of_each(examples: Sequence[Example]) -> list[Example]:
    of_image: dict[int, Example] = {}
    for example in examples:
        of_image.setdefault(example.row["image_id"], example)
        if len(of_image) == _NUM_EXAMPLES:
            break
    return list(of_image.values())


def _rank_figures(direction: str, ranks: np.ndarray, images: np.ndarray) -> dict[str, Estimate]:
    """Captions of one image are no independent draws, so images are resampled."""
    figures = {f"{direction} R@{k}": bootstrap(ranks, _recall(k), images) for k in RECALL_AT}
    return {**figures, f"{direction} median rank": bootstrap(ranks, lambda each: float(np.median(each)), images)}


def _recall(k: int) -> Callable[[np.ndarray], float]:
    return lambda ranks: recall_at(ranks, k)


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _label(row: dict[str, Any], label_field: str) -> str | None:
    value = json.loads(row["source_metadata"] or "{}").get(label_field)
    return None if value is None or isinstance(value, (dict, list)) else str(value)


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("evaluate", sys.argv[1:]))
