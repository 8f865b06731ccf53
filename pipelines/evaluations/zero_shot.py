"""`beamsight evaluate zero-shot`: the best of all labels, by sentences that name them."""

from __future__ import annotations

import numpy as np

from pipelines.corpora import encode_corpus, matrix
from pipelines.evaluations.report import Evaluation, Example, best_and_worst, evaluation_of, mean, metadata_value
from pipelines.options import EvaluateOptions, model_settings
from vlm_ops.metrics import bootstrap, top_k_accuracy
from vlm_ops.models import load_text_model


def measure(options: EvaluateOptions) -> Evaluation:
    """Share of the images whose label is the best, or among the five best, of all labels.

    Raises:
        ValueError: The model makes no embeddings, or no image has a label.
        FileNotFoundError: A pattern matches nothing.
    """
    table, _ = encode_corpus(options, options.input, ("quality", "embedding"), ["image_embedding"])
    all_vectors, all_rows = matrix(table, "image_embedding"), table.drop_columns(["image_embedding"]).to_pylist()
    labels = [metadata_value(row, options.label_field) for row in all_rows]
    kept = [number for number, label in enumerate(labels) if label is not None]
    if not kept:
        raise ValueError(
            f"no image of {' '.join(options.input)} has metadata {options.label_field!r}; name it with --label_field"
        )
    rows, vectors = [all_rows[number] for number in kept], all_vectors[kept]
    names = sorted({str(labels[number]) for number in kept})
    targets = np.array([names.index(str(labels[number])) for number in kept])
    text_model = load_text_model(options.model, model_settings(options))
    texts = sum(
        text_model.encode_texts([each.replace("{}", name.lower()) for name in names]) for each in options.template
    )
    scores = vectors @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
    figures = {
        f"top-{k}": bootstrap(top_k_accuracy(scores, targets, k).astype(float), mean) for k in (1, 5) if k < len(names)
    }
    own = scores[np.arange(len(targets)), targets]
    best = np.where(np.arange(len(names)) == targets[:, None], -np.inf, scores).max(axis=1, initial=-1.0)
    order = np.argsort(best - own, kind="stable")
    found = scores.argmax(axis=1)
    examples = [
        Example(rows[i], names[targets[i]] + ("" if found[i] == targets[i] else f", taken for {names[found[i]]}"))
        for i in order
    ]
    counts = {"images": len(rows), "labels": len(names)}
    return evaluation_of(options, counts, figures, best_and_worst(examples))
