"""`beamsight score`: how likely texts describe images; for a look at some, or to filter a corpus."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from dataclasses import asdict, dataclass

import numpy as np

from pipelines.corpora import encode_corpus, with_captions
from pipelines.matching import load_matching_model, match_pairs, require_match
from pipelines.options import ScoreOptions, model_settings
from pipelines.query_images import encode_query_images
from vlm_ops import storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """A pair, and the probability that they belong together, in [0, 1]."""

    uri: str
    caption: str
    probability: float


def run(options: ScoreOptions) -> int:
    """Scores the pairs, and prints a table or JSON lines.

    Raises:
        ValueError: The model cannot match, an image cannot be decoded, or none has a caption.
        FileNotFoundError: A pattern or an image is not there.
    """
    require_match(options.model, model_settings(options))
    _check_output(options)
    scores = score_own_captions(options) if options.input else score_all_pairs(options)
    if options.output:
        data = "".join(f"{as_json(each)}\n" for each in scores).encode()
        storage.write_bytes(storage.normalise(options.output), data, options.storage_options)
        print(f"scores     {options.output} ({len(scores)} pairs)", file=sys.stderr)
    elif options.json or options.input:
        for each in scores:
            print(as_json(each))
    else:
        print(as_table(scores))
    return 0


def score_all_pairs(options: ScoreOptions) -> list[Score]:
    """Every image of --image with every text of --text."""
    model = load_matching_model(options.model, model_settings(options))
    encoding = encode_query_images(model, options.image, options.storage_options, "score", options.max_image_pixels)
    rows = np.repeat(np.arange(len(options.image)), len(options.text))
    texts = list(options.text) * len(options.image)
    probabilities = match_pairs(model, encoding, rows, texts, options.num_threads)
    return [_score(options.image[row], *pair) for row, *pair in zip(rows, texts, probabilities, strict=True)]


def score_own_captions(options: ScoreOptions) -> list[Score]:
    """Every image of --input with each of its captions, in their order."""
    corpus, _ = encode_corpus(options, options.input, ("caption_match",), ["source_caption_match"])
    table = with_captions(corpus, options.input)
    if num_without := corpus.num_rows - table.num_rows:
        logger.info("%d images have no caption and are left out", num_without)
    columns = (table[name].to_pylist() for name in ("uri", "source_captions", "source_caption_match"))
    return [
        _score(uri, caption, probability)
        for uri, captions, probabilities in zip(*columns, strict=True)
        for caption, probability in zip(captions, probabilities, strict=True)
    ]


def as_json(score: Score) -> str:
    """One JSON line."""
    return json.dumps(asdict(score), ensure_ascii=False)


def as_table(scores: list[Score]) -> str:
    """For a person: the texts of each image, in their order."""
    lines: list[str] = []
    for uri, of_image in itertools.groupby(scores, lambda each: each.uri):
        lines += [uri, *(f"  {each.probability:6.3f}  {each.caption}" for each in of_image)]
    return "\n".join(lines)


def _score(uri: str, caption: str, probability: float) -> Score:
    return Score(uri, caption, round(float(probability), 6))


def _check_output(options: ScoreOptions) -> None:
    """A file that cannot be written says so before any work."""
    if not options.output or not storage.is_local(options.output):
        return
    path = storage.normalise(options.output)
    if os.path.isdir(path):
        raise ValueError(f"--output {options.output!r} is a directory; name a file")
    storage.check_writable(os.path.dirname(path))


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("score", sys.argv[1:]))
