"""What runs a backbone by its settings: engines and precisions, on small modules that are made here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vlm_ops.models import ImageEncoding, ModelInfo, backbones
from vlm_ops.models.backbones import BackboneImageModel, BackboneTextModel, make_forward
from vlm_ops.models.settings import CPU, ModelSettings, resolved
from vlm_ops.models.torch_engine import TorchEngine
from vlm_ops.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("own_cache")

_BF16 = ModelSettings(device="cpu", dtype="bfloat16")
_INT8 = ModelSettings(device="cpu", dtype="int8")
_NAMES = frozenset({"features", "grid", "labels", "embedding"})


class Small(nn.Module):
    """A backbone of convolutions, a block of a transformer, and heads."""

    preprocessing = Preprocessing(32)
    feature_dim = grid_dim = 32
    embedding_dim = 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 2, 2), nn.BatchNorm2d(32)
        )
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.classes, self.head = nn.Linear(32, 5), nn.Linear(32, 8)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = self.stem(pixels.float() / 127.5 - 1).flatten(2).transpose(1, 2)
        normed = self.norm(grid)
        grid = grid + self.attention(normed, normed, normed, need_weights=False)[0]
        grid = grid + self.mlp(grid)
        features = grid.mean(1)
        embedding = F.normalize(self.head(features), dim=1)
        return {"features": features, "grid": grid, "labels": self.classes(features).softmax(1), "embedding": embedding}


def small(settings: ModelSettings, load: Callable[[], Any] = Small) -> BackboneImageModel:
    info = ModelInfo("dir:small", getattr(load, "__name__", "at-hand"), _NAMES)
    return BackboneImageModel(info, Small.preprocessing, load, resolved(settings), _NAMES, list("abcde"))


def pixels(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), np.uint8)


def arrays(encoding: ImageEncoding) -> dict[str, np.ndarray]:
    return {name: array for name, array in vars(encoding).items() if isinstance(array, np.ndarray)}


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = first.reshape(len(first), -1), second.reshape(len(second), -1)
    return (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """Of seven images, by the module itself in float32."""
    with torch.no_grad():
        outputs = Small().eval()(torch.from_numpy(pixels(7)))
    return {backbones.FIELDS[name]: array.numpy() for name, array in outputs.items()}


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(tmp_path))
    return tmp_path


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "distance"),
    [
        (ModelSettings(device="cpu"), 1e-6),
        (ModelSettings(device="cpu", engine="torch"), 1e-6),
        (_BF16, 1e-3),
        (_INT8, 1e-2),
    ],
    ids=["onnxruntime", "torch", "bfloat16", "int8"],
)
def test_engines_agree(settings: ModelSettings, distance: float, expected: dict[str, np.ndarray]) -> None:
    model = small(settings)
    found = arrays(model.encode_images(pixels(7)))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float32 and array.shape == expected[name].shape
        assert cosines(array, expected[name]).min() > 1 - distance
    np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, atol=1e-6)
    again = arrays(model.encode_images(pixels(7)))
    assert all(np.array_equal(again[name], array) for name, array in found.items())
    alone = arrays(model.encode_images(pixels(7)[2:3]))
    assert all(cosines(alone[name], array[2:3]).min() > 1 - distance for name, array in found.items())
    none = arrays(model.encode_images(pixels(0)))
    assert {name: array.shape for name, array in none.items()} == {
        name: (0, *array.shape[1:]) for name, array in expected.items()
    }


# --- torch ----------------------------------------------------------------------------------------


def test_weights_are_converted_once_and_norms_are_not() -> None:
    module: Any = Small()
    TorchEngine(module, resolved(_BF16))
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert dtypes["stem.0.weight"] == dtypes["attention.in_proj_weight"] == dtypes["mlp.1.weight"] == torch.bfloat16
    assert dtypes["norm.weight"] == dtypes["stem.1.weight"] == dtypes["mlp.0.bias"] == torch.float32
    assert module.stem[1].running_mean.dtype == torch.float32


def test_maps_of_cnns_have_their_channels_last() -> None:
    module: Any = Small()
    patches: Any = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.Flatten())
    for each in (module, patches):
        TorchEngine(each, resolved(_BF16))
    assert module.stem[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not patches[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_threads_of_a_cpu_do_not_wait_for_each_other() -> None:
    both = threading.Barrier(2, timeout=20)

    class Meeting(nn.Module):
        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            both.wait()  # breaks where the other thread does not come
            return numbers + 1

    engine = TorchEngine(Meeting(), resolved(ModelSettings(device="cpu", engine="torch")))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(engine.run, [{"numbers": np.zeros((1, 2), np.float32)}] * 2))
    assert all(np.array_equal(result[0], [[1, 1]]) for result in results)


def test_only_floats_become_float32() -> None:
    class Numbers(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.bfloat16(), x.argmax(1)

    first, second = TorchEngine(Numbers(), resolved(_BF16)).run({"x": np.eye(3, dtype=np.float32)})
    assert first.dtype == np.float32 and second.dtype == np.int64 and second.tolist() == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_once_for_all_batches(dtype: str, expected: dict[str, np.ndarray], caplog: Any) -> None:
    """Also in other threads than that which compiles."""
    caplog.set_level("INFO")
    torch._dynamo.reset()
    torch.set_num_threads(1)
    model = small(ModelSettings(device="cpu", dtype=dtype, compile=True))
    assert "compiling a model for cpu, which takes minutes" in caplog.text
    with torch.compiler.set_stance("fail_on_recompile"), ThreadPoolExecutor(1) as pool:
        for n in (7, 4, 2, 1):  # by fours, and what is left
            found = arrays(pool.submit(model.encode_images, pixels(7)[:n]).result())
            for name, array in found.items():
                assert array.shape == expected[name][:n].shape
                assert cosines(array, expected[name][:n]).min() > (1 - 1e-5 if dtype == "float32" else 0.999)


def test_what_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no Triton for this GPU\nand a long report")

    monkeypatch.setattr("torch.compile", lambda module, **options: fail)
    message = r"cannot be compiled here; leave out --compile \(RuntimeError: no Triton for this GPU\)$"
    with pytest.raises(ValueError, match=message):
        small(ModelSettings(device="cpu", compile=True))


# --- ONNX Runtime ---------------------------------------------------------------------------------


def test_int8_does_not_depend_on_the_batch(empty_cache: Path) -> None:
    """Activations share a scale, which would be that of the brightest image."""
    model = small(_INT8)
    batch = pixels(5)
    batch[0] //= 8
    together, alone = arrays(model.encode_images(batch)), arrays(model.encode_images(batch[:1]))
    assert all(np.array_equal(together[name][:1], array) for name, array in alone.items())
    (graph,) = empty_cache.glob("*int8*")
    kinds = [node.op_type for node in onnx.load(graph).graph.node]
    assert kinds.count("MatMulInteger") >= 4 and kinds.count("Conv") == 2
    assert not np.array_equal(together["features"], arrays(small(CPU).encode_images(batch))["features"])


def test_texts_stay_in_float32() -> None:
    class Words(nn.Module):
        text_dim = 8

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(50, 16), nn.Linear(16, 8)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return F.normalize(self.head(self.words(ids).sum(1)) + mask.sum(), dim=1)

    def tokenize(texts: Any) -> dict[str, np.ndarray]:
        ids = np.array([[len(text) % 50, 1] for text in texts], np.int64)
        return {"ids": ids, "mask": np.zeros_like(ids)}

    info = ModelInfo("dir:words", "1", frozenset())
    texts = ["a", "dog", "runs"]
    exact, beside_int8 = (
        BackboneTextModel(info, tokenize, Words, resolved(settings)).encode_texts(texts) for settings in (CPU, _INT8)
    )
    assert np.array_equal(exact, beside_int8)


class Scaling(nn.Module):
    """Nothing to multiply by a matrix."""

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = (pixels.float() / 255).flatten(2).transpose(1, 2)
        features = grid.mean(1)
        return {"features": features, "grid": grid, "labels": features.softmax(1), "embedding": features}


class Delicate(Scaling):
    """One input is ten thousand times as large as the others, and does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = super().forward(pixels)
        return outputs | {"features": (outputs["features"] * torch.tensor([1.0, 1.0, 1e4])) @ self.matrix}


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (Scaling, "^dir-Scaling gains nothing by --dtype int8: it has no matrix products by weights; leave it out"),
        (Delicate, r"^dir-Delicate does not bear --dtype int8: .* \(cosine .*\); use --dtype bfloat16 or float32"),
    ],
)
def test_models_that_int8_is_not_for(load: Callable[[], Any], message: str, empty_cache: Path) -> None:
    with pytest.raises(ValueError, match=message):
        small(_INT8, load)
    assert not list(empty_cache.glob("*int8*"))


