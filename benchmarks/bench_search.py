"""How well and how fast `search` finds, with the default model.

    python benchmarks/bench_search.py [--data FOLDER]

Text to image: R@1, R@5, R@10 of the 5,000 captions of flickr8k/dev among its 1,000 photos. Zero-shot: the share
of the clothing photos whose label is the best of the 17 ("a photo of a {label}" and the bare
label). Start-up: whole-process seconds of `--help` and of a cold text search, medians of five.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/ and clothing/"
    )
    parser.add_argument("--model", default="compact", help="model spec")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        flickr, clothing = Path(scratch) / "flickr", Path(scratch) / "clothing"
        build(args.data / "flickr8k" / "dev-00000.tar", flickr, args.model)
        build(args.data / "clothing", clothing, args.model)
        retrieval(flickr, args.model)
        zero_shot(clothing, args.model)
        start_up(flickr)


def retrieval(catalog: Path, model: str) -> None:
    from vlm_ops.models import load_text_model

    rows = embeddings(catalog)
    images = np.stack([row["image_embedding"] for row in rows])
    captions = [caption for row in rows for caption in row["source_captions"]]
    owners = np.array([number for number, row in enumerate(rows) for _ in row["source_captions"]])
    scores = load_text_model(model).encode_texts(captions) @ images.T
    ranks = (scores > scores[np.arange(len(owners)), owners][:, None]).sum(axis=1)
    found = ", ".join(f"R@{k} {np.mean(ranks < k):.3f}" for k in (1, 5, 10))
    print(
        f"text->image on flickr8k/dev: {found}, median rank {np.median(ranks) + 1:.0f} ({len(captions)} captions, {len(rows)} photos)"
    )


def zero_shot(catalog: Path, model: str) -> None:
    from vlm_ops.models import load_text_model

    rows = embeddings(catalog)
    images = np.stack([row["image_embedding"] for row in rows])
    labels = [json.loads(row["source_metadata"])["label"] for row in rows]
    names = sorted(set(labels))
    text_model = load_text_model(model)
    for template in ("{}", "a photo of a {}"):
        texts = text_model.encode_texts([template.format(name.lower()) for name in names])
        best = [names[number] for number in (images @ texts.T).argmax(axis=1)]
        right = np.mean([mine == true for mine, true in zip(best, labels, strict=True)])
        print(f"zero-shot on clothing, {template!r}: top-1 {right:.3f} ({len(names)} labels, {len(rows)} photos)")


def start_up(catalog: Path) -> None:
    for name, arguments in (("--help", ["--help"]), ("search", ["search", str(catalog), "two dogs in the snow"])):
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "pipelines.cli", *arguments], check=True, capture_output=True, cwd=ROOT
            )
            seconds.append(time.perf_counter() - started)
        print(f"start-up of `beamsight {name}`: {statistics.median(seconds):.2f} s (median of 5)")


def build(inputs: Path, catalog: Path, model: str) -> None:
    from pipelines.cli import main as beamsight

    with contextlib.redirect_stdout(io.StringIO()):
        code = beamsight(["build", "--input", str(inputs), "--catalog", str(catalog), "--model", model])
    assert code == 0


def embeddings(catalog: Path) -> list[dict]:
    from deltalake import DeltaTable

    table = DeltaTable(str(catalog / "images")).to_pyarrow_table(
        columns=["image_embedding", "source_captions", "source_metadata"]
    )
    return [{**row, "image_embedding": np.array(row["image_embedding"], np.float32)} for row in table.to_pylist()]


if __name__ == "__main__":
    main()
