"""The commands on a real Flink cluster, undisturbed and disturbed, beside the same on this machine.

Flink hands out every reference again after a failure; a journal that the workers write shows that nothing that was finished is
computed a second time, and that models are loaded once a process.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from pipelines.cli import main
from schemas.catalog import CatalogLayout
from tests.conftest import jpeg, tar_bytes
from tests.flink.cluster import Command, FlinkCluster, wait_until
from tests.pipelines.test_crashes import assert_same_table, table_of
from vlm_ops.states import commits

pytestmark = pytest.mark.flink
NUM_SHARDS, PER_SHARD = 10, 6
JOURNAL = "tests.toys:JournalOp"


class Journal:
    """What JournalOp wrote: which process loaded it, and which images it computed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[tuple[int, str]]:
        if not self.path.exists():
            return []
        words = (line.split(" ", 1) for line in self.path.read_text().splitlines())
        return [(int(pid), event) for pid, event in words]

    def loads(self) -> Counter[int]:
        """How often each process loaded it."""
        return Counter(pid for pid, event in self.lines() if event == "load")

    def computed(self) -> Counter[str]:
        """How often each image was computed."""
        return Counter(event for _, event in self.lines() if event != "load")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten shards of six drawn photos and a broken one."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(NUM_SHARDS):
        members = [(f"{number}-{i}.jpg", jpeg(100 * number + i)) for i in range(PER_SHARD)]
        (folder / f"{number}.tar").write_bytes(tar_bytes([*members, (f"{number}-bad.jpg", b"no image")]))
    return folder


@pytest.fixture
def undisturbed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The catalog of the corpus, built on this machine."""
    monkeypatch.setenv("BEAMSIGHT_JOURNAL", str(tmp_path / "local journal"))
    assert main(command(corpus, tmp_path / "undisturbed")) == 0
    return tmp_path / "undisturbed"


def command(corpus: Path, catalog: Path) -> list[str]:
    flags = ["--model", "python:tests.toys", "--ops", f"quality,features,embedding,{JOURNAL}", "--device", "cpu"]
    return ["build", "--input", str(corpus), "--catalog", str(catalog), "--max_failure_rate", "1",
            "--num_workers", "1", "--batch_size", "2", *flags]  # fmt: skip


def start(cluster: FlinkCluster, corpus: Path, catalog: Path, journal: Journal) -> Command:
    """A build that takes a second and a half a shard: slow enough to be disturbed."""
    flags = cluster.flags(BEAMSIGHT_JOURNAL=journal.path, BEAMSIGHT_TOY_SECONDS=0.5)
    return cluster.start_command(*command(corpus, catalog), *flags)


def wait_for_parts(catalog: Path, count: int, running: Command) -> set[Path]:
    """Waits until so many shards are finished; their parts."""

    def is_there() -> bool:
        assert running.process.poll() is None, running.process.communicate()
        return len(parts(catalog)) >= count

    wait_until(is_there, f"{count} parts")
    return parts(catalog)


def parts(catalog: Path) -> set[Path]:
    return set(catalog.glob("images/part-*"))


def images_of(finished: set[Path]) -> set[str]:
    return {uri for part in finished for uri in DeltaTable and _uris(part)}


def _uris(part: Path) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(part, columns=["uri"])["uri"].to_pylist()


def rows(catalog: Path, table: str) -> list[dict[str, Any]]:
    """Rows without what names the run, in the order of the images."""
    found = DeltaTable(str(catalog / table)).to_pyarrow_table().drop_columns(["run_id"]).to_pylist()
    return sorted(found, key=lambda row: row["uri"])


def manifest_of(catalog: Path) -> dict[str, Any]:
    (path,) = catalog.glob("runs/*/manifest.json")
    return json.loads(path.read_text())


def assert_like_undisturbed(catalog: Path, undisturbed: Path) -> None:
    """Same rows, failures and index, in one commit; and the run says of itself what an undisturbed one says."""
    assert_same_table(table_of(catalog), table_of(undisturbed))
    assert rows(catalog, "failures") == rows(undisturbed, "failures")
    assert len(commits(CatalogLayout(str(catalog)), {})) == 1
    told, expected = manifest_of(catalog), manifest_of(undisturbed)
    for name in (
        "status",
        "num_shards",
        "num_shards_reused",
        "num_images",
        "num_images_computed",
        "num_added",
        "num_failures",
    ):
        assert told[name] == expected[name], name
    assert told["num_images_computed"] == NUM_SHARDS * PER_SHARD and told["num_shards_reused"] == 0


def test_a_task_manager_is_killed(
    cluster: FlinkCluster, corpus: Path, tmp_path: Path, undisturbed: Path, journal: Journal
) -> None:
    catalog = tmp_path / "catalog"
    running = start(cluster, corpus, catalog, journal)
    finished = wait_for_parts(catalog, 3, running)
    before = journal.loads()
    assert len(before) == 2
    victim = cluster.task_managers()[0]
    victim.kill()
    finished |= parts(catalog)
    cluster.start_task_manager()
    printed = running.finish()
    print(printed, running.errors, journal.loads(), journal.computed())
    import time

    t = time.time()
    while time.time() - t < 60:
        left = [
            (p.pid, p.parent, p.command[:40], p.command[-60:])
            for p in cluster.network.processes()
            if "java" not in p.command
        ]
        print(time.time() - t, left)
        time.sleep(5)
        if not left:
            break
    assert_like_undisturbed(catalog, undisturbed)
