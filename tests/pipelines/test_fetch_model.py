"""`beamsight fetch-model`, with a hub and a web server that the tests make."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torchvision.models import get_model, get_model_weights

from pipelines.cli import main
from tests.hubs import FakeHub, save_tiny
from vlm_ops.models import describe_model, load_image_backbone


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(tmp_path / "cache", monkeypatch) as running:
        yield running


def spec_told(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("use it as")).split()[-1]


def test_a_repository(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = save_tiny(tmp_path / "tiny")
    server.publish("someone/tiny", tiny)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["fetch-model", "hf:someone/tiny", "--to", "here"]) == 0
        assert spec_told(capsys.readouterr().out) == f"hf:{tmp_path / 'here'}"
    server.stop()
    assert describe_model("hf:here").revision == describe_model(f"hf:{tiny}").revision
    assert main(["fetch-model", "hf:someone/tiny", "--to", "there"]) == 2
    assert "cannot be reached; fetch it on a machine with network" in capsys.readouterr().err
    assert not Path("there").exists()


def test_a_language_model(server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One for `tag --text_model`, which is no model of images."""
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt" / "chat_template.jinja").write_text("{{ messages }}")
    server.publish("someone/gpt", tmp_path / "gpt")
    assert main(["fetch-model", "hf:someone/gpt", "--to", str(tmp_path / "here")]) == 0
    assert spec_told(capsys.readouterr().out) == f"hf:{tmp_path / 'here'}"
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "chat_template.jinja",
        "fetched.json",
    }


def test_torchvision_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = get_model_weights("mobilenet_v3_small")["DEFAULT"]
    net = get_model("mobilenet_v3_small", weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "weights")
    content = (tmp_path / "weights").read_bytes()
    name = f"mobilenet_v3_small-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "weights").rename(tmp_path / name)
    monkeypatch.setattr(weights.value, "url", (tmp_path / name).as_uri())
    command = ["fetch-model", "torchvision:mobilenet_v3_small", "--to", str(tmp_path / "here")]
    assert main(command) == 0
    spec = spec_told(capsys.readouterr().out)
    assert spec == f"torchvision:mobilenet_v3_small:{tmp_path / 'here' / name}"
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224), np.uint8)
    transforms = weights.transforms()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (transforms.mean, transforms.std))
    with torch.no_grad():
        expected = net((torch.from_numpy(pixels) / 255 - mean) / std).softmax(1)
        torch.testing.assert_close(load_image_backbone(spec)(torch.from_numpy(pixels))["labels"], expected)
    # A file that is not whole is fetched again; one that is, is not.
    (tmp_path / "here" / name).write_bytes(content[:100])
    assert main(command) == 0 and (tmp_path / "here" / name).read_bytes() == content
    (tmp_path / name).write_bytes(content[:-1])
    assert main(command) == 0
    (tmp_path / "here" / name).unlink()
    capsys.readouterr()
    assert main(command) == 2
    assert "cannot fetch the weights IMAGENET1K_V1 of mobilenet_v3_small from file" in capsys.readouterr().err
    assert list((tmp_path / "here").iterdir()) == []


def test_models_that_are_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for spec in ("compact", "python:tests.toys", f"hf:{save_tiny(tmp_path / 'tiny')}"):
        assert main(["fetch-model", spec, "--to", str(tmp_path / "to")]) == 0
        assert capsys.readouterr().out == f"nothing to fetch: {spec} is on this machine\n"
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet50", "--to", "x"], "unknown model 'resnet50'; known models: "),
        (["torchvision:resnet17", "--to", "x"], "unknown model 'torchvision:resnet17'; torchvision has"),
        (["dir:/no/such", "--to", "x"], "no model in '/no/such'"),
        (["hf:someone/tiny", "--to", "s3://bucket/x"], "argument --to: must be a directory of this machine"),
        (["hf:someone/tiny"], "the following arguments are required: --to"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["fetch-model", *arguments])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    assert code == 2 and message in capsys.readouterr().err
