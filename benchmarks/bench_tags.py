"""How good the categories of `tag` are: every figure of docs/benchmarks.md on them.

    python benchmarks/bench_tags.py [--data FOLDER] [--work FOLDER]

Builds a catalog of each corpus with the default model, tags it, and measures it by `beamsight evaluate tags`. Of
flickr8k/dev, whose photos have no labels, it prints the commonest categories and writes a page of pictures to look at. Its
captions by people are left out: `--caption_field` names a field that is not there.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from schemas.catalog import CatalogLayout
from schemas.tables import INDEX_ROW_COLUMNS
from vlm_ops.delta_tables import read_columns
from vlm_ops.pages import Section, card, render_gallery
from vlm_ops.states import existing_state
from vlm_ops.tag_states import existing_tags

ROOT = Path(__file__).parents[1]
# Name, inputs and the flags of `evaluate tags`; without, the corpus has no labels.
CORPORA = (
    ("clothing", "clothing/catalogue-*.tar", "--mapping recipes/clothing-categories.yaml"),
    ("grocery", "grocery/shelf-*.tar", "--mapping recipes/grocery-categories.yaml --label_field category"),
    ("fashion", "fashion/products-00003.tar", "--mapping recipes/fashion-categories.yaml"),
    ("flickr", "flickr8k/dev-00000.tar", ""),
)
NOT_THERE = "no-captions"
NUM_COMMON = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with clothing/, ...")
    parser.add_argument("--work", type=Path, help="where the catalogs go, and stay (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for name, pattern, flags in CORPORA:
            catalog = work / name
            if not catalog.exists():
                beamsight("build", "--catalog", catalog, "--input", args.data / pattern, "--caption_field", NOT_THERE)
            beamsight("tag", catalog)
            if flags:
                beamsight(
                    "evaluate", "tags", "--catalog", catalog, *shlex.split(flags), "--html", work / f"{name}.html"
                )
            else:
                commonest(catalog, work / f"{name}.html")


def beamsight(*argv: object) -> None:
    texts = [str(each) for each in argv]
    print(f"\n$ beamsight {shlex.join(texts)}", flush=True)
    subprocess.run([sys.executable, "-m", "pipelines.cli", *texts], check=True, cwd=ROOT)


def commonest(catalog: Path, page: Path) -> None:
    """Prints coverage and the commonest categories, and writes a page of some of their pictures, drawn at random."""
    layout = CatalogLayout(str(catalog))
    tables = read_columns(layout.tags, existing_tags(layout, {}).parts, ("image_id", "categories"), {})
    found = {row["image_id"]: row["categories"] for _, table in tables for row in table.to_pylist()}
    images = read_columns(layout.images, existing_state(layout, {}).images, INDEX_ROW_COLUMNS, {})
    rows = {row["image_id"]: row for _, table in images for row in table.to_pylist()}
    counts = Counter(" > ".join(each["path"]) for categories in found.values() for each in categories)
    covered = sum(bool(categories) for categories in found.values())
    print(f"\ncoverage: {covered} of {len(found)} images have a category")
    for path, count in counts.most_common(NUM_COMMON):
        print(f"{count:6} {path}")
    rng = np.random.default_rng(0)
    drawn = [id_ for id_ in rng.permutation(sorted(found)).tolist() if found[id_]]
    sections = [Section("Drawn at random", [_card(rows[id_], found[id_]) for id_ in drawn[:60]])]
    for path, count in counts.most_common(NUM_COMMON):
        own = [id_ for id_ in drawn if any(" > ".join(each["path"]) == path for each in found[id_])]
        sections.append(Section(f"{path}: {count}", [_card(rows[id_], found[id_]) for id_ in own[:6]]))
    page.write_text(render_gallery("Categories", [("images", len(found)), ("with a category", covered)], sections))
    print(f"page: {page}")


def _card(row: dict, categories: list[dict]):  # type: ignore[no-untyped-def]
    text = "; ".join(f"{each['path'][-1]} {each['score']:.2f} ({', '.join(each['evidence'])})" for each in categories)
    return card({**row, "caption": text, "labels": []}, {})


if __name__ == "__main__":
    main()
