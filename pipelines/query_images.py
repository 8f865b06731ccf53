"""Images that a command line names, encoded there and then: the queries of `search`, the images of `score`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schemas.recipes import DEFAULT_MAX_IMAGE_PIXELS
from schemas.samples import SampleError
from vlm_ops import storage
from vlm_ops.images import decode, preprocess
from vlm_ops.models import ImageEncoding, ImageModel


def encode_query_images(
    model: ImageModel,
    uris: Sequence[str],
    storage_options: storage.StorageOptions,
    purpose: str,
    max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
) -> ImageEncoding:
    """The encoding of files, at least one, in their order.

    Args:
        purpose: What the images are for, in the words of a message: "cannot {purpose} image ...".

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be decoded.
    """
    pixels = []
    for uri in uris:
        try:
            image = decode(storage.read_bytes(storage.normalise(uri), storage_options), max_pixels)
        except SampleError as error:
            raise ValueError(f"cannot {purpose} image {uri!r}: {error.message}") from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"cannot {purpose} image {uri!r}: no such file") from error
        pixels.append(preprocess(image.pixels, model.preprocessing).numpy())
    return model.encode_images(np.stack(pixels))
