"""Whether texts describe images, by a model that produces `match`: for `score` and `evaluate matcher`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
from tqdm import tqdm

from vlm_ops.cores import usable_cores
from vlm_ops.models import ImageEncoding, MatchingModel, describe_model, load_image_model
from vlm_ops.models.settings import ModelSettings

_PAIRS_PER_CALL = 512


def require_match(spec: str, settings: ModelSettings) -> None:
    """Raises:
    ValueError: The model is unknown, or does not match images and texts.
    """
    produces = describe_model(spec, settings).produces
    if "match" not in produces:
        raise ValueError(
            f"model {spec!r} does not say whether a text describes an image; it produces: "
            f"{', '.join(sorted(produces)) or 'nothing'}; name one that matches, such as 'compact'"
        )


def load_matching_model(spec: str, settings: ModelSettings) -> MatchingModel:
    """Raises:
    ValueError: As `require_match`, or the device is not there.
    """
    require_match(spec, settings)
    return cast(MatchingModel, load_image_model(spec, settings, frozenset({"match"})))


def match_pairs(
    model: MatchingModel,
    encoding: ImageEncoding,
    rows: Sequence[int] | np.ndarray,
    texts: Sequence[str],
    num_threads: int | None,
) -> np.ndarray:
    """float32[m]: the probability that texts[i] describes image rows[i] of the encoding. Shows a bar on a terminal."""
    starts = range(0, len(texts), _PAIRS_PER_CALL)

    def match(start: int) -> np.ndarray:
        chunk = slice(start, start + _PAIRS_PER_CALL)
        return model.match(encoding, [int(row) for row in rows[chunk]], texts[chunk])

    with ThreadPoolExecutor(num_threads or usable_cores()) as pool:
        matched = tqdm(pool.map(match, starts), total=len(starts), desc="pairs", disable=not sys.stderr.isatty())
        return np.concatenate([np.empty(0, np.float32), *matched])
