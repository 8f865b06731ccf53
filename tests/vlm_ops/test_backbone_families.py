"""`hf` and `torchvision`, and what runs their torch modules; on tiny models with random weights, made here."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model, get_model_weights

from tests.conftest import photo
from tests.vlm_ops.tiny_models import IMAGE_MODELS, TEXTS, VIT, arrays, close, make_model, pictures, pixels_of, settled
from vlm_ops.images import preprocess
from vlm_ops.models import (
    ModelInfo,
    backbones,
    describe_model,
    load_image_backbone,
    load_image_model,
    load_text_model,
    torchvision_family,
)
from vlm_ops.models.backbones import BackboneImageModel
from vlm_ops.models.hf_preprocessing import read_preprocessing
from vlm_ops.models.settings import CPU, ModelSettings, resolved
from vlm_ops.preprocessing import Preprocessing

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for kind in (*IMAGE_MODELS, "bert"):
        make_model(kind, folder / kind)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A classifier of torchvision and the file of its weights."""
    torch.manual_seed(0)
    net = settled(get_model("resnet18", weights=None), 224)
    path = tmp_path_factory.mktemp("torchvision") / "weights.pth"
    torch.save(net.state_dict(), path)
    return net, path


# --- hf: images -----------------------------------------------------------------------------------


def test_classifier_checkpoint_has_no_pooler(tmp_path: Path) -> None:
    """Its features are the class token, and not what a random pooler makes of it; half precision is widened."""
    net = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)).to(torch.bfloat16)
    net.save_pretrained(tmp_path)
    IMAGE_MODELS["vit"][1].save_pretrained(tmp_path)
    pixels = torch.from_numpy(pixels_of(pictures(32, 2)))
    with torch.no_grad():
        actual = load_image_backbone(f"hf:{tmp_path}")(pixels)
        hidden = net.float().eval().vit(pixel_values=pixels / 127.5 - 1).last_hidden_state
    close(actual["features"], hidden[:, 0])
    close(actual["grid"], hidden[:, 1:])


def test_register_tokens_are_not_in_the_grid(tmp_path: Path) -> None:
    config = transformers.Dinov2WithRegistersConfig(**VIT, num_register_tokens=4)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    IMAGE_MODELS["vit"][1].save_pretrained(tmp_path)
    backbone: Any = load_image_backbone(f"hf:{tmp_path}")
    assert backbone.num_special_tokens == 5
    assert backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))["grid"].shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (transformers.ViTImageProcessor(), Preprocessing(224, "stretch", 1.0, "bilinear", "floor")),
        (transformers.ViTImageProcessor(resample=0), Preprocessing(224, "stretch", 1.0, "nearest-exact", "floor")),
        (
            transformers.BitImageProcessor(size={"shortest_edge": 256}),
            Preprocessing(224, "cover", 224 / 256, "bicubic", "floor"),
        ),
        (transformers.DeiTImageProcessor(), Preprocessing(224, "stretch", 224 / 256, "bicubic", "floor")),
        (transformers.PoolFormerImageProcessor(), Preprocessing(224, "cover", 224 / 248, "bicubic", "floor")),
        (
            transformers.ConvNextImageProcessor(size={"shortest_edge": 224}),
            Preprocessing(224, "cover", 224 / 256, "bicubic", "floor"),
        ),
        (transformers.ConvNextImageProcessor(), Preprocessing(384, "stretch", 1.0, "bicubic", "floor")),
        (transformers.CLIPImageProcessor(), Preprocessing(224, "cover", 1.0, "bicubic", "floor")),
        (transformers.SiglipImageProcessor(), Preprocessing(224, "stretch", 1.0, "bicubic", "floor")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_preprocessing_of_image_processors(processor: Any, expected: Preprocessing) -> None:
    assert read_preprocessing(processor) == expected


@pytest.mark.parametrize("kind", IMAGE_MODELS)
@pytest.mark.parametrize("size", [(160, 110), (109, 163), (37, 41), (64, 64)])
def test_preprocessing_equals_that_of_transformers(kind: str, size: tuple[int, int]) -> None:
    processor = IMAGE_MODELS[kind][1]
    image = photo(3, *size)
    expected = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    actual = preprocess(torch.from_numpy(pixels_of([image])[0]), read_preprocessing(processor)).numpy()
    assert np.array_equal(actual, expected)


# --- hf: texts ------------------------------------------------------------------------------------


def test_texts_equal_transformers(directories: dict[str, Path]) -> None:
    path = directories["bert"]
    net = transformers.AutoModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            inputs = tokenizer(text, truncation=True, return_tensors="pt")
            mean = net(**inputs).last_hidden_state[0].mean(0)
        expected.append(mean / mean.norm())
    model = load_text_model(f"hf:{path}", CPU)
    close(model.encode_texts(TEXTS), torch.stack(expected))


# --- hf: specs ------------------------------------------------------------------------------------


def test_spec_is_by_full_path(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = directories["vit"]
    monkeypatch.chdir(path.parent)
    info = describe_model(f"hf:{path.name}")
    assert info.spec == f"hf:{path}" and len(info.revision) == 12
    assert info.produces == {"features", "grid"}


def test_revision_changes_with_weights_and_settings(directories: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(directories["vit"], copy)
    revisions = [describe_model(f"hf:{directories['vit']}").revision, describe_model(f"hf:{copy}").revision]
    assert revisions[0] == revisions[1]
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.4, 0.4, 0.4]}))
    revisions.append(describe_model(f"hf:{copy}").revision)
    transformers.ViTModel(transformers.ViTConfig(**VIT)).save_pretrained(copy)
    revisions.append(describe_model(f"hf:{copy}").revision)
    assert len(set(revisions)) == 3


