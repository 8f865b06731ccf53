"""The writers a captioner can have: how each is described in a model directory, made again from that, and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_ops.models.caption_decoder import CaptionDecoder, DecoderConfig
from vlm_ops.models.directory import ModelDirectory

COMPACT = "compact"


def describe_writer(writer: Any) -> dict[str, Any]:
    """What `writer_from` needs, as JSON."""
    if isinstance(writer, CaptionDecoder):
        return {"kind": COMPACT, **asdict(writer.config)}
    from vlm_ops.models import language_model

    return language_model.describe_writer(writer)


def save_writer_files(writer: Any, path: Path) -> None:
    """What a writer needs beside its weights: the tokenizer of a hub model."""
    if not isinstance(writer, CaptionDecoder):
        from vlm_ops.models import language_model

        language_model.save_tokenizer(writer, path)


def writer_from(description: Mapping[str, Any], path: Path) -> Any:
    """A writer without its weights.

    Args:
        path: The model directory.
    """
    if description["kind"] == COMPACT:
        shapes = {name: value for name, value in description.items() if name != "kind"}
        return CaptionDecoder(DecoderConfig(**shapes))
    from vlm_ops.models import language_model

    return language_model.writer_from(dict(description), path)


def load_writer(directory: ModelDirectory, device: str) -> Any:
    """A captioner's writer, ready to write: the compact one through ONNX Runtime on a CPU, any other through torch."""
    writer = directory.fill(writer_from(directory.config["writer"], directory.path), "writer")
    if device == "cpu" and isinstance(writer, CaptionDecoder):
        from vlm_ops.models.decoder_engine import DecoderEngine

        return DecoderEngine(writer, f"writer-{directory.revision}")
    return writer.to(device)
