"""One Arrow schema a table; each column says what it holds, in which unit or shape, and who makes it.

`docs/catalog.md` is generated from these (`make docs`).
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa


def column(name: str, type_: pa.DataType, producer: str, unit: str, doc: str, required: bool = False) -> pa.Field:
    """An Arrow field with its documentation in the field metadata.

    Args:
        producer: Who fills it: `reader`, `decoder`, `build`, or an op's name.
        unit: The unit, shape or format of a value.
    """
    metadata = {"producer": producer, "unit": unit, "doc": doc}
    return pa.field(name, type_, nullable=not required, metadata=metadata)


# Delta Lake has no fixed-size list, so vectors are variable-length lists; the shape is in `unit`.
_VECTOR = pa.list_(pa.float32())
_LABELS = pa.list_(pa.struct([pa.field("name", pa.string()), pa.field("score", pa.float32())]))
_COLORS = pa.list_(pa.struct([pa.field("hex", pa.string()), pa.field("share", pa.float32())]))
# In shares of width and height, from the upper left corner.
BOX_SIDES = ("left", "top", "right", "bottom")
BOX = pa.struct([(side, pa.float32()) for side in BOX_SIDES])
POINT = pa.struct([("x", pa.float32()), ("y", pa.float32())])
_TEXTS = pa.list_(pa.struct([("text", pa.string()), ("score", pa.float32()), ("box", BOX)]))
_FACES = pa.list_(pa.struct([("box", BOX), ("score", pa.float32())]))
_CROPS = pa.list_(pa.struct([("aspect", pa.string()), ("box", BOX)]))
# Aspect ratios that crops are made for: width by height.
CROP_ASPECTS = {"1:1": 1.0, "1.91:1": 1.91, "4:5": 4 / 5, "9:16": 9 / 16}
_QUALITY_PARTS = ("sharpness", "exposure", "contrast", "plain_background", "border")

_IDENTITY = (
    column("image_id", pa.int64(), "reader", "63-bit hash of `uri`", "Stable identity of the image.", required=True),
    column(
        "uri",
        pa.string(),
        "reader",
        "URI",
        "Where the image is; members of a shard are `<shard_uri>#<member>`.",
        required=True,
    ),
    column(
        "shard_uri",
        pa.string(),
        "reader",
        "URI",
        "The file that holds the bytes; equals `uri` for a single file.",
        required=True,
    ),
    column("key", pa.string(), "reader", "name", "The name an image shares with what stands beside it.", required=True),
    column(
        "byte_offset",
        pa.int64(),
        "reader",
        "bytes",
        "Where the image starts in an uncompressed tar, for direct reading.",
    ),
    column(
        "source_version",
        pa.string(),
        "reader",
        "etag, or size-mtime",
        "Version of a single file; null for members of a shard.",
    ),
    column("num_bytes", pa.int64(), "reader", "bytes", "Size of the encoded image."),
    column(
        "content_sha256",
        pa.string(),
        "reader",
        "64 hex digits",
        "SHA-256 of the encoded image: equal bytes, equal value.",
    ),
    column(
        "duplicate_of",
        pa.int64(),
        "reader",
        "`image_id`",
        "The first image with the same bytes, where this row was copied from it.",
    ),
    column("source_captions", pa.list_(pa.string()), "reader", "sentences", "Captions that came with the image."),
    column("source_metadata", pa.string(), "reader", "JSON object", "Everything else that came with the image."),
)

# What the reader knows of an image besides its bytes, and an op may read.
READER_COLUMNS = tuple(field.name for field in _IDENTITY if field.name != "duplicate_of")

_OP_COLUMNS = (
    column("width", pa.int32(), "quality", "pixels", "Width of the upright image, as stored."),
    column("height", pa.int32(), "quality", "pixels", "Height of the upright image, as stored."),
    column("format", pa.string(), "quality", "JPEG, PNG, WEBP, GIF, BMP or TIFF", "Encoding, by content."),
    column(
        "phash",
        pa.string(),
        "quality",
        "16 hex digits",
        "64-bit DCT perceptual hash; a small Hamming distance means a similar picture.",
    ),
    column(
        "dominant_colors",
        _COLORS,
        "quality",
        "up to 5 of hex, share in [0, 1]",
        "Most frequent colours, largest share first.",
    ),
    column(
        "quality_score",
        pa.float32(),
        "quality",
        "[0, 1]",
        "How good the picture is technically, from its `quality_parts`.",
    ),
    column(
        "quality_parts",
        pa.struct([(name, pa.float32()) for name in _QUALITY_PARTS]),
        "quality",
        "each in [0, 1]",
        "Sharpness, exposure (1: neither too dark nor too light), contrast, share of the edge that is one plain colour, share of the area that is a border.",
    ),
    column("nsfw_score", pa.float32(), "safety", "[0, 1]", "Probability of adult content."),
    column(
        "texts",
        _TEXTS,
        "ocr",
        "text, score in [0, 1], box in shares of width and height",
        "Lines of text in the picture, in reading order.",
    ),
    column("text_share", pa.float32(), "ocr", "[0, 1]", "Share of the area that is text."),
    column("num_faces", pa.int32(), "faces", "count", "Number of faces."),
    column("faces", _FACES, "faces", "box in shares of width and height, score in [0, 1]", "Faces, surest first."),
    column("focus", POINT, "focus", "x, y in [0, 1]", "The point that a crop should keep."),
    column(
        "crops",
        _CROPS,
        "focus",
        f"aspect ratio ({', '.join(CROP_ASPECTS)}), box in shares of width and height",
        "The best crop for each aspect ratio.",
    ),
    column("features", _VECTOR, "features", "float32[feature_dim]", "Pooled CNN features, as the model gives them."),
    column("labels", _LABELS, "labels", "up to 5 of name, score in [0, 1]", "Class labels, likeliest first."),
    column("caption", pa.string(), "caption", "sentence", "Caption that the model has given."),
    column(
        "caption_source",
        pa.string(),
        "caption",
        "`generated` or `labels`",
        "Whether a language model wrote the caption, or it names the likeliest class.",
    ),
    column(
        "caption_score",
        pa.float32(),
        "caption",
        "[0, 1]",
        "How sure the model is: the probability that caption and image match, or that of the caption's words.",
    ),
    column(
        "source_caption_match",
        pa.list_(pa.float32()),
        "caption_match",
        "[0, 1]",
        "Probability that each of `source_captions` describes the image.",
    ),
    column("caption_match", pa.float32(), "caption_match", "[0, 1]", "Probability that `caption` describes the image."),
    column(
        "image_embedding",
        _VECTOR,
        "embedding",
        "float32[embedding_dim], L2-normalised",
        "Image–text embedding: its dot product with a text's is their similarity.",
    ),
)

_PROVENANCE = (
    column(
        "recipe_id", pa.string(), "build", "12 hex digits", "Hash of the recipe that computed the row.", required=True
    ),
    column("run_id", pa.string(), "build", "UTC time and suffix", "The run that computed the row.", required=True),
)

FAILURES = pa.schema(
    [
        column("uri", pa.string(), "build", "URI", "What failed: an image, a list entry, or a shard.", required=True),
        column("shard_uri", pa.string(), "build", "URI", "The file it was read from.", required=True),
        column(
            "member", pa.string(), "build", "name, or row", "Member of a tar or row of a Parquet file, where it is one."
        ),
        column("key", pa.string(), "build", "name", "The sample's key, where known."),
        column("byte_offset", pa.int64(), "build", "bytes", "Where in the shard, where known."),
        column("stage", pa.string(), "build", "`read`, `decode` or an op", "What was being done.", required=True),
        column(
            "reason",
            pa.string(),
            "build",
            "a code of the closed list",
            "Why it failed; see the list of reasons.",
            required=True,
        ),
        column("message", pa.string(), "build", "sentence", "What went wrong, for a person.", required=True),
        column("source_version", pa.string(), "build", "etag, or size-mtime", "Version of a single file that failed."),
        column("source", pa.string(), "build", "JSON object", "What `beamsight retry` reads it from again."),
        column("attempts", pa.int32(), "build", "count", "How often it has been tried.", required=True),
        column("recipe_id", pa.string(), "build", "12 hex digits", "Hash of the recipe of the attempt.", required=True),
        column("run_id", pa.string(), "build", "UTC time and suffix", "The run of the last attempt.", required=True),
    ]
)

RESULTS = pa.schema(
    [
        column("image_id", pa.int64(), "search", "63-bit hash of `uri`", "Identity of the image.", required=True),
        column("uri", pa.string(), "search", "URI", "Where the image is.", required=True),
        column("key", pa.string(), "search", "name", "The sample's key.", required=True),
        column(
            "score",
            pa.float32(),
            "search",
            "[-1, 1]",
            "Similarity of query and image: the dot product of their embeddings.",
            required=True,
        ),
        column("labels", _LABELS, "search", "up to 5 of name, score", "Class labels, likeliest first."),
        column("caption", pa.string(), "search", "sentence", "Generated caption, or null."),
    ]
)

# What `indexes/<n>/rows.parquet` keeps of each image: what a result shows, what finds its bytes,
# and what filters use.
INDEX_ROW_COLUMNS = (
    "image_id", "uri", "shard_uri", "key", "byte_offset", "num_bytes", "width", "height", "labels", "caption",
)  # fmt: skip


def op_columns(op: str) -> tuple[pa.Field, ...]:
    """The columns that a built-in op fills.

    Raises:
        ValueError: No column names this op as its producer.
    """
    fields = tuple(f for f in _OP_COLUMNS if f.metadata[b"producer"] == op.encode())
    if not fields:
        raise ValueError(f"no column of the images table is made by op {op!r}")
    return fields


def images_schema(extra: Iterable[pa.Field] = ()) -> pa.Schema:
    """Schema of the `images` table: the built-in columns, then those of further ops.

    Built-in columns are always there (null where their op is off), so that turning an op on
    later changes no reader.

    Raises:
        ValueError: A further op declares a column that is taken.
    """
    base = (*_IDENTITY, *_OP_COLUMNS, *_PROVENANCE)
    taken = {field.name for field in base}
    added = [field for field in extra if field.name not in {f.name for f in _OP_COLUMNS}]
    for field in added:
        if field.name in taken:
            raise ValueError(f"column {field.name!r} is declared twice; rename it in the op that adds it")
        taken.add(field.name)
    return pa.schema([*base, *added])
