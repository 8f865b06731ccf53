"""The contract of every model family, and what is particular to `compact`."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import photo
from vlm_ops.images import preprocess
from vlm_ops.models import (
    ImageModel,
    describe_model,
    load_image_backbone,
    load_image_model,
    load_text_backbone,
    load_text_model,
    load_tokenizer,
    onnx_engine,
)
from vlm_ops.models.compact import conse, imagenet_labels
from vlm_ops.models.settings import CPU, ModelSettings, resolve_device
from vlm_ops.preprocessing import Preprocessing

FAMILIES = ("compact:conse", "python:tests.toys")


@pytest.fixture(scope="module", params=FAMILIES)
def spec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(spec: str) -> ImageModel:
    return load_image_model(spec, CPU)


def pixels_for(preprocessing: Preprocessing, n: int) -> np.ndarray:
    if n == 0:
        return np.empty((0, 3, preprocessing.size, preprocessing.size), np.uint8)
    tensors = [torch.from_numpy(np.array(photo(seed, 80, 80))).permute(2, 0, 1) for seed in range(n)]
    return np.stack([preprocess(each, preprocessing).numpy() for each in tensors])


def arrays(encoding: object) -> dict[str, np.ndarray]:
    return {name: values for name, values in vars(encoding).items() if isinstance(values, np.ndarray)}


def test_shapes_and_norms(spec: str, model: ImageModel) -> None:
    encoding, backbone = model.encode_images(pixels_for(model.preprocessing, 3)), load_image_backbone(spec)
    np.testing.assert_allclose(np.linalg.norm(encoding.embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoding.probabilities.sum(axis=1), 1, atol=1e-5)
    assert encoding.probabilities.shape == (3, len(model.label_names))
    assert encoding.features.shape == (3, backbone.feature_dim)
    assert encoding.grid.shape[::2] == (3, backbone.grid_dim)
    assert encoding.embeddings.shape == (3, backbone.embedding_dim)
    assert {values.dtype for values in arrays(encoding).values()} == {np.dtype(np.float32)}
    assert model.preprocessing == backbone.preprocessing


def test_the_model_equals_its_backbone(spec: str, model: ImageModel) -> None:
    """ONNX Runtime, where that runs it, gives what torch does."""
    pixels = pixels_for(model.preprocessing, 5)
    with torch.no_grad():
        expected = load_image_backbone(spec)(torch.from_numpy(pixels))
    encoding = model.encode_images(pixels)
    for name, field in (
        ("features", "features"),
        ("grid", "grid"),
        ("labels", "probabilities"),
        ("embedding", "embeddings"),
    ):
        values = expected[name].numpy()
        tolerance = 1e-5 * max(1.0, float(np.abs(values).max()))
        np.testing.assert_allclose(getattr(encoding, field), values, atol=3 * tolerance)


def test_classes_follow_from_features(spec: str) -> None:
    backbone = load_image_backbone(spec)
    with torch.no_grad():
        outputs = backbone(torch.from_numpy(pixels_for(backbone.preprocessing, 3)))
        again = backbone.of_features(outputs["features"])  # type: ignore[attr-defined]
    for name in ("labels", "embedding"):
        torch.testing.assert_close(again[name], outputs[name], atol=1e-5, rtol=1e-4)
    assert backbone.class_weights.shape == (len(backbone.class_names), backbone.feature_dim)  # type: ignore[attr-defined]


def test_texts_and_images_share_a_space(spec: str, model: ImageModel) -> None:
    texts = load_text_model(spec)
    vectors = texts.encode_texts(["a dog", "a much longer sentence about a cat on a sofa", "a dog"])
    assert vectors.shape == (3, model.encode_images(pixels_for(model.preprocessing, 1)).embeddings.shape[1])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert texts.encode_texts([]).shape == (0, vectors.shape[1])


def test_the_text_model_equals_its_backbone(spec: str) -> None:
    texts = ["two dogs play in the snow", "green", "a cat"]
    tokens = load_tokenizer(spec)(texts)
    assert tokens["ids"].shape == tokens["mask"].shape and tokens["ids"].dtype == tokens["mask"].dtype == np.int64
    backbone = load_text_backbone(spec)
    with torch.no_grad():
        expected = backbone(torch.from_numpy(tokens["ids"]), torch.from_numpy(tokens["mask"]))
    assert expected.shape == (3, backbone.text_dim)
    np.testing.assert_allclose(load_text_model(spec).encode_texts(texts), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "compcat",
            "unknown model 'compcat'; known models: compact, compact-large, dir, hf, open_clip, torchvision, or python:package.module",
        ),
        (
            "compact:tiny",
            "unknown model 'compact:tiny'; this family has compact, compact-large, compact-large:conse, compact:aligned,",
        ),
        ("python:no_such_module", "cannot load model 'python:no_such_module': No module named"),
        ("python:", "cannot load model 'python:': "),
    ],
)
def test_unknown_specs(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        describe_model(wrong)


def test_a_family_that_cannot_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("tests.toys.load_image_backbone")
    monkeypatch.delattr("tests.toys.load_tokenizer")
    for load in (load_image_backbone, load_tokenizer):
        with pytest.raises(ValueError, match="model 'python:tests.toys' cannot be trained on; name a model of another"):
            load("python:tests.toys")


def test_device_is_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(ValueError, match="--device cuda was asked for, but no CUDA device"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        resolve_device("tpu")


def test_families_are_told_a_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[ModelSettings] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("load_image_model", "load_text_model"):
        monkeypatch.setattr(f"tests.toys.{name}", lambda spec, settings, *outputs: told.append(settings))
    for load in (load_image_model, load_text_model):
        load("python:tests.toys", ModelSettings())
        with pytest.raises(ValueError, match="no CUDA device"):
            load("python:tests.toys", ModelSettings("cuda"))
    load_text_model("python:tests.toys")
    assert told == [CPU] * 3


# --- compact --------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_given() -> None:
    model = load_image_model("compact:conse", CPU, frozenset({"embedding"}))
    pixels = pixels_for(model.preprocessing, 2)
    assert set(arrays(model.encode_images(pixels))) == {"embeddings"}
    whole = load_image_model("compact:conse", CPU).encode_images(pixels)
    np.testing.assert_allclose(model.encode_images(pixels).embeddings, whole.embeddings, atol=1e-6)
    nothing = load_image_model("compact:conse", CPU, frozenset())
    assert nothing.preprocessing == model.preprocessing and arrays(nothing.encode_images(pixels)) == {}


@pytest.mark.gpu
def test_cuda_equals_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cpu, cuda = load_image_model("compact:conse", CPU), load_image_model("compact:conse", ModelSettings(device="cuda"))
    pixels = pixels_for(cpu.preprocessing, 9)
    np.testing.assert_allclose(cuda.encode_images(pixels).embeddings, cpu.encode_images(pixels).embeddings, atol=1e-2)


def test_conse_is_the_weighted_sum_of_the_likeliest_labels() -> None:
    rng = np.random.default_rng(0)
    probabilities = torch.from_numpy(rng.normal(size=(4, 30))).softmax(1)
    labels = torch.from_numpy(rng.normal(size=(30, 6)))
    expected = []
    for row in probabilities:
        best = sorted(range(30), key=lambda i: -row[i])[:10]
        total = sum(row[i] * labels[i] for i in best)
        expected.append(total / np.linalg.norm(total))
    torch.testing.assert_close(conse(probabilities, labels), torch.stack(expected))


def test_the_grid_has_the_colours_of_the_cells() -> None:
    """Of 7 by 7 cells, how their 8 by 8 places share in 5 levels of red, green and blue."""
    backbone = load_image_backbone("compact:conse")
    pixels = pixels_for(backbone.preprocessing, 2)
    with torch.no_grad():
        grid = backbone(torch.from_numpy(pixels))["grid"].numpy()
    assert grid.shape == (2, 49, 1280 + 125 + 160)
    for image, row, column in ((0, 0, 0), (1, 2, 5), (0, 6, 6)):
        cell = pixels[image, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32].astype(np.float64)
        expected = np.zeros((5, 5, 5))
        for y, x in itertools.product(range(0, 32, 4), repeat=2):
            levels = 4 * (cell[:, y : y + 4, x : x + 4].mean((1, 2)) + 1) / 256
            for corner in itertools.product(range(5), repeat=3):
                expected[corner] += np.maximum(0, 1 - np.abs(levels - corner)).prod() / 64
        np.testing.assert_allclose(grid[image, 7 * row + column, 1280:1405] ** 2, expected.ravel(), atol=1e-4)


def test_the_grid_has_the_early_maps_of_the_network() -> None:
    backbone = load_image_backbone("compact:conse")
    pixels = torch.from_numpy(pixels_for(backbone.preprocessing, 2))
    net = backbone.nets[0]  # type: ignore[attr-defined]
    maps: list[torch.Tensor] = []
    for number in (0, 2, 4, 7):
        net._blocks[number].register_forward_hook(lambda block, inputs, output: maps.append(output))
    with torch.no_grad():
        grid = backbone(pixels)["grid"]
        last = net.extract_features((pixels.float() - 127) / 128)
    torch.testing.assert_close(grid[..., :1280], last.flatten(2).transpose(1, 2))
    for image, row, column in ((0, 0, 0), (1, 2, 5), (0, 6, 6)):
        seen = [each[image].unflatten(1, (7, -1)).unflatten(3, (7, -1))[:, row, :, column] for each in maps[:4]]
        expected = torch.cat([each.mean((1, 2)) for each in seen]) / 10
        torch.testing.assert_close(grid[image, 7 * row + column, 1405:], expected, atol=1e-5, rtol=1e-4)


def test_the_large_base_joins_two_networks() -> None:
    backbone = load_image_backbone("compact-large:conse")
    small = load_image_backbone("compact:conse")
    assert backbone.preprocessing.size == 260 and (backbone.feature_dim, backbone.grid_dim) == (2560, 1565)
    with torch.no_grad():
        outputs = backbone(torch.from_numpy(pixels_for(backbone.preprocessing, 1)))
        alone = small.of_features(outputs["features"][:, :1280])  # type: ignore[attr-defined]
    assert outputs["grid"].shape == (1, 49, 1565)
    # Each network has half of the say.
    assert (outputs["labels"] >= alone["labels"] / 2 - 1e-6).all()
    torch.testing.assert_close(outputs["labels"].sum(1), torch.ones(1))


def test_labels_of_a_real_photo() -> None:
    data = pytest.importorskip("skimage.data", reason="needs the photographs of scikit-image")
    model = load_image_model("compact:conse", CPU)
    pixels = preprocess(torch.from_numpy(data.chelsea()).permute(2, 0, 1), model.preprocessing).numpy()[None]
    best = model.encode_images(pixels).probabilities[0].argmax()
    assert imagenet_labels()[best] in ("tabby", "tiger cat", "Egyptian cat")


# --- the cache of exported graphs -----------------------------------------------------------------


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
