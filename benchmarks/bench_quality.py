"""How good the default models are: every figure of docs/benchmarks.md on quality, by `beamsight evaluate`.

python benchmarks/bench_quality.py [--data FOLDER] [--model SPEC]
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PEOPLE = "man,woman,men,women,boy,girl,boys,girls,person,people,child,children,kid,kids,baby,lady,guy,toddler,player"
KINDS = "--synonyms recipes/product-synonyms.json"
# {data} stands for the folder.
EVALUATIONS = (
    "retrieval --input {data}/flickr8k/dev-00000.tar",
    "matcher --input {data}/flickr8k/dev-00000.tar",
    "zero-shot --input {data}/fashion/products-00003.tar",
    "zero-shot --input {data}/clothing",
    "captions --input {data}/flickr8k/dev-00000.tar",
    f"captions --input {{data}}/fashion/products-00003.tar --mention colour,label {KINDS}",
    f"captions --input {{data}}/grocery --never {PEOPLE}",
    f"captions --input {{data}}/clothing --never {PEOPLE}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/, fashion/, ..."
    )
    parser.add_argument("--model", default="compact", help="model spec")
    args = parser.parse_args()
    for evaluation in EVALUATIONS:
        flags = [*shlex.split(evaluation.format(data=shlex.quote(str(args.data)))), "--model", args.model]
        print(f"\n$ beamsight evaluate {shlex.join(flags)}", flush=True)
        subprocess.run([sys.executable, "-m", "pipelines.cli", "evaluate", *flags], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
