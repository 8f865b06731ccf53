"""A shard of any format -> samples and failures.

To add a format: one reader here and its entry in `READERS`. A reader is a generator of Samples,
and of Failures for what it has to leave out; it never stops at bad data. Storage errors (a network
that fails, a permission that is missing on a shard) propagate, so that the runner tries again.
"""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import math
import os
import posixpath
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.samples import Failure, FileRef, Sample, SampleError, ShardRef
from vlm_ops import storage
from vlm_ops.tars import Damage, Member, iter_members

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SIDECAR_SUFFIXES = (".json", ".txt")
CAPTION_FIELDS = ("captions", "caption", "sentences", "text", "txt", "alt_text", "alt")
KEY_FIELDS = ("key", "__key__", "id", "image_id")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content", "data")
URI_COLUMNS = ("uri", "url", "image_uri", "image_url", "image_path", "path", "file", "file_name", "filename", "image")
LINKS = ("http", "https")
_MAX_SIDECAR_BYTES = 1 << 20
_MAX_METADATA_DEPTH = 32
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
_BAD_NAME = (errno.ENAMETOOLONG, errno.ELOOP)
_HTTP_REFUSED = (401, 403, 410)  # what a list of links meets; 404 is a FileNotFoundError, 5xx is tried again
_PARQUET_BATCH = 64


@dataclass(frozen=True)
class ReadConfig:
    """How shards are read.

    Attributes:
        max_image_bytes: Larger encoded images become failures, unread where possible.
        image_column: Parquet column that holds the image; None finds it.
        caption_field: Metadata field or column that holds captions; None tries CAPTION_FIELDS.
        storage_options: For fsspec.
    """

    max_image_bytes: int
    image_column: str | None = None
    caption_field: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)


Reader = Callable[[ShardRef, ReadConfig], Iterator[Sample | Failure]]


def read_shard(shard: ShardRef, config: ReadConfig) -> Iterator[Sample | Failure]:
    """Everything in a shard, in its order; samples of one URI once.

    Raises:
        OSError: Storage failed. (A shard that is not there any more is a failure, not an error.)
    """
    seen: set[str] = set()
    try:
        for item in READERS[shard.format](shard, config):
            if isinstance(item, Sample):
                if item.uri in seen:
                    yield _failure(
                        item.uri,
                        shard,
                        "duplicate_member",
                        "stands in the shard more than once; the first is kept",
                        item.key,
                    )
                    continue
                seen.add(item.uri)
            yield item
    except FileNotFoundError as error:
        yield _failure(shard.uri, shard, "unreadable_shard", f"not there any more: {error}")


def read_image(uri: str, shard_uri: str, byte_offset: int | None, num_bytes: int | None, config: ReadConfig) -> bytes:
    """The encoded bytes of one image that a catalog names.

    Raises:
        OSError, SampleError: It is not there any more, or not as it was.
    """
    if uri == shard_uri:
        return storage.read_bytes(uri, config.storage_options)
    if byte_offset is not None and num_bytes is not None:
        fs = storage.filesystem(shard_uri, config.storage_options)
        return fs.cat_file(shard_uri, start=byte_offset, end=byte_offset + num_bytes)
    kind = "parquet" if _begins_with(shard_uri, b"PAR1", config) else "tar"
    for item in read_shard(ShardRef(shard_uri, kind, "", 0), config):
        if isinstance(item, Sample) and item.uri == uri:
            return item.data
    raise SampleError("missing_file", f"{uri} is not in its shard any more")


# --- tar -----------------------------------------------------------------------------------------


def read_tar(shard: ShardRef, config: ReadConfig) -> Iterator[Sample | Failure]:
    """WebDataset tars, plain or gzipped: members of one key stand together, each image is a sample."""
    groups = _KeyedGroups(shard, config)
    num_members = 0
    with storage.open_for_reading(shard.uri, config.storage_options) as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw) if is_gzip else raw)
        total = None if is_gzip else (shard.num_bytes or None)
        try:
            for item in _iter_members(stream, config.max_image_bytes, total):
                if isinstance(item, Damage):
                    yield from groups.flush()
                    yield _failure(shard.uri, shard, item.reason, item.message, byte_offset=item.offset)
                    continue
                num_members += 1
                yield from groups.add(item, None if is_gzip else item.offset)
        except _GZIP_ERRORS as error:
            reason = "damaged_shard" if num_members else "unreadable_shard"
            if isinstance(error, EOFError) and num_members:
                reason = "truncated_shard"
            yield from groups.flush()
            yield _failure(shard.uri, shard, reason, f"gzip: {error}")
        yield from groups.flush()


