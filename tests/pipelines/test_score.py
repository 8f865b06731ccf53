"""`beamsight score` by a model that knows three colours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import matching
from pipelines.cli import main
from tests.conftest import encode, tar_bytes
from vlm_ops.models import ImageEncoding
from vlm_ops.models.settings import CPU

MODEL = ("--model", "python:tests.toys")
COLORS = {"red": (250, 10, 10), "green": (10, 250, 10)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`red.png`, `green.png`, and a tar of both with captions and of one without."""
    monkeypatch.setenv("BEAMSIGHT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "inputs"
    folder.mkdir()
    members = []
    for name, color in COLORS.items():
        data = encode(Image.new("RGB", (20, 20), color), "PNG")
        (folder / f"{name}.png").write_bytes(data)
        captions = {"captions": ["etwas Rotes: röd", "a red picture"]}
        members += [(f"{name}.png", data), (f"{name}.json", json.dumps(captions).encode())]
    members += [("plain.png", encode(Image.new("RGB", (20, 20), (90, 90, 90)), "PNG"))]
    (folder / "colors.tar").write_bytes(tar_bytes(members))
    return folder


def scores(text: str) -> list[tuple[str, str, float]]:
    return [tuple(json.loads(line).values()) for line in text.splitlines()]  # type: ignore[misc]


def test_every_image_with_every_text(folder: Path, capsys: pytest.CaptureFixture) -> None:
    red, green = str(folder / "red.png"), str(folder / "green.png")
    flags = ("--image", red, "--image", green, "--text", "a red picture", "--text", "green")
    assert main(["score", *flags, *MODEL, "--json"]) == 0
    out = capsys.readouterr().out
    assert list(json.loads(out.splitlines()[0])) == ["uri", "caption", "probability"]
    assert scores(out) == [
        (red, "a red picture", 1), (red, "green", 0), (green, "a red picture", 0), (green, "green", 1),
    ]  # fmt: skip
    assert main(["score", *flags, *MODEL]) == 0
    assert capsys.readouterr().out.splitlines() == [
        red, "   1.000  a red picture", "   0.000  green", green, "   0.000  a red picture", "   1.000  green",
    ]  # fmt: skip


def test_images_with_their_own_captions(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tar = folder / "colors.tar"
    assert main(["score", "--input", str(tar), *MODEL]) == 0
    captured = capsys.readouterr()
    expected = [
        (f"{tar}#red.png", "etwas Rotes: röd", 0), (f"{tar}#red.png", "a red picture", 1),
        (f"{tar}#green.png", "etwas Rotes: röd", 0), (f"{tar}#green.png", "a red picture", 0),
    ]  # fmt: skip
    assert scores(captured.out) == expected and "röd" in captured.out
    output = folder.parent / "new" / "scores.jsonl"
    assert main(["score", "--input", str(tar), *MODEL, "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and f"scores     {output} (4 pairs)" in captured.err
    assert scores(output.read_text(encoding="utf-8")) == expected


def test_images_without_captions_are_left_out_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "pipelines"):
        assert main(["score", "--input", str(folder / "colors.tar"), *MODEL]) == 0
    assert "1 images have no caption and are left out" in caplog.text


def test_a_second_run_computes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["score", "--input", str(folder / "colors.tar"), *MODEL]) == 0
    monkeypatch.setattr("vlm_ops.enrich.decode_batch", lambda *_: pytest.fail("it decoded again"))
    assert main(["score", "--input", str(folder / "colors.tar"), *MODEL]) == 0


def test_output_on_another_filesystem(folder: Path) -> None:
    import fsspec

    output = "memory://score-test/scores.jsonl"
    image = ("--image", str(folder / "red.png"), "--text", "red")
    assert main(["score", *image, *MODEL, "--output", output]) == 0
    assert scores(fsspec.filesystem("memory").cat_file(output).decode()) == [(str(folder / "red.png"), "red", 1)]


def test_pairs_are_matched_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks by several threads give what one call gives."""
    model = matching.load_matching_model("python:tests.toys", CPU)
    rng = np.random.default_rng(0)
    encoding = ImageEncoding(features=rng.random((5, 3), np.float32))
    rows, texts = rng.integers(0, 5, 100), [["red", "green", "blue"][i] for i in rng.integers(0, 3, 100)]
    expected = model.match(encoding, rows.tolist(), texts)
    monkeypatch.setattr(matching, "_PAIRS_PER_CALL", 7)
    np.testing.assert_array_equal(matching.match_pairs(model, encoding, rows, texts, 3), expected)
    assert matching.match_pairs(model, encoding, [], [], 1).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "/no/image.jpg", "--text", "x"), "cannot score image '/no/image.jpg': no such file"),
        (("--image", "TAR", "--text", "x"), "inputs/colors.tar': not a JPEG"),
        (("--image", "PNG", "--text", "x", "--max_image_pixels", "9"), "20x20 pixels; the limit is 9 (--max_image_pixels)"),
        (("--image", "PNG", "--text", "x", "--model", "compact:conse"),
         "model 'compact:conse' does not say whether a text describes an image; it produces: embedding, features, grid, "
         "labels; name one that matches, such as 'compact'"),
        (("--input", "TAR", "--model", "compact:conse"), "does not say whether a text describes an image"),
        (("--input", "TAR", "--caption_field", "nothing"), "has a caption; name their field with --caption_field"),
        (("--input", "/no/images"), "/no/images"),
        (("--input", "TAR", "--output", "FOLDER"), "is a directory; name a file"),
        (("--input", "TAR", "--output", "TAR/x/scores.jsonl"), "cannot be made"),
    ],
)  # fmt: skip
def test_mistakes(arguments: tuple[str, ...], message: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    names = {"TAR": folder / "colors.tar", "PNG": folder / "red.png", "FOLDER": folder,
             "TAR/x/scores.jsonl": folder / "colors.tar" / "x" / "scores.jsonl"}  # fmt: skip
    assert main(["score", *MODEL, *(str(names.get(each, each)) for each in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to score: give --image FILE and --text TEXT, or --input PATTERN"),
        (("--image", "a.jpg"), "nothing to score"),
        (("--text", "a"), "nothing to score"),
        (
            ("--input", "a", "--text", "a"),
            "--input scores images with their own captions; leave out --image and --text",
        ),
        (("--image", "a.jpg", "--text", " "), "a text is empty; give one that could describe an image"),
    ],
)
def test_wrong_flags(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["score", *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
