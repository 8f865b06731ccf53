"""Makes `schemas/taxonomies/iab-content-3.1.yaml` from the file that IAB Tech Lab publishes, with our prompts.

    python recipes/make_iab.py FILE.tsv [--output FILE]

https://github.com/InteractiveAdvertisingBureau/Taxonomies, "Content Taxonomy 3.1.tsv". Ids, names and parents are taken
as they stand, in their order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from schemas.taxonomy import Node, Taxonomy, parse_iab

ROOT = Path(__file__).parents[1]
PROMPTS = Path(__file__).with_name("iab-prompts.yaml")
OUTPUT = ROOT / "schemas" / "taxonomies" / "iab-content-3.1.yaml"
_HEAD = """\
# IAB Tech Lab Content Taxonomy 3.1: ids, names and parents as published at
# https://github.com/InteractiveAdvertisingBureau/Taxonomies. (c) IAB Technology Laboratory, Inc., licensed under Creative
# Commons Attribution 3.0 (https://creativecommons.org/licenses/by/3.0/). Changes: tiers and extension column left out;
# `prompts`, `sensitive` and `visible` added by Beamsight, which IAB Tech Lab neither made nor endorses.
# Made by recipes/make_iab.py; do not edit.
"""
_ATTRIBUTION = "IAB Tech Lab Content Taxonomy 3.1, (c) IAB Technology Laboratory, Inc., CC BY 3.0; prompts by Beamsight"


def make(published: str, ours: dict[str, Any]) -> str:
    """The text of the built-in file.

    Raises:
        ValueError: The published file is damaged, or prompts are for no node of it.
    """
    taxonomy = parse_iab(published, "the published file", "")
    prompts, sensitive = ours["prompts"], set(ours["sensitive"])
    if unknown := (set(prompts) | sensitive) - set(taxonomy.by_id):
        raise ValueError(f"{', '.join(sorted(unknown))} in {PROMPTS.name}: no id of the published file; correct it")
    seen = {each.id for node in taxonomy.nodes if node.id in prompts for each in _up(taxonomy, node)}
    harmful = {node.id for node in taxonomy.nodes if sensitive & {each.id for each in _up(taxonomy, node)}}
    lines = [f"name: {taxonomy.name}", f'version: "{taxonomy.version}"', f"attribution: {json.dumps(_ATTRIBUTION)}"]
    lines.append("nodes:")
    for node in taxonomy.nodes:
        fields: list[tuple[str, Any]] = [("id", node.id), ("name", node.name)]
        fields += [("parent", node.parent)] if node.parent else []
        fields += [("prompts", prompts[node.id])] if node.id in prompts else []
        fields += [("sensitive", True)] if node.id in harmful else []
        fields += [("visible", False)] if node.id not in seen else []
        lines.append("- {" + ", ".join(f"{key}: {json.dumps(value)}" for key, value in fields) + "}")
    return _HEAD + "\n".join(lines) + "\n"


def _up(taxonomy: Taxonomy, node: Node) -> list[Node]:
    """The node and all above it."""
    return [node, *(_up(taxonomy, taxonomy.by_id[node.parent]) if node.parent else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, metavar="FILE.tsv")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    ours = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    args.output.write_text(make(args.published.read_text(encoding="utf-8"), ours), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