def _iter_members(stream: BinaryIO, max_bytes: int, total_bytes: int | None) -> Iterator[Member | Damage]:
    """All members, also those of a gzipped tar behind one that claims more than there is: how much
    there is shows at its end, so that such a tar, and no other, is read twice."""
    for number, item in enumerate(iter_members(stream, max_bytes, total_bytes)):
        if isinstance(item, Damage) and item.total_bytes is not None:
            stream.seek(0)
            yield from itertools.islice(iter_members(stream, max_bytes, item.total_bytes), number, None)
            return
        yield item


class _KeyedGroups:
    """Collects adjacent members of one key, and gives out their samples when the key changes."""

    def __init__(self, shard: ShardRef, config: ReadConfig) -> None:
        self.shard = shard
        self.config = config
        self.key: str | None = None
        self.images: list[tuple[Member, int | None]] = []
        self.sidecars: list[tuple[str, bytes]] = []
        self.finished: set[str] = set()

    def add(self, member: Member, offset: int | None) -> Iterator[Sample | Failure]:
        name = member.name.removeprefix("./")
        key, suffix = split_key(name)
        uri = f"{self.shard.uri}#{name}"
        if name.endswith("/") or posixpath.basename(name).startswith("."):
            return  # directories and hidden files (.DS_Store, ._resource forks)
        is_image, is_sidecar = suffix in IMAGE_SUFFIXES, suffix in SIDECAR_SUFFIXES
        if not is_image and not is_sidecar:
            return
        if not member.is_regular:
            yield _failure(uri, self.shard, "unsupported_member", "not a regular file (a link or a sparse file)", key)
            return
        if key != self.key:
            yield from self.flush()
            self.key = key
            if key in self.finished:
                message = "members of this key stand apart in the shard; what stands beside an image must be next to it"
                yield _failure(uri, self.shard, "scattered_members", message, key, offset)
        if is_image and member.data is None:
            message = f"{member.size} bytes; the limit is {self.config.max_image_bytes} (--max_image_bytes)"
            yield _failure(uri, self.shard, "too_many_bytes", message, key, offset)
        elif is_image:
            self.images.append((member, offset))
        elif member.data is not None and len(member.data) <= _MAX_SIDECAR_BYTES:
            self.sidecars.append((suffix, member.data))
        else:
            yield _failure(
                uri,
                self.shard,
                "bad_sidecar",
                f"{member.size} bytes of metadata; the limit is {_MAX_SIDECAR_BYTES}",
                key,
                offset,
            )

    def flush(self) -> Iterator[Sample | Failure]:
        if self.key is None:
            return
        beside, errors = read_sidecars(self.sidecars, self.config.caption_field)
        if self.images:
            for message in errors:
                yield _failure(f"{self.shard.uri}#{self.key}", self.shard, "bad_sidecar", message, self.key)
        for member, offset in self.images:
            uri = f"{self.shard.uri}#{member.name.removeprefix('./')}"
            assert member.data is not None
            yield Sample(uri, self.shard.uri, self.key, member.data, offset, beside.captions, beside.metadata)
        self.finished.add(self.key)
        self.key, self.images, self.sidecars = None, [], []


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name; the last suffix is the type."""
    directory, base = posixpath.split(name)
    stem = base.partition(".")[0]
    return posixpath.join(directory, stem), posixpath.splitext(base)[1].lower()


def stem(uri: str) -> str:
    """The name of a single file without its suffix: its key."""
    return posixpath.splitext(posixpath.basename(uri))[0]


# --- Parquet -------------------------------------------------------------------------------------


def read_parquet(shard: ShardRef, config: ReadConfig) -> Iterator[Sample | Failure]:
    """Parquet with image bytes: a binary column, or Hugging Face's struct of bytes and path."""
    with storage.open_for_reading(shard.uri, config.storage_options) as file:
        try:
            parquet = pq.ParquetFile(file)
            column = find_image_column(parquet.schema_arrow, config.image_column)
            if column is None:
                yield _failure(
                    shard.uri,
                    shard,
                    "unreadable_shard",
                    f"no column with image bytes among {parquet.schema_arrow.names}",
                )
                return
        except (pa.ArrowException, OSError) as error:
            raise_storage_errors(error)
            yield _failure(shard.uri, shard, "unreadable_shard", f"not Parquet: {error}")
            return
        row = 0
        for group in range(parquet.num_row_groups):
            end = row + parquet.metadata.row_group(group).num_rows
            try:
                for batch in parquet.iter_batches(_PARQUET_BATCH, row_groups=[group]):
                    for values in batch.to_pylist():
                        yield _sample_of_row(values, row, column, shard, config)
                        row += 1
                if row != end:
                    raise ValueError(f"{end - row} of its rows are missing")
            except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
                # ValueError and OverflowError: text that is not UTF-8, dates that Python has not.
                raise_storage_errors(error)
                yield _failure(
                    shard.uri, shard, "damaged_shard", f"row group {group} (rows {row} to {end - 1}): {error}"
                )
            row = end
        if row != parquet.metadata.num_rows:
            message = f"its row groups hold {row} rows, and its footer tells of {parquet.metadata.num_rows}"
            yield _failure(shard.uri, shard, "damaged_shard", message)


