"""How soon `search` answers: whole-process seconds of `--help` and of a cold text search, medians of five.

python benchmarks/bench_search.py [--data FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/dev-00000.tar"
    )
    parser.add_argument("--model", default="compact", help="model spec")
    args = parser.parse_args()
    flickr = args.data / "flickr8k" / "dev-00000.tar"
    with tempfile.TemporaryDirectory() as scratch:
        catalog = str(Path(scratch) / "catalog")
        beamsight("build", "--input", str(flickr), "--catalog", catalog, "--model", args.model, quiet=True)
        start_up(catalog)


def beamsight(*arguments: str, quiet: bool = False) -> None:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL if quiet else None)


def start_up(catalog: str) -> None:
    for name, arguments in (("--help", ["--help"]), ("search", ["search", catalog, "two dogs in the snow"])):
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "pipelines.cli", *arguments], check=True, capture_output=True, cwd=ROOT
            )
            seconds.append(time.perf_counter() - started)
        print(f"start-up of `beamsight {name}`: {statistics.median(seconds):.2f} s (median of 5)")


if __name__ == "__main__":
    main()
