"""A captioner: an image backbone, where that is fine-tuned too, and a writer that reads what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class Hypothesis:
    """A sentence that a captioner has written.

    Attributes:
        log_prob: Log-probability of its tokens, normalised by length as the writer's search ranks them.
    """

    text: str
    log_prob: float


def num_wanted(num_judged: int) -> int:
    """How many sentences a search has to find where `num_judged` are judged. One more takes the place of one that names people
    who are not there; and the first that comes to its end is often not the best."""
    return num_judged + 1


class Writer(Protocol):
    """A language model under images: a torch module.

    Its inputs are tensors of n images: `features` float32[n, feature_dim], `grid` float[n, cells, grid_dim] and,
    of a base that has one, `embedding` float32[n, embedding_dim]; or `pixels` uint8[n, 3, size, size] for a
    writer that sees for itself.
    """

    def loss(
        self, inputs: Mapping[str, torch.Tensor], captions: Sequence[Sequence[str]], label_smoothing: float
    ) -> torch.Tensor:
        """Mean cross-entropy of the captions' tokens; every image has as many captions."""
        ...

    def write(
        self, inputs: Mapping[str, torch.Tensor], num_beams: int, num_wanted: int | None = None
    ) -> list[list[Hypothesis]]:
        """Up to `num_beams` sentences of each image, best first. One beam is greedy decoding.

        Args:
            num_wanted: How many of them will be asked for (None: all); the others may be left out.
        """
        ...


class Captioner(nn.Module):
    """Images -> sentences.

    Args:
        writer: The language model.
        image_backbone: The image model below it, where it is fine-tuned; its inputs are then `pixels`.
    """

    def __init__(self, writer: Any, image_backbone: Any = None) -> None:
        super().__init__()
        self.writer = writer
        self.image_backbone = image_backbone

    @property
    def backbones(self) -> list[nn.Module]:
        """The pretrained image model, if it is trained."""
        seeing = getattr(self.writer, "image_encoder", None)
        return [each for each in (self.image_backbone, seeing) if each is not None]

    def loss(
        self, inputs: Mapping[str, torch.Tensor], captions: Sequence[Sequence[str]], label_smoothing: float
    ) -> torch.Tensor:
        """See Writer."""
        return self.writer.loss(self.inputs(inputs), captions, label_smoothing)

    @torch.inference_mode()
    def write(
        self, inputs: Mapping[str, torch.Tensor], num_beams: int, num_wanted: int | None = None
    ) -> list[list[Hypothesis]]:
        """See Writer."""
        return self.writer.write(self.inputs(inputs), num_beams, num_wanted)

    def inputs(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What the writer reads of images: their pixels as the backbone sees them, where that is trained."""
        if self.image_backbone is None or "pixels" not in inputs:
            return inputs
        return self.image_backbone(inputs["pixels"])
