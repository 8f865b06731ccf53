"""Makes `vlm_ops/calibrations/compact.json`: what evidence is worth for categories, with the default model.

    beamsight build --catalog CATALOG --input DATA/flickr8k/dev-00000.tar DATA/fashion/products-00003.tar
    python recipes/calibrate_categories.py CATALOG

Photos that the model was not trained on, because on those that it was its embedding is too sure of itself. What a photo
of flickr8k shows, four of its five captions say (`flickr-categories.yaml`); the fifth, or a product's title, is
evidence for every other image, so that texts that come with images are weighed too.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from schemas.catalog import CatalogLayout
from schemas.recipes import DEFAULT_TAXONOMY
from schemas.tags import ImageEvidence
from vlm_ops.categories import calibrate
from vlm_ops.delta_tables import live_parts, open_table, read_columns
from vlm_ops.image_evidence import columns_needed, embeddings_of, evidence_of
from vlm_ops.taxonomies import load_mapping, load_taxonomy

HERE = Path(__file__).parent
OUTPUT = HERE.parent / "vlm_ops" / "calibrations" / "compact.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    taxonomy = load_taxonomy(DEFAULT_TAXONOMY)
    labels = load_mapping(str(HERE / "fashion-categories.yaml"), taxonomy)
    words = {taxonomy.find(id_).id: re.compile(rule) for id_, rule in _rules().items()}
    rows = _rows(args.catalog)
    evidences, (positions, embeddings) = evidence_of(rows), embeddings_of(rows)
    assert len(positions) == len(evidences), "every image must have an embedding"
    truths = [
        _named(each.source_captions[1:], words) or set(labels.get(str(each.metadata.get("label")), ()))
        for each in evidences
    ]
    kept = [_weighed(each, is_told=number % 4 < 2) for number, each in enumerate(evidences)]
    calibration = calibrate(taxonomy, "compact", np.ascontiguousarray(embeddings), kept, truths)
    print(calibration)
    args.output.write_text(calibration.to_json() + "\n", encoding="utf-8")


def _rules() -> dict[str, str]:
    return yaml.safe_load((HERE / "flickr-categories.yaml").read_text(encoding="utf-8"))


def _rows(catalog: str) -> pa.RecordBatch:
    """All rows, in the order of their image ids."""
    uri = CatalogLayout(catalog).images
    tables = [table for _, table in read_columns(uri, live_parts(open_table(uri, {})), columns_needed(), {})]
    return pa.concat_tables(tables).sort_by("image_id").combine_chunks().to_batches()[0]


def _named(captions: tuple[str, ...], words: dict[str, re.Pattern[str]]) -> set[str]:
    """Categories that at least two captions have a word of."""
    return {id_ for id_, rule in words.items() if sum(bool(rule.search(each.lower())) for each in captions) >= 2}


def _weighed(evidence: ImageEvidence, is_told: bool) -> ImageEvidence:
    """With one text beside the image, or with none."""
    told = evidence.source_captions[:1], evidence.metadata
    captions, metadata = told if is_told else ((), {})
    return replace(evidence, source_captions=captions, metadata=metadata)


if __name__ == "__main__":
    main()
