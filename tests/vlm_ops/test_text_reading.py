"""The op `ocr`: drawn texts are read where they stand, and nothing else is."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.banners import banners, word_accuracy
from tests.conftest import encode, jpeg
from tests.vlm_ops.test_ops import batch_of
from vlm_ops.ops import load_ops, plan_ops

pytest.importorskip("rapidocr", reason="needs rapidocr; pip install 'beamsight[tagging]'")
from vlm_ops.text_reading import TextLine, text_share


@pytest.fixture(scope="module")
def op():
    return load_ops(plan_ops(["ocr"], "compact"))[0]


def drawn(*texts: tuple[str, tuple[int, int]], size: tuple[int, int] = (600, 300), height: int = 40) -> Image.Image:
    picture = Image.new("RGB", size, (245, 240, 230))
    for text, place in texts:
        ImageDraw.Draw(picture).text(place, text, font=ImageFont.load_default(height), fill=(20, 30, 60))
    return picture


def read(op, *pictures: Image.Image) -> dict[str, list]:
    columns = op(batch_of([encode(picture, "PNG") for picture in pictures], [op]))
    return {name: array.to_pylist() for name, array in columns.items()}


def test_a_text_is_read_where_it_stands(op) -> None:
    font = ImageFont.load_default(40)
    (left, top, right, bottom) = font.getbbox("Summer sale")
    columns = read(op, drawn(("Summer sale", (150, 120))))
    ((line,),) = columns["texts"]
    assert line["text"] == "Summer sale" and line["score"] > 0.9
    expected = {"left": (150 + left) / 600, "top": (120 + top) / 300, "right": (150 + right) / 600}
    expected["bottom"] = (120 + bottom) / 300
    assert line["box"] == pytest.approx(expected, abs=0.04)
    box_area = (expected["right"] - expected["left"]) * (expected["bottom"] - expected["top"])
    assert columns["text_share"][0] == pytest.approx(box_area, rel=0.8)


def test_lines_come_in_reading_order(op) -> None:
    picture = drawn(("below", (40, 200)), ("right side", (330, 48)), ("left side", (40, 40)))
    (lines,) = read(op, picture)["texts"]
    assert [line["text"] for line in lines] == ["left side", "right side", "below"]


def test_nothing_is_read_where_nothing_is_written(op) -> None:
    columns = op(batch_of([jpeg(0, 300, 200), encode(Image.new("RGB", (90, 90), "white"), "PNG")], [op]))
    assert columns["texts"].to_pylist() == [[], []] and columns["text_share"].to_pylist() == [0.0, 0.0]


def test_pictures_of_several_shapes_share_a_batch(op) -> None:
    pictures = [
        drawn(("first", (20, 20)), size=(200, 90)),
        drawn(size=(80, 300)),
        drawn(("third one", (30, 500)), size=(300, 1500), height=60),
        drawn(size=(1, 1)),
    ]
    texts = [[line["text"] for line in lines] for lines in read(op, *pictures)["texts"]]
    assert texts == [["first"], [], ["third one"], []]


def test_what_is_read_does_not_depend_on_the_batch(op) -> None:
    pictures = [banner.picture for banner in banners(4, seed=1)]
    together = read(op, *pictures)
    alone = [read(op, picture) for picture in pictures]
    assert [[line["text"] for line in row] for row in together["texts"]] == [
        [line["text"] for line in row["texts"][0]] for row in alone
    ]
    scores = [line["score"] for row in together["texts"] for line in row]
    assert scores == pytest.approx([line["score"] for row in alone for line in row["texts"][0]], abs=1e-4)
    assert together["text_share"] == [row["text_share"][0] for row in alone]


def test_an_empty_batch(op) -> None:
    empty = op(batch_of([], [op]))
    assert {name: (array.type, len(array)) for name, array in empty.items()} == {
        field.name: (field.type, 0) for field in op.columns
    }


def test_words_of_drawn_banners(op) -> None:
    made = list(banners(6, seed=7))
    lines = read(op, *(banner.picture for banner in made))["texts"]
    found = [(banner.words, [line["text"] for line in row]) for banner, row in zip(made, lines, strict=True)]
    assert word_accuracy(found) >= 0.9


def test_the_package_reads_the_same(op) -> None:
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "critical", "Global.use_cls": False})
    for banner in banners(2, seed=3):
        picture = banner.picture.copy()
        picture.thumbnail((736, 736))
        expected = engine(np.asarray(picture)[..., ::-1].copy())
        (lines,) = read(op, picture)["texts"]
        assert sorted(line["text"] for line in lines) == sorted(expected.txts or ())


def test_threads_share_the_networks(op) -> None:
    pictures = [drawn((f"number {n}", (40, 40))) for n in range(6)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda picture: read(op, picture), pictures))
    assert [row["texts"][0][0]["text"] for row in found] == [f"number {n}" for n in range(6)]
    assert found[2] == read(op, pictures[2])


def test_no_network_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_ops import text_reading

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    text_reading.text_reader.cache_clear()
    (own,) = load_ops(plan_ops(["ocr"], "compact"))
    assert read(own, drawn(("offline", (40, 40))))["texts"][0][0]["text"] == "offline"


def test_the_share_of_text_counts_overlaps_once() -> None:
    def line(left: float, top: float, right: float, bottom: float) -> TextLine:
        return TextLine("x", 1.0, np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float32))

    assert text_share([]) == 0
    assert text_share([line(0, 0, 0.5, 0.5)]) == pytest.approx(0.25, abs=0.01)
    assert text_share([line(0, 0, 0.5, 0.5), line(0, 0.25, 0.5, 0.5)]) == pytest.approx(0.25, abs=0.01)
    assert text_share([line(-1, -1, 2, 2), line(0, 0, 1, 1)]) == 1


def test_other_weights_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setattr("vlm_ops.text_reading.package_folder", lambda name: tmp_path)
    message = (
        "op 'ocr' needs one detector and one recogniser in .*models, and found none; pip install --force-reinstall"
    )
    with pytest.raises(ValueError, match=message):
        plan_ops(["ocr"], "compact")


def test_few_photos_have_text(op, dev_shard: Path) -> None:
    import tarfile

    with tarfile.open(dev_shard) as shard:
        datas = [shard.extractfile(member).read() for member in shard if member.name.endswith(".jpg")][:80]  # type: ignore[union-attr]
    lines = op(batch_of(datas, [op]))["texts"].to_pylist()
    assert sum(any(len(line["text"].split()) > 1 for line in row) for row in lines) <= 3
