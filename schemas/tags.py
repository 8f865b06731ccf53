"""What `beamsight tag` reads of an image, what it says of it, and the schema of the `tags` table.

Every column names the rule that its values follow and who published it; `docs/tags.md` is generated from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from schemas.samples import to_json
from schemas.tables import BOX, POINT, column


@dataclass(frozen=True)
class Box:
    """A rectangle in shares of width and height: 0 <= left < right <= 1, 0 <= top < bottom <= 1."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Label:
    """A class of the model, and its probability."""

    name: str
    score: float


@dataclass(frozen=True)
class FoundText:
    """A line of text that OCR has found; `score` in [0, 1]."""

    text: str
    score: float
    box: Box


@dataclass(frozen=True)
class ImageEvidence:
    """All that is known of an image: a row of the `images` table. None where an op was off.

    Attributes:
        format: Encoding, such as `JPEG`.
        num_bytes: Size of the file.
        metadata: What came with the image, `source_metadata` parsed; empty where nothing did.
        texts: What OCR found; None where it was not run.
        faces: Their boxes; None where none were looked for.
        crops: The best box for an aspect ratio, such as "1:1".
        colors: (hex, share), largest first.
    """

    image_id: int
    uri: str
    key: str = ""
    width: int | None = None
    height: int | None = None
    format: str | None = None
    num_bytes: int | None = None
    caption: str | None = None
    caption_source: str | None = None
    caption_score: float | None = None
    labels: tuple[Label, ...] = ()
    source_captions: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    texts: tuple[FoundText, ...] | None = None
    text_share: float | None = None
    nsfw_score: float | None = None
    faces: tuple[Box, ...] | None = None
    focus: tuple[float, float] | None = None
    crops: Mapping[str, Box] = field(default_factory=dict)
    colors: tuple[tuple[str, float], ...] = ()
    quality_score: float | None = None
    plain_background: float | None = None
    border: float | None = None


@dataclass(frozen=True)
class Category:
    """A node of a taxonomy that an image belongs to.

    Attributes:
        path: Names from the root down.
        score: Calibrated probability, in [0, 1].
        evidence: What spoke for it, strongest first: `image`, `labels`, `caption`, `source_metadata`.
    """

    id: str
    path: tuple[str, ...]
    score: float
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class TagTexts:
    """The written fields of an image.

    Attributes:
        alt_reason: Why `alt_text` is empty; None where it is not.
        sources: For each written field `generated`, `labels` or `source_metadata`, or with a language model `text_model`.
        doubts: Reasons for a person to look at them.
    """

    alt_text: str
    alt_reason: str | None
    title: str
    caption: str | None
    description: str
    keywords: tuple[str, ...]
    slug: str
    language: str
    sources: Mapping[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class SensitiveTopic:
    """One of IAB's sensitive topics that an image touches. `evidence` says what spoke for it, in words."""

    id: str
    name: str
    score: float
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suitability:
    """How suitable an image is for advertising beside it.

    Attributes:
        level: `floor`, `high`, `medium` or `low` (the levels of risk); None where it cannot be told.
        evidence: What led to the level.
        doubts: Reasons for a person to look at it.
    """

    level: str | None
    topics: tuple[SensitiveTopic, ...] = ()
    evidence: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdSlot:
    """A published image format and whether the image may be used in it, with the crop that makes it so."""

    slot: str
    eligible: bool
    reasons: tuple[str, ...] = ()
    crop: Box | None = None


# Raised when a rule of ours changes, so that all rows are made anew.
TAG_VERSION = 1


@dataclass(frozen=True)
class TagRecipe:
    """Everything that decides what a row of `tags` says, besides the row of `images` it is made from.

    Attributes:
        taxonomy: Name of the taxonomy.
        taxonomy_version: Its version.
        taxonomy_hash: Hash of its nodes.
        categories: Names all that decides the categories: prompts, encoder, calibration, how many and how sure; None where
            the catalog has no embeddings.
        suitability: Names the rules of suitability.
        ad_slots: Names the rules of the ad slots that are in force.
        text_model: Names the language model that writes; None for the templates.
        version: TAG_VERSION.
    """

    taxonomy: str
    taxonomy_version: str
    taxonomy_hash: str
    categories: str | None
    suitability: str
    ad_slots: str
    text_model: str | None
    version: int = TAG_VERSION

    @property
    def recipe_id(self) -> str:
        return hashlib.sha256(to_json(self).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class TagRecord:
    """What a commit of the `tags` table says of itself, in its log.

    Attributes:
        images_version: Version of the images table that the tags belong to.
        images_run_id: The run that committed that version.
        num_images: Rows of the table.
        num_tagged: Those of them that this run made.
    """

    run_id: str
    committed_at: str
    images_version: int
    images_run_id: str
    recipe: TagRecipe
    num_images: int
    num_tagged: int

    def to_json(self) -> str:
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> TagRecord:
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "recipe": TagRecipe(**values["recipe"])})


