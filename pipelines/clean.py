"""`beamsight clean`: deletes what no kept state of a catalog needs."""

from __future__ import annotations

import sys
from collections import Counter
from datetime import UTC, datetime

from pipelines.options import CleanOptions
from schemas.catalog import CatalogLayout
from vlm_ops import storage
from vlm_ops.cleaning import remove, unneeded_files


def run(options: CleanOptions) -> int:
    """Deletes, or says what it would delete.

    Raises:
        FileNotFoundError: There is no catalog.
    """
    catalog = CatalogLayout(storage.normalise(options.catalog))
    since = datetime.now(UTC) - options.older_than
    files = unneeded_files(catalog, since, options.storage_options)
    if not options.dry_run:
        remove(catalog, files, options.storage_options)
    counts = Counter(file.path.split("/")[0] for file in files)
    told = ", ".join(f"{folder} {count}" for folder, count in sorted(counts.items())) or "none"
    verb = "would delete" if options.dry_run else "deleted"
    print(f"{verb} {len(files)} files ({told}), {sum(file.num_bytes for file in files) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("clean", sys.argv[1:]))
