"""Commits: what becomes live, what it replaces, and what happens when two come at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import DeltaTable

from schemas.catalog import CatalogLayout
from schemas.recipes import Recipe
from schemas.samples import FileRef, ShardRef
from tests.conftest import jpeg, tar_bytes
from vlm_ops import delta_tables
from vlm_ops.delta_tables import commit_parts, last_recipe, live_parts, open_table
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.ops import plan_ops, schema_of
from vlm_ops.parts import PartSummary
from vlm_ops.shards import ReadConfig


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
        config = EnrichConfig(self.catalog.root, self.recipe, "run", ReadConfig(10**7), device="cpu")
        return Enricher(config).enrich(shard)

    def commit(self, run_id: str, *parts: PartSummary) -> int:
        return commit_parts(self.catalog, schema_of(self.recipe.ops), parts, run_id, self.recipe, {})

    def keys(self) -> list[str]:
        return sorted(DeltaTable(self.catalog.images).to_pyarrow_table().column("key").to_pylist())

    def failed(self) -> list[str]:
        return sorted(DeltaTable(self.catalog.failures).to_pyarrow_table().column("uri").to_pylist())


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def test_nothing_is_live_before_the_commit(corpus: Corpus) -> None:
    part = corpus.tar("a.tar", "1", ["x", "y"])
    assert live_parts(open_table(corpus.catalog.images, {})) == []
    corpus.commit("r1", part)
    assert corpus.keys() == ["x", "y"]


def test_the_same_run_commits_once(corpus: Corpus) -> None:
    part = corpus.tar("a.tar", "1", ["x"])
    assert corpus.commit("r1", part) == corpus.commit("r1", part)
    assert corpus.keys() == ["x"]


def test_another_run_with_the_same_parts_changes_nothing(corpus: Corpus) -> None:
    part = corpus.tar("a.tar", "1", ["x", "bad"])
    version = corpus.commit("r1", part)
    assert corpus.commit("r2", part) == version
    assert corpus.keys() == ["x"] and len(corpus.failed()) == 1


def test_a_changed_shard_replaces_its_rows_and_failures(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x", "bad1"]), corpus.tar("b.tar", "1", ["z"]))
    corpus.commit("r2", corpus.tar("a.tar", "2", ["x", "y"]))
    assert corpus.keys() == ["x", "y", "z"]
    assert corpus.failed() == []


def test_a_changed_file_replaces_its_own_row_only(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.files({"p.jpg": "1", "q.jpg": "1", "bad.jpg": "1"}))
    corpus.commit("r2", corpus.files({"q.jpg": "2", "r.jpg": "1"}))
    table = DeltaTable(corpus.catalog.images).to_pyarrow_table()
    assert dict(zip(table.column("key").to_pylist(), table.column("source_version").to_pylist(), strict=True)) == {
        "p": "1", "q": "2", "r": "1",
    }  # fmt: skip
    assert [Path(uri).name for uri in corpus.failed()] == ["bad.jpg"]


def test_a_failed_file_that_is_mended_leaves_the_failures(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.files({"bad.jpg": "1", "bad2.jpg": "1"}))
    (corpus.folder / "bad.jpg").write_bytes(jpeg(0))
    refs = (FileRef(str(corpus.folder / "bad.jpg"), "2"),)
    corpus.commit("r2", corpus.enrich(ShardRef(str(corpus.folder), "files", "", 0, refs)))
    assert corpus.keys() == ["bad"]
    assert [Path(uri).name for uri in corpus.failed()] == ["bad2.jpg"]


def test_the_commit_names_run_and_recipe(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x"]))
    assert open_table(corpus.catalog.images, {}).history()[0]["run_id"] == "r1"
    assert last_recipe(corpus.catalog, {}) == corpus.recipe


def test_no_catalog_says_how_to_make_one(corpus: Corpus) -> None:
    with pytest.raises(FileNotFoundError, match="no catalog at .*; make one with `beamsight build"):
        last_recipe(corpus.catalog, {})


def test_of_two_commits_that_replace_the_same_shard_one_says_so(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x"]))
    loser = corpus.tar("a.tar", "2", ["x", "y"])
    winner = corpus.tar("a.tar", "3", ["z"])
    open_images = delta_tables.live_parts

    def live_parts_then_the_other_commits(table: DeltaTable) -> list:
        live = open_images(table)
        if "/images" in table.table_uri:
            monkeypatch.setattr(delta_tables, "live_parts", open_images)
            corpus.commit("winner", winner)
        return live

    monkeypatch.setattr(delta_tables, "live_parts", live_parts_then_the_other_commits)
    with pytest.raises(
        delta_tables.CommitConflictError, match="another run changed .*images.*run the same command again"
    ):
        corpus.commit("loser", loser)
    assert corpus.keys() == ["z"]


def test_a_new_op_adds_its_column(corpus: Corpus) -> None:
    corpus.commit("r1", corpus.tar("a.tar", "1", ["x"]))
    corpus.recipe = Recipe(plan_ops(["quality", "tests.toys:BrightnessOp"], "compact"), 10**7, 10**7)
    corpus.commit("r2", corpus.tar("b.tar", "1", ["y"]))
    rows = DeltaTable(corpus.catalog.images).to_pyarrow_table(columns=["key", "brightness"]).to_pylist()
    assert {row["key"]: row["brightness"] is None for row in rows} == {"x": True, "y": False}
