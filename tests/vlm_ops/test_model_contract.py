"""What every model keeps to, of whatever family: one contract, over a tiny model of each."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torchvision.models import get_model, get_model_weights

from tests.conftest import photo
from tests.vlm_ops.tiny_captioners import FAMILIES as CAPTIONERS
from tests.vlm_ops.tiny_models import DUAL_ENCODERS, IMAGE_MODELS, TEXTS, arrays, close, make_model
from vlm_ops.images import decode, preprocess
from vlm_ops.models import (
    ImageModel,
    TextModel,
    describe_model,
    load_image_backbone,
    load_image_model,
    load_text_backbone,
    load_text_model,
    load_tokenizer,
)
from vlm_ops.models.backbones import FIELDS
from vlm_ops.models.compact import _weights
from vlm_ops.models.settings import CPU, ModelSettings

pytestmark = pytest.mark.usefixtures("_usual_models")

# Families whose models are there already, and those of which one is made.
_HERE = {"compact": "compact", "compact:conse": "compact:conse", "python": "python:tests.toys"}
_TRAINED = {"dir": "compact:aligned"}
TOWERS = (*_HERE, *_TRAINED, "torchvision", "open_clip", *IMAGE_MODELS, *DUAL_ENCODERS)
IMAGES = (*TOWERS, *CAPTIONERS)
SPACES = (*_HERE, *_TRAINED, "open_clip", *DUAL_ENCODERS)
TEXT_SIDES = (*SPACES, "bert")
# Odd sizes, upright, lying, square and small; none is decoded at a reduced scale.
PHOTOS = [photo(0, 97, 61), photo(1, 61, 150), photo(2, 45, 45), photo(3, 29, 33), photo(4, 130, 129)]


@pytest.fixture(scope="module")
def _usual_models(user_cache: Path, own_cache: Path) -> None:
    """What is exported of models of the package is not exported again."""
    for file in user_cache.glob("*.*"):
        (own_cache / file.name).symlink_to(file)


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("models")

    def spec_of(name: str) -> str:
        if name in _HERE:
            return _HERE[name]
        if name in _TRAINED:
            shutil.copytree(_weights(_TRAINED[name]), folder / name, dirs_exist_ok=True)
            return f"dir:{folder / name}"
        return make_model(name, folder / name)

    made: dict[str, str] = {}
    return lambda name: made.setdefault(name, "") or made.update({name: spec_of(name)}) or made[name]


@pytest.fixture(scope="module", params=IMAGES)
def spec(request: pytest.FixtureRequest, spec_of: Callable[[str], str]) -> str:
    return spec_of(request.param)


@pytest.fixture(scope="module")
def model(spec: str) -> ImageModel:
    return load_image_model(spec, CPU)


@pytest.fixture(scope="module", params=TEXT_SIDES)
def text_spec(request: pytest.FixtureRequest, spec_of: Callable[[str], str]) -> str:
    return spec_of(request.param)


@pytest.fixture(scope="module")
def texts(text_spec: str) -> TextModel:
    return load_text_model(text_spec, CPU)


def pixels_for(model: ImageModel, images: Sequence[Image.Image] = PHOTOS) -> Any:
    """As the pipeline makes them, of encoded images."""
    form, rows = model.preprocessing, []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        rows.append(preprocess(decode(file.getvalue(), shorter_side=form.shorter_side).pixels, form).numpy())
    return rows if form.fit == "contain" else np.stack(rows)


def given(model: ImageModel, images: Sequence[Image.Image] = PHOTOS) -> dict[str, np.ndarray]:
    """The arrays of an encoding."""
    return {name: array for name, array in arrays(model.encode_images(pixels_for(model, images))).items()
            if isinstance(array, np.ndarray)}  # fmt: skip


# --- images ---------------------------------------------------------------------------------------


def test_what_is_said_is_given(spec: str, model: ImageModel) -> None:
    assert model.info == describe_model(spec)
    encoding = model.encode_images(pixels_for(model))
    fields = {**FIELDS, "caption": "captions"}
    expected = {fields[name] for name in model.info.produces if name != "match"}
    assert {name for name in fields.values() if getattr(encoding, name) is not None} == expected
    for name, array in given(model).items():
        assert array.dtype == np.float32 and len(array) == len(PHOTOS) and np.isfinite(array).all(), name
    if encoding.probabilities is not None:
        assert encoding.probabilities.shape[1] == len(model.label_names)
        np.testing.assert_allclose(encoding.probabilities.sum(axis=1), 1, atol=1e-5)
    if encoding.embeddings is not None:
        np.testing.assert_allclose(np.linalg.norm(encoding.embeddings, axis=1), 1, atol=1e-5)


def test_same_batch_gives_the_same_bits_from_any_thread(model: ImageModel) -> None:
    pixels = pixels_for(model)
    expected = vars(model.encode_images(pixels))
    results: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: results.append(vars(model.encode_images(pixels)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for each in results:
        assert each["captions"] == expected["captions"]
        assert all(
            np.array_equal(each[name], array) for name, array in expected.items() if isinstance(array, np.ndarray)
        )


def test_one_by_one_gives_the_same_in_the_same_order(model: ImageModel) -> None:
    together = model.encode_images(pixels_for(model))
    alone = [model.encode_images(pixels_for(model, [image])) for image in PHOTOS]
    for name, array in given(model).items():
        close(array, np.concatenate([getattr(each, name) for each in alone]))
        assert np.abs(array[0] - array[1]).max() > 1e-3, f"{name} tells no images apart"
    for caption, other in zip(together.captions or (), alone, strict=bool(together.captions)):
        assert caption.text == other.captions[0].text  # type: ignore[index]
        assert caption.score == pytest.approx(other.captions[0].score, abs=1e-3)  # type: ignore[index]
    assert together.captions is None or len({each.text for each in together.captions}) > 1, "all captions are one"


def test_empty_batch(model: ImageModel) -> None:
    size = model.preprocessing.size
    nothing: Any = [] if model.preprocessing.fit == "contain" else np.empty((0, 3, size, size), np.uint8)
    encoding = model.encode_images(nothing)
    shapes = {name: (0, *array.shape[1:]) for name, array in given(model).items()}
    assert {name: array.shape for name, array in vars(encoding).items() if isinstance(array, np.ndarray)} == shapes
    assert not encoding.captions


def test_only_what_is_asked_for_is_given(spec: str) -> None:
    for name in describe_model(spec).produces - {"match", "caption"}:
        model = load_image_model(spec, CPU, frozenset({name}))
        names = list(given(model))
        assert names == [FIELDS[name]] or (spec.startswith("python:") and FIELDS[name] in names)


def test_a_copy_gives_the_same(spec: str, model: ImageModel, tmp_path: Path) -> None:
    """Saved elsewhere, named by another spec, loaded anew: the same revision, the same vectors."""
    family, _, argument = spec.partition(":")
    path = Path(argument.removeprefix("resnet18:"))
    if not path.is_absolute():
        pytest.skip("a model of the package")
    copy = tmp_path / path.name
    shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
    again = load_image_model(f"{family}:{argument.replace(str(path), str(copy))}", CPU)
    assert again.info.revision == model.info.revision and again.info.spec != model.info.spec
    for name, array in given(model).items():
        np.testing.assert_allclose(given(again)[name], array, atol=1e-6)
    assert again.encode_images(pixels_for(model)).captions == model.encode_images(pixels_for(model)).captions


def test_the_engine_equals_the_backbone(spec: str, model: ImageModel) -> None:
    if not model.info.produces - {"caption"} or model.preprocessing.fit == "contain":
        pytest.skip("no backbone")
    backbone = load_image_backbone(spec)
    assert backbone.preprocessing == model.preprocessing
    with torch.no_grad():
        expected = backbone(torch.from_numpy(pixels_for(model)))
    found = given(model)
    for name, values in expected.items():
        close(found[FIELDS[name]], values)
    dims = {"features": backbone.feature_dim, "grid": backbone.grid_dim, "embeddings": backbone.embedding_dim}
    assert {name: array.shape[-1] for name, array in found.items() if name in dims} == {
        name: dim for name, dim in dims.items() if name in found
    }


def test_backbone_can_be_trained(spec: str, model: ImageModel) -> None:
    if not model.info.produces - {"caption"}:
        pytest.skip("a captioner, which is no backbone")
    if model.preprocessing.fit == "contain":
        with pytest.raises(ValueError, match="makes patches of images of many sizes"):
            load_image_backbone(spec)
        return
    backbone: Any = load_image_backbone(spec)
    if not hasattr(backbone, "parameters") or not any(True for _ in backbone.parameters()):
        pytest.skip("without weights")
    assert not backbone.training
    size = backbone.preprocessing.size
    noise = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    backbone(noise)["features"].square().sum().backward()
    assert any(each.grad is not None and each.grad.abs().max() > 0 for each in backbone.parameters())


@pytest.mark.gpu
def test_cuda_equals_the_cpu(spec: str, model: ImageModel) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cuda = given(load_image_model(spec, ModelSettings(device="cuda", dtype="float32")))
    for name, array in given(model).items():
        np.testing.assert_allclose(cuda[name], array, atol=1e-2 * max(1.0, float(np.abs(array).max())))


# --- texts ----------------------------------------------------------------------------------------


def test_text_contract(text_spec: str, texts: TextModel) -> None:
    assert texts.info == describe_model(text_spec) and texts.info.encodes_text
    vectors = texts.encode_texts(TEXTS)
    assert vectors.shape[0] == len(TEXTS) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(vectors, texts.encode_texts(TEXTS))
    np.testing.assert_allclose(vectors[1], vectors[-1], atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    close(vectors, np.concatenate([texts.encode_texts([text]) for text in TEXTS]))
    assert texts.encode_texts([]).shape == (0, vectors.shape[1])


def test_text_engine_equals_the_backbone(text_spec: str, texts: TextModel) -> None:
    tokens = load_tokenizer(text_spec)(TEXTS)
    assert tokens["ids"].shape == tokens["mask"].shape and tokens["ids"].dtype == tokens["mask"].dtype == np.int64
    backbone = load_text_backbone(text_spec)
    with torch.no_grad():
        expected = backbone(torch.from_numpy(tokens["ids"]), torch.from_numpy(tokens["mask"]))
    assert expected.shape == (len(TEXTS), backbone.text_dim)
    close(texts.encode_texts(TEXTS), expected)


def test_threads_share_a_text_model(texts: TextModel) -> None:
    expected = texts.encode_texts(TEXTS)
    results: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: results.append(texts.encode_texts(TEXTS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(np.array_equal(each, expected) for each in results)


@pytest.mark.parametrize("name", SPACES)
def test_texts_and_images_share_a_space(name: str, spec_of: Callable[[str], str]) -> None:
    spec = spec_of(name)
    images = load_image_model(spec, CPU, frozenset({"embedding"})).encode_images
    vectors = load_text_model(spec, CPU).encode_texts(["a dog"])
    size = load_image_model(spec, CPU, frozenset()).preprocessing.size
    assert (
        images(
            [np.zeros((3, size, size), np.uint8)] if name == "siglip2" else np.zeros((1, 3, size, size), np.uint8)
        ).embeddings.shape
        == vectors.shape
    )  # type: ignore[union-attr]


# --- the family's own pipeline, called by hand ----------------------------------------------------


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_backbones_equal_transformers(name: str, spec_of: Callable[[str], str]) -> None:
    path = spec_of(name).removeprefix("hf:")
    inputs = transformers.AutoImageProcessor.from_pretrained(path)(PHOTOS, return_tensors="pt")
    with torch.no_grad():
        output = transformers.AutoModel.from_pretrained(path).eval()(**inputs)
    hidden, found = output.last_hidden_state, given(load_image_model(f"hf:{path}", CPU))
    close(found["features"], output.pooler_output.flatten(1))
    close(found["grid"], hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, 1:])


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_dual_encoders_equal_transformers(name: str, spec_of: Callable[[str], str]) -> None:
    path, length = spec_of(name).removeprefix("hf:"), DUAL_ENCODERS[name][2]
    net = transformers.AutoModel.from_pretrained(path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    padding: dict[str, Any] = {"padding": "max_length", "max_length": length} if length else {"padding": True}
    tokens = tokenizer(TEXTS, truncation=True, return_tensors="pt", **padding)
    tokens = {key: values for key, values in tokens.items() if key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        images = net.get_image_features(**processor(PHOTOS, return_tensors="pt")).pooler_output
        texts = net.get_text_features(**tokens).pooler_output
    found = given(load_image_model(f"hf:{path}", CPU))
    close(found["features"], images)
    np.testing.assert_allclose(found["embeddings"], torch.nn.functional.normalize(images, dim=1), atol=1e-4)
    vectors = load_text_model(f"hf:{path}", CPU).encode_texts(TEXTS)
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(texts, dim=1), atol=1e-4)


def test_torchvision_equals_its_transforms(spec_of: Callable[[str], str]) -> None:
    spec = spec_of("torchvision")
    transforms = get_model_weights("resnet18")["DEFAULT"].transforms()
    net = get_model("resnet18", weights=None).eval()
    net.load_state_dict(torch.load(spec.removeprefix("torchvision:resnet18:"), weights_only=True))
    inputs = [transforms(torch.from_numpy(np.array(image)).permute(2, 0, 1)) for image in PHOTOS]
    with torch.no_grad():
        expected = net(torch.stack(inputs)).softmax(1)
    np.testing.assert_allclose(given(load_image_model(spec, CPU))["probabilities"], expected, atol=1e-4)
