"""Writes a model directory: weights, config, model card and curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch
from safetensors.torch import save
from torch import nn

from vlm_ops.models.directory import CARD, CONFIG, CURVES, WEIGHTS
from vlm_ops.storage import write_bytes
from vlm_ops.training.loop import Epoch

_LIMITS = {
    "dual-encoder": "It finds what the captions it has seen speak of. What the base model knew beyond them may be found less "
    "well than before: measure both with `beamsight evaluate`.",
    "captioner": "It tells of what its captions told. Away from their kind of picture it may see things that are not there: "
    "look at its captions of yours, and measure with `beamsight evaluate captions`.",
    "matcher": "Its probabilities hold for pairs like those it was trained on, half of which match.",
}


@dataclass(frozen=True)
class ModelCard:
    """What the README of a model directory tells.

    Attributes:
        kind: dual-encoder, captioner or matcher.
        base: What it stands on, with revisions.
        inputs, validation: What it was trained on, and chosen on.
        num_images, num_captions: Of the training images.
        metric: What the curves show, with its value in `epochs`.
        figures: Measured on the validation data, by name.
        recipe: Flags and their values.
        licence: Sentences on the data's licence; empty where nothing was said.
        version: Of this program.
    """

    kind: str
    base: str
    inputs: tuple[str, ...]
    validation: tuple[str, ...]
    num_images: int
    num_captions: int
    metric: str
    epochs: tuple[Epoch, ...]
    figures: Mapping[str, float]
    recipe: Mapping[str, Any]
    licence: str
    version: str


def write_model(path: Path, parts: Mapping[str, nn.Module], description: Mapping[str, Any], card: ModelCard) -> None:
    """Writes the directory; `config.json` comes last, so that a directory that has it is whole.

    Args:
        parts: Modules by the name that their weights go under.
        description: What loads the model, as JSON.
    """
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).unlink(missing_ok=True)  # of an earlier model, whose weights are about to go
    weights = {
        f"{part}.{name}": (tensor.to(torch.float16) if tensor.is_floating_point() else tensor)
        .cpu()
        .contiguous()
        .clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    write_bytes(str(path / WEIGHTS), save(weights))
    write_bytes(str(path / CURVES), curves(card.epochs, card.metric).encode())
    write_bytes(str(path / CARD), render_card(card).encode())
    write_bytes(str(path / CONFIG), (json.dumps({"kind": card.kind, **description}, indent=2) + "\n").encode())


def render_card(card: ModelCard) -> str:
    """The README of a model directory, in Markdown."""
    figures = "\n".join(f"| {name} | {value:.3f} |" for name, value in card.figures.items())
    recipe = "\n".join(f"| {name} | {value} |" for name, value in card.recipe.items())
    licence = card.licence or "The licence of the weights follows from that of these data."
    return f"""# {card.kind.capitalize()} on {card.base}

Trained by `beamsight train {card.kind}` {card.version}. Use it as `--model dir:PATH`.

**Data.** {card.num_images} images with {card.num_captions} captions from {_names(card.inputs)}; validated on {_names(card.validation)}.

**Licence.** {licence}

| measured on the validation data | |
|---|---|
{figures}

![loss and {card.metric} by epoch]({CURVES})

| recipe | |
|---|---|
{recipe}

**Limits.** {_LIMITS[card.kind]}
"""


def curves(epochs: Sequence[Epoch], metric: str) -> str:
    """Loss and validation metric by epoch, as SVG."""
    loss = [epoch.loss for epoch in epochs]
    scores = [epoch.score for epoch in epochs]
    panels = [
        _panel(0, "training loss", loss, max(loss)),
        _panel(330, f"validation {metric}", scores, max([1.0, *scores])),
    ]
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="650" height="230" font-family="sans-serif" font-size="12">{"".join(panels)}</svg>\n'


def _panel(left: int, title: str, values: Sequence[float], top: float) -> str:
    width, height = 250, 150
    bottom = min([0.0, *values])  # a reward's loss may be negative
    top = max(top, bottom + 1e-9)
    step = width / max(len(values) - 1, 1)
    points = " ".join(
        f"{left + 45 + number * step:.1f},{30 + height * (top - value) / (top - bottom):.1f}"
        for number, value in enumerate(values)
    )
    return (
        f'<text x="{left + 45}" y="18" font-weight="bold">{escape(title)}</text>'
        f'<rect x="{left + 45}" y="30" width="{width}" height="{height}" fill="none" stroke="#bbb"/>'
        f'<text x="{left + 40}" y="36" text-anchor="end">{top:.2f}</text>'
        f'<text x="{left + 40}" y="{30 + height}" text-anchor="end">{bottom:.2g}</text>'
        f'<text x="{left + 45 + width}" y="{46 + height}" text-anchor="end">epoch {len(values)}: {values[-1]:.3f}</text>'
        f'<polyline points="{points}" fill="none" stroke="#2a6fdb" stroke-width="2"/>'
    )


def _names(patterns: Sequence[str]) -> str:
    """The last two parts of each path, which say enough and nothing of the machine."""
    return ", ".join(f"`{'/'.join(Path(pattern).parts[-2:])}`" for pattern in patterns)
