"""Benchmarks are run by hand; here only that they run, on a network of no size."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import jpeg, tar_bytes

pytestmark = pytest.mark.usefixtures("own_cache")
FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench_models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("bench_models", FOLDER / "bench_models.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "flickr8k").mkdir()
    members = [(f"{seed}.jpg", jpeg(seed)) for seed in range(8)]
    (tmp_path / "flickr8k" / "dev-00000.tar").write_bytes(tar_bytes(members))
    return tmp_path


def test_ways_of_a_cpu(bench_models: ModuleType, data: Path, capsys: pytest.CaptureFixture) -> None:
    ways = "onnxruntime float32,torch float32,torch bfloat16"
    bench_models.main(["--data", str(data), "--networks", "tiny", "--ways", ways, "--photos", "8", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert "tiny, 8 small photos, medians of 1" in printed and "tiny, 2 photos of 1 MB" in printed
    for way in ("by hand", *ways.split(",")):
        assert printed.count(f"  {way:<24} ") == 2
    assert printed.count("of by hand (bar: ") == 2


def test_build_beside_the_model_alone(
    bench_models: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As on a GPU, but on a CPU."""
    bench_models.NETWORKS["tiny"](tmp_path / "tiny")
    shard = data / "flickr8k" / "dev-00000.tar"
    bench_models.on_gpu("tiny", tmp_path / "tiny", shard, "cpu", 1, 2, 1, tmp_path)
    printed = capsys.readouterr().out
    assert "model alone" in printed and ", 1.00 of the model alone (1.00 to 1.00)" in printed
    assert "build" in printed and "by hand" in printed and "bar for build: 0.9" in printed


@pytest.mark.gpu
def test_gpu(bench_models: ModuleType, data: Path, capsys: pytest.CaptureFixture) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bench_models.main(
        ["--data", str(data), "--networks", "tiny", "--device", "cuda", "--copies", "2", "--repeats", "1"]
    )
    assert "bar for build: 0.9" in capsys.readouterr().out
