"""What flows through a build: shard references, samples, and failures.

A *shard* is the unit of work. Only references to shards travel between machines; samples and
pixels never leave the worker that read them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from schemas.catalog import part_name

INPUT_FORMATS = ("auto", "tar", "parquet", "list", "image")
FILES_PER_SHARD = 1000

# The closed list of reasons a sample or a shard can fail for, with what each one means. The
# `failures` table holds nothing else in its `reason` column.
REASONS: dict[str, str] = {
    "empty_file": "zero bytes where an image should be",
    "not_an_image": "the bytes are not an image of a supported format (an HTML page, say)",
    "corrupt_image": "an image that its decoder refuses, or whose coded data is damaged",
    "truncated_image": "an image whose data ends early",
    "too_many_pixels": "more pixels than --max_image_pixels (or a decompression bomb)",
    "too_many_bytes": "more bytes than --max_image_bytes",
    "missing_file": "a listed or sidecar file that is not there",
    "unreadable_file": "a file that may not be read, or that is not a file",
    "unreachable_host": "a link whose host is not found or does not answer (`beamsight retry` tries again)",
    "scheme_not_allowed": "a listed URI whose scheme is not among --allowed_schemes",
    "bad_record": "a list line or a Parquet row without a usable image",
    "bad_sidecar": "metadata beside an image that cannot be parsed (the image is kept)",
    "model_error": "a model that fails on this image alone",
    "unreadable_shard": "a shard of which nothing could be read",
    "truncated_shard": "a shard that ends early (what came before is kept)",
    "damaged_shard": "a damaged stretch inside a shard (the rest is kept)",
    "duplicate_member": "a second shard member of the same name (the first is kept)",
    "scattered_members": "members of one key that stand apart (the image is kept without them)",
    "unsupported_member": "a shard member that is not a regular file (a link, a sparse file)",
}

# Failures that cost no image: the sample is in the table all the same, or a copy of it is.
HARMLESS_REASONS = frozenset({"bad_sidecar", "duplicate_member", "scattered_members"})


# Failures that cost an unknown number of images of a shard.
SHARD_DAMAGE = frozenset({"unreadable_shard", "truncated_shard", "damaged_shard"})


class SampleError(Exception):
    """A sample that cannot be processed. The only exception that becomes a row of `failures`."""

    def __init__(self, reason: str, message: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown failure reason {reason!r}; known: {sorted(REASONS)}")
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Sample:
    """One encoded image with what stands beside it.

    Attributes:
        uri: Where the image is; for a member of a shard, `<shard uri>#<member>`.
        shard_uri: The file that holds the bytes; equal to `uri` for a file on its own.
        key: The name shared by an image and what stands beside it (WebDataset's key).
        data: The encoded image.
        byte_offset: Where `data` starts in an uncompressed tar; None elsewhere.
        captions: Captions that came with the image.
        metadata: JSON object of everything else that came with it, or None.
        version: Changes whenever the file behind `uri` does (files on their own only).
    """

    uri: str
    shard_uri: str
    key: str
    data: bytes
    byte_offset: int | None = None
    captions: tuple[str, ...] = ()
    metadata: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Failure:
    """One thing that went wrong, and where. `stage` is `read`, `decode`, or an op's name."""

    uri: str
    shard_uri: str
    stage: str
    reason: str
    message: str
    key: str | None = None
    byte_offset: int | None = None
    version: str | None = None

    @property
    def loses_image(self) -> bool:
        return self.reason not in HARMLESS_REASONS


@dataclass(frozen=True, slots=True)
class FileRef:
    """A single image file, as the planner found it.

    `version` changes whenever the file does, or what stands beside it; for an entry of a list,
    whenever the entry or its file does (of a link: the entry alone); `entry` is then the version of the entry. `error` is a `(reason, message)` pair for a list entry that names no usable file; such a
    reference still travels, so that the failure is recorded like any other.
    """

    uri: str
    version: str = ""
    num_bytes: int = 0
    sidecars: tuple[str, ...] = ()
    key: str | None = None
    captions: tuple[str, ...] = ()
    metadata: str | None = None
    error: tuple[str, str] | None = None
    entry: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not as usual."""
        return _told(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FileRef:
        """The reverse of `to_dict`, also after JSON has made lists of tuples."""
        fields_: dict[str, Any] = {}
        for name, value in values.items():
            fields_[name] = tuple(value) if isinstance(value, list) else value
        return cls(**fields_)


@dataclass(frozen=True, slots=True)
class ShardRef:
    """A reference to one unit of work.

    Attributes:
        uri: The tar or Parquet file; for packed files, the folder or list they come from.
        format: `tar`, `parquet` or `files`.
        version: Changes whenever the file's content does (an etag, or size and mtime).
        num_bytes: Size on storage, for progress and ETA.
        files: The packed files, for format `files`.
        revision: Tells parts of the same shard and version apart: 8 hex digits where the shard is
            read anew although its version has not changed.
        attempts: How often images of it have failed before, by URI.
    """

    uri: str
    format: str
    version: str
    num_bytes: int
    files: tuple[FileRef, ...] = field(default=(), repr=False)
    revision: str = ""
    attempts: Mapping[str, int] = field(default_factory=dict, repr=False, hash=False)

    @property
    def location_id(self) -> str:
        """Names the place: the same for every version of one shard file.

        Packs of single files start with `p`: their rows are replaced file by file, those of a
        shard file (`s`) all at once.
        """
        if self.format != "files":
            return "s" + digest(self.uri)
        return "p" + digest(self.uri, *(file.uri for file in self.files))

    def part_name(self, recipe_id: str) -> str:
        """File name of the part that this shard becomes."""
        return part_name(self.shard_id, recipe_id, self.revision)

    @property
    def shard_id(self) -> str:
        """Names the place and its content: a changed shard has another one."""
        versions = [f"{file.version}|{file.sidecars}|{file.metadata}|{file.captions}" for file in self.files]
        return f"{self.location_id}-{digest(self.version, *versions)[:12]}"

    def to_json(self) -> str:
        """One line. Names that are not UTF-8 are escaped, and come back as they were."""
        nested = {"files": [file.to_dict() for file in self.files], "attempts": dict(self.attempts)}
        return json.dumps({**_told(self), **nested}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ShardRef:
        values = json.loads(text)
        return cls(**{**values, "files": tuple(FileRef.from_dict(file) for file in values["files"])})


def _told(reference: FileRef | ShardRef) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    told = ((each.name, getattr(reference, each.name), each.default) for each in fields(reference))
    return {name: value for name, value, default in told if value != default}


def image_id(uri: str) -> int:
    """int64 identity of an image: 63 bits of the SHA-256 of its URI; stable across runs."""
    return int.from_bytes(hashlib.sha256(clean_text(uri).encode()).digest()[:8], "big") >> 1


def clean_text(text: str) -> str:
    """Text as UTF-8 can hold it: names that are not UTF-8 come as lone surrogates, which are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def to_json(value: Any) -> str:
    """Canonical JSON of dataclasses and plain values: sorted keys, no spaces, Unicode kept."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(*parts: str) -> str:
    """16 hex digits of the SHA-256 of some texts."""
    return hashlib.sha256(clean_text("\0".join(parts)).encode()).hexdigest()[:16]
