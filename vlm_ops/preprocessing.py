"""Preprocessing as data: what a model wants its pixels to be. `images.preprocess` carries it out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become a model's input.

    Attributes:
        size: Height and width of the model's input.
        fit: `stretch` (the whole image, aspect ratio given up) or `cover` (the shorter side
            resized to `size / crop_fraction`, then a centre crop).
        crop_fraction: For `cover`, the share of the shorter side that the crop keeps.
    """

    size: int
    fit: str = "stretch"
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.fit not in ("stretch", "cover"):
            raise ValueError(f"unknown fit {self.fit!r}; use 'stretch' or 'cover'")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be in (0, 1], got {self.crop_fraction}")

    @property
    def shorter_side(self) -> int:
        """What the shorter side of an image must have, for nothing to be lost."""
        return self.size if self.fit == "stretch" else round(self.size / self.crop_fraction)


THUMBNAIL = Preprocessing(size=64)