TEXT_FIELDS = ("alt_text", "title", "caption", "description", "keywords")

_STRINGS = pa.list_(pa.string())
_CATEGORIES = pa.list_(
    pa.struct([("id", pa.string()), ("path", _STRINGS), ("score", pa.float32()), ("evidence", _STRINGS)])
)
_TOPICS = pa.list_(
    pa.struct([("id", pa.string()), ("name", pa.string()), ("score", pa.float32()), ("evidence", _STRINGS)])
)
_SLOTS = pa.list_(pa.struct([("slot", pa.string()), ("eligible", pa.bool_()), ("reasons", _STRINGS), ("crop", BOX)]))
_COLORS = pa.list_(pa.struct([("hex", pa.string()), ("share", pa.float32()), ("name", pa.string())]))
_RIGHTS = pa.struct(
    [(name, pa.string()) for name in ("creator", "credit_text", "copyright_notice", "license", "acquire_license_page")]
)


def tag_column(name: str, type_: pa.DataType, unit: str, doc: str, rule: str = "", source: str = "") -> pa.Field:
    """A column of the `tags` table.

    Args:
        rule: What every value keeps to.
        source: Who published the rule: a URL, or empty where it is our own.
    """
    made = column(name, type_, "tag", unit, doc, required=name in _REQUIRED)
    return made.with_metadata({**made.metadata, b"rule": rule.encode(), b"source": source.encode()})


_REQUIRED = frozenset({"image_id", "uri", "run_id"})

