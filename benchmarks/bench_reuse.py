"""What copying rows costs, beside computing them: a corpus in its shards, and the same images sharded anew.

    python benchmarks/bench_reuse.py [--data FOLDER] [--shards N] [--threads N]

The shards are computed by the default model and ops. Then the same images, in shards of another size, in
their old order and shuffled, are copied by their bytes from what was computed. Each is read, written and
summarised as in `build`; planning, commit and index are left out.
"""

from __future__ import annotations

import argparse
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from schemas.recipes import DEFAULT_MAX_IMAGE_BYTES, DEFAULT_MAX_IMAGE_PIXELS, DEFAULT_MODEL, DEFAULT_OPS, Recipe
from schemas.samples import ShardRef
from vlm_ops.contents import write_known_contents
from vlm_ops.delta_tables import LivePart
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.models.settings import CPU
from vlm_ops.ops import plan_ops
from vlm_ops.parts import PartSummary
from vlm_ops.shards import ReadConfig

ROOT = Path(__file__).parents[1]
IMAGES_PER_NEW_SHARD = 700


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/*.tar")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    old = sorted((args.data / "flickr8k").glob("train-*.tar"))[: args.shards]
    recipe = Recipe(plan_ops(DEFAULT_OPS, DEFAULT_MODEL), DEFAULT_MAX_IMAGE_BYTES, DEFAULT_MAX_IMAGE_PIXELS)
    with tempfile.TemporaryDirectory() as scratch:
        catalog, known = f"{scratch}/catalog", f"{scratch}/known.arrow"
        read = ReadConfig(DEFAULT_MAX_IMAGE_BYTES)
        config = EnrichConfig(catalog, recipe, "bench", read, settings=CPU, num_threads=args.threads)
        summaries = measure("computed", config, old)
        parts = [LivePart(each.name, each.num_images, each.num_bytes) for each in summaries]
        started = time.perf_counter()
        write_known_contents(known, f"{catalog}/images", parts, {}, lambda _, rows: np.zeros(rows.num_rows, bool))
        print(f"known contents written in {time.perf_counter() - started:.2f} s", flush=True)
        copying = replace(config, known_contents=known)
        members = [member for path in old for member in members_of(path)]
        measure("copied, in order", copying, sharded_anew(members, Path(scratch), "new"))
        random.Random(0).shuffle(members)
        measure("copied, shuffled", copying, sharded_anew(members, Path(scratch), "shuffled"))


def measure(name: str, config: EnrichConfig, shards: Sequence[Path]) -> list[PartSummary]:
    enricher = Enricher(config)
    started = time.perf_counter()
    summaries = [enricher.enrich(ShardRef(str(path), "tar", "", path.stat().st_size)) for path in shards]
    seconds = time.perf_counter() - started
    num_images = sum(summary.num_images for summary in summaries)
    num_copied = sum(summary.num_copied for summary in summaries)
    stages = ", ".join(
        f"{stage} {sum(summary.stage_sec.get(stage, 0) for summary in summaries):.1f}"
        for stage in ("read", "copy", "decode", "model", "caption", "write")
    )
    print(
        f"{name:18} {num_images} images, {num_copied} of them copied: {seconds:6.1f} s, {num_images / seconds:7.1f} images/s"
        f"   ({stages})",
        flush=True,
    )
    return summaries


def members_of(path: Path) -> list[tuple[Path, list[str]]]:
    """(tar, names of one key) of each key of a shard."""
    with tarfile.open(path) as archive:
        keys: dict[str, list[str]] = {}
        for name in archive.getnames():
            keys.setdefault(name.partition(".")[0], []).append(name)
    return [(path, names) for names in keys.values()]


def sharded_anew(members: Sequence[tuple[Path, list[str]]], folder: Path, prefix: str) -> list[Path]:
    sources = {path: tarfile.open(path) for path, _ in members}
    shards = []
    for start in range(0, len(members), IMAGES_PER_NEW_SHARD):
        shards.append(folder / f"{prefix}-{start:06}.tar")
        with tarfile.open(shards[-1], "w") as out:
            for number, (path, names) in enumerate(members[start : start + IMAGES_PER_NEW_SHARD]):
                for name in names:
                    info = sources[path].getmember(name)
                    file = sources[path].extractfile(info)
                    info.name = f"{number:06}.{name.partition('.')[2]}"
                    out.addfile(info, file)
    return shards


if __name__ == "__main__":
    main()
