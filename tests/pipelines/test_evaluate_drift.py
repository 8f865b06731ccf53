"""`beamsight evaluate drift`, on coloured pictures and a toy model whose vectors are known."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cli import main
from tests import toys
from tests.conftest import encode, tar_bytes
from vlm_ops.models import ImageEncoding
from vlm_ops.models.settings import ModelSettings

TOY = "python:tests.toys"
COLORS = [(20 * number, 250 - 20 * number, 10 * (number % 3)) for number in range(13)]


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirteen colours, two with captions."""
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(tmp_path / "cache"))
    members = [
        (f"{number:02}.png", encode(Image.new("RGB", (20, 20), color), "PNG")) for number, color in enumerate(COLORS)
    ]
    members += [("00.json", b'{"captions": ["a green picture", "green"]}'), ("12.json", b'{"captions": ["all red"]}')]
    (tmp_path / "colors.tar").write_bytes(tar_bytes(sorted(members)))
    return tmp_path / "colors.tar"


Change = Callable[[np.ndarray], np.ndarray]


def change_vectors(monkeypatch: pytest.MonkeyPatch, change: Change) -> list[ModelSettings]:
    """Makes the toy give other embeddings in int8; gives the settings by which it is loaded from now on."""
    loaded: list[ModelSettings] = []

    class Changed(toys.ToyImageModel):
        def encode_images(self, pixels: np.ndarray) -> ImageEncoding:
            encoding = super().encode_images(pixels)
            assert encoding.embeddings is not None
            return replace(encoding, embeddings=change(encoding.embeddings.copy()))

    def load(spec: str, settings: ModelSettings, outputs: frozenset[str]) -> toys.ToyImageModel:
        loaded.append(settings)
        return (Changed if settings.dtype == "int8" else toys.ToyImageModel)(toys.describe(spec))

    monkeypatch.setattr(toys, "load_image_model", load)
    return loaded


def drift(shard: Path, *flags: str) -> int:
    return main(["evaluate", "drift", "--input", str(shard), "--model", TOY, "--device", "cpu", *flags])


def figures(capsys: pytest.CaptureFixture) -> dict[str, float]:
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"images": 13, "captions": 3}
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in found["figures"].values())
    return {name: figure["value"] for name, figure in found["figures"].items()}


def test_the_same_vectors(shard: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    loaded = change_vectors(monkeypatch, lambda vectors: vectors)
    assert drift(shard, "--dtype", "int8", "--json") == 0
    found = figures(capsys)
    assert found.pop("mean cosine") == pytest.approx(1) and found.pop("least cosine") == pytest.approx(1)
    assert found == {
        "image->image, 10 nearest that stay": 1,
        "text->image, 10 nearest that stay": 1,
        "text->image R@10": 1,
        "text->image R@10 in float32": 1,
    }
    assert [(each.device, each.dtype, each.engine) for each in loaded] == [
        ("cpu", "int8", "onnxruntime"),
        ("cpu", "float32", "torch"),
    ]


def test_other_vectors(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def red_is_green(vectors: np.ndarray) -> np.ndarray:
        return vectors[:, [1, 0, 2]]

    change_vectors(monkeypatch, red_is_green)
    assert drift(shard, "--dtype", "int8", "--json", "--html", str(tmp_path / "page.html")) == 0
    found = figures(capsys)
    vectors = np.array([np.add(color, 1) / np.linalg.norm(np.add(color, 1)) for color in COLORS])
    cosines = (vectors * red_is_green(vectors)).sum(1)
    assert found["mean cosine"] == pytest.approx(cosines.mean(), abs=1e-3)
    assert found["least cosine"] == pytest.approx(cosines.min(), abs=1e-3)
    assert found["image->image, 10 nearest that stay"] == 1  # exchanged in all, so none is nearer than before
    assert found["text->image, 10 nearest that stay"] == pytest.approx(0.7)  # thirteen, of which three are never found
    assert found["text->image R@10"] == 0 and found["text->image R@10 in float32"] == 1
    shown = re.findall(r"<div>cosine ([0-9.]+)</div>", (tmp_path / "page.html").read_text())
    assert len(shown) == 12 and np.allclose([float(each) for each in shown], np.sort(cosines)[:12], atol=5e-3)


def test_it_says_what_was_compared(shard: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def turn(vectors: np.ndarray) -> np.ndarray:
        vectors[:, 0] += 0.01
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    change_vectors(monkeypatch, turn)
    assert drift(shard, "--dtype", "int8") == 0
    table = capsys.readouterr().out
    assert "embedding in int8 by onnxruntime on cpu against float32 by torch on the CPU" in table
    assert re.search(r"mean cosine +0\.999\d\d ", table)  # not rounded to 1


def test_vectors_of_another_way_are_not_taken(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = change_vectors(monkeypatch, lambda vectors: vectors)
    assert drift(shard) == drift(shard, "--dtype", "float32") == 0
    assert drift(shard, "--engine", "torch") == drift(shard, "--compile") == 0
    ways = {(each.dtype, each.engine, each.compile) for each in loaded}
    assert ways == {("float32", "onnxruntime", False), ("float32", "torch", False), ("float32", "torch", True)}
    monkeypatch.setattr("vlm_ops.enrich.decode_batch", lambda *_: pytest.fail("it decoded again"))
    assert drift(shard) == 0


def test_too_few_images(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = [(f"{i}.png", encode(Image.new("RGB", (20, 20), color), "PNG")) for i, color in enumerate(COLORS[:11])]
    (tmp_path / "few.tar").write_bytes(tar_bytes(few))
    assert drift(tmp_path / "few.tar") == 2
    assert "has 11 images; 10 nearest neighbours of each need at least 12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "--device cuda was asked for, but no CUDA device is available here"),
        (
            ["--device", "cpu", "--dtype", "float16"],
            "--dtype float16 is for GPUs; use bfloat16, int8 or float32 on a CPU",
        ),
        (["--device", "cpu", "--dtype", "int8", "--compile"], "--compile is for torch; leave it out"),
        (
            ["--device", "cpu", "--engine", "onnxruntime", "--dtype", "bfloat16"],
            "--engine onnxruntime computes in float32",
        ),
    ],
)
@pytest.mark.parametrize("command", [["evaluate", "drift"], ["evaluate", "retrieval"], ["build", "--catalog", "C"]])
def test_what_cannot_be_run_is_said_before_any_work(
    command: list[str],
    flags: list[str],
    message: str,
    shard: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("vlm_ops.enrich.decode_batch", lambda *_: pytest.fail("it decoded an image"))
    command = [str(tmp_path / "catalog") if each == "C" else each for each in command]
    assert main([*command, "--input", str(shard), "--model", TOY, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "catalog").exists()
