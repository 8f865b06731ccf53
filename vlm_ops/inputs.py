"""Input patterns -> shard references: what there is to read, without reading it.

Brace patterns, globs, folders and files are expanded; each file becomes a shard (tar, Parquet),
a list of images (JSONL, CSV, Parquet with a URI column), or a single image. Single images are
packed into shards of about a thousand.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import braceexpand
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.samples import FILES_PER_SHARD, INPUT_FORMATS, FileRef, ShardRef
from vlm_ops import storage
from vlm_ops.shards import (
    IMAGE_SUFFIXES,
    KEY_FIELDS,
    LINKS,
    SIDECAR_SUFFIXES,
    URI_COLUMNS,
    find_image_column,
    has_suffix,
    raise_storage_errors,
    what_stands_beside,
)

_SUFFIXES = {
    "tar": (".tar", ".tgz"),
    "parquet": (".parquet", ".pq"),
    "list": (".jsonl", ".ndjson", ".csv", ".tsv"),
    "image": IMAGE_SUFFIXES,
}

logger = logging.getLogger(__name__)

_GLOB_CHARACTERS = "*?["
_SNIFF_BYTES = 512
_NOT_ALLOWED = "!"  # ends the version of an entry of such a scheme, so that it is new once it is allowed
NUM_REQUESTS = 32
_MANY_REQUESTS = 1000


@dataclass(frozen=True)
class InputConfig:
    """What to read, and how to tell what it is.

    Attributes:
        patterns: Files, folders, globs, with brace patterns (`{00000..00041}`), on any filesystem.
        format: One of INPUT_FORMATS: told by suffix and content (`auto`), or forced.
        uri_column: Column or field of a list that holds the image URIs; None finds it.
        caption_field: As in ReadConfig.
        image_column: As in ReadConfig.
        allowed_schemes: Schemes that listed URIs may have; empty: only the list's own.
        files_per_shard: How many single files make one unit of work.
        storage_options: For fsspec.
    """

    patterns: tuple[str, ...]
    format: str = "auto"
    uri_column: str | None = None
    caption_field: str | None = None
    image_column: str | None = None
    allowed_schemes: tuple[str, ...] = ()
    files_per_shard: int = FILES_PER_SHARD
    storage_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format not in INPUT_FORMATS:
            raise ValueError(f"unknown input format {self.format!r}; use one of {', '.join(INPUT_FORMATS)}")
        if self.files_per_shard < 1:
            raise ValueError(f"files_per_shard must be at least 1, got {self.files_per_shard}")


@dataclass(frozen=True)
class Listing:
    """All inputs.

    Attributes:
        shards: Shard files.
        files: Single image files, by the folder or list they come from.
        passed_over: Files in folders that are no input, counted by their suffix.
        empty_patterns: Patterns, and lists, that are there and hold no input.
    """

    shards: tuple[ShardRef, ...]
    files: dict[str, list[FileRef]]
    passed_over: dict[str, int] = field(default_factory=dict)
    empty_patterns: tuple[str, ...] = ()

    @property
    def num_files(self) -> int:
        return sum(len(files) for files in self.files.values())


@dataclass(frozen=True, slots=True)
class _Found:
    uri: str
    size: int
    version: str
    format: str


def list_inputs(config: InputConfig) -> Listing:
    """Finds everything that the patterns name, each file once, in the order of their URIs.

    Raises:
        FileNotFoundError: A pattern matches nothing.
        ValueError: There is no input in what the patterns match, a file's format cannot be told, a list has no column of
            URIs, or a scheme is allowed that nothing here can open.
    """
    _check_schemes(config.allowed_schemes)
    shards: dict[str, ShardRef] = {}
    files: dict[str, dict[str, FileRef]] = {}
    listed: set[str] = set()
    empty_lists: list[str] = []
    passed_over: Counter[str] = Counter()
    used: set[str] = set()
    for pattern in config.patterns:
        for origin, found, sidecars in _expand(pattern, config):
            if found.format == "other":
                passed_over[posixpath.splitext(found.uri)[1].lower()] += 1
                continue
            if found.format in ("tar", "parquet"):
                used.add(pattern)
                shards[found.uri] = ShardRef(found.uri, found.format, found.version, found.size)
                continue
            is_list = found.format == "list"
            refs = [_file_ref(found, sidecars)]
            if is_list:
                refs = in_present_version(list(_read_list(found, config)), config.storage_options)
            if refs:
                used.add(pattern)
            else:
                empty_lists.append(found.uri)
            place = found.uri if is_list else origin
            for ref in refs:
                if ref.uri not in listed:
                    listed.add(ref.uri)
                    files.setdefault(place, {})[ref.uri] = ref
    ordered = {place: [refs[uri] for uri in sorted(refs)] for place, refs in sorted(files.items())}
    if passed_over:
        others = ", ".join(f"{count} of {suffix or 'no suffix'}" for suffix, count in sorted(passed_over.items()))
        logger.warning("passed over, as no input that is known: %s", others)
    if empty_lists:
        logger.warning("lists without an entry: %s", ", ".join(empty_lists))
    if not shards and not ordered and empty_lists:
        raise ValueError(f"the list {empty_lists[0]} has no entry; give one that names images")
    if not shards and not ordered:
        raise ValueError(f"no images, tars, Parquet files or lists in {' '.join(config.patterns)}")
    empty = dict.fromkeys([*(pattern for pattern in config.patterns if pattern not in used), *empty_lists])
    return Listing(tuple(shards[uri] for uri in sorted(shards)), ordered, dict(passed_over), tuple(empty))


def _check_schemes(schemes: Iterable[str]) -> None:
    for scheme in schemes:
        try:
            fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise ValueError(f"--allowed_schemes {scheme}: cannot be opened: {error}") from error


def pack(files: Mapping[str, Sequence[FileRef]], files_per_shard: int = FILES_PER_SHARD) -> list[ShardRef]:
    """Single files -> shards of format `files`, evenly filled."""
    packs = []
    for place, refs in files.items():
        num_packs = -(-len(refs) // files_per_shard)
        for number in range(num_packs):
            chosen = tuple(refs[number * len(refs) // num_packs : (number + 1) * len(refs) // num_packs])
            packs.append(ShardRef(place, "files", "", sum(ref.num_bytes for ref in chosen), chosen))
    return packs


def _expand(pattern: str, config: InputConfig) -> Iterator[tuple[str, _Found, tuple[str, ...]]]:
    """(folder, file, its sidecars) for each file of a pattern."""
    alternatives = _alternatives(pattern, config)
    if len(alternatives) == 1:  # whatever is below it passes one by one
        yield from _expand_one(alternatives[0], config)
        return
    for _, found in storage.read_ahead(lambda uri: list(_expand_one(uri, config)), alternatives, NUM_REQUESTS):
        yield from found


def _expand_one(uri: str, config: InputConfig) -> Iterator[tuple[str, _Found, tuple[str, ...]]]:
    with storage.named(uri):
        yield from _found_at(uri, config)


def _found_at(uri: str, config: InputConfig) -> Iterator[tuple[str, _Found, tuple[str, ...]]]:
    fs = storage.filesystem(uri, config.storage_options)
    if fs.isdir(uri):
        infos = [info for info in fs.find(uri, detail=True).values() if not _is_hidden(fs, info["name"], uri)]
        yield from _classify(fs, infos, uri, config, explicit=False)
    elif fs.exists(uri):
        info = fs.info(uri)
        yield from _classify(
            fs, [info, *_sidecars_beside(fs, info["name"])], posixpath.dirname(uri), config, explicit=True
        )
    elif infos := [info for info in _glob(fs, uri) if info["type"] == "file"]:
        yield from _classify(fs, infos, _folder_of_glob(uri), config, explicit=True)
    else:
        raise FileNotFoundError(f"no input matches {uri!r}")


def _alternatives(pattern: str, config: InputConfig) -> list[str]:
    uri = storage.normalise(pattern)
    if "{" not in pattern or storage.exists(uri, config.storage_options):
        return [uri]
    try:
        return [storage.normalise(alternative) for alternative in braceexpand.braceexpand(pattern, escape=False)]
    except ValueError as error:
        raise ValueError(f"cannot read the brace pattern {pattern!r}: {error}") from error


def _glob(fs: Any, uri: str) -> list[Mapping[str, Any]]:
    """What a glob matches, and the sidecars in the same folders. As in a shell, `*` is no hidden file."""
    if not any(character in uri for character in _GLOB_CHARACTERS):
        return []
    folder = _folder_of_glob(uri)
    wants_hidden = "/." in uri[len(folder) :]
    matched = {
        name: info
        for name, info in fs.glob(uri, detail=True).items()
        if wants_hidden or not _is_hidden(fs, name, folder)
    }
    folders = {posixpath.dirname(name) for name in matched if has_suffix(name, IMAGE_SUFFIXES)}
    for folder in folders:
        matched |= {
            info["name"]: info for info in fs.ls(folder, detail=True) if has_suffix(info["name"], SIDECAR_SUFFIXES)
        }
    return list(matched.values())


def _classify(
    fs: Any, infos: Iterable[Mapping[str, Any]], origin: str, config: InputConfig, explicit: bool
) -> Iterator[tuple[str, _Found, tuple[str, ...]]]:
    """Tells the format of each file. Inside a folder what is no input has format `other`; a file
    that was named is an error."""
    infos = sorted(infos, key=lambda info: info["name"])
    beside: dict[str, list[Mapping[str, Any]]] = {}
    for info in infos:
        if has_suffix(info["name"], SIDECAR_SUFFIXES):
            beside.setdefault(posixpath.splitext(info["name"])[0], []).append(info)
    for info in infos:
        format_ = _format_of(fs, info, config, explicit)
        if has_suffix(info["name"], SIDECAR_SUFFIXES) and format_ is None:
            continue
        if format_ is None or (format_ == "list" and not explicit):
            format_ = "other"
        sidecars = beside.get(posixpath.splitext(info["name"])[0], []) if format_ == "image" else []
        # What stands beside an image is part of its row, so it is part of its version.
        version = "+".join(storage.version_of(each) for each in (info, *sidecars))
        found = _Found(storage.uri_of(fs, info["name"]), int(info.get("size") or 0), version, format_)
        yield origin, found, tuple(storage.uri_of(fs, each["name"]) for each in sidecars)


def _format_of(fs: Any, info: Mapping[str, Any], config: InputConfig, explicit: bool) -> str | None:
    name = str(info["name"]).lower()
    if has_suffix(name, SIDECAR_SUFFIXES) and not (explicit and config.format in ("tar", "parquet", "list")):
        return None
    if config.format != "auto":
        return config.format
    if name.endswith(".tar.gz"):
        return "tar"
    for format_, suffixes in _SUFFIXES.items():
        if has_suffix(name, suffixes):
            return _parquet_or_list(fs, name=str(info["name"]), config=config) if format_ == "parquet" else format_
    if explicit or not posixpath.splitext(name)[1]:
        # Object stores refuse a range of an empty file.
        start = fs.cat_file(info["name"], start=0, end=_SNIFF_BYTES) if info.get("size") != 0 else b""
        sniffed = sniff(start)
        if sniffed is None and explicit:
            raise ValueError(
                f"cannot tell the format of {info['name']!r} by suffix or content; force it with --input_format"
            )
        return _parquet_or_list(fs, str(info["name"]), config) if sniffed == "parquet" else sniffed
    return None


def sniff(start: bytes) -> str | None:
    """Format of a file by its first bytes; None where they tell nothing."""
    if start[257:262] == b"ustar" or start[:2] == b"\x1f\x8b":
        return "tar"
    if start[:4] == b"PAR1":
        return "parquet"
    is_image = start[:3] == b"\xff\xd8\xff" or start[:8] == b"\x89PNG\r\n\x1a\n" or start[:6] in (b"GIF87a", b"GIF89a")
    is_image = (
        is_image
        or start[:2] == b"BM"
        or start[:4] in (b"II*\0", b"MM\0*")
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
    )
    if is_image:
        return "image"
    if start.lstrip()[:1] == b"{":
        return "list"
    return None


def _parquet_or_list(fs: Any, name: str, config: InputConfig) -> str:
    """Parquet holds images, or names them; a file that is neither is left to its reader to report."""
    try:
        with fs.open(name, "rb") as file:
            schema = pq.read_schema(file)
    except (pa.ArrowException, OSError):
        return "parquet"
    if find_image_column(schema, config.image_column) is not None:
        return "parquet"
    if config.image_column is not None:
        raise ValueError(
            f"{name}: --image_column {config.image_column!r} is no column of bytes; there are: {', '.join(schema.names)}"
        )
    return "list" if _find_uri_column(schema.names, config) else "parquet"


# --- lists of image URIs -------------------------------------------------------------------------


def _read_list(found: _Found, config: InputConfig) -> Iterator[FileRef]:
    """One reference a line or row, in the version of the line; a bad one travels with its error."""
    for number, record, error in _records(found, config):
        place = f"{found.uri}#{number}"
        version = hashlib.sha256(json.dumps([record, error], default=str, sort_keys=True).encode()).hexdigest()[:12]
        if record is None:
            yield FileRef(place, version, error=("bad_record", f"line {number}: {error}"), entry=version)
            continue
        column = _find_uri_column(list(record), config)
        value = record.get(column) if column else None
        if not isinstance(value, str) or not value.strip():
            wanted = config.uri_column or f"one of {', '.join(URI_COLUMNS)}"
            yield FileRef(
                place, version, error=("bad_record", f"line {number}: no image URI ({wanted})"), entry=version
            )
            continue
        uri = _resolve(value.strip(), found.uri)
        scheme = storage.scheme_of(uri)
        allowed = config.allowed_schemes or (storage.scheme_of(found.uri),)
        if scheme not in allowed:
            message = f"line {number}: {scheme}:// is not allowed here; allow it with --allowed_schemes {scheme}"
            refused = version + _NOT_ALLOWED
            yield FileRef(uri, refused, error=("scheme_not_allowed", message), entry=refused)
            continue
        key = next((str(record[name]) for name in KEY_FIELDS if record.get(name) not in (None, "")), None)
        rest = {name: item for name, item in record.items() if name != column}
        beside = what_stands_beside(rest, config.caption_field)
        yield FileRef(uri, version, key=key, captions=beside.captions, metadata=beside.metadata, entry=version)


def in_present_version(files: Sequence[FileRef], storage_options: storage.StorageOptions) -> list[FileRef]:
    """The references in the version and size that their files have now, by a request each, many at a time.

    Links are not asked for: web servers answer such requests slowly, wrongly or not at all. A file that cannot be had keeps
    the version that it came with, and is left to its reader, who tells why.
    """
    asked = [i for i, file in enumerate(files) if not file.error and storage.scheme_of(file.uri) not in LINKS]
    if len(asked) >= _MANY_REQUESTS:
        logger.info("asking for size and time of %d files", len(asked))
    present = list(files)
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        for i, file in zip(asked, pool.map(lambda i: _stated(files[i], storage_options), asked), strict=True):
            present[i] = file
    return present


def allowed(file: FileRef) -> FileRef:
    """An entry whose scheme its list did not allow, as one that is allowed."""
    entry = file.entry.removesuffix(_NOT_ALLOWED)
    return replace(file, error=None, entry=entry, version=entry)


def _stated(file: FileRef, storage_options: storage.StorageOptions) -> FileRef:
    versions = [file.entry] if file.entry else []
    size = 0
    for uri in (file.uri, *file.sidecars):
        try:
            info = storage.filesystem(uri, storage_options).info(uri)
        except Exception:  # of any library below fsspec
            return file
        versions.append(storage.version_of(info))
        size = int(info.get("size") or 0) if uri == file.uri else size
    return replace(file, version="+".join(versions), num_bytes=size)


def _records(found: _Found, config: InputConfig) -> Iterator[tuple[int, dict[str, Any] | None, str | None]]:
    """(line number from 1, record, error) of a list in any of its formats."""
    with storage.open_for_reading(found.uri, config.storage_options) as file:
        if file.read(4) == b"PAR1":
            file.seek(0)
            yield from _parquet_records(file)
            return
        file.seek(0)
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
        if has_suffix(found.uri, (".csv", ".tsv")):
            reader = csv.DictReader(text, delimiter="\t" if has_suffix(found.uri, (".tsv",)) else ",", restkey="_rest")
            try:
                names = list(reader.fieldnames or ())
            except csv.Error as problem:
                raise ValueError(f"{found.uri}: not CSV: {problem}") from problem
            if names and _find_uri_column(names, config) is None:
                wanted = (
                    f"--uri_column {config.uri_column!r}"
                    if config.uri_column
                    else f"column named one of {', '.join(URI_COLUMNS)}"
                )
                raise ValueError(f"{found.uri}: there is no {wanted}; its columns are {', '.join(names)}")
            while True:
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as problem:  # a quotation mark that is never closed, say
                    yield reader.line_num, None, f"not CSV: {problem}"
                    continue
                yield reader.line_num, {str(name): value for name, value in row.items() if value}, None
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                error = None if isinstance(record, dict) else f"a JSON object was expected, not {type(record).__name__}"
            except (ValueError, RecursionError) as problem:
                record, error = None, f"not JSON: {problem}"
            yield number, record if error is None else None, error


def _parquet_records(file: Any) -> Iterator[tuple[int, dict[str, Any] | None, str | None]]:
    """Rows of a Parquet list; those of a damaged row group with its error, each of them."""
    parquet = pq.ParquetFile(file)
    first = 1
    for group in range(parquet.num_row_groups):
        num_rows = parquet.metadata.row_group(group).num_rows
        rows: list[dict[str, Any] | None] = [None] * num_rows
        error = None
        try:
            rows = [*parquet.read_row_group(group).to_pylist()]
        except (pa.ArrowException, OSError, ValueError, OverflowError) as problem:
            raise_storage_errors(problem)
            error = f"row group {group} is damaged: {problem}"
        for number, row in enumerate(rows, first):
            yield number, row, error
        first += num_rows


def _find_uri_column(names: Sequence[str], config: InputConfig) -> str | None:
    if config.uri_column:
        return config.uri_column if config.uri_column in names else None
    by_lower = {name.lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in URI_COLUMNS if name in by_lower), None)


def _resolve(value: str, list_uri: str) -> str:
    """Paths in a list are relative to its folder."""
    if "://" in value:
        return storage.normalise(value)
    if value.startswith("/") and storage.is_local(list_uri):
        return storage.normalise(value)
    joined = posixpath.join(posixpath.dirname(list_uri), value)
    if storage.is_local(list_uri):
        return storage.normalise(joined)
    if ".." in value.split("/"):  # object stores know no parent folder
        scheme, _, path = joined.partition("://")
        return f"{scheme}://{posixpath.normpath(path)}"
    return joined


# --- single files --------------------------------------------------------------------------------


def _file_ref(found: _Found, sidecars: tuple[str, ...]) -> FileRef:
    return FileRef(found.uri, found.version, found.size, sidecars)


def _sidecars_beside(fs: Any, name: str) -> list[Mapping[str, Any]]:
    """What stands beside one image that was named alone."""
    if not has_suffix(name, IMAGE_SUFFIXES):
        return []
    candidates = [posixpath.splitext(name)[0] + suffix for suffix in SIDECAR_SUFFIXES]
    return [fs.info(candidate) for candidate in candidates if fs.exists(candidate)]


def _folder_of_glob(uri: str) -> str:
    first = min(uri.find(character) for character in _GLOB_CHARACTERS if character in uri)
    return posixpath.dirname(uri[:first])


def _is_hidden(fs: Any, name: str, folder: str) -> bool:
    relative = name[len(fs._strip_protocol(folder)) :]
    return any(part.startswith(".") for part in relative.split("/"))
