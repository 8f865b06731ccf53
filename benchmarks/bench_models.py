"""How fast models of transformers run here, beside transformers called by hand.

    python benchmarks/bench_models.py [--networks NAME,NAME] [--ways WAY,WAY] [--photos N] [--threads N] [--repeats N]
    python benchmarks/bench_models.py --device cuda [--networks ...] [--copies N]

Networks have random weights, which cost the same time as trained ones; they are saved to a temporary folder with their image
processor, and read by `hf:FOLDER` and by `AutoModel` and `AutoImageProcessor`.

On a CPU: from the bytes of a photo to its vector, decoding and preprocessing included, in each way (precision and engine) that
our settings have, and by hand: Pillow, the image processor, the model in float32, batches of 32. The ways take turns; a ratio is
one of a turn; medians are printed. Rates are images by seconds of processor time, so that what else runs on the machine
counts for little; with `--threads 1`, the default, that is images/s a core. The bar for the best way is 2 times by hand where the CPU computes in
bfloat16, 1.3 elsewhere.

On a GPU: what share of the speed of the model alone, on ready pixels, `build` reaches end to end, its fixed costs taken out by
building one copy of the corpus and several (bar: 0.9); and the same by hand.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

WAYS: dict[str, dict[str, Any]] = {
    "onnxruntime float32": {},
    "onnxruntime int8": {"dtype": "int8"},
    "torch float32": {"engine": "torch"},
    "torch bfloat16": {"dtype": "bfloat16"},
    "torch bfloat16 compiled": {"dtype": "bfloat16", "compile": True},
}
BY_HAND = "by hand"
# What the kernels of torch and ONNX Runtime ask of a CPU.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm", "bf16")
BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}
BATCH = 16  # of `build` on a CPU
GPU_BATCH = 128
BATCH_BY_HAND = 32
BIG_EVERY = 4  # of the photos, which are upscaled to 1 MB


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/dev-00000.tar")
    add("--networks", default="clip-vit-b-32,clip-vit-b-16,resnet-50", help=f"of {', '.join(NETWORKS)}")
    add("--ways", default=",".join(WAYS), help="on a CPU (default: %(default)s)")
    add("--device", default="cpu")
    add("--threads", type=int, help="default: 1 on a CPU, the cores beside a GPU")
    add("--photos", type=int, help="of each size; default: 32 on a CPU, all beside a GPU")
    add("--copies", type=int, default=5, help="of the corpus, beside a GPU (default: %(default)s)")
    add("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    import torch
    from bench_build import upscale
    from bench_ops import copy_first, processor

    is_cpu = args.device == "cpu"
    threads = args.threads or (1 if is_cpu else len(os.sched_getaffinity(0)))
    torch.set_num_threads(threads)
    device = f"{processor()} ({', '.join(features())})" if is_cpu else torch.cuda.get_device_name(args.device)
    print(f"{device}, {threads} threads", flush=True)
    shard = args.data / "flickr8k" / "dev-00000.tar"
    with tempfile.TemporaryDirectory() as scratch:
        small, big = Path(scratch) / "small.tar", Path(scratch) / "big.tar"
        copy_first(shard, small, args.photos or (32 if is_cpu else 10**9))
        upscale(small, big, max(1, len(photos_of(small)) // BIG_EVERY))
        for network in args.networks.split(","):
            path = Path(scratch) / network
            torch.manual_seed(0)
            NETWORKS[network](path)
            for corpus, name in ((small, "small photos"), (big, "photos of 1 MB")):
                title = f"{network}, {len(photos_of(corpus))} {name}"
                if is_cpu:
                    on_cpu(title, path, photos_of(corpus), args.ways.split(","), threads, args.repeats)
                else:
                    on_gpu(title, path, corpus, args.device, threads, args.copies, args.repeats, Path(scratch))


# --- networks -------------------------------------------------------------------------------------


def clip(path: Path, patch_size: int, hidden_size: int = 768, num_layers: int = 12, size: int = 224) -> None:
    """CLIP (Radford et al., 2021) with an image tower of ViT-B, and a text tower of no size, which is not called."""
    import tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    images = {
        "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64, "patch_size": patch_size, "image_size": size, "projection_dim": 512,
    }  # fmt: skip
    texts = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
    }  # fmt: skip
    CLIPModel(CLIPConfig(text_config=texts, vision_config=images, projection_dim=512)).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(path)
    # Of no words: no text is encoded here, but a dual encoder without a tokenizer is refused.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)


def resnet(path: Path) -> None:
    """ResNet-50 (He et al., 2016), which is what transformers' default configuration is."""
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig()).save_pretrained(path)
    ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875).save_pretrained(path)


