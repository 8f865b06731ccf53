"""Preprocessing as data: what a model wants its pixels to be. `images.preprocess` carries it out."""

from __future__ import annotations

from dataclasses import dataclass

_FITS = ("stretch", "cover", "contain")
_INTERPOLATIONS = ("bicubic", "bilinear", "nearest-exact")
_ROUNDINGS = ("round", "floor")


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become a model's input.

    Attributes:
        size: Height and width of the model's input; for `contain`, the most that the longer side has.
        fit: `stretch` (the whole image, aspect ratio given up), `cover` (the shorter side
            resized to `size / crop_fraction`, then a centre crop) or `contain` (the whole image in its own
            aspect ratio, and never enlarged).
        crop_fraction: For `cover`, the share of the shorter side that the crop keeps; for `stretch`, of both sides.
        interpolation: `bicubic` or `bilinear`, antialiased, or `nearest-exact`.
        crop_rounding: What becomes of half a pixel left of a crop: `round` (torchvision's way, to an even number) or
            `floor` (transformers' way).
    """

    size: int
    fit: str = "stretch"
    crop_fraction: float = 1.0
    interpolation: str = "bicubic"
    crop_rounding: str = "round"

    def __post_init__(self) -> None:
        if self.fit not in _FITS:
            raise ValueError(f"unknown fit {self.fit!r}; use {', '.join(map(repr, _FITS[:-1]))} or {_FITS[-1]!r}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be in (0, 1], got {self.crop_fraction}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; use {', '.join(_INTERPOLATIONS)}")
        if self.crop_rounding not in _ROUNDINGS:
            raise ValueError(f"unknown crop_rounding {self.crop_rounding!r}; use {' or '.join(_ROUNDINGS)}")

    def extent(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image of this size has afterwards."""
        if self.fit != "contain":
            return self.size, self.size
        scale = min(1.0, self.size / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    @property
    def shorter_side(self) -> int:
        """What the shorter side of an image must have, for nothing to be lost.

        For `contain` half the longer side's: an image decoded at a reduced scale keeps twice of it, so that neither
        side is shorter than what the longer one needs.
        """
        if self.fit == "contain":
            return -(-self.size // 2)
        return round(self.size / self.crop_fraction)

    def window(self, width: int, height: int) -> tuple[float, float, float, float]:
        """What of an image of this size the model sees: left, top, right and bottom, in shares of its width and height."""
        if self.fit == "contain":
            return 0.0, 0.0, 1.0, 1.0
        if self.fit == "stretch":
            margin = (1 - self.crop_fraction) / 2
            return margin, margin, 1 - margin, 1 - margin
        side = self.crop_fraction * min(width, height)
        left, top = (1 - side / width) / 2, (1 - side / height) / 2
        return left, top, 1 - left, 1 - top


THUMBNAIL = Preprocessing(size=64)
