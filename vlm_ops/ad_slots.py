"""Published image formats of ads and product listings, and whether an image may be used in each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

from schemas.tags import AdSlot, Box, ImageEvidence
from vlm_ops.promotional_text import promotional_text
from vlm_ops.suitability import ADULT_SCORE

# A face of which less is inside a crop has been cut.
_WHOLE_FACE = 0.9
# Faces this much smaller than the largest one, in area, stand in the background and may go.
_BACKGROUND_FACE = 0.1
_LEAST_BORDER = 0.02  # of the area; less is the edge of a photo, or JPEG noise
_PLAIN = 0.5  # share of the edge from which on a background counts as plain

_RESPONSIVE_DISPLAY = "https://support.google.com/google-ads/answer/17090561"
_DEMAND_GEN = "https://support.google.com/google-ads/answer/17140672"
_IMAGE_LINK = "https://support.google.com/merchants/answer/6324350"
_ALWAYS = date.min


@dataclass(frozen=True)
class Size:
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


@dataclass(frozen=True)
class SlotFormat:
    """What a slot asks of an image.

    Attributes:
        minimums: From which day on which size is the least, oldest first.
        recommended: The size that its publisher advises.
        formats: Encodings that are taken.
        max_bytes: Of the file.
        source: Where its publisher says so.
        aspect: Such as "1.91:1"; None where any will do.
        tolerance: How far the aspect ratio may be off, as a share of it.
        max_pixels: None where there is no limit.
        max_text_share: Share of the area that text may cover; None where there is no limit.
        refuses_promotional_text: Also prices, calls to action and the like.
        wants_plain_background: Advised, not demanded.
    """

    name: str
    minimums: tuple[tuple[date, Size], ...]
    recommended: Size
    formats: frozenset[str]
    max_bytes: int
    source: str
    aspect: str | None = None
    tolerance: float = 0.01
    max_pixels: int | None = None
    max_text_share: float | None = None
    refuses_promotional_text: bool = False
    wants_plain_background: bool = False

    def minimum(self, on: date) -> Size:
        """The least size on a day."""
        return next(size for since, size in reversed(self.minimums) if since <= on)


def _google_ads(name: str, aspect: str, minimum: Size, recommended: Size, source: str) -> SlotFormat:
    # The tolerance, the encodings and the size of the file: those of the API, e.g. ResponsiveDisplayAdInfo and
    # https://developers.google.com/google-ads/api/performance-max/asset-requirements; for the text:
    # https://support.google.com/adspolicy/answer/6363786
    return SlotFormat(
        f"google_ads_{name}",
        ((_ALWAYS, minimum),),
        recommended,
        frozenset({"GIF", "JPEG", "PNG"}),
        5120 * 1024,
        source,
        aspect,
        max_text_share=0.2,
    )


def _merchant_center(name: str, minimum: Size) -> SlotFormat:
    return SlotFormat(
        f"merchant_center_{name}",
        ((_ALWAYS, minimum), (date(2027, 1, 31), Size(500, 500))),
        Size(1500, 1500),
        frozenset({"BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"}),
        16 * 1024 * 1024,
        _IMAGE_LINK,
        max_pixels=64_000_000,
        refuses_promotional_text=True,
        wants_plain_background=True,
    )


SLOTS = (
    _google_ads("landscape", "1.91:1", Size(600, 314), Size(1200, 628), _RESPONSIVE_DISPLAY),
    _google_ads("square", "1:1", Size(300, 300), Size(1200, 1200), _RESPONSIVE_DISPLAY),
    # Responsive display ads take no upright pictures; Demand Gen and Performance Max do.
    _google_ads("portrait", "4:5", Size(480, 600), Size(960, 1200), _DEMAND_GEN),
    _google_ads("tall_portrait", "9:16", Size(600, 1067), Size(1080, 1920), _DEMAND_GEN),
    _merchant_center("product", Size(100, 100)),
    _merchant_center("apparel", Size(250, 250)),
)
"""The formats, as they were published in November 2026."""


@lru_cache(maxsize=8)  # asked of every image
def slots_on(on: date) -> tuple[tuple[SlotFormat, Size], ...]:
    """The formats, each with the least size that it takes on a day."""
    return tuple((slot, slot.minimum(on)) for slot in SLOTS)


def rules_in_force(on: date) -> str:
    """12 hex digits that change whenever a format or its rules do, be it by the calendar."""
    rules = [
        ({**vars(slot), "formats": sorted(slot.formats), "minimums": ()}, minimum) for slot, minimum in slots_on(on)
    ]
    return hashlib.sha256(repr(rules).encode()).hexdigest()[:12]


def ad_slots(evidence: ImageEvidence, on: date) -> tuple[AdSlot, ...]:
    """Each format and whether the image may be used in it on a day, with the crop that makes it so.

    `reasons` say why not; where it may, what was done for it, what was not looked at, and what its publisher advises beyond.
    """
    promotional = None if evidence.texts is None else promotional_text(evidence.texts)
    return tuple(_judge(slot, evidence, promotional, minimum) for slot, minimum in slots_on(on))


def _judge(slot: SlotFormat, evidence: ImageEvidence, promotional: tuple[str, ...] | None, minimum: Size) -> AdSlot:
    if not evidence.width or not evidence.height:
        return AdSlot(slot.name, False, ("the size of the image is not known (--ops quality)",))
    whole = Size(evidence.width, evidence.height)
    crop = None
    notes: list[str] = []
    if slot.aspect is not None and not _has_aspect(whole, slot):
        crop = evidence.crops.get(slot.aspect)
        if crop is None:
            return AdSlot(
                slot.name, False, (f"{whole} pixels are not {slot.aspect}, and no crop is known (--ops focus)",)
            )
        notes.append(f"cropped to {slot.aspect}")
    faults = [*_faults_of_size(slot, whole, crop, minimum), *_faults_of_file(slot, evidence, crop)]
    faults += _faults_of_content(slot, evidence, crop, promotional)
    if faults:
        return AdSlot(slot.name, False, tuple(faults))
    return AdSlot(slot.name, True, (*notes, *_advice(slot, evidence, whole, crop, minimum)), crop)


def _faults_of_size(slot: SlotFormat, whole: Size, crop: Box | None, minimum: Size) -> Iterator[str]:
    size = _pixels(whole, crop)
    what = f"cropped to {slot.aspect} it has" if crop else "it has"
    if crop and not _has_aspect(size, slot):
        yield f"its crop for {slot.aspect} has {size} pixels, which is another aspect ratio"
    if size.width < minimum.width or size.height < minimum.height:
        yield f"{what} {size} pixels; at least {minimum} are needed"
    if slot.max_pixels is not None and size.width * size.height > slot.max_pixels:
        yield f"{what} {size} pixels; at most {slot.max_pixels / 1e6:g} million are taken"


def _faults_of_file(slot: SlotFormat, evidence: ImageEvidence, crop: Box | None) -> Iterator[str]:
    if crop is not None:  # who crops writes a new file
        return
    if evidence.format is not None and evidence.format not in slot.formats:
        yield f"it is a {evidence.format} file; taken are {', '.join(sorted(slot.formats))}"
    if evidence.num_bytes is not None and evidence.num_bytes > slot.max_bytes:
        megabytes = slot.max_bytes / 2**20
        yield f"the file has {evidence.num_bytes / 2**20:.1f} MB; at most {megabytes:g} are taken"


def _faults_of_content(
    slot: SlotFormat, evidence: ImageEvidence, crop: Box | None, promotional: tuple[str, ...] | None
) -> Iterator[str]:
    # https://support.google.com/adspolicy/answer/6021648
    if evidence.nsfw_score is not None and evidence.nsfw_score >= ADULT_SCORE:
        yield f"adult content score {evidence.nsfw_score:.2f}; adult content is not taken"
    if slot.max_text_share is not None:
        share = _text_share(evidence, crop)
        if share is not None and share > slot.max_text_share:
            yield f"text covers {share:.0%} of it; at most {slot.max_text_share:.0%} may be text"
    if slot.refuses_promotional_text and promotional:
        yield f"promotional text: {', '.join(map(repr, promotional))}"
    if crop is None and evidence.border is not None and evidence.border >= _LEAST_BORDER:
        yield f"{evidence.border:.0%} of it is a border"
    if crop is not None and (lost := _num_lost_faces(evidence, crop)):
        yield f"its crop for {slot.aspect} cuts {lost} of {len(evidence.faces or ())} faces"


def _advice(slot: SlotFormat, evidence: ImageEvidence, whole: Size, crop: Box | None, minimum: Size) -> Iterator[str]:
    size = _pixels(whole, crop)
    if evidence.texts is None and (slot.refuses_promotional_text or evidence.text_share is None):
        yield "text in it was not looked for (--ops ocr)"
    if crop is not None and (evidence.border or 0.0) >= _LEAST_BORDER:
        yield f"{evidence.border:.0%} of the image is a border, of which the crop may hold some"
    for since, coming in slot.minimums:
        if coming.width > minimum.width and (size.width < coming.width or size.height < coming.height):
            yield f"from {since:%d %B %Y} on at least {coming} are needed; it has {size}"
    if size.width < slot.recommended.width or size.height < slot.recommended.height:
        yield f"advised: {slot.recommended} pixels or more; it has {size}"
    if slot.wants_plain_background and evidence.plain_background is not None and evidence.plain_background < _PLAIN:
        yield "advised: a plain background"


def _has_aspect(size: Size, slot: SlotFormat) -> bool:
    if slot.aspect is None:
        return True
    wide, _, high = slot.aspect.partition(":")
    wanted = float(wide) / float(high)
    # A pixel more or less is rounding: no 314 pixels are exactly a 1.91st of their width.
    return abs(size.width - wanted * size.height) <= max(slot.tolerance * wanted * size.height, 0.5)


def _pixels(whole: Size, crop: Box | None) -> Size:
    """What is left of an image, in whole pixels."""
    if crop is None:
        return whole
    width = round(crop.right * whole.width) - round(crop.left * whole.width)
    height = round(crop.bottom * whole.height) - round(crop.top * whole.height)
    return Size(width, height)


def _text_share(evidence: ImageEvidence, crop: Box | None) -> float | None:
    """Share of the crop, or of the whole, that is text; None where nobody looked."""
    if crop is None:
        return evidence.text_share
    if evidence.texts is None:
        return None
    return min(1.0, sum(_overlap(text.box, crop) for text in evidence.texts) / _area(crop))


def _num_lost_faces(evidence: ImageEvidence, crop: Box) -> int:
    faces = evidence.faces or ()
    largest = max(map(_area, faces), default=0.0)
    kept = (
        _overlap(face, crop) >= _WHOLE_FACE * _area(face) for face in faces if _area(face) > _BACKGROUND_FACE * largest
    )
    return sum(not whole for whole in kept)


def _area(box: Box) -> float:
    return (box.right - box.left) * (box.bottom - box.top)


def _overlap(one: Box, other: Box) -> float:
    """Area that two boxes share, in shares of the picture."""
    width = min(one.right, other.right) - max(one.left, other.left)
    height = min(one.bottom, other.bottom) - max(one.top, other.top)
    return max(width, 0.0) * max(height, 0.0)
