"""`beamsight train dual-encoder` on coloured pictures, and `dir:` as a model everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipelines.cli import main
from tests.conftest import encode, tar_bytes
from vlm_ops.models import describe_model, load_image_model, load_text_model

TOY = "python:tests.toys"
# Words that the toy text model does not know: it can only learn them.
WORDS = {"crimson": (230, 20, 30), "lime": (60, 240, 40), "navy": (20, 30, 180), "lemon": (240, 230, 40)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("val", 12)):
        members = []
        for number in range(count):
            word, color = list(WORDS.items())[number % 4]
            shade = tuple(int(v) for v in np.clip(np.array(color) + rng.integers(-20, 20, 3), 0, 255))
            members.append((f"{number:03}.png", encode(Image.new("RGB", (16, 16), shade), "PNG")))
            members.append((f"{number:03}.json", json.dumps({"caption": f"{word} thing", "label": word}).encode()))
        (folder / f"{name}.tar").write_bytes(tar_bytes(members))
    return folder


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("model") / "colors"
    flags = ["--epochs", "200", "--images_per_step", "20", "--learning_rate", "0.01", "--dropout", "0"]
    assert train(corpus, output, *flags) == 0
    return output


def train(corpus: Path, output: Path, *flags: str) -> int:
    inputs = ["--input", str(corpus / "train.tar"), "--validation", str(corpus / "val.tar")]
    return main(["train", "dual-encoder", *inputs, "--model", TOY, "--output", str(output), *flags])


def test_the_model_directory_is_whole(model: Path) -> None:
    assert {path.name for path in model.iterdir()} == {"README.md", "config.json", "curves.svg", "model.safetensors"}
    card = (model / "README.md").read_text()
    assert "40 images with 40 captions from `train.tar`" in card and "| text→image R@10 |" in card
    assert ElementTree.fromstring((model / "curves.svg").read_text()).tag.endswith("svg")
    assert json.loads((model / "config.json").read_text())["base"] == TOY


def test_it_has_learnt_words_that_the_base_does_not_know(
    corpus: Path, model: Path, capsys: pytest.CaptureFixture
) -> None:
    top = {}
    for spec in (TOY, f"dir:{model}"):
        assert (
            main(
                [
                    "evaluate",
                    "zero-shot",
                    "--input",
                    str(corpus / "val.tar"),
                    "--model",
                    spec,
                    "--template",
                    "{} thing",
                    "--json",
                ]
            )
            == 0
        )
        top[spec] = json.loads(capsys.readouterr().out)["figures"]["top-1"]["value"]
    assert top[f"dir:{model}"] == 1.0 > top[TOY]


def test_it_builds_and_searches_a_catalog(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    catalog = str(tmp_path / "catalog")
    assert main(["build", "--input", str(corpus / "val.tar"), "--catalog", catalog, "--model", f"dir:{model}"]) == 0
    capsys.readouterr()
    assert main(["search", catalog, "navy thing", "--json", "-k", "3"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [int(row["key"]) % 4 for row in results] == [2, 2, 2]
    assert main(["search", catalog, "x", "--model", TOY]) == 2


def test_heads_equal_torch(model: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from vlm_ops.models.heads import HeadsConfig, ImageHead, TextHead

    shapes = HeadsConfig(**json.loads((model / "config.json").read_text())["heads"])
    weights = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    image_head, text_head = ImageHead(shapes).eval(), TextHead(shapes).eval()
    image_head.load_state_dict({k.removeprefix("image."): v for k, v in weights.items() if k.startswith("image.")})
    text_head.load_state_dict({k.removeprefix("text."): v for k, v in weights.items() if k.startswith("text.")})
    pixels = np.random.default_rng(0).integers(0, 255, (5, 3, 8, 8), dtype=np.uint8)
    base = load_image_model(TOY, "cpu").encode_images(pixels)
    texts = torch.from_numpy(load_text_model(TOY, "cpu").encode_texts(["lime thing", "else"]))
    with torch.no_grad():
        expected = image_head(torch.from_numpy(base.features), torch.from_numpy(base.embeddings))
        expected_texts = text_head(texts)
    spec = f"dir:{model}"
    found = load_image_model(spec, "cpu").encode_images(pixels)
    np.testing.assert_allclose(found.embeddings, expected, atol=1e-5)
    np.testing.assert_array_equal(found.features, base.features)
    np.testing.assert_allclose(
        load_text_model(spec, "cpu").encode_texts(["lime thing", "else"]), expected_texts, atol=1e-5
    )
    assert load_image_model(spec, "cpu").encode_images(pixels[:0]).embeddings.shape == (0, 3)


def test_what_is_no_model_says_so(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no model in '.*nothing': there is no config.json; `beamsight train` writes one"
    ):
        describe_model(f"dir:{tmp_path}/nothing")
    for name, change, message in (
        ("kind", {"kind": "poet"}, "is a 'poet', which this version cannot load"),
        ("base", {"base_revision": "0"}, "was trained on python:tests.toys@0, but python:tests.toys@1 is installed"),
        ("half", {}, "is not whole: there is no model.safetensors"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | change))
        if name != "half":
            (folder / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
        with pytest.raises(ValueError, match=message):
            describe_model(f"dir:{folder}")


def test_the_output_is_a_local_directory(corpus: Path, capsys: pytest.CaptureFixture) -> None:
    assert train(corpus, "s3://bucket/model") == 2  # type: ignore[arg-type]
    assert "--output must be a local directory, got 's3://bucket/model'" in capsys.readouterr().err


def test_without_captions(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train(corpus, tmp_path / "m", "--caption_field", "nothing") == 2
    assert "has a caption; name their field with --caption_field" in capsys.readouterr().err
