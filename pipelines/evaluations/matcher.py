"""`beamsight evaluate matcher`: whether a model tells an image's own captions from those of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.corpora import encode_corpus, matrix, with_captions
from pipelines.evaluations.report import Evaluation, Example, evaluation_of
from pipelines.matching import load_matching_model, match_pairs, require_match
from pipelines.options import EvaluateOptions, model_settings
from vlm_ops.metrics import Estimate, accuracy, area_under_curve, bootstrap
from vlm_ops.models import ImageEncoding, describe_model
from vlm_ops.pairs import NO_IMAGE, other_images

# What is kept of an image for the model to match: op, column and where an encoding holds it.
_KEPT = (("features", "features", "features"), ("embedding", "image_embedding", "embeddings"))


def measure(options: EvaluateOptions) -> Evaluation:
    """AUC, and accuracy at a probability of one half, on as many right pairs as wrong ones.

    Of an encoding, the model's `match` may read features and embeddings, which are all that is kept of it.

    Raises:
        ValueError: The model cannot match, or no two images have different captions.
        FileNotFoundError: A pattern matches nothing.
    """
    settings = model_settings(options)
    require_match(options.model, settings)
    kept = [each for each in _KEPT if each[0] in describe_model(options.model, settings).produces]
    columns = [column for _, column, _ in kept]
    corpus, _ = encode_corpus(options, options.input, ("quality", *(op for op, _, _ in kept)), columns)
    table = with_captions(corpus, options.input)
    arrays: dict[str, Any] = {field: matrix(table, column) for _, column, field in kept}
    rows = table.drop_columns(columns).to_pylist()
    owners, others, texts = draw_pairs([row["source_captions"] for row in rows])
    if not len(texts):
        raise ValueError(
            f"no two images of {' '.join(options.input)} have different captions, so there are no wrong pairs; give more"
        )
    model = load_matching_model(options.model, settings)
    images = np.concatenate([owners, others])
    probabilities = match_pairs(model, ImageEncoding(**arrays), images, [*texts, *texts], options.num_threads)
    # The pairs of one image's captions are no independent draws.
    figures = _figures(probabilities, np.concatenate([owners, owners]))
    right, wrong = np.split(probabilities, 2)
    examples = {
        "Wrong pairs that it believes": [
            Example(rows[others[i]], f"{wrong[i]:.3f}: {texts[i]}") for i in np.argsort(-wrong, kind="stable")
        ],
        "Right pairs that it doubts": [
            Example(rows[owners[i]], f"{right[i]:.3f}: {texts[i]}") for i in np.argsort(right, kind="stable")
        ],
    }
    counts = {
        "images": len(rows),
        "right pairs": len(texts),
        "wrong pairs": len(texts),
        "images without captions": corpus.num_rows - len(rows),
    }
    return evaluation_of(options, counts, figures, examples)


def _figures(probabilities: np.ndarray, groups: np.ndarray) -> dict[str, Estimate]:
    """Of right pairs, and behind them as many wrong ones."""
    pairs = np.stack([probabilities, np.repeat([1.0, 0.0], len(probabilities) // 2)], axis=1)
    return {
        "AUC": bootstrap(pairs, lambda each: area_under_curve(each[:, 0], each[:, 1]), groups),
        "accuracy": bootstrap(pairs, lambda each: accuracy(each[:, 0], each[:, 1]), groups),
    }


def draw_pairs(captions: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """Each caption with its own image, and with another, drawn at random, that has no such caption.

    Args:
        captions: Those of each image. One that all images have is left out.

    Returns:
        The captions' own images, the others, and the captions.
    """
    texts = [text for own in captions for text in own]
    owners = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    numbers: dict[str, int] = {}
    captions_by_text = np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
    others = other_images(owners, captions_by_text, len(captions))
    kept = np.flatnonzero(others != NO_IMAGE)
    return owners[kept], others[kept], [texts[i] for i in kept]
