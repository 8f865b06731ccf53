"""Writes a model directory: weights, config, model card and curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from safetensors.torch import save

from vlm_ops.models.directory import CARD, CONFIG, CURVES, WEIGHTS
from vlm_ops.models.heads import HeadsConfig
from vlm_ops.storage import write_bytes
from vlm_ops.training.dual_encoder import Epoch, Trained, TrainingConfig


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from, for its card.

    Attributes:
        base, base_revision: The frozen model below the heads.
        inputs, validation: What it was trained on, and chosen on.
        num_images, num_captions: Of the training images.
        version: Of this program.
    """

    base: str
    base_revision: str
    inputs: tuple[str, ...]
    validation: tuple[str, ...]
    num_images: int
    num_captions: int
    version: str


def write_dual_encoder(
    path: Path, trained: Trained, shapes: HeadsConfig, config: TrainingConfig, provenance: Provenance
) -> None:
    """Writes the directory; `config.json` comes last, so that a directory that has it is whole."""
    path.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{side}.{name}": tensor.to(torch.float16).contiguous()
        for side, head in (("image", trained.image_head), ("text", trained.text_head))
        for name, tensor in head.state_dict().items()
    }
    write_bytes(str(path / WEIGHTS), save(weights))
    write_bytes(str(path / CURVES), curves(trained.epochs).encode())
    write_bytes(str(path / CARD), model_card(trained.epochs, config, provenance).encode())
    description = {
        "kind": "dual-encoder",
        "base": provenance.base,
        "base_revision": provenance.base_revision,
        "heads": asdict(shapes),
        "training": asdict(config),
    }
    write_bytes(str(path / CONFIG), (json.dumps(description, indent=2) + "\n").encode())


def model_card(epochs: Sequence[Epoch], config: TrainingConfig, provenance: Provenance) -> str:
    """The README of a model directory, in Markdown."""
    last = epochs[-1]
    recipe = "\n".join(f"| {name} | {value} |" for name, value in asdict(config).items())
    return f"""# Dual encoder on {provenance.base}

Image and text heads that align the frozen model `{provenance.base}@{provenance.base_revision}`, trained by
`beamsight train dual-encoder` {provenance.version}. Use it as `--model dir:PATH`.

**Data.** {provenance.num_images} images with {provenance.num_captions} captions from {_names(provenance.inputs)};
validated on {_names(provenance.validation)}. The licence of the weights follows from that of these data.

| measured on the validation data | |
|---|---|
| text→image R@10 | {last.recall_at_10:.3f} |
| epochs | {last.number} |

![loss and recall by epoch]({CURVES})

| recipe | |
|---|---|
{recipe}

**Limits.** It finds what the captions it has seen speak of. What the base model knew beyond them, its class names for one, may be
found less well than before: measure both with `beamsight evaluate`.
"""


def curves(epochs: Sequence[Epoch]) -> str:
    """Loss and validation recall by epoch, as SVG."""
    loss = [epoch.loss for epoch in epochs]
    recall = [epoch.recall_at_10 for epoch in epochs]
    panels = [_panel(0, "training loss", loss, max(loss)), _panel(330, "validation text→image R@10", recall, 1.0)]
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="650" height="230" font-family="sans-serif" font-size="12">{"".join(panels)}</svg>\n'


def _panel(left: int, title: str, values: Sequence[float], top: float) -> str:
    width, height = 250, 150
    step = width / max(len(values) - 1, 1)
    points = " ".join(
        f"{left + 45 + number * step:.1f},{30 + height * (1 - value / (top or 1)):.1f}"
        for number, value in enumerate(values)
    )
    return (
        f'<text x="{left + 45}" y="18" font-weight="bold">{escape(title)}</text>'
        f'<rect x="{left + 45}" y="30" width="{width}" height="{height}" fill="none" stroke="#bbb"/>'
        f'<text x="{left + 40}" y="36" text-anchor="end">{top:.2f}</text>'
        f'<text x="{left + 40}" y="{30 + height}" text-anchor="end">0</text>'
        f'<text x="{left + 45 + width}" y="{46 + height}" text-anchor="end">epoch {len(values)}: {values[-1]:.3f}</text>'
        f'<polyline points="{points}" fill="none" stroke="#2a6fdb" stroke-width="2"/>'
    )


def _names(patterns: Sequence[str]) -> str:
    return ", ".join(f"`{Path(pattern).name}`" for pattern in patterns)
