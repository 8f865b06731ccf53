"""What `beamsight train` leaves behind: weights in half precision, a card, curves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vlm_ops.training.loop import Epoch
from vlm_ops.training.model_directory import ModelCard, curves, render_card, write_model

CARD = ModelCard(
    kind="matcher",
    base="compact:conse@1",
    inputs=("data/train-00000.tar", "s3://bucket/more.tar"),
    validation=("data/val.tar",),
    num_images=12,
    num_captions=30,
    metric="AUC",
    epochs=(Epoch(1, 0.7, 0.5), Epoch(2, 0.3, 0.9)),
    figures={"AUC": 0.9123, "accuracy": 0.8},
    recipe={"learning_rate": 0.001, "seed": 3},
    licence="",
    version="1.2",
)


def test_the_directory(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    write_model(tmp_path / "model", {"net": net, "other": nn.Linear(1, 1)}, {"base": "b"}, CARD)
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {"README.md", "config.json", "curves.svg", "model.safetensors"}
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {"kind": "matcher", "base": "b"}
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"net", "other"}
    assert torch.equal(weights["net.0.weight"], net[0].weight.half())
    assert weights["net.1.num_batches_tracked"].dtype == torch.int64


def test_the_card_tells_data_figures_and_recipe() -> None:
    text = render_card(CARD)
    assert text.startswith("# Matcher on compact:conse@1\n\nTrained by `beamsight train matcher` 1.2.")
    assert (
        "12 images with 30 captions from `data/train-00000.tar`, `bucket/more.tar`; validated on `data/val.tar`."
        in text
    )
    assert "| AUC | 0.912 |\n| accuracy | 0.800 |" in text
    assert "| learning_rate | 0.001 |\n| seed | 3 |" in text
    assert "The licence of the weights follows from that of these data." in text
    assert "half of which match" in text


@pytest.mark.parametrize("losses", [(0.7, 0.3), (2.0,), (0.0, 0.0), (-0.01, -0.05), (0.1, -0.2)])
def test_curves_stay_in_their_panels(losses: tuple[float, ...]) -> None:
    epochs = [Epoch(number, loss, 2 * loss) for number, loss in enumerate(losses, start=1)]
    svg = ElementTree.fromstring(curves(epochs, "A<C"))
    namespace = "{http://www.w3.org/2000/svg}"
    titles = [each.text for each in svg.iter(f"{namespace}text")]
    assert "training loss" in titles and "validation A<C" in titles
    for box, line in zip(svg.iter(f"{namespace}rect"), svg.iter(f"{namespace}polyline"), strict=True):
        points = [tuple(map(float, each.split(","))) for each in line.attrib["points"].split()]
        assert len(points) == len(losses)
        left, top = float(box.attrib["x"]), float(box.attrib["y"])
        assert all(left <= x <= left + float(box.attrib["width"]) for x, _ in points)
        assert all(top <= y <= top + float(box.attrib["height"]) for _, y in points)
    assert re.search(rf"epoch {len(losses)}: {losses[-1]:.3f}", curves(epochs, "x"))