NETWORKS: dict[str, Callable[[Path], None]] = {
    "clip-vit-b-32": lambda path: clip(path, 32),
    "clip-vit-b-16": lambda path: clip(path, 16),
    "resnet-50": resnet,
    "tiny": lambda path: clip(path, 8, 64, 2, 32),
}


# --- CPUs -----------------------------------------------------------------------------------------


def on_cpu(title: str, path: Path, datas: Sequence[bytes], ways: Sequence[str], threads: int, repeats: int) -> None:
    works = {BY_HAND: by_hand(path, datas, "cpu")}
    with ThreadPoolExecutor(threads) as pool:
        for way in ways:
            try:
                works[way] = by_us(path, datas, WAYS[way], pool)
            except ValueError as error:  # a network without matrix products has no int8
                print(f"{title}, {way}: {error}")
        rates: dict[str, list[float]] = {way: [] for way in works}
        for turn in range(repeats + 1):
            for way, work in works.items():
                started = time.process_time()
                work()
                if turn:  # the first warms up
                    rates[way].append(len(datas) / (time.process_time() - started))
    print(f"{title}, medians of {repeats}", flush=True)
    medians = {}
    for way, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(values, rates[BY_HAND], strict=True)]
        medians[way] = statistics.median(ratios)
        print(
            f"  {way:<24} {statistics.median(values):7.1f} images by a second of processor time, "
            f"{medians[way]:5.2f} of by hand ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    best = max(works.keys() - {BY_HAND}, key=lambda way: medians[way])
    bar = 2 if BFLOAT16_UNITS & set(features()) else 1.3
    print(f"  best: {best}, {medians[best]:.2f} of by hand (bar: {bar})", flush=True)


def by_us(path: Path, datas: Sequence[bytes], asked: dict[str, Any], pool: ThreadPoolExecutor) -> Callable[[], Any]:
    """As `build` does it: a thread decodes a batch, and runs the model over it."""
    import torch

    from schemas.samples import Sample
    from vlm_ops.enrich import decode_batch
    from vlm_ops.models import load_image_model
    from vlm_ops.models.settings import ModelSettings

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each, as in `build`
    model = load_image_model(f"hf:{path}", ModelSettings(device="cpu", **asked), outputs_of(path))
    torch.set_num_threads(num_threads)
    samples = [Sample(f"photo-{i}", "", f"{i}", data) for i, data in enumerate(datas)]
    batches = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]

    def encode(batch: Sequence[Sample]) -> np.ndarray:
        torch.set_num_threads(1)
        images, failures = decode_batch(batch, [model.preprocessing], 10**9)
        assert not failures
        encoding = model.encode_images(images.pixels[model.preprocessing])
        vectors = encoding.features if encoding.embeddings is None else encoding.embeddings
        assert vectors is not None and len(vectors) == len(batch)
        return vectors

    return lambda: list(pool.map(encode, batches))


