"""Images with captions that are not theirs, for training and for measuring what tells them from their own."""

from __future__ import annotations

import numpy as np

NO_IMAGE = -1


def other_images(owners: np.ndarray, captions: np.ndarray, num_images: int, seed: int = 0) -> np.ndarray:
    """For each caption of an image another image, drawn at random, that has no such caption.

    Args:
        owners, captions: int64[m], all pairs that belong together: numbers of images, and of captions by their text.

    Returns:
        int64[m], numbers of images; NO_IMAGE where all have the caption.
    """
    rng = np.random.default_rng(seed)
    others = (owners + rng.integers(1, max(num_images, 2), len(owners))) % num_images
    num_captions = captions.max(initial=0) + 1
    is_own = np.isin(others * num_captions + captions, owners * num_captions + captions)
    for caption in np.unique(captions[is_own]):
        places = np.flatnonzero(is_own & (captions == caption))
        without = np.setdiff1d(np.arange(num_images), owners[captions == caption])
        others[places] = rng.choice(without, len(places)) if len(without) else NO_IMAGE
    return others
