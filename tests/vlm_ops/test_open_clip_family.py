"""`open_clip:` models, against open_clip called by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tests.conftest import photo
from tests.hubs import FakeHub
from vlm_ops.images import preprocess
from vlm_ops.models import (
    describe_model,
    fetch_model,
    load_image_backbone,
    load_image_model,
    load_text_backbone,
    load_text_model,
    load_tokenizer,
)
from vlm_ops.models.settings import CPU, ModelSettings
from vlm_ops.preprocessing import Preprocessing

open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch")
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_cache")

TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}
# One of each kind of tower: model_cfg, preprocess_cfg, and what its images give.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "vit": ({"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT}, {}, {"features", "grid", "embeddings"}),
    "siglip": (
        {
            "embed_dim": 16,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
            "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        },
        HALVES,
        {"features", "embeddings"},
    ),
    "resnet": (
        {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
            "text_cfg": TEXT,
        },
        {},
        {"features", "embeddings"},
    ),
    "bert": (
        {
            "embed_dim": 16,
            "vision_cfg": VIT,
            "text_cfg": {"hf_model_name": "someone/bert", "hf_tokenizer_name": "someone/bert", "hf_proj_type": "mlp"},
        },
        {},
        {"features", "grid", "embeddings"},
    ),
    "coca": (
        {
            "embed_dim": 16,
            "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {"context_length": 20, "width": 16, "heads": 2, "layers": 1},
            "custom_text": True,
        },
        {},
        {"features", "embeddings"},
    ),
}  # fmt: skip
TORCH = ModelSettings(device="cpu", dtype="float32", engine="torch")
# ONNX Runtime takes seconds to prepare each.
RUNS = [
    *((name, CPU) for name in ("vit", "siglip")),
    *((name, TORCH) for name in ("resnet", "bert", "coca")),
    *(pytest.param(name, CPU, marks=pytest.mark.slow) for name in ("resnet", "bert", "coca")),
]
TEXTS = ["a dog runs", "two black dogs are running through the snow", "x", "A DOG  runs", "!", ""]


def save_bert(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "two", "black", "dog", "dogs", "runs", "snow", "x"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    paths = {}
    bert = save_bert(tmp_path_factory.mktemp("bert"))
    for name, (model, preprocess_cfg, _) in MODELS.items():
        paths[name] = folder = tmp_path_factory.mktemp(name)
        config = json.loads(json.dumps(model))
        if name == "bert":
            for file in bert.iterdir():
                shutil.copy(file, folder)
            (folder / "config.json").rename(folder / "text_tower.json")
            (folder / "text_tower").mkdir()
            (folder / "text_tower.json").rename(folder / "text_tower" / "config.json")
            config["text_cfg"]["hf_model_name"] = str(folder / "text_tower")
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": config, "preprocess_cfg": preprocess_cfg})
        )
        net = by_hand(folder, is_trained=False)
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, folder / "model.safetensors")
    return paths


def by_hand(folder: Path, is_trained: bool = True) -> Any:
    net = open_clip.create_model(f"local-dir:{folder}", load_weights=is_trained, pretrained_text=False)
    if not is_trained:
        with torch.no_grad():
            for name, values in net.named_parameters():  # what begins with zeros or ones is no test
                if values.ndim == 1 and name.endswith("weight"):
                    values.add_(torch.randn_like(values) * 0.3)
            images = torch.from_numpy(pixels_of(drawn(PreprocessCfg(**net.visual.preprocess_cfg).input_size[-1], 8)))
            net.train().encode_image(images / 128 - 1)  # for the averages of batch normalisation
    return net.eval()


def drawn(size: int, num: int) -> list[Image.Image]:
    return [photo(seed, size, size) for seed in range(num)]


def pixels_of(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.array(image).transpose(2, 0, 1) for image in images])


@pytest.mark.parametrize(("name", "settings"), RUNS)
def test_images_and_texts_equal_open_clip(name: str, settings: ModelSettings, directories: dict[str, Path]) -> None:
    folder = directories[name]
    net = by_hand(folder)
    transform = image_transform_v2(PreprocessCfg(**net.visual.preprocess_cfg), is_train=False)
    model = load_image_model(f"open_clip:{folder}", settings)
    images = drawn(model.preprocessing.size, 5)
    encoding = model.encode_images(pixels_of(images))
    assert {key for key, value in vars(encoding).items() if value is not None} == MODELS[name][2]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        expected = net.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        expected_texts = net.encode_text(tokenizer(TEXTS), normalize=True)
    np.testing.assert_allclose(encoding.embeddings, expected, atol=1e-4)
    texts = load_text_model(f"open_clip:{folder}", settings)
    np.testing.assert_allclose(texts.encode_texts(TEXTS), expected_texts, atol=1e-4)
    assert np.abs(encoding.embeddings[0] - encoding.embeddings[1]).max() > 1e-3
    assert (expected_texts[0] - expected_texts[1]).abs().max() > 1e-3
    assert texts.encode_texts([]).shape == (0, 16) == model.encode_images(pixels_of(images)[:0]).embeddings.shape


@pytest.mark.parametrize(("name", "settings"), RUNS)
def test_batches_do_not_matter(name: str, settings: ModelSettings, directories: dict[str, Path]) -> None:
    spec = f"open_clip:{directories[name]}"
    model, texts = load_image_model(spec, settings), load_text_model(spec, settings)
    pixels = pixels_of(drawn(model.preprocessing.size, 6))
    together = model.encode_images(pixels)
    alone = [model.encode_images(pixels[i : i + 1]) for i in range(6)]
    for field in MODELS[name][2]:
        values = np.concatenate([getattr(each, field) for each in alone])
        np.testing.assert_allclose(getattr(together, field), values, atol=1e-4 * max(1, np.abs(values).max()))
    assert np.array_equal(together.embeddings, model.encode_images(pixels).embeddings)
    vectors = texts.encode_texts(TEXTS)
    np.testing.assert_allclose(vectors, np.concatenate([texts.encode_texts([text]) for text in TEXTS]), atol=1e-5)


def test_features_and_grid(directories: dict[str, Path]) -> None:
    """Before the projection: the class token, and the patches."""
    backbone: Any = load_image_backbone(f"open_clip:{directories['vit']}")
    visual = by_hand(directories["vit"]).visual
    pixels = torch.from_numpy(pixels_of(drawn(32, 2)))
    normalised = (pixels / 255 - backbone.mean) / backbone.std
    with torch.no_grad():
        outputs = backbone(pixels)
        projection, visual.proj = visual.proj, None
        visual.output_tokens = True
        features, tokens = visual(normalised)
    torch.testing.assert_close(outputs["features"], features)
    torch.testing.assert_close(outputs["grid"], tokens)
    torch.testing.assert_close(outputs["embedding"], torch.nn.functional.normalize(features @ projection, dim=-1))
    assert (backbone.feature_dim, backbone.grid_dim, backbone.embedding_dim) == (32, 32, 16)
    assert outputs["grid"].shape == (2, 16, 32)
    resnet: Any = load_image_backbone(f"open_clip:{directories['resnet']}")
    with torch.no_grad():
        outputs = resnet(pixels)
    torch.testing.assert_close(torch.nn.functional.normalize(outputs["features"], dim=-1), outputs["embedding"])


def test_texts_are_trained_on_by_backbone_and_tokenizer(directories: dict[str, Path]) -> None:
    for name in ("vit", "bert"):
        spec = f"open_clip:{directories[name]}"
        tokens, backbone = load_tokenizer(spec)(TEXTS), load_text_backbone(spec)
        assert tokens["ids"].shape == tokens["mask"].shape and tokens["ids"].shape[1] < 20
        with torch.no_grad():
            vectors = backbone(*map(torch.from_numpy, tokens.values()))
        assert vectors.shape == (len(TEXTS), backbone.text_dim)
        np.testing.assert_allclose(load_text_model(spec, TORCH).encode_texts(TEXTS), vectors, atol=1e-5)


def test_preprocessing(directories: dict[str, Path]) -> None:
    """Photos of any size look as open_clip's transform makes them, but for rounding."""
    for name, expected in (
        ("vit", Preprocessing(32, "cover")),
        ("siglip", Preprocessing(160, "stretch", 1.0, "bilinear")),
    ):
        preprocessing = load_image_model(f"open_clip:{directories[name]}", CPU, frozenset()).preprocessing
        assert preprocessing == expected
        cfg = PreprocessCfg(**by_hand(directories[name]).visual.preprocess_cfg)
        transform = image_transform_v2(cfg, is_train=False)
        image = photo(3, 201, 333)
        pixels = preprocess(torch.from_numpy(np.array(image)).permute(2, 0, 1), preprocessing) / 255
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (cfg.mean, cfg.std))
        assert ((pixels - mean) / std - transform(image)).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("vision", "preprocess_cfg", "message"),
    [
        ({"image_size": [32, 64]}, {}, "its images are 32 x 64, and only squares are supported"),
        ({}, {"resize_mode": "longest"}, "its images are resized by 'longest'; only 'shortest' and 'squash'"),
    ],
)
def test_preprocessing_that_cannot_be_followed(
    vision: dict[str, Any], preprocess_cfg: dict[str, Any], message: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(directories["vit"], tmp_path / "model"))
    config = {**MODELS["vit"][0], "vision_cfg": {**VIT, **vision}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess_cfg}))
    with pytest.raises(ValueError, match=f"cannot load model 'open_clip:{folder}': {message}"):
        describe_model(f"open_clip:{folder}")


