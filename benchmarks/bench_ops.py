"""What each op costs in `build`, and how well `ocr` reads.

    python benchmarks/bench_ops.py [--data FOLDER] [--images N] [--repeats N] [--only costs|reading]

Costs: `build` with one worker thread over N photos, with the default ops, with each op of `tagging` added, with all of
them, and without `quality`, in turn, several times. A rate is images by seconds of processor time, so that what else runs on
the machine counts for little; the fixed costs of a run (planning, loading, commit, index, report) are taken out by building once
one shard and once several copies of it. Ratios are those of one turn; medians are printed.

Reading: the words of 200 drawn banners (fonts, colours, angles, English and German) that are read letter by letter (bar: 0.9), and
the share of the photos of flickr8k/dev that are given text, and promotional text (bar: 0.02 at most).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

COPIES = 4
BANNERS = 200
DEFAULT = "default"
CHOICES = {
    DEFAULT: "default",
    "without quality": "features,labels,caption,embedding",
    "+ safety": "default,safety",
    "+ ocr": "default,ocr",
    "+ faces": "default,faces",
    "+ focus": "default,focus",
    "+ tagging": "default,tagging",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/dev-00000.tar")
    add("--images", type=int, default=100, help="photos a shard (default: %(default)s)")
    add("--repeats", type=int, default=3)
    add("--only", choices=("costs", "reading"))
    args = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    print(f"{processor()}, {len(os.sched_getaffinity(0))} cores", flush=True)
    shard = args.data / "flickr8k" / "dev-00000.tar"
    if args.only != "reading":
        from bench_build import upscale

        with tempfile.TemporaryDirectory() as scratch:
            small, big = Path(scratch) / "small.tar", Path(scratch) / "big.tar"
            copy_first(shard, small, args.images)
            upscale(shard, big, max(1, args.images // 4))
            costs("flickr8k/dev (224x224)", small, args.repeats, Path(scratch))
            costs("the same, upscaled to 1 MB (3200x2400)", big, args.repeats, Path(scratch))
    if args.only != "costs":
        reading(shard)


def costs(name: str, shard: Path, repeats: int, scratch: Path) -> None:
    from bench_build import build

    with tarfile.open(shard) as archive:
        count = sum(member.name.endswith(".jpg") for member in archive)
    copies = []
    for number in range(COPIES):
        copies.append(str(scratch / f"copy{number}.tar"))
        Path(copies[-1]).write_bytes(shard.read_bytes())

    def seconds(inputs: Sequence[str], ops: str) -> float:
        started = time.process_time()
        build(list(inputs), 1, scratch, ("--ops", ops))
        return time.process_time() - started

    seconds(copies[:1], CHOICES["+ tagging"])  # graphs are exported and cached
    rates: dict[str, list[float]] = {choice: [] for choice in CHOICES}
    for _ in range(repeats):
        for choice, ops in CHOICES.items():
            once = seconds(copies[:1], ops)
            rates[choice].append((COPIES - 1) * count / (seconds(copies, ops) - once))
    print(f"{name}: {count} photos in each of {COPIES} shards, medians of {repeats}")
    for choice, own in rates.items():
        ratio = statistics.median(rate / default for rate, default in zip(own, rates[DEFAULT], strict=True))
        extra = statistics.median(
            1000 / rate - 1000 / default for rate, default in zip(own, rates[DEFAULT], strict=True)
        )
        median = statistics.median(own)
        print(
            f"  {choice:16} {median:7.1f} images/s a core   {ratio:.2f} of default   {extra:+6.1f} ms an image",
            flush=True,
        )


def reading(shard: Path) -> None:
    from schemas.tags import Box, FoundText
    from tests.banners import banners, word_accuracy
    from vlm_ops.promotional_text import promotional_text
    from vlm_ops.text_reading import READING, text_reader

    reader = text_reader()
    read: dict[str, list[tuple[tuple[str, ...], list[str]]]] = {}
    started = time.process_time()
    for banner in banners(BANNERS):
        (lines,) = reader.read([contained(np.asarray(banner.picture), READING)])
        read.setdefault(banner.language, []).append((banner.words, [line.text for line in lines]))
    spent = time.process_time() - started
    every = [pair for pairs in read.values() for pair in pairs]
    by_language = ", ".join(f"{language} {word_accuracy(pairs):.3f}" for language, pairs in read.items())
    print(
        f"words of {BANNERS} drawn banners: {word_accuracy(every):.3f} ({by_language}); {BANNERS / spent:.1f} images/s a core"
    )
    photos = 0
    counts = {"any text": 0, "a line of two words or more": 0, "promotional text": 0}
    for picture in pictures_of(shard):
        (lines,) = reader.read([contained(picture, READING)])
        photos += 1
        counts["any text"] += bool(lines)
        counts["a line of two words or more"] += any(len(line.text.split()) > 1 for line in lines)
        counts["promotional text"] += bool(
            promotional_text([FoundText(line.text, line.score, Box(**line.box)) for line in lines])
        )
    print(
        f"flickr8k/dev, of {photos} photos:",
        ", ".join(f"{kind} {count / photos:.3f}" for kind, count in counts.items()),
    )


def contained(picture: np.ndarray, preprocessing: object) -> np.ndarray:
    """uint8[h, w, 3] -> uint8[3, h, w] of its extent."""
    import torch

    from vlm_ops.images import preprocess

    return preprocess(torch.from_numpy(picture.copy()).permute(2, 0, 1), preprocessing).numpy()  # type: ignore[arg-type]


def pictures_of(shard: Path) -> Iterator[np.ndarray]:
    from PIL import Image

    with tarfile.open(shard) as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                file = archive.extractfile(member)
                assert file is not None
                with contextlib.closing(Image.open(io.BytesIO(file.read()))) as image:
                    yield np.asarray(image.convert("RGB"))


def copy_first(shard: Path, target: Path, count: int) -> None:
    """The first photos of a shard."""
    with tarfile.open(shard) as source, tarfile.open(target, "w") as out:
        for member in [member for member in source if member.name.endswith(".jpg")][:count]:
            out.addfile(member, source.extractfile(member))


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )


if __name__ == "__main__":
    main()
