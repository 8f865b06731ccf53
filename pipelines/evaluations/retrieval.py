"""`beamsight evaluate retrieval`: captions find their image, and images their captions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipelines.corpora import encode_corpus, matrix, with_captions
from pipelines.evaluations.report import Evaluation, Example, best_and_worst, evaluation_of
from pipelines.options import EvaluateOptions, model_settings
from vlm_ops.metrics import RECALL_AT, Estimate, bootstrap, image_to_text_ranks, recall_at, text_to_image_ranks
from vlm_ops.models import load_text_model


def measure(options: EvaluateOptions) -> Evaluation:
    """Recall and median rank, both ways.

    Raises:
        ValueError: The model makes no embeddings, or no image has a caption.
        FileNotFoundError: A pattern matches nothing.
    """
    corpus, _ = encode_corpus(options, options.input, ("quality", "embedding"), ["image_embedding"])
    table = with_captions(corpus, options.input)
    vectors, rows = matrix(table, "image_embedding"), table.drop_columns(["image_embedding"]).to_pylist()
    captions = [caption for row in rows for caption in row["source_captions"]]
    owners = np.array([number for number, row in enumerate(rows) for _ in row["source_captions"]])
    similarity = load_text_model(options.model, model_settings(options)).encode_texts(captions) @ vectors.T
    to_image, to_text = text_to_image_ranks(similarity, owners), image_to_text_ranks(similarity, owners)
    figures = {
        **_rank_figures("text->image", to_image, owners),
        **_rank_figures("image->text", to_text, np.arange(len(rows))),
    }
    margin = similarity[np.arange(len(owners)), owners]
    order = np.lexsort((-margin, to_image))
    examples = [Example(rows[owners[i]], f"rank {to_image[i]}: {captions[i]}") for i in order]
    counts = {
        "images": len(rows),
        "captions": len(captions),
        "images without captions": corpus.num_rows - len(rows),
    }
    return evaluation_of(options, counts, figures, best_and_worst(examples))


def _rank_figures(direction: str, ranks: np.ndarray, images: np.ndarray) -> dict[str, Estimate]:
    """Captions of one image are no independent draws, so images are resampled."""
    figures = {f"{direction} R@{k}": bootstrap(ranks, _recall(k), images) for k in RECALL_AT}
    return {**figures, f"{direction} median rank": bootstrap(ranks, lambda each: float(np.median(each)), images)}


def _recall(k: int) -> Callable[[np.ndarray], float]:
    return lambda ranks: recall_at(ranks, k)
