"""`beamsight evaluate drift`: what another precision, engine or device changes in vectors and in what is found by them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipelines.corpora import encode_corpus, matrix
from pipelines.evaluations.report import Evaluation, Example, evaluation_of, mean
from pipelines.options import EvaluateOptions, model_settings
from vlm_ops.metrics import Estimate, bootstrap, kept_neighbours, recall_at, row_cosines, text_to_image_ranks
from vlm_ops.models import describe_model, load_text_model
from vlm_ops.models.settings import CPU, ModelSettings, resolved

NUM_NEIGHBOURS = 10
_ROWS_AT_ONCE = 1024
# By what each image is compared: the first of these that the model makes.
_VECTORS = (("embedding", "image_embedding"), ("features", "features"))


def measure(options: EvaluateOptions) -> Evaluation:
    """Each image's vector by the settings that are asked for, against its vector by torch in float32 on the CPU: cosines, and
    the share of the nearest neighbours that stay. Texts are encoded as ever, in float32.

    The settings go into the recipe of what is kept, resolved, so that no vector of another way is taken for one of this.

    Raises:
        ValueError: The model makes no vectors of images or cannot be run by the settings, or the images are too few.
        FileNotFoundError: A pattern matches nothing.
    """
    run = resolved(model_settings(options))
    made = describe_model(options.model, run).produces
    op, column = next((each for each in _VECTORS if each[0] in made), _VECTORS[0])
    table = _encoded(options, run, op, column)
    reference = _encoded(options, ModelSettings(device="cpu", dtype="float32", engine="torch"), op, column)
    if table["image_id"] != reference["image_id"]:
        raise ValueError(f"some images of {' '.join(options.input)} failed one way only; leave them out")
    if table.num_rows < NUM_NEIGHBOURS + 2:
        raise ValueError(
            f"{' '.join(options.input)} has {table.num_rows} images; {NUM_NEIGHBOURS} nearest neighbours of each need at "
            f"least {NUM_NEIGHBOURS + 2}"
        )
    rows = table.drop_columns([column]).to_pylist()
    vectors, exact = matrix(table, column), matrix(reference, column)
    cosines = row_cosines(vectors, exact)
    figures = {
        "mean cosine": bootstrap(cosines, mean),
        "least cosine": bootstrap(cosines, lambda each: float(each.min())),
        f"image->image, {NUM_NEIGHBOURS} nearest that stay": bootstrap(_kept_among_images(vectors, exact), mean),
    }
    counts = {"images": len(rows)}
    captions = [caption for row in rows for caption in row["source_captions"]]
    if captions and op == "embedding" and describe_model(options.model, run).encodes_text:
        owners = np.array([number for number, row in enumerate(rows) for _ in row["source_captions"]])
        figures |= _by_texts(load_text_model(options.model, CPU).encode_texts(captions), vectors, exact, owners)
        counts["captions"] = len(captions)
    farthest = [Example(rows[i], f"cosine {cosines[i]:.5f}") for i in np.argsort(cosines, kind="stable")]
    evaluation = evaluation_of(options, counts, figures, {"Farthest from float32": farthest})
    return replace(evaluation, model=f"{evaluation.model}, {op} in {_words(run)} against float32 by torch on the CPU")


def _words(run: ModelSettings) -> str:
    return f"{run.dtype} by {run.engine}{', compiled,' if run.compile else ''} on {run.device}"


def _encoded(options: EvaluateOptions, run: ModelSettings, op: str, column: str) -> pa.Table:
    """The images by a way of running, which stands in the recipe, or in the name of the folder of what is kept."""
    asked = replace(options, device=run.device, dtype=run.dtype, engine=run.engine, compile=run.compile)
    folder = f"drift-{run.device.partition(':')[0]}{'-compiled' if run.compile else ''}"
    return encode_corpus(asked, options.input, ("quality", op), [column], folder)[0]


def _kept_among_images(vectors: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """float[n]: of each image, the share of its nearest other images that stay."""
    shares = []
    for rows in _blocks(len(vectors)):
        similarity, reference = (_among(each, rows) for each in (_unit(vectors), _unit(exact)))
        shares.append(kept_neighbours(similarity, reference, NUM_NEIGHBOURS))
    return np.concatenate(shares)


def _among(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float32[rows, n]: the similarity of images to all others; of each to itself -inf."""
    similarity = vectors[rows] @ vectors.T
    similarity[np.arange(len(rows)), rows] = -np.inf
    return similarity


def _by_texts(texts: np.ndarray, vectors: np.ndarray, exact: np.ndarray, owners: np.ndarray) -> dict[str, Estimate]:
    """What texts float32[m, d] find, of which each belongs to an image. Those of one image are resampled together."""
    kept, ranks, exact_ranks = [], [], []
    for rows in _blocks(len(texts)):
        similarity, reference = texts[rows] @ vectors.T, texts[rows] @ exact.T
        kept.append(kept_neighbours(similarity, reference, NUM_NEIGHBOURS))
        ranks.append(text_to_image_ranks(similarity, owners[rows]))
        exact_ranks.append(text_to_image_ranks(reference, owners[rows]))

    def recall(each: np.ndarray) -> float:
        return recall_at(each, NUM_NEIGHBOURS)

    return {
        f"text->image, {NUM_NEIGHBOURS} nearest that stay": bootstrap(np.concatenate(kept), mean, owners),
        f"text->image R@{NUM_NEIGHBOURS}": bootstrap(np.concatenate(ranks), recall, owners),
        f"text->image R@{NUM_NEIGHBOURS} in float32": bootstrap(np.concatenate(exact_ranks), recall, owners),
    }


def _blocks(num_rows: int) -> Iterator[np.ndarray]:
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        yield np.arange(start, min(num_rows, start + _ROWS_AT_ONCE))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
