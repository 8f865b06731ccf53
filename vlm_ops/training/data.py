"""Images with captions, as the tasks of training take them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vlm_ops.pairs import NO_IMAGE, other_images

_CHUNK = 64
_SEEN_FIRST = 256  # images by which the features of a backbone are known well enough to be standardised


@dataclass(frozen=True)
class CaptionedImages:
    """n images and their captions.

    Attributes:
        images: What stands for them, each [n, ...]: `features`, `grid` and `embedding` of a frozen base, or
            `pixels` for one that is fine-tuned.
        captions: For each image the rows of `sentences` that are its captions, at least one.
        sentences: The distinct captions.
        texts: What stands for the sentences, each [m, ...]: `vectors` of a frozen text model, or `ids` and `mask`
            for one that is fine-tuned; empty where the task reads sentences.
        mirrored: What stands for the images turned left to right; empty where training does without.
    """

    images: Mapping[str, np.ndarray]
    captions: Sequence[Sequence[int]]
    sentences: Sequence[str]
    texts: Mapping[str, np.ndarray] = field(default_factory=dict)
    mirrored: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.captions) or not all(len(each) for each in self.captions):
            raise ValueError("every image needs a caption, and there must be an image")

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def num_captions(self) -> int:
        return sum(len(each) for each in self.captions)

    def image_inputs(self, rows: np.ndarray | slice, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Tensors of some images."""
        return {name: torch.from_numpy(values[rows]).to(device) for name, values in self.images.items()}

    def drawn_inputs(self, rows: np.ndarray, rng: np.random.Generator, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Tensors of some images, each mirrored or not by chance, where they are known mirrored."""
        if not self.mirrored:
            return self.image_inputs(rows, device)
        turned = rng.random(len(rows)) < 0.5
        inputs = {}
        for name, values in self.images.items():
            chosen = values[rows]
            chosen[turned] = self.mirrored[name][rows[turned]]
            inputs[name] = torch.from_numpy(chosen).to(device)
        return inputs

    def text_inputs(self, rows: np.ndarray | slice, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Tensors of some sentences."""
        return {name: torch.from_numpy(values[rows]).to(device) for name, values in self.texts.items()}

    def draw_captions(self, images: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Up to `count` different captions of each image: rows of `sentences`."""
        return [rng.permutation(np.asarray(self.captions[image]))[:count] for image in images]

    @property
    def fingerprint(self) -> str:
        """Changes with the data."""
        digest = hashlib.sha256("\0".join(self.sentences).encode("utf-8", "backslashreplace"))
        digest.update(np.concatenate(caption_owners(self)).astype(np.int64).tobytes())
        for name, values in sorted(self.images.items()):
            digest.update(
                f"{name} {values.shape} {values[:: max(1, len(values) // 64)].sum(dtype=np.float64)}".encode()
            )
        return digest.hexdigest()[:16]


def features_at_the_start(data: CaptionedImages, backbone: Any, device: str) -> torch.Tensor:
    """float32[k, feature_dim] of training images, for standardising: those of the frozen base; or, of a backbone that
    is to be fine-tuned, what it gives for some of them before it is."""
    if "features" in data.images:
        return torch.from_numpy(data.images["features"])
    backbone.eval().to(device)
    rows = np.linspace(0, len(data) - 1, min(len(data), _SEEN_FIRST)).astype(int)
    with torch.no_grad():
        parts = [data.image_inputs(rows[chunk], device) for chunk in chunks(len(rows), _CHUNK)]
        return torch.cat([backbone(part["pixels"])["features"] for part in parts]).cpu()


def chunks(length: int, size: int) -> list[slice]:
    """Slices of at most `size`, one behind the other, that cover a length."""
    return [slice(start, start + size) for start in range(0, length, size)]


def caption_owners(data: CaptionedImages) -> tuple[np.ndarray, np.ndarray]:
    """All (image, caption) pairs: rows of the images, and rows of the sentences."""
    owners = np.repeat(np.arange(len(data)), [len(each) for each in data.captions])
    return owners, np.concatenate([np.asarray(each) for each in data.captions])


def labelled_pairs(data: CaptionedImages, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each image with its own captions, and each of these captions with an image that has it not, drawn at random;
    captions of all images have none.

    Returns:
        Rows of images, rows of sentences, and whether they belong together.

    Raises:
        ValueError: All images have the same captions.
    """
    owners, rows = caption_owners(data)
    others = other_images(owners, rows, len(data), seed)
    kept = others != NO_IMAGE
    if not kept.any():
        raise ValueError("all images have the same captions, so that nothing could tell them apart; add other ones")
    targets = np.repeat([1.0, 0.0], [len(owners), kept.sum()])
    return np.concatenate([owners, others[kept]]), np.concatenate([rows, rows[kept]]), targets
