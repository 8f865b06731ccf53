"""Whether the written fields keep to their rules, how long they take, and how they read.

    python benchmarks/bench_alt_text.py [--data FOLDER] [--catalog DIR] [--samples N]

Without --catalog, the 1,000 photos of flickr8k/dev are built with the default ops first. Texts are written twice: from all that is
known of an image, and as if nothing had come with it, so that the model's captions and labels speak. Rules are those of
`vlm_ops/text_rules.py`; a word that is cut is looked for apart, beside the texts that were shortened.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deltalake import DeltaTable

from pipelines.cli import main as beamsight
from schemas.tags import ImageEvidence, TagTexts
from vlm_ops.image_evidence import evidence_of
from vlm_ops.plain_text import plain, word_is_cut
from vlm_ops.tag_texts import write_texts
from vlm_ops.text_rules import violations

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with flickr8k/*.tar")
    parser.add_argument("--catalog", help="a catalog that is there, instead of one of flickr8k/dev")
    parser.add_argument("--samples", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        catalog = args.catalog or f"{scratch}/catalog"
        if not args.catalog:
            photos = args.data / "flickr8k" / "dev-00000.tar"
            if code := beamsight(["build", "--input", str(photos), "--catalog", catalog]):
                raise SystemExit(code)
        images = DeltaTable(f"{catalog}/images").to_pyarrow_table()
    evidences = [each for batch in images.to_batches() for each in evidence_of(batch)]
    measure("all that is known", evidences, args.samples)
    alone = [replace(each, source_captions=(), metadata={}) for each in evidences]
    measure("nothing came with the images", alone, args.samples)


def measure(name: str, evidences: Sequence[ImageEvidence], num_samples: int) -> None:
    write_texts(evidences[0], ())
    started = time.process_time()
    written = [write_texts(evidence, ()) for evidence in evidences]
    seconds = time.process_time() - started
    broken = Counter(field for texts in written for field in violations(texts))
    cut = sum(ends_in_a_word(texts, evidence) for texts, evidence in zip(written, evidences, strict=True))
    sources = Counter(texts.sources.get("alt_text", "empty") for texts in written)
    doubts = Counter(doubt.partition(" (")[0] for texts in written for doubt in texts.doubts)
    lengths = sorted(len(texts.alt_text) for texts in written)
    print(f"\n{name}: {len(written)} images, {1e3 * seconds / len(written):.3f} ms of processor time each")
    print(f"  rules broken        {dict(broken) or 0}; alternative texts that end inside a word: {cut}")
    print(
        f"  alternative texts   {dict(sources)}; median {lengths[len(lengths) // 2]} characters, longest {lengths[-1]}"
    )
    print(f"  different slugs     {len({texts.slug for texts in written})}")
    print(f"  doubts              {dict(doubts)}\n")
    for texts in random.Random(0).sample(written, min(num_samples, len(written))):
        print(f"  {texts.alt_text or texts.alt_reason}\n      {texts.title} | {', '.join(texts.keywords)}")


def ends_in_a_word(texts: TagTexts, evidence: ImageEvidence) -> bool:
    """Whether an alternative text is the beginning of something known, and ends where no word ends."""
    text = texts.alt_text.rstrip(".").casefold()
    known = [evidence.caption, *evidence.source_captions, *evidence.metadata.values()]
    for whole in (plain(each).casefold() for each in known):
        start = whole.find(text) if text else -1
        if start >= 0 and word_is_cut(whole, start + len(text)):
            return True
    return False


if __name__ == "__main__":
    main()
