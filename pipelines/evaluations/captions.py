"""`beamsight evaluate captions`: the captions that a model gives, against those that people gave, against labels, and
against words that nobody should read in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.corpora import encode_corpus
from pipelines.evaluations.report import Evaluation, Example, best_and_worst, evaluation_of, mean, metadata_value
from pipelines.options import EvaluateOptions
from vlm_ops import storage
from vlm_ops.caption_metrics import bleu, bleu_counts, cider_d, rouge_l
from vlm_ops.mentions import has_any_word, mentions, words
from vlm_ops.metrics import Estimate, bootstrap

Row = Mapping[str, Any]
_COLUMNS = ("caption", "caption_source", "caption_score")


def measure(options: EvaluateOptions) -> Evaluation:
    """BLEU-4, CIDEr-D and ROUGE-L where images have captions of people, and what the captions name and should not.

    Raises:
        ValueError: The model gives no captions, or there is nothing to compare them with.
        FileNotFoundError: A pattern matches nothing, or there is no such file of synonyms.
    """
    synonyms = read_synonyms(options.synonyms, options.storage_options) if options.synonyms else {}
    table, _ = encode_corpus(options, options.input, ("quality", "caption"), _COLUMNS)
    rows = table.to_pylist()
    described = [row for row in rows if row["source_captions"]]
    if not (described or options.mention or options.never):
        raise ValueError(
            f"no image of {' '.join(options.input)} has a caption; name their field with --caption_field, or measure "
            "with --mention or --never"
        )
    counts = {
        "images": len(rows),
        "reference captions": sum(len(row["source_captions"]) for row in described),
        "images without captions": len(rows) - len(described),
    }
    figures: dict[str, Estimate] = {}
    named = {field: _named(rows, field, synonyms) for field in options.mention}
    unwanted = np.array([has_any_word(row["caption"], options.never) for row in rows], float)
    if described:
        figures, examples = _against_references(described)
    else:
        examples = _examples_by_names(rows, named, unwanted)
    figures["caption score"] = bootstrap(np.array([row["caption_score"] for row in rows]), mean)
    figures["captions of labels"] = bootstrap(
        np.array([row["caption_source"] == "labels" for row in rows], float), mean
    )
    for field, found in named.items():
        known = found[~np.isnan(found)]
        if not len(known):
            raise ValueError(
                f"no image of {' '.join(options.input)} has metadata {field!r}; name another with --mention"
            )
        counts[f"images with {field}"] = len(known)
        figures[f"names {field}"] = bootstrap(known, mean)
    if options.never:
        figures[f"names {options.never[0]}{' ...' if options.never[1:] else ''}"] = bootstrap(unwanted, mean)
    return evaluation_of(options, counts, figures, best_and_worst(examples))


def read_synonyms(uri: str, storage_options: storage.StorageOptions) -> dict[str, list[str]]:
    """Other words for a value of the metadata, by the value in lower case.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else than lists of words.
    """
    try:
        found = json.loads(storage.read_bytes(storage.normalise(uri), storage_options))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file of synonyms {uri!r}") from error
    except ValueError as error:
        raise ValueError(f"the file of synonyms {uri!r} is not JSON: {error}") from error
    if not isinstance(found, dict) or not all(_are_words(each) for each in found.values()):
        raise ValueError(f'the file of synonyms {uri!r} must be like {{"Tshirts": ["t-shirt", "tee"]}}')
    return {value.lower(): names for value, names in found.items()}


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _against_references(rows: Sequence[Row]) -> tuple[dict[str, Estimate], list[Example]]:
    """Figures, and examples by CIDEr-D, best first."""
    captions, references = [row["caption"] for row in rows], [row["source_captions"] for row in rows]
    cider = cider_d(captions, references)
    figures = {
        "BLEU-4": bootstrap(bleu_counts(captions, references), bleu),
        "CIDEr-D": bootstrap(cider, mean),
        "ROUGE-L": bootstrap(rouge_l(captions, references), mean),
    }
    order = np.argsort(-cider, kind="stable")
    examples = [
        Example(rows[i], f"CIDEr-D {cider[i]:.2f}: {captions[i]} (reference: {references[i][0]})") for i in order
    ]
    return figures, examples


def _named(rows: Sequence[Row], field: str, synonyms: Mapping[str, Sequence[str]]) -> np.ndarray:
    """float64[n]: 1 where the caption names the field's value, 0 where not, NaN where there is none to name."""
    named = np.full(len(rows), np.nan)
    for number, row in enumerate(rows):
        value = metadata_value(row, field)
        if value is not None and words(value):
            named[number] = mentions(row["caption"], [value, *synonyms.get(value.lower(), ())])
    return named


def _examples_by_names(rows: Sequence[Row], named: Mapping[str, np.ndarray], unwanted: np.ndarray) -> list[Example]:
    """Examples by how much of what they should they name, and by the model's own score."""
    merit = sum((np.nan_to_num(each) for each in named.values()), -unwanted)
    scores = np.array([row["caption_score"] for row in rows])
    return [Example(rows[i], _with_values(rows[i], named)) for i in np.lexsort((-scores, -merit))]


def _with_values(row: Row, fields: Mapping[str, np.ndarray]) -> str:
    values = {field: metadata_value(row, field) for field in fields}
    listed = ", ".join(f"{field}: {value}" for field, value in values.items() if value is not None)
    return f"{row['caption']} ({listed})" if listed else row["caption"]
