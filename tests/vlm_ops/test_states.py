"""States of a catalog: what a commit makes visible, what it replaces, and what happens when two come at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from schemas.catalog import CatalogLayout, parse_part_name, part_name
from schemas.manifests import RunManifest
from schemas.recipes import Recipe
from schemas.samples import FileRef, ShardRef
from tests.conftest import jpeg, tar_bytes
from vlm_ops import publishing, states
from vlm_ops.delta_tables import CommitConflictError, LivePart
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.models.settings import CPU
from vlm_ops.ops import plan_ops, schema_of
from vlm_ops.parts import PartSummary, read_summary, writing_part
from vlm_ops.publishing import PublishConfig, publish_run
from vlm_ops.shards import ReadConfig
from vlm_ops.states import (
    CatalogState,
    Changes,
    Gone,
    commit_parts,
    count_changes,
    current_state,
    existing_state,
    new_record,
    parts_after,
)


class Corpus:
    """A small catalog that parts are made for by the real worker code."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog = CatalogLayout(str(folder / "catalog"))
        self.recipe = Recipe(plan_ops(["quality"], "compact"), 10**7, 10**7)

    def tar(self, name: str, version: str, keys: list[str]) -> PartSummary:
        data = tar_bytes([(f"{key}.jpg", b"bad" if key.startswith("bad") else jpeg(0)) for key in keys])
        (self.folder / name).write_bytes(data)
        return self.enrich(ShardRef(str(self.folder / name), "tar", version, len(data)))

    def files(self, versions: dict[str, str]) -> PartSummary:
        for name in versions:
            (self.folder / name).write_bytes(b"bad" if name.startswith("bad") else jpeg(1))
        refs = tuple(FileRef(str(self.folder / name), version) for name, version in versions.items())
        return self.enrich(ShardRef(str(self.folder), "files", "", 0, refs))

    def enrich(self, shard: ShardRef) -> PartSummary:
        config = EnrichConfig(self.catalog.root, self.recipe, "run", ReadConfig(10**7), settings=CPU)
        return Enricher(config).enrich(shard)

    def commit(self, run_id: str, *parts: PartSummary, gone: Gone = Gone(), sequence: int | None = None) -> RunManifest:  # noqa: B008
        sequence = self.state().sequence if sequence is None else sequence
        config = PublishConfig(
            self.catalog.root, self.recipe, run_id, "build", "2026-01-01T00:00:00+00:00", (), gone, sequence, None
        )
        return publish_run(config, parts)

    def state(self) -> CatalogState:
        return current_state(self.catalog, {})

    def keys(self) -> list[str]:
        return sorted(DeltaTable(self.catalog.images).to_pyarrow_table().column("key").to_pylist())

    def failed(self) -> list[str]:
        return sorted(DeltaTable(self.catalog.failures).to_pyarrow_table().column("uri").to_pylist())

    def changes(self) -> tuple[int, int, int]:
        record = self.state().record
        assert record is not None
        return record.num_added, record.num_changed, record.num_removed


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def test_nothing_is_live_before_the_commit(corpus: Corpus) -> None:
    part = corpus.tar("a.tar", "1", ["x", "y"])
    assert corpus.state() == CatalogState()
    corpus.commit("r1", part)
    assert corpus.keys() == ["x", "y"] and corpus.changes() == (2, 0, 0)


def test_the_same_run_commits_once(corpus: Corpus) -> None:
    part = corpus.tar("a.tar", "1", ["x"])
    first, again = corpus.commit("r1", part), corpus.commit("r1", part)
    assert (first.table_version, first.num_added) == (again.table_version, again.num_added) == (1, 1)
    assert corpus.keys() == ["x"]


def test_a_run_that_publishes_again_says_the_same(corpus: Corpus) -> None:
    """A runner may lose what was published a moment ago, and have it published again."""
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x", "y"]), corpus.tar("b.tar", "1", ["z"]))
    damaged = corpus.tar("a.tar", "2", ["x", "y"])
    path = corpus.folder / "a.tar"
    path.write_bytes(path.read_bytes()[:700])
    damaged = corpus.enrich(ShardRef(str(path), "tar", "3", 700))
    first = corpus.commit("r2", damaged)
    corpus.commit("r3", corpus.tar("c.tar", "1", ["c"]))  # another one came in between
    again = corpus.commit("r2", damaged, sequence=1)
    assert first.num_lost_images > 0
    untimed = {"finished_at": "", "wall_sec": 0.0}
    assert replace(again, **untimed) == replace(first, **untimed)  # type: ignore[arg-type]
    assert corpus.keys() == ["c", "z"]


def test_another_run_with_the_same_parts_changes_nothing(corpus: Corpus) -> None:
    part = corpus.tar("a.tar", "1", ["x", "bad"])
    first = corpus.commit("r1", part)
    assert corpus.commit("r2", part).table_version == first.table_version
    assert corpus.keys() == ["x"] and len(corpus.failed()) == 1