def test_repository_in_the_local_cache(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, commit = tmp_path / "models--someone--tiny", "0123456789" * 4
    shutil.copytree(directories["vit"], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    for name in ("main", "v1"):
        (repo / "refs" / name).write_text(commit)
    local = describe_model(f"hf:{directories['vit']}")
    for spec in ("hf:someone/tiny", "hf:someone/tiny@v1", f"hf:someone/tiny@{commit}"):
        pinned = f"hf:someone/tiny@{commit}"
        assert describe_model(spec) == ModelInfo(pinned, local.revision, local.produces, False)
    with pytest.raises(ValueError, match="no model 'hf:someone/tiny@v2': 'someone/tiny' is neither a directory nor in"):
        describe_model("hf:someone/tiny@v2")


@pytest.mark.parametrize("wrong", ["hf:", "hf:/no/such/directory", "hf:someone/unknown"])
def test_model_that_is_not_here(wrong: str) -> None:
    with pytest.raises(ValueError, match=f"^no model '{wrong}': .* is neither a directory nor"):
        describe_model(wrong)


def test_directories_that_are_not_whole(directories: dict[str, Path], tmp_path: Path) -> None:
    spec = f"hf:{tmp_path}"
    with pytest.raises(ValueError, match="there is no config.json; save_pretrained writes one"):
        describe_model(spec)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read: config.json: "):
        describe_model(spec)
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(
        ValueError,
        match="its model_type is 'whisper'; known are captioners .* the image backbones bit, .* text encoders albert",
    ):
        describe_model(spec)
    shutil.copy(directories["vit"] / "config.json", tmp_path)
    with pytest.raises(ValueError, match="has no weights: there is no model.safetensors"):
        describe_model(spec)
    save_file({"layernorm.bias": torch.zeros(16)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no image processor that can be read \(preprocessor_config.json\)"):
        load_image_model(spec, CPU)
    IMAGE_MODELS["vit"][1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the weights in .* lack embeddings.cls_token, .*; save the whole model there"):
        load_image_backbone(spec)


def test_sides_that_are_not_there(directories: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a text encoder and has no image side; name an image model"):
        load_image_model(f"hf:{directories['bert']}", CPU)
    with pytest.raises(ValueError, match="has no text side"):
        load_text_model(f"hf:{directories['vit']}", CPU)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(directories["bert"] / name, tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer.json; save its fast tokenizer there"):
        load_text_model(f"hf:{tmp_path}", CPU)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (transformers.ViTImageProcessor(size={"height": 20, "width": 30}), "does not resize every image to one square"),
        (transformers.MobileViTImageProcessor(), "does more to the pixels than to rescale and normalise them"),
        (
            transformers.BitImageProcessor(do_center_crop=False),
            "keeps the aspect ratio of every image; give it a crop_size",
        ),
        (
            transformers.ViTImageProcessor(resample=1),
            r"resizes by Pillow's filter 1, which is not supported; set resample",
        ),
    ],
    ids=["oblong", "BGR", "no crop", "filter"],
)
def test_image_processors_that_cannot_be_followed(
    processor: Any, message: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(directories["vit"], tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_image_backbone(f"hf:{tmp_path / 'model'}")


# --- torchvision ----------------------------------------------------------------------------------


def test_torchvision_equals_the_classifier(resnet18: tuple[nn.Module, Path]) -> None:
    net, path = copy.deepcopy(resnet18[0]), resnet18[1]
    model = load_image_model(f"torchvision:resnet18:{path}", CPU)
    categories = get_model_weights("resnet18")["DEFAULT"].meta["categories"]
    assert list(model.label_names) == categories
    assert model.preprocessing == Preprocessing(224, "cover", 224 / 256, "bilinear")
    pixels = pixels_of(pictures(224, 3))
    encoding = model.encode_images(pixels)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        inputs = (torch.from_numpy(pixels) / 255 - mean) / std
        stem = net.maxpool(net.relu(net.bn1(net.conv1(inputs))))
        grid = net.layer4(net.layer3(net.layer2(net.layer1(stem))))
        probabilities = net(inputs).softmax(1)
        net.fc = nn.Identity()
        hidden = net(inputs)
    close(encoding.features, hidden)
    close(encoding.grid, grid.flatten(2).transpose(1, 2))
    close(encoding.probabilities, probabilities)


def test_classes_are_a_linear_function_of_features(resnet18: tuple[nn.Module, Path]) -> None:
    backbone: Any = load_image_backbone(f"torchvision:resnet18:{resnet18[1]}")
    features = torch.randn(2, backbone.feature_dim)
    logits = features @ backbone.class_weights.T + resnet18[0].fc.bias
    torch.testing.assert_close(backbone.of_features(features)["labels"], logits.softmax(1))
    assert len(backbone.class_names) == len(backbone.class_weights) == 1000


@pytest.mark.parametrize(
    ("name", "cells", "dim"), [("mobilenet_v2", 49, 1280), ("shufflenet_v2_x0_5", 49, 1024), ("swin_t", 49, 768)]
)
def test_grid_is_the_last_map_before_it_is_pooled(name: str, cells: int, dim: int) -> None:
    weights = get_model_weights(name)["DEFAULT"]
    backbone = torchvision_family.TorchvisionBackbone(get_model(name, weights=None), weights)
    with torch.no_grad():
        outputs = backbone(torch.from_numpy(pixels_of(pictures(224, 1))))
    assert outputs["grid"].shape == (1, cells, dim) and backbone.grid_dim == backbone.feature_dim == dim
    torch.testing.assert_close(outputs["grid"].mean(1), outputs["features"], atol=1e-4, rtol=0)


def test_squeezenet_classifies_before_it_pools(tmp_path: Path) -> None:
    net = get_model("squeezenet1_1", weights=None, num_classes=7).eval()
    save_file(net.state_dict(), tmp_path / "seven.safetensors")
    spec = f"torchvision:squeezenet1_1:{tmp_path / 'seven.safetensors'}"
    model = load_image_model(spec, ModelSettings("cpu", "float32", "torch"))
    images = pictures(model.preprocessing.size, 2)
    encoding = model.encode_images(pixels_of(images))
    transforms = get_model_weights("squeezenet1_1")["DEFAULT"].transforms()
    assert model.preprocessing == Preprocessing(224, "cover", 224 / 256, "bilinear")
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (transforms.mean, transforms.std))
    with torch.no_grad():
        inputs = (torch.from_numpy(pixels_of(images)) / 255 - mean) / std
        expected = net(inputs).softmax(1)
    np.testing.assert_allclose(encoding.probabilities, expected, atol=1e-4)
    assert encoding.features.shape == (2, 512) and encoding.grid.shape == (2, 169, 512)
    close(encoding.features, encoding.grid.mean(1))
    assert model.label_names[-1] == "class 6"


def test_own_classes(tmp_path: Path) -> None:
    path = tmp_path / "five.safetensors"
    save_file(get_model("mobilenet_v3_small", weights=None, num_classes=5).state_dict(), path)
    spec = f"torchvision:mobilenet_v3_small:{path}"
    model = load_image_model(spec, CPU, frozenset())
    assert list(model.label_names) == ["class 0", "class 1", "class 2", "class 3", "class 4"]
    labels = load_image_backbone(spec)(torch.zeros(2, 3, 224, 224, dtype=torch.uint8))["labels"]
    torch.testing.assert_close(labels.sum(1), torch.ones(2))


def test_named_weights_are_described_without_them() -> None:
    info = describe_model("torchvision:resnet50")
    assert info == ModelInfo(
        "torchvision:resnet50", "IMAGENET1K_V2-11ad3fa6", frozenset({"features", "grid", "labels"}), False
    )
    assert describe_model("torchvision:resnet50:IMAGENET1K_V1").revision == "IMAGENET1K_V1-0676ba61"


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision_family, "get_model", fail)
    with pytest.raises(
        ValueError, match="cannot fetch the weights IMAGENET1K_V1 of resnet18 .*no network.*name the file"
    ):
        load_image_backbone("torchvision:resnet18")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("resnet17", "unknown model 'torchvision:resnet17'; torchvision has alexnet, "),
        ("resnet50:V3", "no weights 'V3' for resnet50; use IMAGENET1K_V1, IMAGENET1K_V2, or the path of a state dict"),
        ("resnet50:/no/file.pth", "no weights '/no/file.pth' for resnet50; use"),
    ],
)
def test_unknown_torchvision_models(wrong: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        describe_model(f"torchvision:{wrong}")


def test_weights_that_do_not_fit(resnet18: tuple[nn.Module, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are not those of a vgg11; name the model that they belong to"):
        load_image_model(f"torchvision:vgg11:{resnet18[1]}", CPU)
    with pytest.raises(ValueError, match="are not those of a resnet34"):
        load_image_backbone(f"torchvision:resnet34:{resnet18[1]}")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot read the weights in .*broken.pth'; save a model's state_dict"):
        load_image_backbone(f"torchvision:resnet18:{tmp_path / 'broken.pth'}")


# --- running a module that is at hand -------------------------------------------------------------


class Colours(nn.Module):
    """A backbone of one parameter: scaled colours, and their mean."""

    preprocessing = Preprocessing(8)
    feature_dim = grid_dim = 3
    embedding_dim = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 255))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = (pixels.float() * self.scale).flatten(2).transpose(1, 2)
        return {"features": grid.mean(1), "grid": grid}


def colours_model(revision: str, outputs: set[str], load: Callable[[], Any] = Colours) -> BackboneImageModel:
    info = ModelInfo("dir:colours", revision, frozenset({"features", "grid"}))
    return BackboneImageModel(info, Colours.preprocessing, load, resolved(CPU), frozenset(outputs))


def test_only_what_is_asked_for_is_computed() -> None:
    module = Colours()
    pixels = pixels_of(pictures(8, 6))
    encoding = colours_model("1", {"features", "caption"}, lambda: module).encode_images(pixels)
    assert list(arrays(encoding)) == ["features"]
    np.testing.assert_allclose(encoding.features, pixels.mean((2, 3)) / 255, atol=1e-5)


def test_cached_graph_needs_no_module() -> None:
    def load() -> None:
        raise AssertionError("the module was loaded")

    pixels = pixels_of(pictures(8, 2))
    expected = colours_model("2", {"grid"}).encode_images(pixels).grid
    assert np.array_equal(colours_model("2", {"grid"}, load).encode_images(pixels).grid, expected)
    assert arrays(colours_model("3", set(), load).encode_images(pixels)) == {}


def test_module_that_cannot_be_exported_runs_through_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("no such operator\nand a long report")

    monkeypatch.setattr(backbones, "export", fail)
    pixels = pixels_of(pictures(8, 6))
    with caplog.at_level(logging.WARNING):
        encoding = colours_model("4", {"features", "grid"}).encode_images(pixels)
    assert (
        "runs through torch, more slowly: it cannot be exported to ONNX: RuntimeError: no such operator" in caplog.text
    )
    assert "long report" not in caplog.text
    np.testing.assert_allclose(encoding.features, pixels.mean((2, 3)) / 255, atol=1e-5)


def test_graph_that_gives_other_values_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def export_something_else(module: Any, *args: Any) -> None:
        with torch.no_grad():
            module.backbone.scale.mul_(2)
        export(module, *args)
        with torch.no_grad():
            module.backbone.scale.div_(2)

    export = backbones.export
    monkeypatch.setattr(backbones, "export", export_something_else)
    with caplog.at_level(logging.WARNING):
        encoding = colours_model("5", {"features"}).encode_images(pixels_of(pictures(8, 1)))
    assert "the exported graph gives other values" in caplog.text
    assert encoding.features.max() <= 1
