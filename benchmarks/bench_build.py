"""How fast `build` is, beside what its parts can do alone, in the same run.

    python benchmarks/bench_build.py [--data FOLDER] [--threads N] [--repeats N]

For each corpus: decode alone (read, decode, resize, for all ops), model alone (the default model on
ready pixels), and `build` from the command line's entry to its last line, each with the same number of
threads, in turn, several times; medians are printed. The bar is build >= 0.85 of what the
cores allow, 1 / (1/decode + 1/model) a core. `build` also computes quality and labels, writes the
table, commits it and makes the index; "without captions" leaves out the op `caption`; the fixed costs of a run (planning, loading the model, commit,
index, report) are kept apart by building once and several copies of the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
COPIES = 5
BIG_PHOTOS = 120
WITHOUT_CAPTIONS = ("--ops", "quality,features,labels,embedding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/dev-00000.tar"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        return build_in_this_process(args.peak, args.threads)
    shard = args.data / "flickr8k" / "dev-00000.tar"
    with tempfile.TemporaryDirectory() as scratch:
        big = Path(scratch) / "big.tar"
        upscale(shard, big, BIG_PHOTOS)
        for name, corpus in (("flickr8k/dev (224x224)", shard), ("the same, upscaled to 1 MB", big)):
            measure(name, corpus, args.threads, args.repeats, Path(scratch))
        peaks(shard, args.threads, Path(scratch))


def measure(name: str, shard: Path, threads: int, repeats: int, scratch: Path) -> None:
    from schemas.samples import Sample, ShardRef
    from vlm_ops.images import decode, preprocess
    from vlm_ops.models import load_image_model
    from vlm_ops.models.settings import CPU
    from vlm_ops.preprocessing import THUMBNAIL
    from vlm_ops.shards import ReadConfig, read_shard

    model = load_image_model("compact", CPU, frozenset({"features", "labels", "embedding", "caption"}))
    config = ReadConfig(10**9)
    datas = [item.data for item in read_shard(ShardRef(str(shard), "tar", "", 0), config) if isinstance(item, Sample)]

    def decode_one(data: bytes) -> object:
        pixels = decode(data, shorter_side=model.preprocessing.shorter_side).pixels
        preprocess(pixels, THUMBNAIL)
        return preprocess(pixels, model.preprocessing).numpy()

    import numpy as np

    pixels = np.stack([decode_one(data) for data in datas])  # type: ignore[arg-type]
    batches = [pixels[start : start + 16] for start in range(0, len(pixels), 16)]
    copies = []
    for number in range(COPIES):
        copies.append(str(scratch / f"copy{number}.tar"))
        shutil.copy(shard, copies[-1])
    rates: dict[str, list[float]] = {"decode": [], "model": [], "build": [], "without captions": [], "one copy": []}
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            rates["decode"].append(len(datas) / timed(lambda: list(pool.map(decode_one, datas))))
            rates["model"].append(len(datas) / timed(lambda: list(pool.map(model.encode_images, batches))))
            for key, flags in (("without captions", WITHOUT_CAPTIONS), ("build", ())):
                once = timed(lambda flags=flags: build([str(shard)], threads, scratch, flags))  # type: ignore[misc]
                many = timed(lambda flags=flags: build(copies, threads, scratch, flags))  # type: ignore[misc]
                rates[key].append((COPIES - 1) * len(datas) / (many - once))
            rates["one copy"].append(len(datas) / once)
    allowed = [1 / (1 / d + 1 / m) for d, m in zip(rates["decode"], rates["model"], strict=True)]
    ratios = [each / limit for each, limit in zip(rates["build"], allowed, strict=True)]
    median = {key: statistics.median(values) for key, values in rates.items()}
    print(f"{name}: {len(datas)} photos, {threads} threads, medians of {repeats}")
    print(f"  decode alone   {median['decode']:8.1f} images/s")
    print(f"  model alone    {median['model']:8.1f} images/s")
    print(f"  allowed        {statistics.median(allowed):8.1f} images/s   1 / (1/decode + 1/model)")
    print(
        f"  build          {median['build']:8.1f} images/s   {statistics.median(ratios):.2f} of allowed ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    shares = [each / plain for each, plain in zip(rates["build"], rates["without captions"], strict=True)]
    print(
        f"  without captions {median['without captions']:6.1f} images/s   build is {statistics.median(shares):.2f} of it ({min(shares):.2f} to {max(shares):.2f})"
    )
    print(f"  one copy       {median['one copy']:8.1f} images/s   with a run's fixed costs, imports apart", flush=True)


def peaks(shard: Path, threads: int, scratch: Path) -> None:
    """Peak memory of the whole process over few and over many shards."""
    for count in (2, 16):
        copies = []
        for number in range(count):
            copies.append(str(scratch / f"peak{number}.tar"))
            shutil.copy(shard, copies[-1])
        command = [sys.executable, __file__, "--threads", str(threads), "--peak", *copies]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"peak memory over {count:2} shards of 1,000 photos: {done.stdout.split()[-1]} MB", flush=True)


def build_in_this_process(inputs: list[str], threads: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        build(inputs, threads, Path(scratch))
    # Not getrusage: a child's ru_maxrss starts with what its parent had when it forked.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) // 1024)


def build(inputs: list[str], threads: int, scratch: Path, flags: Sequence[str] = ()) -> None:
    from pipelines.cli import main as beamsight

    catalog = scratch / "catalog"
    shutil.rmtree(catalog, ignore_errors=True)
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        fixed = ["--device", "cpu", "--num_threads", str(threads)]
        code = beamsight(["build", "--input", *inputs, "--catalog", str(catalog), *fixed, *flags])
    assert code == 0, quiet.getvalue()


def upscale(shard: Path, target: Path, count: int) -> None:
    """The first photos of a shard, upscaled and encoded to about 1 MB each."""
    with tarfile.open(shard) as source, tarfile.open(target, "w") as out:
        members = [member for member in source if member.name.endswith(".jpg")][:count]
        for member in members:
            file = source.extractfile(member)
            assert file is not None
            picture = Image.open(file).convert("RGB").resize((3200, 2400), Image.Resampling.BICUBIC)
            noise = Image.effect_noise(picture.size, 24).convert("RGB")
            buffer = io.BytesIO()
            Image.blend(picture, noise, 0.12).save(buffer, "JPEG", quality=82)
            info = tarfile.TarInfo(member.name)
            info.size = buffer.tell()
            buffer.seek(0)
            out.addfile(info, buffer)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
