"""`beamsight search`, `index` and `inspect` on a catalog of drawn photos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipelines.cli import main
from schemas.tables import RESULTS


@pytest.fixture
def catalog(toy_catalog: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_catalog, tmp_path / "catalog"))


def lines(capsys: pytest.CaptureFixture) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_an_image_finds_itself(toy_catalog: Path, toy_inputs: Path, capsys: pytest.CaptureFixture) -> None:
    query = str(toy_inputs / "photo05.jpg")
    assert main(["search", str(toy_catalog), "--image", query, "--json", "-k", "3"]) == 0
    (answer,) = lines(capsys)
    assert answer["query"] == query and len(answer["results"]) == 3
    best = answer["results"][0]
    assert best["uri"] == query and best["score"] == pytest.approx(1, abs=1e-4)
    assert list(best) == RESULTS.names


def test_text_results_are_sorted(toy_catalog: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["search", str(toy_catalog), "a colourful shape", "--json"]) == 0
    scores = [row["score"] for row in lines(capsys)[0]["results"]]
    assert len(scores) == 10 and scores == sorted(scores, reverse=True)


def test_the_table_names_score_labels_and_uri(toy_catalog: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["search", str(toy_catalog), "a ball", "-k", "2"]) == 0
    title, first, _ = capsys.readouterr().out.splitlines()
    assert title == "a ball"
    score, rest = first.split(maxsplit=1)
    assert -1 <= float(score) <= 1 and ".jpg" in rest


def test_queries_of_a_file_are_answered_in_order(
    toy_catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "q.txt").write_text("a dog\n\na cat\n")
    assert main(["search", str(toy_catalog), "--queries", str(tmp_path / "q.txt"), "-k", "1"]) == 0
    assert [answer["query"] for answer in lines(capsys)] == ["a dog", "a cat"]


def test_gallery(toy_catalog: Path, tmp_path: Path) -> None:
    page = tmp_path / "out" / "gallery.html"
    assert main(["search", str(toy_catalog), "<b>bold</b>", "--html", str(page), "-k", "4"]) == 0
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 4 and "<b>bold" not in text and "&lt;b&gt;bold" in text


def test_another_encoder_is_refused_with_both_names(toy_catalog: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["search", str(toy_catalog), "x", "--model", "python:tests.toys"]) == 2
    message = capsys.readouterr().err
    assert "was built by encoder compact@" in message and "would be encoded by python:tests.toys@1" in message


def test_an_older_revision_is_refused(catalog: Path, capsys: pytest.CaptureFixture) -> None:
    (path,) = catalog.glob("indexes/*/manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder_revision": "old"}))
    assert main(["search", str(catalog), "x"]) == 2
    assert "was built by encoder compact@old, but the queries would be encoded by compact@" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "/no/catalog", "x"], "no catalog at /no/catalog; make one with `beamsight build"),
        (["search", "CATALOG", "--image", "/no/image.jpg"], "cannot search with image '/no/image.jpg': no such file"),
        (["search", "CATALOG", "--image", "TEXT"], "cannot search with image .*: not a JPEG"),
        (["search", "CATALOG", "--queries", "/no/file"], "no query file '/no/file'"),
        (["search", "CATALOG", "--queries", "EMPTY"], "holds no queries; write one a line"),
        (["inspect", "/no/catalog"], "no catalog at /no/catalog; make one with `beamsight build"),
        (["index", "/no/catalog"], "no catalog at /no/catalog; make one with `beamsight build"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, toy_catalog: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import re

    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "empty.txt").write_text("\n")
    names = {"CATALOG": str(toy_catalog), "TEXT": str(tmp_path / "text.txt"), "EMPTY": str(tmp_path / "empty.txt")}
    assert main([names.get(each, each) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "Traceback" not in error


def test_nothing_to_search_for(toy_catalog: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["search", str(toy_catalog)])
    assert stopped.value.code == 2 and "give a text, --image FILE or --queries FILE" in capsys.readouterr().err


def test_real_photos_are_found(dev_shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    catalog = str(tmp_path / "catalog")
    assert main(["build", "--input", str(dev_shard), "--catalog", catalog, "--device", "cpu"]) == 0
    assert (
        "images     1000 (shards: 1)\nchanges    1000 added, 0 changed, 0 removed\nfailures   none"
        in capsys.readouterr().out
    )
    assert main(["search", catalog, "a dog", "a bicycle", "--json"]) == 0
    for answer, word in zip(lines(capsys), ("dog", "bike"), strict=True):
        captions = [_captions(catalog, row["uri"]) for row in answer["results"]]
        assert sum(word in caption for caption in captions) >= 6, (word, captions)


def _captions(catalog: str, uri: str) -> str:
    from deltalake import DeltaTable

    table = DeltaTable(f"{catalog}/images").to_pyarrow_table(columns=["uri", "source_captions"])
    return " ".join(next(row["source_captions"] for row in table.to_pylist() if row["uri"] == uri)).lower()


# --- index and inspect -----------------------------------------------------------------------------


def test_the_index_is_made_from_the_table_alone(
    catalog: Path, toy_inputs: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_ops.shards.read_shard", lambda *_: pytest.fail("it read a shard"))
    shutil.rmtree(catalog / "indexes")
    assert main(["search", str(catalog), "x"]) == 2
    assert f"is not there; make it anew with `beamsight index {catalog}`" in capsys.readouterr().err
    assert main(["index", str(catalog)]) == 0
    (index,) = (catalog / "indexes").iterdir()
    assert f"indexes/{index.name}: 20 vectors of 388 dimensions, IDMap2,Flat" in capsys.readouterr().out
    assert main(["search", str(catalog), "--image", str(toy_inputs / "photo02.jpg"), "--json", "-k", "1"]) == 0
    assert lines(capsys)[0]["results"][0]["key"] == "photo02"


def test_inspect(toy_catalog: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(toy_catalog), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["failures"], found["index"]["ntotal"]) == (20, {}, 20)
    assert set(found["recipe"]["ops"]) == {"quality", "features", "labels", "caption", "embedding"}
    assert found["run"]["action"] == "build" and found["bytes"]["images"] > 50_000
    assert main(["inspect", str(toy_catalog)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "images     20 (parts: 2)",
        "failures   none",
        "encoder    compact@",
        "20 vectors of 388 dimensions",
    ):
        assert expected in text
