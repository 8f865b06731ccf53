"""`beamsight build` from the command line, on drawn photos and on broken ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from pipelines.cli import main
from schemas.catalog import CatalogLayout
from schemas.tables import images_schema
from tests.conftest import jpeg, png, tar_bytes
from vlm_ops.faiss_index import open_index

TOY = "python:tests.toys"


def build(catalog: Path, *inputs: object, flags: tuple[str, ...] = (), model: str = TOY) -> int:
    arguments = ["build", "--input", *map(str, inputs), "--catalog", str(catalog), "--model", model, "--device", "cpu"]
    return main([*arguments, *flags])


def rows(catalog: Path, table: str = "images") -> list[dict]:
    return DeltaTable(str(catalog / table)).to_pyarrow_table().to_pylist()


def by_key(catalog: Path) -> dict[str, dict]:
    return {row["key"]: row for row in rows(catalog)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(6):
        (folder / f"p{seed}.jpg").write_bytes(jpeg(seed))
    return folder


def test_the_default_catalog(toy_catalog: Path, toy_inputs: Path) -> None:
    table = DeltaTable(str(toy_catalog / "images")).to_pyarrow_table()
    assert table.num_rows == 20
    assert table.schema.names == images_schema().names
    found = by_key(toy_catalog)
    assert found["photo00"]["source_captions"] == ["a drawn photo"]
    assert json.loads(found["photo00"]["source_metadata"]) == {"licence": "none"}
    assert found["photo01"]["source_captions"] == ["first caption", "second caption"]
    assert found["member03"]["uri"] == f"{toy_inputs}/shard.tar#member03.jpg"
    for row in found.values():
        assert len(row["features"]) == 1280 and len(row["image_embedding"]) == 388 and len(row["labels"]) == 5
        assert sum(x * x for x in row["image_embedding"]) == pytest.approx(1, abs=1e-4)
        assert (row["width"], row["height"], row["format"]) == (96, 64, "JPEG")
    (run,) = (toy_catalog / "runs").iterdir()
    assert (toy_catalog / "indexes" / run.name / "manifest.json").exists()


def test_the_run_says_what_it_did(toy_catalog: Path) -> None:
    (run,) = (toy_catalog / "runs").iterdir()
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["status"], manifest["num_images"], manifest["num_shards"]) == ("committed", 20, 2)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["images"] == 20 and metrics["stage_sec"]["decode"] > 0 and metrics["stage_sec"]["model"] > 0
    assert "data:image/jpeg" in (run / "report.html").read_text()


def test_nothing_is_computed_twice(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.tar").write_bytes(tar_bytes([("m.jpg", jpeg(50)), ("bad.jpg", b"x")]))
    (photos / "bad.jpg").write_bytes(b"no image")
    catalog = tmp_path / "c"
    flags = ("--max_failure_rate", "1")
    assert build(catalog, photos, tmp_path / "t.tar", flags=flags) == 0
    before = sorted(rows(catalog), key=lambda row: row["uri"])
    monkeypatch.setattr("pipelines.build.execute", lambda *_: pytest.fail("it computed something"))
    capsys.readouterr()
    assert build(catalog, photos, tmp_path / "t.tar", flags=flags) == 0
    assert "nothing to do: the catalog" in capsys.readouterr().out
    assert sorted(rows(catalog), key=lambda row: row["uri"]) == before


def test_names_that_are_not_utf8_are_done_once_too(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Path(os.fsdecode(os.fsencode(photos) + b"/\xff.jpg")).write_bytes(jpeg(7))
    assert build(tmp_path / "c", photos) == build(tmp_path / "c", photos) == 0
    assert "nothing to do" in capsys.readouterr().out and len(rows(tmp_path / "c")) == 7


def test_what_is_no_input_is_not_passed_over_in_silence(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.heic", "b.HEIC", "notes.doc", "p0.txt"):
        (photos / name).write_bytes(b"x")
    assert build(tmp_path / "c", photos) == 0
    assert "passed over, as no input that is known: 1 of .doc, 2 of .heic" in caplog.text


def test_new_and_changed_inputs_are_added(photos: Path, tmp_path: Path) -> None:
    catalog, tar = tmp_path / "c", tmp_path / "t.tar"
    tar.write_bytes(tar_bytes([("m1.jpg", jpeg(50))]))
    assert build(catalog, photos, tar) == 0
    first = by_key(catalog)
    (photos / "new.png").write_bytes(png(7))
    (photos / "p0.jpg").write_bytes(jpeg(99))
    os.utime(photos / "p0.jpg", (1, 1))
    (photos / "p2.txt").write_text("a caption that was not there")
    tar.write_bytes(tar_bytes([("m1.jpg", jpeg(50)), ("m2.jpg", jpeg(51))]))
    assert build(catalog, photos, tar) == 0
    second = by_key(catalog)
    assert set(second) == set(first) | {"new", "m2"} and len(rows(catalog)) == len(second)
    assert second["p0"]["content_sha256"] != first["p0"]["content_sha256"]
    assert second["p2"]["source_captions"] == ["a caption that was not there"]
    assert second["p1"]["run_id"] == first["p1"]["run_id"] != second["p0"]["run_id"]
    assert open_index(CatalogLayout(str(catalog)), {}).manifest.ntotal == 9


def test_a_killed_run_goes_on(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tars = []
    for number in range(3):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(tar_bytes([(f"{number}{i}.jpg", jpeg(10 * number + i)) for i in range(4)]))
        tars.append(path)
    script = (
        "import os, sys, vlm_ops.publishing as p, pipelines.transforms as t\n"
        "t.publish_run = lambda *a: os._exit(9)\n"  # the machine dies when all parts but no commit are there
        "from pipelines.cli import main; main(sys.argv[1:])\n"
    )
    catalog = tmp_path / "c"
    command = ["build", "--input", *map(str, tars), "--catalog", str(catalog), "--model", TOY]
    killed = subprocess.run([sys.executable, "-c", script, *command], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == 9 and not (catalog / "images" / "_delta_log").exists()
    capsys.readouterr()
    assert build(catalog, *tars) == 0
    assert "12 (shards: 3, 3 of them finished by an earlier run)" in capsys.readouterr().out
    assert len(rows(catalog)) == 12


def test_too_many_failures_publish_nothing(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (photos / "bad.jpg").write_bytes(b"<html>")
    (photos / "empty.jpg").write_bytes(b"")
    catalog = tmp_path / "c"
    assert build(catalog, photos) == 3
    message = capsys.readouterr().err
    assert "nothing was published: 25.0% failed (2 failed, 6 good), more than --max_failure_rate 0.05" in message
    assert "reasons: empty_file 1, not_an_image 1" in message
    assert f"empty_file: {photos}/empty.jpg: zero bytes" in message and f"not_an_image: {photos}/bad.jpg" in message
    assert not (catalog / "images" / "_delta_log").exists() and not (catalog / "indexes").exists()
    assert build(catalog, photos, flags=("--max_failure_rate", "0.3")) == 0
    assert "6 (shards: 1; copied from the same bytes: 6)" in capsys.readouterr().out
    failed = rows(catalog, "failures")
    assert {(row["reason"], row["attempts"]) for row in failed} == {("empty_file", 2), ("not_an_image", 2)}


def test_an_unreadable_shard_stops_the_publication(tmp_path: Path) -> None:
    (tmp_path / "good.tar").write_bytes(tar_bytes([(f"{i}.jpg", jpeg(i)) for i in range(30)]))
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    assert build(tmp_path / "c", tmp_path / "good.tar", tmp_path / "bad.tar") == 3


def test_bad_input_never_loses_good_data(tmp_path: Path) -> None:
    good = tar_bytes([(f"{i}.jpg", jpeg(i)) for i in range(8)])
    fifth = good.index(b"4.jpg")  # in the header of the fifth member
    (tmp_path / "cut.tar").write_bytes(good[: fifth + 1000])
    (tmp_path / "whole.tar").write_bytes(good)
    assert build(tmp_path / "c", tmp_path / "cut.tar", tmp_path / "whole.tar", flags=("--max_failure_rate", "0.5")) == 0
    kept = [row["uri"] for row in rows(tmp_path / "c")]
    assert sum("whole.tar" in uri for uri in kept) == 8 and sum("cut.tar" in uri for uri in kept) == 4
    (failure,) = rows(tmp_path / "c", "failures")
    assert failure["reason"] == "truncated_shard" and failure["uri"] == str(tmp_path / "cut.tar")


def test_a_mix_of_formats(tmp_path: Path, photos: Path) -> None:
    import pyarrow as pa

    (tmp_path / "z.tar.gz").write_bytes(tar_bytes([("z.jpg", jpeg(20))], "w:gz"))
    table = pa.table({"image": [{"bytes": jpeg(21), "path": "hf.jpg"}], "text": ["from parquet"], "shop": ["x"]})
    pq.write_table(table, tmp_path / "hf.parquet")
    (tmp_path / "list.jsonl").write_text(json.dumps({"url": "photos/p0.jpg", "caption": "listed", "sku": 7}) + "\n")
    inputs = [tmp_path / "z.tar.gz", tmp_path / "*.parquet", tmp_path / "list.jsonl", photos / "p{1,2}.jpg"]
    assert build(tmp_path / "c", *inputs) == 0
    found = by_key(tmp_path / "c")
    assert set(found) == {"z", "hf", "p0", "p1", "p2"}
    assert found["hf"]["source_captions"] == ["from parquet"] and json.loads(found["hf"]["source_metadata"]) == {
        "shop": "x"
    }
    assert found["p0"]["source_captions"] == ["listed"] and json.loads(found["p0"]["source_metadata"]) == {"sku": 7}


def test_memory_filesystem(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/corpus/a.jpg", jpeg(0))
    try:
        assert build(tmp_path / "c", "memory://corpus") == 0
        assert [row["uri"] for row in rows(tmp_path / "c")] == ["memory:///corpus/a.jpg"]
    finally:
        fs.rm("/corpus", recursive=True)


def test_captions_of_a_model_that_writes_them(photos: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "c", photos, flags=("--ops", "quality,caption,embedding")) == 0
    for row in rows(tmp_path / "c"):
        assert (
            row["caption"].endswith("picture")
            and row["caption_source"] == "generated"
            and 0 < row["caption_score"] <= 1
        )
        assert row["features"] is None


def test_without_embeddings_there_is_no_index(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert build(tmp_path / "c", photos, flags=("--ops", "quality")) == 0
    assert not (tmp_path / "c" / "indexes").exists()
    assert main(["index", str(tmp_path / "c")]) == 2
    assert "holds no embeddings; build it with --ops embedding" in capsys.readouterr().err
    assert main(["search", str(tmp_path / "c"), "x"]) == 2


def test_another_recipe_computes_all_images_anew(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = tmp_path / "c"
    (tmp_path / "t.tar").write_bytes(tar_bytes([("m.jpg", jpeg(50))]))
    assert build(catalog, photos, tmp_path / "t.tar") == 0
    other = ("--ops", "quality,features,embedding")
    assert build(catalog, photos, tmp_path / "t.tar", flags=(*other, "--no_recompute")) == 2
    message = capsys.readouterr().err
    assert "holds 7 images of recipe" in message and "(op labels left out; op caption left out)" in message
    assert build(catalog, photos, flags=other) == 2
    assert "all images of" in (message := capsys.readouterr().err) and "1 of them are not among the inputs" in message
    assert build(catalog, photos, tmp_path / "t.tar", flags=(*other, "--dry_run")) == 0
    assert "changed    1 shard file, 6 single files (7 images by another recipe)" in capsys.readouterr().out
    assert build(catalog, photos, tmp_path / "t.tar", flags=other) == 0
    assert "another recipe (op labels left out; op caption left out): 7 images are computed anew" in caplog.text
    assert len(rows(catalog)) == 7 and all(row["labels"] is None for row in rows(catalog))
    assert len({row["recipe_id"] for row in rows(catalog)}) == 1
    assert build(catalog, photos, flags=("--prune",)) == 0
    assert len(rows(catalog)) == 6


def test_one_worker_and_many_give_the_same_catalog(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.tar").write_bytes(
            tar_bytes([(f"{number}-{i}.jpg", jpeg(100 * number + i)) for i in range(9)])
        )
    tables = []
    for workers in ("1", "4"):
        catalog = tmp_path / f"c{workers}"
        assert build(catalog, tmp_path / "*.tar", flags=("--num_threads", workers, "--batch_size", "4")) == 0
        tables.append(sorted(({**row, "run_id": ""} for row in rows(catalog)), key=lambda row: row["uri"]))
    assert tables[0] == tables[1]


def test_table_opens_in_duckdb_and_pandas(toy_catalog: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    images = DeltaTable(str(toy_catalog / "images")).to_pyarrow_dataset()  # noqa: F841 (DuckDB finds it)
    (count, width) = duckdb.sql("select count(*), max(width) from images where labels[1].score > 0").fetchall()[0]
    assert (count, width) == (20, 96)
    assert len(DeltaTable(str(toy_catalog / "images")).to_pandas()) == 20


def test_a_write_that_fails_is_no_user_error_and_keeps_nothing_half(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm_ops.parts.pq.ParquetWriter", no_space)
    assert build(tmp_path / "c", photos) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "run the same command again" in error
    assert len(error.splitlines()) < 8 and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "/no/such/place", "--catalog", "C"], "no input matches '/no/such/place'"),
        (["--input", "IN", "--catalog", "C", "--model", "compcat"], "unknown model 'compcat'"),
        (["--input", "IN", "--catalog", "C", "--ops", "qualty"], "unknown op 'qualty'"),
        (
            ["--input", "IN", "--catalog", "C", "--ops", "caption", "--model", "compact:conse"],
            "cannot serve op 'caption'",
        ),
        (["--input", "IN", "--catalog", "memory://c"], "a catalog cannot live on memory://"),
        (["--input", "IN", "--catalog", "FILE"], "cannot be made: "),
        (["--input", "ftpx://a/b", "--catalog", "C"], "cannot open 'ftpx://a/b'"),
        (["--input", "EMPTY", "--catalog", "C"], "no images, tars, Parquet files or lists in"),
        (["--input", "IN", "--catalog", "C", "--device", "cuda"], "--device cuda was asked for"),
    ],
)
def test_mistakes_are_told_before_any_work(
    arguments: list[str],
    message: str,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    names = {
        "IN": str(photos),
        "C": str(tmp_path / "c"),
        "EMPTY": str(tmp_path / "empty"),
        "FILE": str(photos / "p0.jpg"),
    }
    assert main(["build", *(names.get(each, each) for each in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "c").exists()