def by_hand(path: Path, datas: Sequence[bytes], device: str) -> Callable[[], Any]:
    """As a page of documentation would have it."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    model, processor = AutoModel.from_pretrained(path).eval().to(device), AutoImageProcessor.from_pretrained(path)
    run = getattr(model, "get_image_features", model)

    def encode() -> list[Any]:
        vectors = []
        for start in range(0, len(datas), BATCH_BY_HAND):
            images = [Image.open(io.BytesIO(data)).convert("RGB") for data in datas[start : start + BATCH_BY_HAND]]
            with torch.no_grad():
                vectors.append(run(**processor(images=images, return_tensors="pt").to(device)).pooler_output.cpu())
        return vectors

    return encode


# --- GPUs -----------------------------------------------------------------------------------------


def on_gpu(
    title: str, path: Path, shard: Path, device: str, threads: int, copies: int, repeats: int, scratch: Path
) -> None:
    """On a CPU it runs as well, and says little."""
    from vlm_ops.models import load_image_model
    from vlm_ops.models.settings import ModelSettings

    op = "embedding" if "embedding" in outputs_of(path) else "features"
    model = load_image_model(f"hf:{path}", ModelSettings(device=device), outputs_of(path))
    datas = photos_of(shard)
    ready = np.random.default_rng(0).integers(
        0, 256, (GPU_BATCH, 3, model.preprocessing.size, model.preprocessing.size), np.uint8
    )
    num_batches = max(threads, copies * len(datas) // GPU_BATCH)
    names = [str(scratch / f"copy{number}.tar") for number in range(copies)]
    for name in names:
        shutil.copy(shard, name)
    flags = ("--model", f"hf:{path}", "--ops", op, "--device", device, "--num_threads", str(threads))
    naive = by_hand(path, datas, device)
    rates: dict[str, list[float]] = {"model alone": [], "build": [], BY_HAND: []}
    with ThreadPoolExecutor(threads) as pool:
        for turn in range(repeats + 1):
            alone = num_batches * GPU_BATCH / wall(lambda: list(pool.map(model.encode_images, [ready] * num_batches)))
            once, many = (wall(lambda names=names: build(names, scratch, flags)) for names in (names[:1], names))  # type: ignore[misc]
            found = {
                "model alone": alone,
                "build": (copies - 1) * len(datas) / max(many - once, 1e-9),
                BY_HAND: len(datas) / wall(naive),
            }
            for name, rate in found.items() if turn else ():  # the first warms up
                rates[name].append(rate)
    print(f"{title}, {copies} copies, medians of {repeats}")
    for name, values in rates.items():
        shares = [rate / alone for rate, alone in zip(values, rates["model alone"], strict=True)]
        print(
            f"  {name:<12} {statistics.median(values):9.1f} images/s, {statistics.median(shares):.2f} of the model alone "
            f"({min(shares):.2f} to {max(shares):.2f})"
        )
    print("  bar for build: 0.9", flush=True)


def build(inputs: Sequence[str], scratch: Path, flags: Sequence[str]) -> None:
    import contextlib

    from pipelines.cli import main as beamsight

    catalog, quiet = scratch / "catalog", io.StringIO()
    shutil.rmtree(catalog, ignore_errors=True)
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        code = beamsight(["build", "--input", *inputs, "--catalog", str(catalog), *flags])
    assert code == 0, quiet.getvalue()


# --- shared ---------------------------------------------------------------------------------------


def outputs_of(path: Path) -> frozenset[str]:
    """The vectors of an image, and nothing else."""
    from vlm_ops.models import describe_model

    return frozenset({"embedding"}) & describe_model(f"hf:{path}").produces or frozenset({"features"})


def photos_of(shard: Path) -> list[bytes]:
    with tarfile.open(shard) as archive:
        files = [archive.extractfile(member) for member in archive if member.name.endswith(".jpg")]
        return [file.read() for file in files if file is not None]


def wall(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def features() -> list[str]:
    """What this CPU has of FEATURES, where the system tells."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "").split()
    return [each for each in FEATURES if each in flags]


if __name__ == "__main__":
    main()