def raise_storage_errors(error: Exception) -> None:
    """Arrow complains about bad content with an OSError too: a plain one, without an errno."""
    if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
        raise error


def find_image_column(schema: pa.Schema, wanted: str | None = None) -> str | None:
    """Name of the column that holds encoded images, or None."""
    candidates = [name for name in schema.names if _is_image_type(schema.field(name).type)]
    if wanted is not None:
        return wanted if wanted in candidates else None
    by_name = [name for name in IMAGE_COLUMNS if name in candidates]
    return (by_name or candidates or [None])[0]


def _is_image_type(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return type_.get_field_index("bytes") >= 0 and _is_image_type(type_.field("bytes").type)
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def _sample_of_row(
    values: dict[str, Any], row: int, column: str, shard: ShardRef, config: ReadConfig
) -> Sample | Failure:
    image: Any = values.pop(column)
    path: Any = None
    if isinstance(image, dict):
        image, path = image.get("bytes"), image.get("path")
    uri = f"{shard.uri}#{row}"
    key = next((str(values[name]) for name in KEY_FIELDS if values.get(name) is not None), None)
    key = key or (stem(path) if isinstance(path, str) else "") or str(row)
    if image is None:
        return _failure(uri, shard, "bad_record", f"row {row}: column {column!r} is null", key)
    if len(image) > config.max_image_bytes:
        message = f"{len(image)} bytes; the limit is {config.max_image_bytes} (--max_image_bytes)"
        return _failure(uri, shard, "too_many_bytes", message, key)
    beside = what_stands_beside(values, config.caption_field)
    return Sample(uri, shard.uri, key, image, None, beside.captions, beside.metadata)


# --- single files, from folders, globs and lists -------------------------------------------------


def read_files(shard: ShardRef, config: ReadConfig) -> Iterator[Sample | Failure]:
    """A packed list of single files with their sidecars."""
    for file in shard.files:
        if file.error:
            yield Failure(file.uri, shard.uri, "read", *file.error, key=file.key, version=file.version)
            continue
        try:
            yield from _read_file(file, shard, config)
        except SampleError as error:
            yield Failure(file.uri, file.uri, "read", error.reason, error.message, file.key, version=file.version)


def _read_file(file: FileRef, shard: ShardRef, config: ReadConfig) -> Iterator[Sample | Failure]:
    _check_size(file.num_bytes, config)
    data = _read_small(file.uri, config)
    _check_size(len(data), config)
    key = file.key or stem(file.uri)
    sidecars, errors = [], []
    for uri in file.sidecars:
        try:
            sidecar = _read_small(uri, config)
            if len(sidecar) > _MAX_SIDECAR_BYTES:
                errors.append(f"{uri}: {len(sidecar)} bytes of metadata; the limit is {_MAX_SIDECAR_BYTES}")
                continue
            sidecars.append((posixpath.splitext(uri)[1].lower(), sidecar))
        except SampleError as error:
            errors.append(f"{uri}: {error.message}")
    beside, parse_errors = read_sidecars(sidecars, config.caption_field)
    for message in errors + parse_errors:
        yield Failure(file.uri, file.uri, "read", "bad_sidecar", message, key, version=file.version)
    captions = file.captions + beside.captions
    metadata = file.metadata or beside.metadata
    yield Sample(file.uri, file.uri, key, data, None, captions, metadata, file.version)


def _read_small(uri: str, config: ReadConfig) -> bytes:
    fs = storage.filesystem(uri, config.storage_options)
    try:
        if storage.is_local(uri):
            status = os.stat(storage.normalise(uri))
            if not stat.S_ISREG(status.st_mode):  # a pipe or a device might never end
                raise SampleError("unreadable_file", f"not a regular file: {uri}")
            _check_size(status.st_size, config)
        return fs.cat_file(uri)
    except FileNotFoundError as error:
        raise SampleError("missing_file", f"not there: {uri}") from error
    except Exception as error:
        if _is_fault_of_file(error):
            raise SampleError("unreadable_file", f"{uri!r}: {error}") from error
        if storage.scheme_of(uri) in LINKS and isinstance(error, OSError) and not hasattr(error, "status"):
            # Of a web full of links some hosts are always away; that is no reason to wait for them.
            raise SampleError("unreachable_host", f"{uri!r}: {error}") from error
        raise


def _is_fault_of_file(error: Exception) -> bool:
    """Whether a file, or its name, is to blame; else it is the storage, and trying again may help."""
    return (
        isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError | ValueError)
        or getattr(error, "errno", None) in _BAD_NAME
        or getattr(error, "status", None) in _HTTP_REFUSED
        or type(error).__name__ == "ParamValidationError"  # botocore: no name of a bucket or an object
    )