# --- specs ----------------------------------------------------------------------------------------


@pytest.fixture
def server(directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that holds the models, as architectures `tiny-NAME` with the tag `drawn`."""
    configs, pretrained = {}, {}
    with FakeHub(tmp_path / "cache", monkeypatch) as running:
        for name, (model, preprocess_cfg, _) in MODELS.items():
            published = Path(shutil.copytree(directories[name], tmp_path / f"published-{name}"))
            (published / "model.safetensors").rename(published / "open_clip_model.safetensors")
            (published / "open_clip_pytorch_model.bin").write_bytes(b"the same once more")
            running.publish(f"someone/{name}-weights", published)
            configs[f"tiny-{name}"] = model
            pretrained[f"tiny-{name}"] = {"drawn": {"url": "", "hf_hub": f"someone/{name}-weights/", **preprocess_cfg}}
        running.publish("someone/bert", save_bert(tmp_path / "bert"))
        monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", configs)
        monkeypatch.setattr("open_clip.pretrained._PRETRAINED", pretrained)
        yield running


@pytest.mark.parametrize("name", ["vit", "siglip", "bert"])
def test_a_tag_is_fetched_and_kept(
    name: str, server: FakeHub, directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tag, local = f"open_clip:tiny-{name}/drawn", f"open_clip:{directories[name]}"
    info = describe_model(tag)
    assert info.spec == tag and info.produces == describe_model(local).produces
    pixels = pixels_of(drawn(load_image_model(tag, CPU, frozenset()).preprocessing.size, 2))
    vectors = load_image_model(tag, TORCH).encode_images(pixels).embeddings
    np.testing.assert_allclose(vectors, load_image_model(local, TORCH).encode_images(pixels).embeddings, atol=1e-6)
    texts = load_text_model(tag, TORCH).encode_texts(TEXTS)
    np.testing.assert_allclose(texts, load_text_model(local, TORCH).encode_texts(TEXTS), atol=1e-6)
    assert not [path for path in server.requests if path.endswith("open_clip_pytorch_model.bin")]
    spec = fetch_model(tag, tmp_path / "fetched")
    assert spec == f"open_clip:{tmp_path / 'fetched'}"
    num_requests = len(server.requests)
    assert describe_model(spec).revision == info.revision == describe_model(tag).revision
    assert fetch_model(tag, tmp_path / "fetched") == spec and len(server.requests) == num_requests
    server.stop()
    server.forget()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    np.testing.assert_allclose(load_text_model(spec, TORCH).encode_texts(TEXTS), texts, atol=1e-6)
    assert np.array_equal(load_image_model(spec, TORCH).encode_images(pixels).embeddings, vectors)
    if name != "bert":  # open_clip asks the network for a text tower's configuration
        by_hand(tmp_path / "fetched")
    with pytest.raises(
        ValueError,
        match=f"no model '{tag}': .* HF_HUB_OFFLINE is set; .*fetch-model {tag} --to DIR`, and name open_clip:DIR",
    ):
        describe_model(tag)


def test_a_broken_fetch_is_no_model(server: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "fetched"
    server.cut = "open_clip_model.safetensors"
    with pytest.raises(ValueError, match="broke off .*; try again, and it goes on with what is missing"):
        fetch_model("open_clip:tiny-vit/drawn", folder)
    with pytest.raises(ValueError, match="there is no open_clip_config.json"):
        describe_model(f"open_clip:{folder}")
    server.cut = None
    assert describe_model(fetch_model("open_clip:tiny-vit/drawn", folder) or "").produces
    with pytest.raises(
        ValueError, match="holds open_clip:tiny-vit/drawn, not open_clip:tiny-siglip/drawn; name another"
    ):
        fetch_model("open_clip:tiny-siglip/drawn", folder)


def test_a_file_of_weights(
    server: FakeHub, directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = by_hand(directories["vit"])
    torch.save({"state_dict": net.state_dict()}, tmp_path / "tiny.pt")
    monkeypatch.chdir(tmp_path)
    for file in ("tiny.pt", f"{tmp_path}/tiny.pt"):
        spec = f"open_clip:tiny-vit/{file}"
        assert describe_model(spec).spec == f"open_clip:tiny-vit/{tmp_path}/tiny.pt"
        expected = load_text_model(f"open_clip:{directories['vit']}", TORCH).encode_texts(TEXTS)
        np.testing.assert_allclose(load_text_model(spec, TORCH).encode_texts(TEXTS), expected, atol=1e-6)
    assert fetch_model(spec, tmp_path / "to") is None and server.requests == []
    with pytest.raises(
        ValueError, match="tiny.pt' cannot be read as those of 'open_clip:tiny-resnet/.*; name the arch"
    ):
        load_image_backbone("open_clip:tiny-resnet/tiny.pt")
    (tmp_path / "tiny.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="tiny.pt' cannot be read as those of"):
        load_image_backbone("open_clip:tiny-vit/tiny.pt")


def test_pickles_are_not_run(server: FakeHub, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path / "exploded").write_text, ("",)

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="bomb.pt' cannot be read"):
        load_image_backbone(f"open_clip:tiny-vit/{tmp_path / 'bomb.pt'}")
    assert not (tmp_path / "exploded").exists()


def test_weights_of_quick_gelu_run_with_it(server: FakeHub, directories: dict[str, Path]) -> None:
    plain = describe_model("open_clip:tiny-vit/drawn").revision
    open_clip.pretrained._PRETRAINED["tiny-vit"]["drawn"]["quick_gelu"] = True
    assert describe_model("open_clip:tiny-vit/drawn").revision != plain
    net = open_clip.create_model(f"local-dir:{directories['vit']}", force_quick_gelu=True).eval()
    with torch.no_grad():
        expected = net.encode_text(open_clip.get_tokenizer("tiny-vit")(TEXTS), normalize=True)
    np.testing.assert_allclose(
        load_text_model("open_clip:tiny-vit/drawn", TORCH).encode_texts(TEXTS), expected, atol=1e-4
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "",
            "unknown model 'open_clip:': '' is neither a directory nor an architecture of open_clip; those are tiny-vit",
        ),
        ("ViT-Z/openai", "unknown model 'open_clip:ViT-Z/openai': 'ViT-Z' is neither"),
        ("/no/such", "unknown model 'open_clip:/no/such': '' is neither"),
        ("tiny-vit", "no weights '' for tiny-vit in 'open_clip:tiny-vit'; use drawn, or the path of a file"),
        ("tiny-vit/laion", "no weights 'laion' for tiny-vit in 'open_clip:tiny-vit/laion'; use drawn, or the path"),
        ("tiny-vit//no/file.pt", "no weights '/no/file.pt' for tiny-vit"),
    ],
)
def test_unknown_specs(wrong: str, message: str, server: FakeHub) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        describe_model(f"open_clip:{wrong}")
    assert server.requests == []


def test_directories_that_are_not_whole(directories: dict[str, Path], tmp_path: Path) -> None:
    spec = f"open_clip:{tmp_path}"
    with pytest.raises(ValueError, match="there is no open_clip_config.json"):
        describe_model(spec)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="open_clip_config.json has no model_cfg"):
        describe_model(spec)
    shutil.copy(directories["bert"] / "open_clip_config.json", tmp_path)
    with pytest.raises(ValueError, match="has no weights; put open_clip_model.safetensors there"):
        describe_model(spec)
    shutil.copy(directories["bert"] / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer; save its tokenizer.json there"):
        load_text_model(spec)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "vlm_ops.models.open_clip_family")
    with pytest.raises(ValueError, match="it needs open_clip_torch; pip install 'beamsight\\[open_clip\\]'"):
        describe_model("open_clip:ViT-B-32/openai")
