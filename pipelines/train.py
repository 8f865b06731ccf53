"""`beamsight train`: a model for a corpus of one's own."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from pipelines.corpora import encode_corpus, matrix
from pipelines.options import TrainOptions
from vlm_ops.models import describe_model, load_text_model
from vlm_ops.models.onnx_engine import cached_file
from vlm_ops.publishing import installed_version
from vlm_ops.storage import check_writable, is_local
from vlm_ops.training.dual_encoder import Epoch, Pairs, TrainingConfig, heads_config, train
from vlm_ops.training.model_directory import Provenance, write_dual_encoder

logger = logging.getLogger(__name__)

_OPS = ("quality", "features", "embedding")
_TEXTS_PER_CALL = 1024
_CHECKPOINT = "checkpoint.pt"


def run(options: TrainOptions) -> int:
    """Encodes images and captions once, trains, and writes the model directory.

    Raises:
        ValueError: A flag is wrong, an input has no captions, or the checkpoint is of another training.
        FileNotFoundError: A pattern matches nothing.
    """
    if not is_local(options.output):
        raise ValueError(f"--output must be a local directory, got {options.output!r}; copy the model from there")
    check_writable(options.output)
    output = Path(options.output).expanduser()
    config = TrainingConfig(
        num_epochs=options.epochs,
        batch_size=options.images_per_step,
        learning_rate=options.learning_rate,
        dropout=options.dropout,
        seed=options.seed,
    )
    pairs = encode_pairs(options, options.input)
    validation = encode_pairs(options, options.validation)
    output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=config.num_epochs, unit="epoch", desc="train", disable=not sys.stderr.isatty()) as bar:

        def show(epoch: Epoch) -> None:
            bar.n = epoch.number
            bar.set_postfix_str(f"loss {epoch.loss:.3f}, validation R@10 {epoch.recall_at_10:.3f}")
            if bar.disable:
                logger.info("epoch %d of %d: loss %.3f, validation R@10 %.3f",
                            epoch.number, config.num_epochs, epoch.loss, epoch.recall_at_10)  # fmt: skip

        trained = train(pairs, validation, config, output / _CHECKPOINT, show)
    base = describe_model(options.model)
    provenance = Provenance(
        base=base.spec,
        base_revision=base.revision,
        inputs=options.input,
        validation=options.validation,
        num_images=len(pairs),
        num_captions=sum(len(each) for each in pairs.captions),
        version=installed_version(),
    )
    write_dual_encoder(output, trained, heads_config(pairs, config), config, provenance)
    (output / _CHECKPOINT).unlink(missing_ok=True)
    print(
        f"model      dir:{output}\nR@10       {trained.epochs[-1].recall_at_10:.3f} (text to image, on {len(validation)} validation images)"
    )
    return 0


def encode_pairs(options: TrainOptions, patterns: Sequence[str]) -> Pairs:
    """Features and captions of all images that have any, encoded by the base model or found in the cache."""
    table, _ = encode_corpus(options, patterns, _OPS)
    captions = table.column("source_captions").to_pylist()
    kept = [number for number, each in enumerate(captions) if each]
    if not kept:
        raise ValueError(f"no image of {' '.join(patterns)} has a caption; name their field with --caption_field")
    if len(kept) < len(captions):
        logger.warning("%d images without captions are left out", len(captions) - len(kept))
    table = table.take(pa.array(kept))
    rows_of: dict[str, int] = {}
    rows = [[rows_of.setdefault(caption, len(rows_of)) for caption in captions[number]] for number in kept]
    texts = encode_texts(options, list(rows_of))
    return Pairs(matrix(table, "features"), matrix(table, "image_embedding"), rows, texts)


def encode_texts(options: TrainOptions, texts: Sequence[str]) -> np.ndarray:
    """float32[m, d] of the texts, from the cache where the same texts were encoded before."""
    info = describe_model(options.model)
    key = hashlib.sha256("\0".join((info.name, *texts)).encode("utf-8", "backslashreplace")).hexdigest()[:16]

    def make(path: Path) -> None:
        model = load_text_model(options.model, options.device)
        chunks = [texts[start : start + _TEXTS_PER_CALL] for start in range(0, len(texts), _TEXTS_PER_CALL)]
        with ThreadPoolExecutor(options.num_workers) as pool:
            encoded = tqdm(
                pool.map(model.encode_texts, chunks), total=len(chunks), desc="texts", disable=not sys.stderr.isatty()
            )
            np.save(path, np.concatenate(list(encoded)))

    return np.load(cached_file(f"texts-{key}.npy", make))


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("train", sys.argv[1:]))
