"""What image processors of transformers do, as `Preprocessing` and as two numbers a channel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_ops.preprocessing import Preprocessing

# ConvNeXt's image processor stretches from this size on, and crops below.
_STRETCHED_FROM = 384
# Of Pillow's filters, by the numbers that processors name them by, those that images are resized with here.
_INTERPOLATIONS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}


def load_image_processor(directory: Path, trust_remote_code: bool = False) -> Any:
    """Raises:
    ValueError: There is none beside the model.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the model in {str(directory)!r} has no image processor that can be read (preprocessor_config.json); save "
            "the one it was trained with there"
        ) from error


def is_naflex(processor: Any) -> bool:
    """Whether images keep their aspect ratio and become as many patches as fit (SigLIP 2's NaFlex)."""
    return hasattr(processor, "max_num_patches")


def read_preprocessing(processor: Any) -> Preprocessing:
    """What an image processor does to the geometry of an image; pixel for pixel what transformers makes of it.

    Raises:
        ValueError: The processor makes no square of one size, or resizes by a filter that is not known here.
    """
    if is_naflex(processor):
        raise ValueError(
            f"{type(processor).__name__} makes patches of images of many sizes; such a model encodes, but cannot be trained on: name "
            "one of a fixed size, such as hf:google/siglip2-base-patch16-224"
        )
    size = dict(processor.size)
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else {}
    resized, side = _square(size), _square(crop or size)
    if not processor.do_resize or resized is None or side is None or "longest_edge" in size:
        raise ValueError(
            f"{type(processor).__name__} with size {size} and crop_size {crop or None} does not resize every image to "
            "one square; give both sides of size, or of crop_size, the same length"
        )
    resample = getattr(processor, "resample", None)
    if resample is not None and int(resample) not in _INTERPOLATIONS:
        raise ValueError(
            f"{type(processor).__name__} resizes by Pillow's filter {int(resample)}, which is not supported; set resample "
            "to 3 (bicubic), 2 (bilinear) or 0 (nearest) in preprocessor_config.json"
        )
    interpolation = _INTERPOLATIONS[2 if resample is None else int(resample)]
    crop_pct = getattr(processor, "crop_pct", None)
    is_stretched = "height" in size
    if crop_pct and not crop:  # ConvNeXt's own way
        is_stretched = side >= _STRETCHED_FROM
        crop = {} if is_stretched else size
    if crop_pct and not is_stretched:
        resized = int(resized / crop_pct)
    if not is_stretched and not crop:
        raise ValueError(
            f"{type(processor).__name__} with size {size} keeps the aspect ratio of every image; give it a crop_size"
        )
    fraction = min(1.0, side / resized) if crop else 1.0
    found = Preprocessing(side, "stretch" if is_stretched else "cover", fraction, interpolation, crop_rounding="floor")
    _check_by(processor, found)
    return found


def _check_by(processor: Any, found: Preprocessing) -> None:
    """Compares with what the processor does, since some have ways of their own.

    Raises:
        ValueError: It makes other pixels.
    """
    import torch

    from vlm_ops.images import preprocess

    scale, shift = normalisation(processor)
    for shape in (
        (3, found.shorter_side + 59, 2 * found.shorter_side + 42),
        (3, found.size // 2 + 9, found.size // 3 + 6),
    ):
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        expected = processor([image], input_data_format="channels_first", return_tensors="np")["pixel_values"][0]
        actual = preprocess(torch.from_numpy(image), found).numpy() * scale + shift
        if expected.shape != actual.shape or (np.abs(expected - actual) > 1.01 * np.abs(scale)).any():  # of one level
            raise ValueError(
                f"{type(processor).__name__} does more to an image than to resize and to crop it ({found} comes nearest), which is "
                "not supported; name another model"
            )


def normalisation(processor: Any) -> tuple[np.ndarray, np.ndarray]:
    """`scale` and `shift`, float32[3, 1, 1], with pixels * scale + shift what the processor makes of pixels.

    They are found by asking it, since some rescale or normalise in ways of their own.

    Raises:
        ValueError: The processor does something else, such as flipping the channels.
    """
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    black, white, expected = processor(
        [np.zeros_like(noise), np.full_like(noise, 255), noise],
        do_resize=False, do_center_crop=False, input_data_format="channels_first", return_tensors="np",
    )["pixel_values"]  # fmt: skip
    shift = black[:, :1, :1]
    scale = (white[:, :1, :1] - shift) / 255
    if not np.allclose(noise * scale + shift, expected, atol=1e-4):
        raise ValueError(
            f"{type(processor).__name__} does more to the pixels than to rescale and normalise them, which is not "
            "supported; name another model"
        )
    return scale, shift


def _square(size: Mapping[str, int]) -> int | None:
    if "shortest_edge" in size:
        return size["shortest_edge"]
    return size["height"] if "height" in size and size["height"] == size.get("width") else None
