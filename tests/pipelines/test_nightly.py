"""Night after night: only what is new or changed is computed, and every night can be taken back."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from datetime import UTC
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable

from pipelines.cli import main
from schemas.catalog import CatalogLayout
from tests.conftest import jpeg, tar_bytes
from vlm_ops.cleaning import stored_files
from vlm_ops.faiss_index import open_index
from vlm_ops.states import current_state, existing_state

TOY = "python:tests.toys"


class Night:
    """A corpus of two tars and a folder of files, and the commands over it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture) -> None:
        self.folder = folder
        self.photos = folder / "photos"
        self.photos.mkdir()
        self.catalog = folder / "catalog"
        self._capsys = capsys
        for seed in range(4):
            (self.photos / f"p{seed}.jpg").write_bytes(jpeg(seed))
        self.tar("a", range(10, 13))
        self.tar("b", range(20, 23))

    def tar(self, name: str, seeds: range, extra: tuple[tuple[str, bytes], ...] = ()) -> Path:
        path = self.folder / f"{name}.tar"
        path.write_bytes(tar_bytes([*((f"{name}{seed}.jpg", jpeg(seed)) for seed in seeds), *extra]))
        return path

    def run(self, command: str, *arguments: str, code: int = 0) -> str:
        """Runs a command on the catalog; returns what it printed."""
        self._capsys.readouterr()
        assert main([command, *arguments]) == code
        captured = self._capsys.readouterr()
        return captured.out if code == 0 else captured.err

    def build(self, *flags: str, inputs: tuple[Path, ...] = (), code: int = 0) -> str:
        named = inputs or (self.photos, *sorted(self.folder.glob("*.tar")))
        toy = ("--model", TOY, "--device", "cpu", "--max_failure_rate", "1")
        return self.run("build", "--input", *map(str, named), "--catalog", str(self.catalog), *toy, *flags, code=code)

    def rows(self) -> dict[str, dict]:
        table = DeltaTable(str(self.catalog / "images")).to_pyarrow_table().to_pylist()
        assert len({row["uri"] for row in table}) == len(table)
        return {row["key"]: row for row in table}

    def failures(self) -> dict[str, dict]:
        state = existing_state(CatalogLayout(str(self.catalog)), {})
        table = DeltaTable(str(self.catalog / "failures"), version=state.record.failures_version)  # type: ignore[union-attr]
        return {Path(row["uri"]).name: row for row in table.to_pyarrow_table().to_pylist()}

    def history(self) -> list[dict]:
        return [json.loads(line) for line in self.run("history", str(self.catalog), "--json").splitlines()]

    def indexed(self) -> set[int]:
        return set(open_index(CatalogLayout(str(self.catalog)), {}).rows.column("image_id").to_pylist())


@pytest.fixture
def night(tmp_path: Path, capsys: pytest.CaptureFixture) -> Night:
    return Night(tmp_path, capsys)


def comparable(rows: dict[str, dict]) -> dict[str, dict]:
    """Rows without what tells which run computed them."""
    return {key: {name: value for name, value in row.items() if name != "run_id"} for key, row in rows.items()}


# --- what is computed ------------------------------------------------------------------------------


