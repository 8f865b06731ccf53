"""The contract of every model family, and what is particular to `compact`."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import photo
from vlm_ops.images import preprocess
from vlm_ops.models import ImageModel, describe_model, load_image_model, load_text_model, onnx_engine, resolve_device
from vlm_ops.models.compact import TorchForward, conse, imagenet_labels, minilm_module, softmax

FAMILIES = ("compact", "python:tests.toys")


@pytest.fixture(scope="module", params=FAMILIES)
def spec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(spec: str) -> ImageModel:
    return load_image_model(spec, "cpu")


def pixels_for(model: ImageModel, n: int) -> np.ndarray:
    size = model.preprocessing.size
    if n == 0:
        return np.empty((0, 3, size, size), np.uint8)
    tensors = [torch.from_numpy(np.array(photo(seed, 80, 80))).permute(2, 0, 1) for seed in range(n)]
    return np.stack([preprocess(each, model.preprocessing).numpy() for each in tensors])


def test_same_batch_gives_the_same_bits(model: ImageModel) -> None:
    pixels = pixels_for(model, 5)
    first, second = model.encode_images(pixels), model.encode_images(pixels)
    assert np.array_equal(first.embeddings, second.embeddings)
    assert np.array_equal(first.features, second.features)


def test_one_by_one_gives_the_same_in_the_same_order(model: ImageModel) -> None:
    pixels = pixels_for(model, 7)
    together = model.encode_images(pixels)
    alone = [model.encode_images(pixels[i : i + 1]) for i in range(7)]
    np.testing.assert_allclose(together.features, np.concatenate([each.features for each in alone]), atol=1e-4)
    np.testing.assert_allclose(together.embeddings, np.concatenate([each.embeddings for each in alone]), atol=1e-5)
    assert np.abs(together.features[0] - together.features[1]).max() > 1e-2


def test_shapes_and_norms(model: ImageModel) -> None:
    encoding = model.encode_images(pixels_for(model, 3))
    np.testing.assert_allclose(np.linalg.norm(encoding.embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoding.probabilities.sum(axis=1), 1, atol=1e-5)
    assert encoding.probabilities.shape == (3, len(model.label_names))
    assert encoding.features.dtype == encoding.embeddings.dtype == np.float32


def test_empty_batch(model: ImageModel) -> None:
    encoding = model.encode_images(pixels_for(model, 0))
    one = model.encode_images(pixels_for(model, 1))
    assert encoding.embeddings.shape == (0, one.embeddings.shape[1])
    assert encoding.features.shape == (0, one.features.shape[1])


def test_texts_and_images_share_a_space(spec: str, model: ImageModel) -> None:
    texts = load_text_model(spec, "cpu")
    vectors = texts.encode_texts(["a dog", "a much longer sentence about a cat on a sofa", "a dog"])
    assert vectors.shape == (3, model.encode_images(pixels_for(model, 1)).embeddings.shape[1])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert texts.encode_texts([]).shape == (0, vectors.shape[1])


def test_the_description_is_that_of_the_loaded_model(spec: str, model: ImageModel) -> None:
    assert model.info == describe_model(spec) == load_text_model(spec, "cpu").info


def test_threads_share_a_model(model: ImageModel) -> None:
    pixels = pixels_for(model, 6)
    expected = model.encode_images(pixels).embeddings
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(model.encode_images(pixels).embeddings)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(np.array_equal(each, expected) for each in results)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("compcat", "unknown model 'compcat'; known models: compact, dir, or python:package.module"),
        ("compact:tiny", "unknown model 'compact:tiny'; did you mean 'compact'?"),
        ("python:no_such_module", "cannot load model 'python:no_such_module': No module named"),
    ],
)
def test_unknown_specs(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("?", r"\?")):
        describe_model(wrong)


def test_device_is_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="--device cuda was asked for, but no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        resolve_device("tpu")


# --- compact -------------------------------------------------------------------------------------


def test_onnx_runtime_equals_torch() -> None:
    model = load_image_model("compact", "cpu")
    pixels = pixels_for(model, 5)
    features, logits = TorchForward("cpu")(pixels)
    encoding = model.encode_images(pixels)
    np.testing.assert_allclose(encoding.features, features, atol=3e-5)
    np.testing.assert_allclose(encoding.probabilities, softmax(logits), atol=1e-5)


@pytest.mark.gpu
def test_cuda_equals_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cpu, cuda = load_image_model("compact", "cpu"), load_image_model("compact", "cuda")
    pixels = pixels_for(cpu, 9)
    np.testing.assert_allclose(cuda.encode_images(pixels).embeddings, cpu.encode_images(pixels).embeddings, atol=1e-2)


def test_text_encoder_equals_torch() -> None:
    from tokenizers import Tokenizer

    from vlm_ops.models.compact import _minilm_dir

    text = "two dogs play in the snow"
    tokenizer = Tokenizer.from_file(str(_minilm_dir() / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(text).ids])
    ids = ids[:, : int((ids != 0).sum())]
    with torch.no_grad():
        expected = minilm_module()(ids, torch.ones_like(ids)).numpy()
    np.testing.assert_allclose(load_text_model("compact", "cpu").encode_texts([text]), expected, atol=1e-5)


def test_conse_is_the_weighted_sum_of_the_likeliest_labels() -> None:
    rng = np.random.default_rng(0)
    probabilities = softmax(rng.normal(size=(4, 30)).astype(np.float32))
    labels = rng.normal(size=(30, 6)).astype(np.float32)
    expected = []
    for row in probabilities:
        best = sorted(range(30), key=lambda i: -row[i])[:10]
        total = sum(row[i] * labels[i] for i in best)
        expected.append(total / np.linalg.norm(total))
    np.testing.assert_allclose(conse(probabilities, labels), np.stack(expected), atol=1e-5)


def test_labels_of_a_real_photo() -> None:
    data = pytest.importorskip("skimage.data", reason="needs the photographs of scikit-image")
    model = load_image_model("compact", "cpu")
    pixels = preprocess(torch.from_numpy(data.chelsea()).permute(2, 0, 1), model.preprocessing).numpy()[None]
    best = model.encode_images(pixels).probabilities[0].argmax()
    assert imagenet_labels()[best] in ("tabby", "tiger cat", "Egyptian cat")


# --- the cache of exported graphs ------------------------------------------------------------------


def test_cached_file_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(tmp_path / "cache"))
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("graph")

    assert onnx_engine.cached_file("a.onnx", make) == onnx_engine.cached_file("a.onnx", make)
    assert len(made) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a.onnx"]


def test_cached_file_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(tmp_path))

    def make(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("export failed")

    with pytest.raises(RuntimeError, match="export failed"):
        onnx_engine.cached_file("a.onnx", make)
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the cache directory should be")
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(blocked))
    path = onnx_engine.cached_file("a.onnx", lambda path: path.write_text("graph") and None)
    assert path.read_text() == "graph" and tmp_path not in path.parents
