"""`beamsight evaluate`: how good a model is, on images with captions or labels, and how good the tags of a catalog are.

The images go through the same readers, decoders and ops as in `build`, into part files of the user's
cache, so that a second evaluation of the same model and images computes nothing.
"""

from __future__ import annotations

import sys

from pipelines.evaluations import captions, drift, matcher, retrieval, tags, zero_shot
from pipelines.evaluations.report import as_json, as_page, as_table
from pipelines.options import EvaluateOptions
from vlm_ops import storage

_MEASURES = {
    "retrieval": retrieval.measure,
    "zero-shot": zero_shot.measure,
    "captions": captions.measure,
    "matcher": matcher.measure,
    "tags": tags.measure,
    "drift": drift.measure,
}


def run(options: EvaluateOptions) -> int:
    """Measures, and prints a table or JSON.

    Raises:
        ValueError: The model does not make what is measured, or no image has what it is measured with.
        FileNotFoundError: A pattern matches nothing, or there is no such file of synonyms.
    """
    evaluation = _MEASURES[options.task](options)
    print(as_json(evaluation) if options.json else as_table(evaluation))
    if options.html:
        storage.write_bytes(
            storage.normalise(options.html), as_page(evaluation, options).encode(), options.storage_options
        )
        print(f"page       {options.html}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("evaluate", sys.argv[1:]))
