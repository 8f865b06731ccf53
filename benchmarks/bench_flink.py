"""How fast `build` is on a Flink cluster of this machine, beside the local runner in the same turn.

    python benchmarks/bench_flink.py [--data FOLDER] [--shards N] [--photos N] [--repeats N]

Photos of flickr8k in small shards, default ops, on a cluster in a network of its own (tests/flink): one TaskManager with one slot, one with two
slots, two with one slot each; on the local runner with one thread and with two. A slot has one thread. The rate is that of the work alone: images of the
parts that were finished after the first ones, by the time between. What a run costs besides (submission, starting workers, loading models,
commit, index) is its wall time less that of the work. Medians over turns; ratios within a turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.flink.cluster import Command, flink_cluster  # noqa: E402
from tests.flink.network import own_network  # noqa: E402

WAYS = {  # TaskManagers, slots of each; None: the local runner with so many threads
    "local, 1 thread": (None, 1),
    "local, 2 threads": (None, 2),
    "Flink, 1 TaskManager x 1 slot": (1, 1),
    "Flink, 1 TaskManager x 2 slots": (1, 2),
    "Flink, 2 TaskManagers x 1 slot": (2, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/*.tar")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--photos", type=int, default=100, help="in each shard")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.shards < 4:
        parser.error(f"--shards must be at least 4, got {args.shards}: the rate is taken between parts")
    results: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        write_shards(args.data / "flickr8k", corpus, args.shards, args.photos)
        for turn in range(args.repeats):
            for way, (task_managers, slots) in WAYS.items():
                folder = Path(scratch) / f"{turn} {way}"
                folder.mkdir()
                results[way].append(measure(corpus, folder, task_managers, slots, args.photos))
                rate, rest = results[way][-1]
                print(f"  turn {turn + 1}, {way}: {rate:.1f} images/s, {rest:.1f} s besides", flush=True)
    print(f"{args.shards} shards of {args.photos} photos, medians of {args.repeats}")
    base = [rate for rate, _ in results["local, 1 thread"]]
    for way, found in results.items():
        rates, rests = ([each[i] for each in found] for i in (0, 1))
        ratios = [rate / one for rate, one in zip(rates, base, strict=True)]
        print(
            f"  {way:<32} {statistics.median(rates):7.1f} images/s   {statistics.median(ratios):.2f} of one local thread "
            f"({min(ratios):.2f} to {max(ratios):.2f})   {statistics.median(rests):5.1f} s besides",
            flush=True,
        )


def measure(corpus: Path, folder: Path, task_managers: int | None, slots: int, photos: int) -> tuple[float, float]:
    """Builds a catalog; images/s of the work, and seconds of the run besides."""
    catalog = folder / "catalog"
    build = ["build", "--input", corpus, "--catalog", catalog, "--device", "cpu"]
    if task_managers is None:
        with own_network() as network:
            wall_sec = timed(lambda: Command(network, [*build, "--num_threads", slots]).finish(timeout_sec=1200))
        num_slots = slots
    else:
        (folder / "cluster").mkdir()
        num_slots = task_managers * slots
        with flink_cluster(folder / "cluster", task_managers, slots) as cluster:
            flags = [*cluster.flags(), f"--parallelism={num_slots}", "--num_threads", str(slots)]
            wall_sec = timed(lambda: cluster.start_command(*build, *flags).finish(timeout_sec=1200))
    finished = sorted(path.stat().st_mtime for path in catalog.glob("images/part-*"))
    counted = finished[num_slots - 1 :]
    rate = photos * (len(counted) - 1) / (counted[-1] - counted[0])
    return rate, wall_sec - photos * len(finished) / rate


def write_shards(data: Path, folder: Path, shards: int, photos: int) -> None:
    """Shards of different photos, of the training part."""
    folder.mkdir()
    left = shards * photos
    out: tarfile.TarFile | None = None
    for path in sorted(data.glob("train-*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.name.endswith(".jpg") or not left:
                    continue
                if left % photos == 0:
                    if out:
                        out.close()
                    out = tarfile.open(folder / f"{left // photos:03}.tar", "w")
                assert out
                out.addfile(member, archive.extractfile(member))
                left -= 1
    if out:
        out.close()
    if left:
        sys.exit(f"{data} has not enough photos: {left} are missing")


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