TAGS = pa.schema(
    [
        tag_column("image_id", pa.int64(), "63-bit hash of `uri`", "The image, as in `images`."),
        tag_column("uri", pa.string(), "URI", "Where the image is."),
        tag_column("alt_text", pa.string(), "text", "What the picture shows, for those who do not see it: the page's own, a caption, the text of a picture of text, or the likeliest class. Empty for decorative pictures and for unknown ones.", "At most 125 code points, a description; no \"image of\", no list of keywords, no file name, no link or HTML, no word or grapheme cluster cut", "https://www.w3.org/WAI/tutorials/images/tips/, https://developers.google.com/search/docs/appearance/google-images"),
        tag_column("alt_reason", pa.string(), "text", "Why `alt_text` is empty: `decorative: ...` (8 pixels or less in one direction, 20 times as long as wide, or one plain colour over 98 % in which no class is found), or that nothing is known; null where it is not.", "There is one exactly where `alt_text` is empty", "https://www.w3.org/WAI/tutorials/images/decorative/"),
        tag_column("title", pa.string(), "text", "Title of the picture; empty where nothing is known.", "At most 60 code points, no word cut, no file name, no link or HTML"),
        tag_column("caption", pa.string(), "sentence", "The caption: the image's own one where it came with one, else the model's.", "At most 500 code points, no word cut"),
        tag_column("description", pa.string(), "text", "The source's description, or the caption (or a shop's title) with what the source says of kind, colour and brand, and the text in the picture.", "One to three sentences, at most 500 code points"),
        tag_column("keywords", _STRINGS, "3 to 10 words or terms", "Keywords, best supported first: the source's own, its kind, brand and categories, what captions name, likely classes, categories. Fewer than three where no more have evidence.", "Lower case, each at most 3 words, none within another, no plural beside its singular, no word in more than two", "https://developers.google.com/search/docs/essentials/spam-policies"),
        tag_column("slug", pa.string(), "ASCII", "Name for a URL: words of the title, and `image_id` in base 36, which makes it unique in the catalog; the same as long as image and title are.", "a-z, 0-9 and single hyphens, at most 60 characters", "https://developers.google.com/search/docs/crawling-indexing/url-structure"),
        tag_column("language", pa.string(), "BCP 47", "Language of `alt_text`: of generated texts theirs; of the source's what it states, else `en`, or `und` where most letters are not Latin or a text of six words has no English one.", "A language tag", "https://www.rfc-editor.org/info/bcp47"),
        tag_column("categories", _CATEGORIES, "id, path, score in [0, 1], evidence", "Nodes of the taxonomy, likeliest first; empty where none is likely enough.", "Calibrated probabilities; a child is never likelier than its parent"),
        tag_column("sensitive_topics", _TOPICS, "id, name, score in [0, 1], evidence", "IAB's sensitive topics that the picture touches, surest first; each with what spoke for it.", "The eleven of Content Taxonomy 3.1 (root v9i3On), by id; what is only doubtful is in `review_reasons`", "https://github.com/InteractiveAdvertisingBureau/Taxonomies"),
        tag_column("suitability", pa.string(), "`floor`, `high`, `medium`, `low`", "Level of risk for an advertiser beside the picture; null where it cannot be told.", "The worst that something sure asks for; `low` only where everything was looked for and nothing was found", "https://www.brandsafetyinstitute.com/resources/frameworks/brand-safety-floor-suitability"),
        tag_column("suitability_evidence", _STRINGS, "sentences", "What led to `suitability`.", "Topic and what spoke for it, in words"),
        tag_column("dominant_colors", _COLORS, "up to 5 of hex, share in [0, 1], name", "Most frequent colours, largest share first.", "The name of the nearest anchor in OKLab: the eleven basic colour terms, and seven that shops use", "https://bottosson.github.io/posts/oklab/"),
        tag_column("focus", POINT, "x, y in [0, 1]", "The point that a crop should keep."),
        tag_column("ad_slots", _SLOTS, "slot, eligible, reasons, crop", "Published formats, and whether the picture may be used in each; reasons also where it may.", "Size, aspect ratio, file and text as the format's publisher asks on the day of the run, in the image or in the crop", "https://support.google.com/google-ads/answer/17090561 https://support.google.com/google-ads/answer/17140672 https://support.google.com/adspolicy/answer/6363786 https://support.google.com/merchants/answer/6324350"),
        tag_column("text_share", pa.float32(), "[0, 1]", "Share of the area that is text."),
        tag_column("num_faces", pa.int32(), "count", "Faces found; null where none were looked for."),
        tag_column("rights", _RIGHTS, "text", "Creator, credit, notice and licence, where the image came with them.", "Only what metadata say; a licence is a URL where it has one, and `acquire_license_page` always is", "https://developers.google.com/search/docs/appearance/structured-data/image-license-metadata"),
        tag_column("review", pa.string(), "`ok`, `needs_review`", "Whether a person should look at it."),
        tag_column("review_reasons", _STRINGS, "sentences", "Why."),
        tag_column("tag_source", pa.struct([(name, pa.string()) for name in TEXT_FIELDS]), "`generated`, `labels`, `source_metadata` or `text_model`", "Where each written field comes from; of keywords, the first. Captions that came with the image count as `source_metadata`."),
        tag_column("taxonomy_name", pa.string(), "name", "Taxonomy of `categories`."),
        tag_column("taxonomy_version", pa.string(), "version", "Its version."),
        tag_column("taxonomy_hash", pa.string(), "12 hex digits", "Hash of its nodes."),
        tag_column("tag_recipe_id", pa.string(), "12 hex digits", "Hash of all that decides what a row says: taxonomy, rules, flags, models."),
        tag_column("row_hash", pa.string(), "16 hex digits", "Hash of what the row was made from: a row of `images` that is the same is not tagged again."),
        tag_column("run_id", pa.string(), "UTC time and suffix", "The run that wrote the row."),
    ]
)  # fmt: skip
