"""What runs said of themselves at their end: `runs/<run id>/manifest.json`."""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

from schemas.catalog import RUN_MANIFEST, CatalogLayout
from schemas.manifests import RunManifest
from schemas.recipes import Recipe
from vlm_ops import storage

logger = logging.getLogger(__name__)

_NUM_RUNS_ASKED = 50
_MIN_BYTES = 1_000_000  # of a run that tells how long others will take


def new_run_id() -> str:
    """Sorts by time, and is nobody else's."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03}-{uuid.uuid4().hex[:6]}"


def read_manifest(catalog: CatalogLayout, run_id: str, storage_options: storage.StorageOptions) -> RunManifest:
    """The manifest of a run.

    Raises:
        FileNotFoundError: It has none: it was killed.
    """
    return RunManifest.from_json(storage.read_bytes(catalog.run_file(run_id, RUN_MANIFEST), storage_options).decode())


def refused_runs(
    catalog: CatalogLayout, storage_options: storage.StorageOptions, last: int = _NUM_RUNS_ASKED
) -> list[RunManifest]:
    """Of so many newest runs those that published nothing, newest first."""
    newest = itertools.islice(_manifests(catalog, storage_options), last)
    return [manifest for manifest in newest if manifest.status == "refused"]


def seconds_per_byte(catalog: CatalogLayout, recipe: Recipe, storage_options: storage.StorageOptions) -> float | None:
    """How long a recipe takes for each byte of input, as the largest of the newest runs tells; None where none is large enough."""
    newest = itertools.islice(_manifests(catalog, storage_options), _NUM_RUNS_ASKED)
    telling = [
        manifest
        for manifest in newest
        if manifest.recipe == recipe
        and manifest.num_bytes_read >= _MIN_BYTES
        and manifest.num_images_copied <= 0.1 * manifest.num_images  # copies take a fraction of the time
    ]
    if not telling:
        return None
    largest = max(telling, key=lambda manifest: manifest.num_bytes_read)
    return largest.wall_sec / largest.num_bytes_read


def _manifests(catalog: CatalogLayout, storage_options: storage.StorageOptions) -> Iterator[RunManifest]:
    """Newest first; runs that were killed have none."""
    try:
        names = storage.names_in(catalog.runs, storage_options)
    except FileNotFoundError:
        return
    for run_id in sorted(names, reverse=True):
        try:
            yield read_manifest(catalog, run_id, storage_options)
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, KeyError) as error:  # of another version, or damaged
            logger.warning("%s cannot be read: %s", catalog.run_file(run_id, RUN_MANIFEST), error)