def test_a_changed_shard_replaces_its_rows_and_failures(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x", "bad1"]), corpus.tar("b.tar", "1", ["z"]))
    corpus.commit("r2", corpus.tar("a.tar", "2", ["x", "y"]))
    assert corpus.keys() == ["x", "y", "z"] and corpus.changes() == (1, 0, 0)
    assert corpus.failed() == []


def test_a_changed_file_replaces_its_own_row_only(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.files({"p.jpg": "1", "q.jpg": "1", "bad.jpg": "1"}))
    corpus.commit("r2", corpus.files({"q.jpg": "2", "r.jpg": "1"}))
    table = DeltaTable(corpus.catalog.images).to_pyarrow_table()
    assert dict(zip(table.column("key").to_pylist(), table.column("source_version").to_pylist(), strict=True)) == {
        "p": "1", "q": "2", "r": "1",
    }  # fmt: skip
    assert [Path(uri).name for uri in corpus.failed()] == ["bad.jpg"]
    assert corpus.changes() == (1, 0, 0)  # the bytes of q are the same


def test_a_failed_file_that_is_mended_leaves_the_failures(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.files({"bad.jpg": "1", "bad2.jpg": "1"}))
    assert corpus.state().images == ()
    (corpus.folder / "bad.jpg").write_bytes(jpeg(0))
    refs = (FileRef(str(corpus.folder / "bad.jpg"), "2"),)
    corpus.commit("r2", corpus.enrich(ShardRef(str(corpus.folder), "files", "", 0, refs)))
    assert corpus.keys() == ["bad"]
    assert [Path(uri).name for uri in corpus.failed()] == ["bad2.jpg"]


def test_what_is_gone_leaves_both_tables(corpus: Corpus) -> None:
    tar = corpus.tar("a.tar", "1", ["x", "bad1"])
    corpus.commit("r1", tar, corpus.files({"p.jpg": "1", "bad.jpg": "1", "q.jpg": "1"}))
    place = parse_part_name(tar.name)
    assert place is not None
    uris = tuple(str(corpus.folder / name) for name in ("p.jpg", "bad.jpg"))
    corpus.commit("r2", gone=Gone(frozenset([place.location_id]), uris))
    assert corpus.keys() == ["q"] and corpus.failed() == [] and corpus.changes() == (0, 0, 2)


def test_images_with_other_bytes_or_by_another_recipe_have_changed(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x", "y"]))
    data = tar_bytes([("x.jpg", jpeg(0)), ("y.jpg", jpeg(1)), ("z.jpg", jpeg(2))])
    (corpus.folder / "a.tar").write_bytes(data)
    corpus.commit("r2", corpus.enrich(ShardRef(str(corpus.folder / "a.tar"), "tar", "2", len(data))))
    assert corpus.changes() == (1, 1, 0)
    corpus.recipe = Recipe(plan_ops(["quality"], "compact"), 10**8, 10**7)
    corpus.commit("r3", corpus.enrich(ShardRef(str(corpus.folder / "a.tar"), "tar", "2", len(data))))
    assert corpus.changes() == (0, 3, 0)


def test_a_file_that_moves_from_pack_to_pack_has_not_changed(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.files({"p.jpg": "1", "q.jpg": "1"}), corpus.tar("a.tar", "1", ["x"]))
    corpus.commit("r2", corpus.files({"p.jpg": "1"}), corpus.files({"q.jpg": "1", "r.jpg": "1"}))
    assert corpus.keys() == ["p", "q", "r", "x"] and corpus.changes() == (1, 0, 0)


def test_parts_of_shards_that_are_just_new_or_gone_are_not_read(corpus: Corpus) -> None:
    """They need not even be there."""
    new, gone = (LivePart(part_name(f"s{digit * 16}-{'0' * 12}", "0" * 12), 7, 1) for digit in "ab")
    assert count_changes(corpus.catalog, [gone], [new], {}) == Changes(7, 0, 7)
    kept = corpus.tar("a.tar", "1", ["x", "y"]).images
    assert count_changes(corpus.catalog, [kept, gone], [kept, new], {}) == Changes(7, 0, 7)
    other = corpus.tar("a.tar", "2", ["y", "z"]).images
    assert count_changes(corpus.catalog, [kept, gone], [other, new], {}) == Changes(8, 0, 8)


def test_the_commit_names_run_and_recipe(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x"]))
    assert DeltaTable(corpus.catalog.images).history()[0]["run_id"] == "r1"
    assert existing_state(corpus.catalog, {}).record.recipe == corpus.recipe


def test_no_catalog_says_how_to_make_one(corpus: Corpus) -> None:
    with pytest.raises(FileNotFoundError, match="no catalog at .*; make one with `beamsight build"):
        existing_state(corpus.catalog, {})


@pytest.mark.parametrize("shard", ["a.tar", "b.tar"])
def test_of_two_runs_at_once_one_says_so(corpus: Corpus, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they add different shards, which Delta alone would let pass: the index would lack one of them."""
    corpus.commit("r1", corpus.tar("0.tar", "1", ["x"]))
    loser, winner = corpus.tar("a.tar", "2", ["x2", "y"]), corpus.tar(shard, "3", ["z"])
    count = publishing.count_changes

    def count_while_the_other_commits(*arguments: Any) -> Changes:
        monkeypatch.setattr(publishing, "count_changes", count)
        corpus.commit("winner", winner)
        return count(*arguments)

    monkeypatch.setattr(publishing, "count_changes", count_while_the_other_commits)
    with pytest.raises(CommitConflictError, match="another run changed .*images.*run the same command again"):
        corpus.commit("loser", loser)
    assert corpus.keys() == ["x", "z"]
    corpus.commit("loser again", loser)
    assert corpus.keys() == ["x", "x2", "y"] + (["z"] if shard == "b.tar" else [])


def test_a_run_that_was_planned_from_an_older_state_stops(corpus: Corpus) -> None:
    loser = corpus.tar("a.tar", "1", ["x"])
    corpus.commit("winner", corpus.tar("b.tar", "1", ["y"]))
    with pytest.raises(CommitConflictError, match="1 commits since this run began"):
        corpus.commit("loser", loser, sequence=0)
    assert corpus.keys() == ["y"]


def test_commits_at_the_very_same_time(corpus: Corpus) -> None:
    """Threads that have all planned from the same state: exactly one commits."""
    corpus.commit("r1", corpus.tar("0.tar", "1", ["x"]))
    parts = [corpus.tar(f"{number}.tar", "1", [f"k{number}"]) for number in range(1, 5)]
    state = corpus.state()

    def attempt(number: int) -> bool:
        after = parts_after(corpus.catalog, state, [parts[number]], Gone(), {})
        record = new_record(f"run{number}", "build", corpus.recipe, None, after)
        try:
            commit_parts(corpus.catalog, state, after, record, {}, schema_of(corpus.recipe.ops))
        except CommitConflictError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(attempt, range(4)))
    assert sum(won) == 1 and corpus.keys() == sorted(["x", f"k{won.index(True) + 1}"])


def test_a_run_that_is_killed_between_the_two_tables_changes_nothing(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x", "bad1"]))
    part = corpus.tar("b.tar", "1", ["y", "bad2"])
    before, real = corpus.state(), states.set_live

    def die_before_the_images(uri: str, *arguments: Any) -> int:
        if uri == corpus.catalog.images:
            raise KeyboardInterrupt
        return real(uri, *arguments)

    monkeypatch.setattr(states, "set_live", die_before_the_images)
    with pytest.raises(KeyboardInterrupt):
        corpus.commit("r2", part)
    assert corpus.state() == before and len(before.failures) == 1
    monkeypatch.setattr(states, "set_live", real)
    corpus.commit("r3", part)
    assert corpus.keys() == ["x", "y"] and len(corpus.state().failures) == 2


@pytest.mark.parametrize("table", ["images", "failures"])
def test_parts_that_are_gone_are_not_committed(corpus: Corpus, table: str) -> None:
    """`clean` at the wrong moment, say."""
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x"]))
    part = corpus.tar("b.tar", "1", ["y", "bad"])
    (Path(corpus.catalog.root) / table / (part.name if table == "images" else part.failures_name)).unlink()
    with pytest.raises(RuntimeError, match="1 parts of this run are not in .* any more.*run the same command again"):
        corpus.commit("r2", part)
    assert corpus.keys() == ["x"]


def test_a_new_op_adds_its_column(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x"]))
    corpus.recipe = Recipe(plan_ops(["quality", "tests.toys:BrightnessOp"], "compact"), 10**7, 10**7)
    corpus.commit("r2", corpus.tar("b.tar", "1", ["y"]))
    rows = DeltaTable(corpus.catalog.images).to_pyarrow_table(columns=["key", "brightness"]).to_pylist()
    assert {row["key"]: row["brightness"] is None for row in rows} == {"x": True, "y": False}


def test_a_committed_part_never_changes_its_bytes(corpus: Corpus) -> None:
    """Another worker that was as far with the same shard comes too late, and takes what is there."""
    part = corpus.tar("a.tar", "1", ["x", "bad"])
    path = Path(corpus.catalog.images) / part.name
    before = path.read_bytes()
    shard = ShardRef(str(corpus.folder / "a.tar"), "tar", "1", 0)
    with writing_part(corpus.catalog, shard, schema_of(corpus.recipe.ops), corpus.recipe.recipe_id, "late", {}, {}):
        pass
    assert path.read_bytes() == before and read_summary(corpus.catalog, part.name, {}) == part
