"""How many images a second `tag` makes of a catalog's rows: the whole command, median of some rounds.

    python benchmarks/bench_tag.py [--catalog CATALOG] [--images 100000] [--rounds 3] [--threads N]

The catalog, by default one of flickr8k/dev with the ops of tagging, is copied under other image ids as often as it takes, so that
its rows are as varied as photos are and none is computed twice.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.catalog import CatalogLayout, part_name
from schemas.samples import digest, image_id
from vlm_ops.delta_tables import LivePart, read_columns
from vlm_ops.ops import schema_of
from vlm_ops.run_manifests import new_run_id
from vlm_ops.states import CatalogState, StateParts, commit_parts, existing_state, new_record

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/dev-00000.tar"
    )
    parser.add_argument("--catalog", help="a catalog to copy, instead of building one")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = args.catalog or f"{scratch}/source"
        if args.catalog is None:
            shard = str(args.data / "flickr8k" / "dev-00000.tar")
            beamsight("build", "--input", shard, "--catalog", source, "--ops", "default,tagging")
        large = CatalogLayout(f"{scratch}/large")
        num_images = copy(CatalogLayout(source), large, args.images)
        rates = []
        for _ in range(args.rounds):
            shutil.rmtree(f"{scratch}/large/tags", ignore_errors=True)
            started = time.perf_counter()
            beamsight("tag", large.root, "--num_threads", str(args.threads))
            rates.append(num_images / (time.perf_counter() - started))
            print(f"{num_images} images: {rates[-1]:.0f} images/s", flush=True)
        started = time.perf_counter()
        beamsight("tag", large.root)
        again = time.perf_counter() - started
        print(f"median {statistics.median(rates):.0f} images/s; again with nothing new: {again:.1f} s")


def beamsight(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def copy(source: CatalogLayout, target: CatalogLayout, num_images: int) -> int:
    """Copies rows under other URIs until there are so many; returns how many there are."""
    state = existing_state(source, {})
    assert state.record is not None
    recipe = state.record.recipe
    Path(target.images).mkdir(parents=True)
    Path(target.failures).mkdir()
    tables = [rows for _, rows in read_columns(source.images, state.images, schema_of(recipe.ops).names, {})]
    parts: list[LivePart] = []
    done = number = 0
    while done < num_images:
        rows = tables[number % len(tables)]
        uris = [f"{uri}?copy={number}" for uri in rows["uri"].to_pylist()]
        for name, values in (("uri", pa.array(uris)), ("image_id", pa.array([image_id(uri) for uri in uris]))):
            rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), values)
        name = part_name(f"s{digest(str(number))}-{digest(str(number))[:12]}", recipe.recipe_id)
        path = f"{target.images}/{name}"
        pq.write_table(rows, path, compression="zstd", row_group_size=128)
        parts.append(LivePart(name, rows.num_rows, os.path.getsize(path)))
        done, number = done + rows.num_rows, number + 1
    made = StateParts(tuple(parts), ())
    record = new_record(new_run_id(), "build", recipe, None, made)
    commit_parts(target, CatalogState(), made, record, {}, schema_of(recipe.ops))
    return done


if __name__ == "__main__":
    main()
