"""Where a run reads and writes: free space, the catalog's folder, the inputs."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlm_ops.diagnosis import Finding, failed, gigabytes, refused

_LITTLE_SPACE = 2e9
ANSWER_SEC = 10.0  # that storage has for an answer; its libraries ask again for minutes
LISTING_SEC = 20.0
_FIRST_BYTES = 4096

_T = TypeVar("_T")


def check_disk(catalog: str | None) -> Iterator[Finding]:
    """Free space where a run keeps files, and whether it may."""
    from vlm_ops import storage
    from vlm_ops.models.onnx_engine import cache_dir

    try:
        yield check_folder("temporary files", Path(tempfile.gettempdir()), is_needed=True)
    except FileNotFoundError as error:
        yield Finding("temporary files", "problem", f"there is no place for them: {error}", "set TMPDIR")
    yield check_folder("cache", cache_dir(), remedy="set BEAMSIGHT_CACHE; what cannot be kept is made at every start")
    yield check_folder("hub cache", hub_cache(), remedy="set HF_HUB_CACHE, for models of the Hugging Face hub")
    if catalog is not None and storage.is_local(catalog):
        yield check_folder("catalog", Path(storage.normalise(catalog)), is_needed=True)
    if (shared := Path("/dev/shm")).is_dir():
        yield Finding("shared memory", "ok", f"{gigabytes(shutil.disk_usage(shared).total)} at {shared}")


def check_folder(name: str, folder: Path, remedy: str = "", is_needed: bool = False) -> Finding:
    """Free space of a folder that is there, or will be made.

    Args:
        remedy: Where it cannot be written, besides allowing it.
        is_needed: Whether nothing goes on without it.
    """
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    told = f"{gigabytes(free)} free at {folder}"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "no permission, or read-only" if there.is_dir() else "no directory"
        advice = f"allow it, or {remedy}" if remedy else "allow it, or name another place"
        return Finding(name, "problem" if is_needed else "warning", f"{told}, which cannot be written: {reason} ({there})", advice)  # fmt: skip
    if free < _LITTLE_SPACE:
        return Finding(name, "warning", told, f"make room: less than {gigabytes(_LITTLE_SPACE)} is soon full")
    return Finding(name, "ok", told)


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps models (its `constants.py`), without importing it."""
    if found := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(found).expanduser()
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "hub"


def check_catalog_access(catalog: str, storage_options: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a catalog can be here."""
    yield from check_place("catalog", catalog, storage_options)


def check_place(name: str, place: str, storage_options: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether a folder can be used: a small file is written below it, kept from being written again, read, listed
    and deleted. Nothing stays behind.

    Args:
        name: What the folder is for.
    """
    from vlm_ops import storage

    try:
        within(lambda: storage.check_writable(place, storage_options), ANSWER_SEC)
        file = f".beamsight-doctor-{uuid.uuid4().hex[:8]}"
        uri = f"{_folder_that_is_there(storage.normalise(place))}/{file}"
        yield within(lambda: _try_out(name, uri, storage_options), ANSWER_SEC)
    except TimeoutError:
        told = f"{place}: no answer within {ANSWER_SEC:g} seconds"
        remedy = "see whether the storage, and its endpoint in --storage_options, can be reached at all"
        yield Finding(name, "problem", told, remedy)
    except ValueError as error:
        yield refused(name, error)
    except Exception as error:  # of any library below fsspec
        yield _unreachable(name, place, error)


def check_inputs(patterns: Sequence[str], storage_options: Mapping[str, Any]) -> Iterator[Finding]:
    """Each pattern."""
    for pattern in patterns:
        yield from check_input(pattern, storage_options)


def check_input(pattern: str, storage_options: Mapping[str, Any]) -> Iterator[Finding]:
    """What an input pattern names, and whether the first of it can be read."""
    from vlm_ops.inputs import InputConfig, list_inputs

    try:
        config = InputConfig((pattern,), storage_options=storage_options)
        listing = within(lambda: list_inputs(config), LISTING_SEC)
        files = [file.uri for place in listing.files.values() for file in place]
        first = next(iter([*(shard.uri for shard in listing.shards), *files]))
        within(lambda: _read_start(first, storage_options), ANSWER_SEC)
    except TimeoutError:
        told = f"{pattern}: not listed within {LISTING_SEC:g} seconds; there is very much, or no answer"
        yield Finding("input", "unknown", told, "beamsight build --dry_run lists to the end")
    except (ValueError, FileNotFoundError) as error:
        yield refused("input", error)
    except Exception as error:  # of any library below fsspec
        yield _unreachable("input", pattern, error)
    else:
        told = f"{pattern}: {len(listing.shards)} shards and {len(files)} single files; the first one can be read"
        yield Finding("input", "ok", told)


def within(action: Callable[[], _T], seconds: float) -> _T:
    """What an action gives, if it does so in time.

    Raises:
        TimeoutError: It did not; it is left alone, in a thread that does not keep the program from ending.
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    if errors:
        raise errors[0]
    return results[0]


def _unreachable(name: str, uri: str, error: Exception) -> Finding:
    from vlm_ops import storage

    if not storage.is_local(uri):
        return refused(name, storage.unreachable(uri, error))
    return failed(
        name, error, f"check {uri}, and what may be done there: list, read and, for a catalog, write and delete"
    )


def _try_out(name: str, uri: str, storage_options: Mapping[str, Any]) -> Finding:
    """Writes a file twice, of which the first one must stay, and looks for it."""
    from vlm_ops import storage

    fs = storage.filesystem(uri, storage_options)
    folder, _, file = uri.rpartition("/")
    first, second = uuid.uuid4().bytes, uuid.uuid4().bytes
    try:
        for data in (first, second):
            with storage.replacing(uri, storage_options, only_if_absent=True) as path:
                Path(path).write_bytes(data)
        found = storage.read_bytes(uri, storage_options)
        fs.invalidate_cache()
        listed = {str(path).rstrip("/").rpartition("/")[2] for path in fs.ls(folder, detail=False)}
    finally:
        storage.remove(uri, storage_options)
    if found == second:
        told = f"{folder}: a file that is there is replaced unasked, so two runs at once would spoil the catalog"
        return Finding(name, "problem", told, "use a storage with conditional writes (docs/storage.md)")
    if found != first or file not in listed:
        told = f"{folder}: what was written is not what is {'listed' if found == first else 'read'}"
        return Finding(name, "problem", told, "use another storage")
    return Finding(name, "ok", f"{folder}: a small file was written, read, listed and deleted")


def _folder_that_is_there(uri: str) -> str:
    """A local catalog that is not there yet is not made, so the folder around it is tried."""
    from vlm_ops import storage

    while storage.is_local(uri) and not os.path.isdir(uri):
        uri = os.path.dirname(uri)
    return uri.rstrip("/")


def _read_start(uri: str, storage_options: Mapping[str, Any]) -> None:
    from vlm_ops import storage

    with storage.open_for_reading(uri, storage_options) as file:
        file.read(_FIRST_BYTES)