def test_only_new_and_changed_inputs_are_computed(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_ops.run_manifests._MIN_BYTES", 1)
    night.build()
    first = night.rows()
    night.tar("c", range(30, 32))
    night.tar("b", range(20, 24))
    (night.photos / "p0.jpg").write_bytes(jpeg(99))
    (night.photos / "new.jpg").write_bytes(jpeg(50))
    plan = night.build("--dry_run")
    assert "new        1 shard file, 1 single file" in plan and "changed    1 shard file, 1 single file" in plan
    assert "kept       1 shard file, 3 single files" in plan and "removed    0 images" in plan
    assert re.search(r"time       about \d+ s \(0.0 MB to read\)", plan)
    assert len(night.history()) == 1  # it only said so
    printed = night.build()
    assert "images     8 (shards: 3; copied from the same bytes: 3)" in printed
    assert "changes    4 added, 1 changed, 0 removed" in printed
    second = night.rows()
    assert set(second) - set(first) == {"c30", "c31", "b23", "new"} and night.indexed() == {
        row["image_id"] for row in second.values()
    }
    assert second["a10"]["run_id"] == first["a10"]["run_id"] and second["p1"]["run_id"] == first["p1"]["run_id"]
    assert "nothing to do" in night.build()


def test_listed_files_are_computed_when_they_change(night: Night) -> None:
    listed = night.folder / "list.csv"
    listed.write_text("path,alt\nphotos/p0.jpg,one\nphotos/p1.jpg,two\nphotos/late.jpg,three\n")
    night.build(inputs=(listed,))
    assert set(night.failures()) == {"late.jpg"} and "nothing to do" in night.build(inputs=(listed,))
    (night.photos / "p0.jpg").write_bytes(jpeg(60))
    (night.photos / "late.jpg").write_bytes(jpeg(61))
    assert "changed    0 shard files, 2 single files" in night.build("--dry_run", inputs=(listed,))
    assert "changes    1 added, 1 changed, 0 removed" in night.build(inputs=(listed,))
    assert night.rows()["late"]["source_captions"] == ["three"] and night.failures() == {}
    listed.write_text(listed.read_text().replace("two", "another"))
    assert "copied from the same bytes: 1" in night.build(inputs=(listed,))
    assert night.rows()["p1"]["source_captions"] == ["another"] and "nothing to do" in night.build(inputs=(listed,))


def test_before_the_first_run_the_time_is_not_known(night: Night) -> None:
    plan = night.build("--dry_run")
    assert "new        2 shard files, 4 single files" in plan and "time       not known before a first run" in plan
    assert not (night.catalog / "images").exists()


def test_what_is_gone_from_the_input_stays_unless_pruned(night: Night) -> None:
    night.tar("b", range(20, 23), (("bad.jpg", b"x"),))
    (night.photos / "bad.jpg").write_bytes(b"x")
    night.build()
    assert set(night.failures()) == {"b.tar#bad.jpg", "bad.jpg"}
    (night.folder / "b.tar").unlink()
    for name in ("p0.jpg", "bad.jpg"):
        (night.photos / name).unlink()
    assert "nothing to do" in night.build()
    plan = night.build("--dry_run")
    assert "removed    4 images are not among the inputs; they stay without --prune" in plan
    assert "removed    4 images\n" in night.build("--dry_run", "--prune")
    assert "changes    0 added, 0 changed, 4 removed" in night.build("--prune")
    assert set(night.rows()) == {"p1", "p2", "p3", "a10", "a11", "a12"} and night.failures() == {}
    assert night.indexed() == {row["image_id"] for row in night.rows().values()}
    assert "nothing to do" in night.build("--prune")


def test_everything_can_be_pruned_but_what_is_there(night: Night) -> None:
    night.build()
    night.build("--prune", inputs=(night.photos / "p0.jpg",))
    assert set(night.rows()) == {"p0"}


def test_contents_are_compared_when_asked_for(night: Night, caplog: pytest.LogCaptureFixture) -> None:
    """A file and a shard that change, but neither in size nor in time."""

    def tamper(path: Path, new: bytes) -> None:
        status = path.stat()
        path.write_bytes(new[: status.st_size].ljust(status.st_size, b"\0"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def grey(seed: int, size: int) -> bytes:
        return jpeg(seed, 16, 16).ljust(size, b"\0")

    night.build()
    before = night.rows()
    tamper(night.photos / "p0.jpg", grey(70, 0))
    members = [(f"a{seed}.jpg", grey(seed, len(jpeg(seed)))) for seed in range(10, 13)]
    tamper(night.folder / "a.tar", tar_bytes(members))
    assert "nothing to do" in night.build()
    assert "changed    1 shard file, 1 single file" in night.build("--verify_content", "--dry_run")
    assert "changes    0 added, 4 changed, 0 removed" in night.build("--verify_content")
    assert "comparing the bytes of 6 inputs with the catalog" in caplog.text
    after = night.rows()
    assert {key for key in after if after[key]["width"] == 16} == {"p0", "a10", "a11", "a12"}
    assert after["b20"] == before["b20"]
    for flags in ((), ("--verify_content",)):
        assert "nothing to do" in night.build(*flags)
    tamper(night.folder / "a.tar", tar_bytes([(f"a{seed}.jpg", jpeg(seed)) for seed in range(10, 13)]))
    assert "changes    0 added, 3 changed, 0 removed" in night.build("--verify_content")  # and back
    assert comparable(night.rows())["a11"] == comparable(before)["a11"]


def test_moved_and_resharded_images_are_copied(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    night.build()
    first = night.rows()
    night.photos.rename(night.folder / "pictures")
    (night.folder / "a.tar").unlink()
    (night.folder / "b.tar").unlink()
    night.tar("z", range(10, 13), tuple((f"z{seed}.jpg", jpeg(seed)) for seed in range(20, 23)))
    monkeypatch.setattr(
        "tests.toys.ToyImageModel.encode_images", lambda *_: pytest.fail("a model was asked for known bytes")
    )
    printed = night.build("--prune", inputs=(night.folder / "pictures", night.folder / "z.tar"))
    assert "copied from the same bytes: 10" in printed and "changes    10 added, 0 changed, 10 removed" in printed
    second = night.rows()
    for new, old in [("p0", "p0"), ("z10", "a10"), ("z22", "b22")]:
        np.testing.assert_allclose(second[new]["image_embedding"], first[old]["image_embedding"], atol=1e-5)
        assert second[new]["labels"] == first[old]["labels"] and second[new]["uri"] != first[old]["uri"]
        assert second[new]["duplicate_of"] is None  # the first one has left with this run
    assert not list(night.catalog.rglob("contents.arrow")) and not list(night.catalog.rglob("work.jsonl.gz"))


def test_a_copy_names_the_first_one(night: Night) -> None:
    night.build()
    (night.photos / "copy.jpg").write_bytes(jpeg(11))
    night.tar("c", range(30, 31), (("again.jpg", jpeg(30)),))
    night.build()
    rows = night.rows()
    assert (
        rows["copy"]["duplicate_of"] == rows["a11"]["image_id"]
        and rows["again"]["duplicate_of"] == rows["c30"]["image_id"]
    )
    assert sum(row["duplicate_of"] is not None for row in rows.values()) == 2


@pytest.mark.parametrize("seed", range(4))
def test_duplicate_of_stays_true_whatever_happens(night: Night, seed: int) -> None:
    """It names an image that is there, has the same bytes, and is no copy itself; also where older parts come back."""
    rng = random.Random(seed)
    night.tar("a", range(10, 13), (("z.jpg", b"x"),))
    names = [f"q{number}.jpg" for number in range(6)]
    for _ in range(6):
        for name in rng.sample(names, 3):
            path = night.photos / name
            if path.exists() and rng.random() < 0.4:
                path.unlink()
            else:
                path.write_bytes(jpeg(rng.choice([0, 1, 10, 11, 70])))
                os.utime(path, (moment := rng.randrange(10**9), moment))
        if rng.random() < 0.5:
            night.tar("a", range(rng.randrange(9, 12), 13), (("z.jpg", b"x"),))
        night.build(*(["--prune"] if rng.random() < 0.6 else []))
        if rng.random() < 0.5:
            night.run("retry", str(night.catalog), "--device", "cpu")
        if rng.random() < 0.3:
            night.run("rollback", str(night.catalog), rng.choice(night.history())["run"])
        rows = {row["image_id"]: row for row in night.rows().values()}
        for row in rows.values():
            if row["duplicate_of"] is not None:
                first = rows[row["duplicate_of"]]
                assert first["content_sha256"] == row["content_sha256"] and first["duplicate_of"] is None
        assert set(rows) == night.indexed()
    night.build("--prune")
    assert "nothing to do" in night.build("--verify_content", "--prune")


# --- failures --------------------------------------------------------------------------------------


def test_retry_processes_just_what_failed(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {12: True, 3: True}

    def fails(samples: list) -> bool:
        return any((broken.get(12) and s.data == jpeg(12)) or (broken.get(3) and s.data == jpeg(3)) for s in samples)

    from vlm_ops.ops import EmbeddingOp

    real = EmbeddingOp.__call__
    seen: list[str] = []

    def call(self: EmbeddingOp, batch: object) -> dict:
        if fails(batch.samples):  # type: ignore[attr-defined]
            raise RuntimeError("a hiccup")
        seen.extend(sample.key for sample in batch.samples)  # type: ignore[attr-defined]
        return real(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(EmbeddingOp, "__call__", call)
    (night.photos / "bad.jpg").write_bytes(b"x")
    listed = night.folder / "list.jsonl"
    listed.write_text(json.dumps({"url": "late.jpg", "caption": "came late"}) + "\n")
    inputs = (night.photos, night.folder / "a.tar", night.folder / "b.tar", listed)
    night.build(inputs=inputs)
    failed = night.failures()
    assert {name: row["reason"] for name, row in failed.items()} == {
        "a.tar#a12.jpg": "model_error", "p3.jpg": "model_error", "bad.jpg": "not_an_image", "late.jpg": "missing_file",
    }  # fmt: skip
    assert failed["a.tar#a12.jpg"]["member"] == "a12.jpg" and failed["bad.jpg"]["member"] is None
    assert failed["a.tar#a12.jpg"]["byte_offset"] > 0 and {row["attempts"] for row in failed.values()} == {1}
    assert "nothing to do" in night.build(inputs=inputs)

    del broken[12]
    seen.clear()
    printed = night.run("retry", str(night.catalog), "--device", "cpu")
    assert "changes    1 added, 0 changed, 0 removed" in printed and "left       3 failures in the catalog" in printed
    assert seen == ["a12"]
    assert {name: row["attempts"] for name, row in night.failures().items()} == {
        "p3.jpg": 2,
        "bad.jpg": 2,
        "late.jpg": 2,
    }
    assert [
        row["key"]
        for row in sorted(night.rows().values(), key=lambda row: row["byte_offset"] or 0)
        if row["key"][0] == "a"
    ] == ["a10", "a11", "a12"]

    del broken[3]
    (night.folder / "late.jpg").write_bytes(jpeg(77))
    night.run("retry", str(night.catalog), "--device", "cpu")
    assert night.rows()["late"]["source_captions"] == ["came late"]
    assert {name: row["attempts"] for name, row in night.failures().items()} == {"bad.jpg": 3}
    assert night.indexed() == {row["image_id"] for row in night.rows().values()}
    assert [run["action"] for run in night.history()] == ["retry", "retry", "build"]
    (night.photos / "bad.jpg").unlink()
    night.build("--prune", inputs=inputs)
    assert "nothing to retry" in night.run("retry", str(night.catalog))


def test_a_refused_run_is_tried_again_and_keeps_what_was_good(
    night: Night, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.toys import ToyImageModel

    real = ToyImageModel.encode_images
    monkeypatch.setattr(ToyImageModel, "encode_images", lambda *_: 1 / 0)
    gate = ("--max_failure_rate", "0.1")
    night.build(inputs=(night.photos,))
    message = night.build(*gate, code=3)
    assert "nothing was published" in message and "model_error 6" in message and "what failed is tried again" in message
    assert len(night.failures()) == 4 and [run["action"] for run in night.history()] == ["refused", "build"]
    night.run("retry", str(night.catalog), "--device", "cpu")
    assert "published nothing" in caplog.text and {row["attempts"] for row in night.failures().values()} == {2}
    monkeypatch.setattr(ToyImageModel, "encode_images", real)
    night.build(*gate)
    assert len(night.rows()) == 6
    night.run("retry", str(night.catalog), "--device", "cpu")
    assert len(night.rows()) == 10 and night.failures() == {}


def test_a_retry_never_takes_an_image_away(night: Night, caplog: pytest.LogCaptureFixture) -> None:
    """A shard that is away, or damaged behind its old size and time, keeps what the catalog has of it."""
    bad = (("bad.jpg", b"x"),)
    night.tar("a", range(10, 13), bad)
    night.tar("b", range(20, 23), bad)
    night.build()
    before = night.rows()
    shard = night.folder / "a.tar"
    status, whole = shard.stat(), shard.read_bytes()
    shard.write_bytes(whole[:600].ljust(status.st_size, b"\0"))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    (night.folder / "b.tar").rename(night.folder / "away")
    assert "changes    0 added, 0 changed, 0 removed" in night.run("retry", str(night.catalog), "--device", "cpu")
    assert night.rows() == before and set(night.failures()) == {"a.tar#bad.jpg", "b.tar#bad.jpg"}
    assert "1 shards are not there, or have changed since they failed" in caplog.text
    assert "1 shards gave fewer images than the catalog has of them" in caplog.text
    shard.write_bytes(whole)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    night.run("retry", str(night.catalog), "--device", "cpu")
    assert night.failures()["a.tar#bad.jpg"]["attempts"] == 2 and night.rows().keys() == before.keys()


def test_a_retry_after_a_rollback_tries_again(night: Night) -> None:
    bad = night.photos / "bad.jpg"
    bad.write_bytes(b"x" * 20_000)
    limit = ("--max_image_bytes", "10000")
    night.build(*limit)
    assert night.failures()["bad.jpg"]["reason"] == "too_many_bytes"
    (built,) = night.history()
    night.run("retry", str(night.catalog), "--device", "cpu")
    assert night.failures()["bad.jpg"]["attempts"] == 2
    night.run("rollback", str(night.catalog), built["run"])
    bad.write_bytes(jpeg(80, 16, 16))
    night.run("retry", str(night.catalog), "--device", "cpu")
    assert night.failures() == {} and "bad" in night.rows()
    assert "nothing to do" in night.build(*limit)  # the row has the version of the mended file


def test_a_refused_run_is_tried_again_after_another_run(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.toys import ToyImageModel

    night.build(inputs=(night.folder / "a.tar",))
    real = ToyImageModel.encode_images
    monkeypatch.setattr(ToyImageModel, "encode_images", lambda *_: 1 / 0)
    gate = ("--max_failure_rate", "0.1")
    night.build(*gate, inputs=(night.photos,), code=3)
    monkeypatch.setattr(ToyImageModel, "encode_images", real)
    night.build(*gate, inputs=(night.folder / "b.tar",))
    night.build(*gate, inputs=(night.photos,))
    assert len(night.rows()) == 10


def test_a_damaged_shard_that_gives_fewer_images_counts_them_as_failed(night: Night) -> None:
    night.build()
    shard = night.folder / "a.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    message = night.build("--max_failure_rate", "0.5", code=3)
    assert "lost with damaged shards" in message and len(night.rows()) == 10


def test_an_entry_whose_scheme_is_allowed_later_is_new(night: Night) -> None:
    listed = night.folder / "list.jsonl"
    listed.write_text(json.dumps({"url": "memory://x/a.jpg"}) + "\n")
    night.build(inputs=(night.photos, listed))
    assert night.failures()["a.jpg"]["reason"] == "scheme_not_allowed"
    assert "nothing to do" in night.build(inputs=(night.photos, listed))
    import fsspec

    fsspec.filesystem("memory").pipe("/x/a.jpg", jpeg(90))
    try:
        night.build("--allowed_schemes", "file,memory", inputs=(night.photos, listed))
        assert night.failures() == {} and len(night.rows()) == 5
    finally:
        fsspec.filesystem("memory").rm("/x", recursive=True)


def test_bad_lines_of_a_list_leave_with_their_lines(night: Night) -> None:
    listed = night.folder / "list.jsonl"
    listed.write_text("{}\n" + json.dumps({"url": "photos/p0.jpg"}) + "\n")
    night.build(inputs=(listed,))
    assert set(night.failures()) == {"list.jsonl#1"}
    listed.write_text(json.dumps({"url": "photos/p0.jpg"}) + "\n{}\n")
    night.build(inputs=(listed,))
    assert set(night.failures()) == {"list.jsonl#2"} and set(night.rows()) == {"p0"}


def test_what_failed_before_is_no_change_of_contents(night: Night) -> None:
    (night.photos / "bad.jpg").write_bytes(b"x")
    night.build()
    assert "nothing to do" in night.build("--verify_content", "--max_failure_rate", "0.05")


def test_links_to_nowhere_stop_nothing(night: Night) -> None:
    listed = night.folder / "list.jsonl"
    listed.write_text(json.dumps({"url": "http://127.0.0.1:9/x.jpg"}) + "\n")
    night.build("--allowed_schemes", "http,file", inputs=(night.photos, listed))
    assert night.failures()["x.jpg"]["reason"] == "unreachable_host" and len(night.rows()) == 4


# --- mistakes that would cost images ---------------------------------------------------------------


def test_an_input_that_is_empty_is_not_pruned(night: Night) -> None:
    night.build()
    for path in night.photos.iterdir():
        path.unlink()
    message = night.build("--prune", code=2)
    assert f"--prune would remove all that the catalog has of {night.photos}" in message and len(night.rows()) == 10


def test_a_list_that_is_empty_is_not_pruned(night: Night) -> None:
    listed = night.folder / "list.csv"
    listed.write_text("path\nphotos/p0.jpg\n")
    inputs = (listed, night.folder / "a.tar")
    night.build(inputs=inputs)
    listed.write_text("path\n")
    assert f"--prune would remove all that the catalog has of {listed}" in night.build("--prune", inputs=inputs, code=2)


def test_a_scheme_that_is_forgotten_once_takes_no_image_away(night: Night) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/x/a.jpg", jpeg(90))
    try:
        listed = night.folder / "list.jsonl"
        listed.write_text(json.dumps({"url": "memory://x/a.jpg"}) + "\n")
        night.build("--allowed_schemes", "file,memory", inputs=(night.photos, listed))
        assert "nothing to do" in night.build(inputs=(night.photos, listed)) and len(night.rows()) == 5
    finally:
        fsspec.filesystem("memory").rm("/x", recursive=True)


def test_a_part_without_its_failures_is_computed_again(night: Night) -> None:
    (night.photos / "bad.jpg").write_bytes(b"x")
    assert "nothing was published" in night.build("--max_failure_rate", "0", code=3)
    for path in (night.catalog / "failures").glob("part-*"):
        path.unlink()
    night.build()
    assert set(night.failures()) == {"bad.jpg"} and len(night.rows()) == 10


def test_a_catalog_is_apart_from_its_inputs(night: Night) -> None:
    night.catalog = night.folder
    (night.folder / "images").mkdir()
    (night.folder / "images" / "own.jpg").write_bytes(jpeg(5))
    message = night.build(inputs=(night.folder / "images",), code=2)
    assert "lies inside the catalog" in message


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b"])
def test_names_that_delta_cannot_have(night: Night, name: str) -> None:
    night.catalog = night.folder / name
    assert "cannot hold a catalog: Delta tables cannot have" in night.build(code=2)


# --- back, and clean -------------------------------------------------------------------------------


def test_a_rollback_takes_table_failures_and_index_back(night: Night) -> None:
    (night.photos / "bad.jpg").write_bytes(b"x")
    night.build()
    first, first_failures, first_index = night.rows(), night.failures(), night.indexed()
    (night.photos / "bad.jpg").write_bytes(jpeg(40))
    night.tar("a", range(10, 15))
    night.build("--prune", inputs=(night.photos, night.folder / "a.tar"))
    second = night.rows()
    assert night.failures() == {} and night.indexed() != first_index
    newest, oldest = night.history()
    assert (newest["added"], newest["changed"], newest["removed"], newest["failures"]) == (3, 0, 3, 0)
    printed = night.run("rollback", str(night.catalog), oldest["run"])
    assert f"undo       beamsight rollback {night.catalog} {newest['run']}" in printed
    assert night.rows() == first and night.failures() == first_failures and night.indexed() == first_index
    back = night.history()[0]
    assert (back["action"], back["of_run"], back["index"]) == ("rollback", oldest["run"], oldest["index"])
    assert "nothing to do" in night.run("rollback", str(night.catalog), back["run"])
    night.run("rollback", str(night.catalog), newest["run"])
    assert night.rows() == second


def test_a_rollback_to_nowhere(night: Night) -> None:
    night.build()
    assert "has no run 'yesterday' that changed it" in night.run("rollback", str(night.catalog), "yesterday", code=2)
    assert "no catalog at /no/where" in night.run("rollback", "/no/where", "x", code=2)


def test_clean_removes_what_no_kept_state_needs(night: Night) -> None:
    night.build()
    night.tar("a", range(10, 15))
    night.build()
    (night.catalog / "images" / f".part-s{0:016}-{0:012}-{0:012}.parquet.01234567.tmp").write_bytes(
        b"left by a killed run"
    )
    own = night.catalog / "images" / "holiday.jpg"
    own.write_bytes(jpeg(1))
    foreign = night.catalog / "indexes" / "mine" / "manifest.json"
    foreign.parent.mkdir()
    foreign.write_text("{}")
    old, new = night.history()[::-1]
    assert "deleted 0 files" in night.run("clean", str(night.catalog))  # all of it is young
    assert "would delete 5 files (images 2, indexes 3)" in night.run(
        "clean", str(night.catalog), "--older_than", "0d", "--dry_run"
    )
    files = set(stored_files(CatalogLayout(str(night.catalog)), {}))
    assert "deleted 5 files" in night.run("clean", str(night.catalog), "--older_than", "0d")
    left = set(stored_files(CatalogLayout(str(night.catalog)), {}))
    assert own.exists() and foreign.exists()  # what is not Beamsight's is not its to delete
    assert not any(old["run"] in path or path.endswith(".tmp") for path in left) and len(files - left) == 5
    assert not (night.catalog / "indexes" / old["run"]).exists()
    assert len(night.rows()) == 12 and night.indexed() == {row["image_id"] for row in night.rows().values()}
    assert [run["can_go_back"] for run in night.history()] == [True, False]
    message = night.run("rollback", str(night.catalog), old["run"], code=2)
    assert "cannot go back to run" in message and "`beamsight clean` has deleted" in message
    assert "nothing to do" in night.build()
    assert new["run"] == current_state(CatalogLayout(str(night.catalog)), {}).record.run_id  # type: ignore[union-attr]


def test_clean_keeps_what_was_current_since_then(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nights, ten days apart; fourteen days back the first one's successor was current."""
    from datetime import datetime, timedelta

    import vlm_ops.states as states

    now = datetime.now(UTC)
    for days in (25, 15, 5):

        class Clock(datetime):
            @classmethod
            def now(cls, tz: object = None, days: int = days) -> datetime:  # type: ignore[override]
                return now - timedelta(days=days)

        monkeypatch.setattr(states, "datetime", Clock)
        night.tar("a", range(10, 10 + days))
        night.build()
        for path in night.catalog.rglob("*"):
            if path.stat().st_mtime > (now - timedelta(days=1)).timestamp():
                os.utime(path, (moment := (now - timedelta(days=days)).timestamp(), moment))
    night.run("clean", str(night.catalog), "--older_than", "14d")
    assert [run["can_go_back"] for run in night.history()] == [True, True, False]
    second = night.history()[1]["run"]
    night.run("rollback", str(night.catalog), second)
    assert len(night.rows()) == 15 + 3 + 4 and len(night.indexed()) == 22


def test_an_age_that_is_none(night: Night) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["clean", str(night.catalog), "--older_than", "soon"])
    assert stop.value.code == 2


def test_a_catalog_can_be_moved(night: Night) -> None:
    """Nothing in it tells where it is."""
    night.build()
    shutil.move(night.catalog, night.folder / "elsewhere")
    night.catalog = night.folder / "elsewhere"
    assert len(night.indexed()) == 10 and "nothing to do" in night.build()