def _check_size(num_bytes: int, config: ReadConfig) -> None:
    if num_bytes > config.max_image_bytes:
        message = f"{num_bytes} bytes; the limit is {config.max_image_bytes} (--max_image_bytes)"
        raise SampleError("too_many_bytes", message)


READERS: dict[str, Reader] = {"tar": read_tar, "parquet": read_parquet, "files": read_files}


# --- what stands beside an image -----------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """Captions, and a JSON object of all the rest, or None."""

    captions: tuple[str, ...] = ()
    metadata: str | None = None


def read_sidecars(sidecars: Iterable[tuple[str, bytes]], caption_field: str | None) -> tuple[Beside, list[str]]:
    """Contents of .json and .txt files beside an image, and a message for each that is no good."""
    values: dict[str, Any] = {}
    captions: list[str] = []
    errors: list[str] = []
    for suffix, data in sidecars:
        try:
            text = data.decode("utf-8-sig")
            if suffix == ".txt":
                captions += [line.strip() for line in text.splitlines() if line.strip()]
                continue
            parsed = json.loads(text)
            if not isinstance(parsed, dict):
                raise ValueError(f"an object was expected, not {type(parsed).__name__}")
            values |= parsed
        except (ValueError, RecursionError) as error:
            errors.append(f"{suffix} beside the image: {error}")
    beside = what_stands_beside(values, caption_field)
    return Beside((*captions, *beside.captions), beside.metadata), errors


def what_stands_beside(values: Mapping[str, Any], caption_field: str | None) -> Beside:
    """Splits metadata fields into captions and the rest."""
    names: Sequence[str] = (caption_field,) if caption_field else CAPTION_FIELDS
    name = next((name for name in names if _sentences(values.get(name))), None)
    rest = _plain({key: value for key, value in values.items() if key != name})
    metadata = json.dumps(rest, ensure_ascii=False, default=str) if rest else None
    return Beside(_sentences(values.get(name)) if name else (), metadata)


def _sentences(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return tuple(item.strip() for item in value if item.strip())
    return ()


def _plain(value: Any, depth: int = 0) -> Any:
    """What JSON can hold of a value; None for bytes, nulls and numbers that are not finite.

    Such fields, and what is nested too deeply, are left out of objects; lists keep their length.
    """
    if isinstance(value, (bytes, bytearray)) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, (dict, list, tuple)) and depth > _MAX_METADATA_DEPTH:
        return None
    if isinstance(value, dict):
        plain = {str(key): _plain(inner, depth + 1) for key, inner in value.items()}
        return {key: inner for key, inner in plain.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, depth + 1) for inner in value]
    return value


def _begins_with(uri: str, magic: bytes, config: ReadConfig) -> bool:
    return storage.filesystem(uri, config.storage_options).cat_file(uri, start=0, end=len(magic)) == magic


def _failure(
    uri: str, shard: ShardRef, reason: str, message: str, key: str | None = None, byte_offset: int | None = None
) -> Failure:
    return Failure(uri, shard.uri, "read", reason, message, key, byte_offset)


def has_suffix(uri: str, suffixes: tuple[str, ...]) -> bool:
    return os.path.splitext(uri)[1].lower() in suffixes