def test_a_cnn_hardly_gains_by_int8(empty_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Convolutions(Scaling):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.convolution, self.head = nn.Conv2d(3, 512, 8), nn.Linear(512, 4)

        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            features = self.head(self.convolution(pixels.float() / 255).mean((2, 3)))
            return super().forward(pixels) | {"features": features}

    message = "dir-Convolutions is mostly convolutions, which stay in float32: --dtype int8 makes it hardly faster"
    small(_INT8, Convolutions)
    assert message in caplog.text


@pytest.mark.parametrize(
    ("settings", "asked"),
    [(ModelSettings(device="cpu", engine="onnxruntime"), "--engine onnxruntime"), (_INT8, "--dtype int8")],
)
def test_an_engine_that_was_asked_for_is_not_replaced(
    settings: ModelSettings, asked: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(backbones, "export", fail)
    message = (
        f"^dir-Small cannot be exported to ONNX, so that {asked} cannot be had .RuntimeError: no such operator.; use"
    )
    with pytest.raises(ValueError, match=message):
        small(settings)


def test_graphs_are_not_shared_among_precisions(empty_cache: Path) -> None:
    def module() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(4, 4)

    example = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}
    results = {
        settings.dtype: make_forward("linear", module, example, {"x": {0: "n"}}, resolved(settings))(example)[0]
        for settings in (CPU, _INT8, CPU)
    }
    assert len(list(empty_cache.glob("linear*"))) == 2
    assert not np.array_equal(results["float32"], results["int8"])
    with torch.no_grad():
        np.testing.assert_allclose(results["float32"], module()(torch.from_numpy(example["x"])), atol=1e-6)


# --- GPUs -----------------------------------------------------------------------------------------


def cuda(number: int = 0) -> str:
    if torch.cuda.device_count() <= number:
        pytest.skip("needs a CUDA device" if number == 0 else f"needs {number + 1} CUDA devices")
    return "cuda" if number == 0 else f"cuda:{number}"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "is_compiled", "distance"),
    [("float32", False, 1e-6), ("bfloat16", False, 1e-3), ("float16", False, 1e-4), ("bfloat16", True, 1e-3)],
)
def test_gpu_agrees_with_the_cpu(
    dtype: str, is_compiled: bool, distance: float, expected: dict[str, np.ndarray]
) -> None:
    device = cuda()
    model = small(ModelSettings(device=device, dtype=dtype, compile=is_compiled))
    for n in (7, 3, 1):
        for name, array in arrays(model.encode_images(pixels(7)[:n])).items():
            assert array.dtype == np.float32 and cosines(array, expected[name][:n]).min() > 1 - distance
    found = arrays(model.encode_images(pixels(7)))
    np.testing.assert_allclose(np.linalg.norm(found["embeddings"], axis=1), 1, atol=1e-6)


@pytest.mark.gpu
def test_threads_of_a_gpu_get_their_own_results(expected: dict[str, np.ndarray]) -> None:
    model = small(ModelSettings(device=cuda(), dtype="float32"))
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda i: arrays(model.encode_images(pixels(7)[i : i + 1]))["features"], list(range(7)) * 20)
        )
    assert cosines(np.concatenate(results), np.tile(expected["features"], (20, 1))).min() > 1 - 1e-6


@pytest.mark.gpu
def test_the_gpu_that_is_named_is_used(expected: dict[str, np.ndarray]) -> None:
    device = cuda(1)
    module: Any = Small()
    found = arrays(small(ModelSettings(device=device, dtype="float32"), lambda: module).encode_images(pixels(7)))
    assert module.head.weight.device == torch.device("cuda:1")
    assert cosines(found["features"], expected["features"]).min() > 1 - 1e-6
