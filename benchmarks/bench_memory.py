"""Whether the memory of a build depends on the size of the corpus.

    python benchmarks/bench_memory.py [--data FOLDER] [--images 5000 50000] [--ops OP,OP] [--threads N]

Photos of flickr8k in shards of 1,000, each with other bytes (a few are put behind the end of the picture, so
that none is a copy of another one), are built into a catalog by the real command in a process of its own; its
peak resident memory is what the system books for it. Index, commit and report are included.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES_PER_SHARD = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/*.tar")
    parser.add_argument("--images", type=int, nargs="+", default=[5000, 50000])
    parser.add_argument("--ops", default="quality,features,labels,embedding")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    peaks = []
    with tempfile.TemporaryDirectory() as scratch:
        photos = list(read_photos(args.data / "flickr8k"))
        for count in args.images:
            write_corpus(Path(scratch) / str(count), photos, count)
            peaks.append(measure(Path(scratch), count, args.ops, args.threads))
    print(f"peak of the largest over the smallest: {peaks[-1] / peaks[0]:.3f}")


def read_photos(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    yield archive.extractfile(member).read()  # type: ignore[union-attr]


def write_corpus(folder: Path, photos: list[bytes], count: int) -> None:
    folder.mkdir()
    endless = itertools.cycle(photos)
    for start in range(0, count, IMAGES_PER_SHARD):
        with tarfile.open(folder / f"{start // IMAGES_PER_SHARD:05}.tar", "w") as archive:
            for number in range(start, min(start + IMAGES_PER_SHARD, count)):
                data = next(endless) + number.to_bytes(8, "big")
                info = tarfile.TarInfo(f"{number:07}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def measure(scratch: Path, count: int, ops: str, threads: int) -> float:
    """Peak resident memory of a build, in MB."""
    command = [sys.executable, "-m", "pipelines.cli", "build", "--input", str(scratch / str(count))]
    command += ["--catalog", str(scratch / f"catalog-{count}"), "--ops", ops, "--num_threads", str(threads)]
    started = time.perf_counter()
    process = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"the build of {count} images failed")
    peak = usage.ru_maxrss / 1024
    print(f"{count} images: peak {peak:.0f} MB, {count / seconds:.0f} images/s", flush=True)
    return peak


if __name__ == "__main__":
    main()
