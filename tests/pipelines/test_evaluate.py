"""`beamsight evaluate` on coloured pictures, where it is known what a good model finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from pipelines.cli import main
from tests.conftest import encode, tar_bytes

TOY = "python:tests.toys"
COLORS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250)}


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(tmp_path / "cache"))
    members = []
    for name, color in COLORS.items():
        beside = {"captions": [f"{name}", f"a {name} picture"], "label": name.title(), "odd": {"nested": 1}}
        members += [(f"{name}.png", encode(Image.new("RGB", (20, 20), color), "PNG"))]
        members += [(f"{name}.json", json.dumps(beside).encode())]
    members += [("plain.png", encode(Image.new("RGB", (20, 20), (90, 90, 90)), "PNG")), ("bad.png", b"no image")]
    (tmp_path / "colors.tar").write_bytes(tar_bytes(members))
    return tmp_path / "colors.tar"


def evaluate(task: str, shard: Path, *flags: str) -> int:
    return main(["evaluate", task, "--input", str(shard), "--model", TOY, *flags])


def test_retrieval(shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate("retrieval", shard, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"images": 3, "captions": 6, "images without captions": 1}
    assert found["model"] == f"{TOY}@1" and found["inputs"] == [str(shard)]
    for direction in ("text->image", "image->text"):
        assert found["figures"][f"{direction} R@1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert found["figures"][f"{direction} median rank"]["value"] == 1


def test_zero_shot(shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate("zero-shot", shard, "--json", "--template", "something {}", "--template", "{}") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"images": 3, "labels": 3}
    assert found["figures"] == {"top-1": {"value": 1.0, "low": 1.0, "high": 1.0}}


def test_wrong_labels_count_as_wrong(tmp_path: Path, capsys: pytest.CaptureFixture, shard: Path) -> None:
    members = []
    for number, (name, color) in enumerate([*COLORS.items(), ("red", COLORS["blue"])]):
        members += [(f"{number}.png", encode(Image.new("RGB", (20, 20), color), "PNG"))]
        members += [(f"{number}.json", json.dumps({"label": name}).encode())]
    (tmp_path / "one_wrong.tar").write_bytes(tar_bytes(members))
    assert evaluate("zero-shot", tmp_path / "one_wrong.tar", "--json") == 0
    top = json.loads(capsys.readouterr().out)["figures"]["top-1"]
    assert top["value"] == 0.75 and top["low"] < 0.75 < top["high"]


def test_table_and_page(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate("retrieval", shard, "--html", str(tmp_path / "page.html")) == 0
    table = capsys.readouterr().out
    assert "retrieval of" in table and "text->image R@10" in table and "95 % of resamples in [1.000, 1.000]" in table
    page = (tmp_path / "page.html").read_text()
    assert "rank 1: a blue picture" in page and page.count("data:image/jpeg") == 6  # three images, best and worst


def test_a_second_evaluation_computes_nothing(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate("zero-shot", shard) == 0
    monkeypatch.setattr("vlm_ops.enrich.decode_batch", lambda *_: pytest.fail("it decoded again"))
    assert evaluate("retrieval", shard) == 0


def test_captions_of_another_field_are_read_anew(shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert (
        evaluate("retrieval", shard, "--json")
        == evaluate("retrieval", shard, "--json", "--caption_field", "label")
        == 0
    )
    first, second = (json.loads(line)["counts"]["captions"] for line in capsys.readouterr().out.splitlines())
    assert (first, second) == (6, 3)


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("retrieval", ("--caption_field", "nothing"), "has a caption; name their field with --caption_field"),
        ("zero-shot", ("--label_field", "kind"), "has metadata 'kind'; name it with --label_field"),
        ("zero-shot", ("--model", "nothing"), "unknown model 'nothing'"),
    ],
)
def test_mistakes(task: str, flags: tuple[str, ...], message: str, shard: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate(task, shard, *flags) == 2
    assert message in capsys.readouterr().err


def test_a_template_without_a_place_for_the_label(shard: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        evaluate("zero-shot", shard, "--template", "a photo")
    assert "argument --template: {} must stand for the label, got 'a photo'" in capsys.readouterr().err
