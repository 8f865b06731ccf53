"""The commands on a real Flink cluster, undisturbed and disturbed, beside the same on this machine.

Flink hands out every reference again after a failure; a journal that the workers write shows that nothing that was finished is
computed a second time, and that models are loaded once a process.
"""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from pipelines.cli import main
from schemas.catalog import CatalogLayout
from tests.conftest import DATA, jpeg, tar_bytes
from tests.flink.cluster import Command, FlinkCluster, wait_until
from tests.flink.network import Process
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
            "--num_threads", "1", "--batch_size", "2", *flags]  # fmt: skip


def start(cluster: FlinkCluster, corpus: Path, catalog: Path, journal: Journal) -> Command:
    """A build that takes a second and a half a shard: slow enough to be disturbed."""
    flags = cluster.flags(BEAMSIGHT_JOURNAL=journal.path, BEAMSIGHT_TOY_SECONDS=0.5)
    return cluster.start_command(*command(corpus, catalog), *flags)


def parts(catalog: Path) -> set[Path]:
    return set(catalog.glob("images/part-*"))


def wait_for_parts(catalog: Path, count: int, running: Command) -> None:
    """Waits until so many shards are finished."""
    wait_until(lambda: len(parts(catalog)) >= count or running.process.poll() is not None, f"{count} parts")
    assert running.process.poll() is None, running.process.communicate()


def rows(catalog: Path, table: str) -> list[dict[str, Any]]:
    """Rows without what names the run, in the order of their images."""
    found = DeltaTable(str(catalog / table)).to_pyarrow_table()
    return sorted(found.drop_columns(["run_id"]).to_pylist(), key=lambda row: row["uri"])


def search(catalog: Path, text: str, capsys: pytest.CaptureFixture) -> list[tuple[str, float]]:
    """What is found, with its score."""
    capsys.readouterr()
    assert main(["search", str(catalog), text, "--json", "-k", "20"]) == 0
    return [
        (hit["uri"], pytest.approx(hit["score"], abs=1e-4)) for hit in json.loads(capsys.readouterr().out)["results"]
    ]


def assert_like_undisturbed(catalog: Path, undisturbed: Path, num_reused: int = 0) -> None:
    """Same rows and failures, in one commit; the run's manifest tells what it did itself."""
    assert_same_table(table_of(catalog), table_of(undisturbed))
    assert rows(catalog, "failures") == rows(undisturbed, "failures")
    assert len(commits(CatalogLayout(str(catalog)), {})) == 1
    (path,) = catalog.glob("runs/*/manifest.json")
    told = json.loads(path.read_text())
    assert (told["status"], told["num_shards"], told["num_shards_reused"]) == ("committed", NUM_SHARDS, num_reused)
    assert told["num_images"] == told["num_added"] == NUM_SHARDS * PER_SHARD
    assert told["num_images_computed"] == PER_SHARD * (NUM_SHARDS - num_reused)


def assert_computed_once(journal: Journal, finished: set[Path]) -> None:
    """What was finished is not computed a second time; and of the rest, only what was at work when it broke off: a shard a worker."""
    images = {uri for part in finished for uri in pq.read_table(part, columns=["uri"])["uri"].to_pylist()}
    computed = journal.computed()
    assert len(images) >= 3 * PER_SHARD and {computed[uri] for uri in images} == {1}
    assert len(computed) == NUM_SHARDS * PER_SHARD
    assert len({uri.partition("#")[0] for uri, count in computed.items() if count > 1}) <= 2
    assert set(journal.loads().values()) == {1}, "models are loaded once a process"


def test_build_index_and_tag_are_as_on_this_machine(
    cluster: FlinkCluster,
    tmp_path: Path,
    journal: Journal,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """With the default model; on real photos too, where they are."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for number in range(4):
        members = [(f"{number}-{i}.jpg", jpeg(100 * number + i)) for i in range(6)]
        (inputs / f"drawn{number}.tar").write_bytes(tar_bytes([*members, (f"{number}-bad.jpg", b"no image")]))
    for number, photos in enumerate(real_photos(shards=4, each=24)):
        (inputs / f"real{number}.tar").write_bytes(tar_bytes(photos))
    (inputs / "cut.tar").write_bytes(tar_bytes([(f"cut-{i}.jpg", jpeg(900 + i)) for i in range(6)])[:9000])
    (inputs / "files").mkdir()
    for seed in range(5):
        (inputs / "files" / f"{seed}.jpg").write_bytes(jpeg(seed))
    here, there = tmp_path / "here", tmp_path / "there"
    flags = ["--device", "cpu", "--max_failure_rate", "0.5", "--ops", f"default,{JOURNAL}", "--num_threads", "1"]
    build = ["build", "--input", str(inputs), *flags]
    monkeypatch.setenv("BEAMSIGHT_JOURNAL", str(tmp_path / "local journal"))
    assert main([*build, "--catalog", str(here)]) == main(["tag", str(here)]) == 0

    running = cluster.start_command(*build, "--catalog", there, *cluster.flags(BEAMSIGHT_JOURNAL=journal.path))
    wait_until(lambda: len(journal.loads()) == 2 or running.process.poll() is not None, "both workers")
    task_managers = {each.pid for each in cluster.task_managers()}
    boots = {each.pid: each.parent for each in cluster.network.processes("--provision_endpoint")}
    workers = {each.pid: boots[each.parent] for each in cluster.workers()}
    assert "images " in running.finish()
    assert {workers[pid] for pid in journal.loads()} == task_managers, "one Python process a TaskManager"
    assert set(journal.loads().values()) == {1}, "models are loaded once a process"
    assert set(journal.computed().values()) == {1}
    assert_same_table(table_of(there), table_of(here))
    assert rows(there, "failures") == rows(here, "failures") and len(rows(here, "failures")) == 5
    found = search(here, "a dog on the beach", capsys)
    assert len(found) == 20 and search(there, "a dog on the beach", capsys) == found

    printed = cluster.start_command("index", there, *cluster.flags()).finish()
    assert f"{len(rows(here, 'images'))} vectors" in printed
    newest, older = (commit.record for commit in commits(CatalogLayout(str(there)), {}))
    assert newest.index != older.index and search(there, "a dog on the beach", capsys) == found

    printed = cluster.start_command("tag", there, *cluster.flags()).finish()
    assert f"tagged     {len(rows(here, 'images'))} images" in printed
    assert_same_tags(rows(there, "tags"), rows(here, "tags"))


def real_photos(shards: int, each: int) -> list[list[tuple[str, bytes]]]:
    """Some photos of flickr8k, as members of shards; none where they are not."""
    path = DATA / "flickr8k" / "dev-00000.tar"
    if not path.exists():
        return []
    with tarfile.open(path) as archive:
        names = [name for name in archive.getnames() if name.endswith(".jpg")][: shards * each]
        members = [(name, archive.extractfile(name).read()) for name in names]  # type: ignore[union-attr]
    return [members[start : start + each] for start in range(0, len(members), each)]


def assert_same_tags(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal but for the last digits of scores."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 3)
        if isinstance(value, dict):
            return {name: rounded(each) for name, each in value.items()}
        return [rounded(each) for each in value] if isinstance(value, list) else value

    assert len(found) == len(expected) > 0
    for row, other in zip(found, expected, strict=True):
        assert rounded(row) == rounded(other)


def test_a_task_manager_is_killed(
    cluster: FlinkCluster, corpus: Path, tmp_path: Path, undisturbed: Path, journal: Journal
) -> None:
    catalog = tmp_path / "catalog"
    running = start(cluster, corpus, catalog, journal)
    wait_for_parts(catalog, 3, running)
    victim = cluster.task_managers()[0]
    orphans = cluster.network.descendants(victim)  # a container would take them along; here they try to go on
    victim.kill()
    finished = parts(catalog)
    assert len(finished) < NUM_SHARDS and orphans
    cluster.start_task_manager()
    printed = running.finish()
    for orphan in orphans:
        orphan.kill()
    assert f"images     {NUM_SHARDS * PER_SHARD} (shards: {NUM_SHARDS})\n" in printed
    assert_like_undisturbed(catalog, undisturbed)
    assert_computed_once(journal, finished)
    cluster.wait_for(2)


def test_python_workers_are_killed_at_work_and_after_the_commit(
    cluster: FlinkCluster, corpus: Path, tmp_path: Path, undisturbed: Path, journal: Journal
) -> None:
    """The second time they die between the commit and the end of the step that publishes, which Flink then takes again."""
    catalog = tmp_path / "catalog"
    running = start(cluster, corpus, catalog, journal)
    wait_for_parts(catalog, 3, running)
    victim = next(iter(journal.loads()))
    next(each for each in cluster.workers() if each.pid == victim).kill()
    finished = parts(catalog)
    assert len(finished) < NUM_SHARDS
    commit = catalog / "images" / "_delta_log" / f"{1:020}.json"
    workers: list[Process] = []
    while not commit.exists():  # who publishes is there for seconds before, and done within milliseconds
        assert running.process.poll() is None, running.process.communicate()
        workers = cluster.workers()
        with contextlib.suppress(TimeoutError):
            wait_until(commit.exists, "the commit", timeout_sec=1, every_sec=0.0005)
    for worker in workers:
        worker.kill()
    assert not any(catalog.glob("runs/*/manifest.json")), "it was killed too late"
    running.finish()
    assert_like_undisturbed(catalog, undisturbed)
    assert_computed_once(journal, finished)


def test_a_job_is_cancelled_and_submitted_again(
    cluster: FlinkCluster, corpus: Path, tmp_path: Path, undisturbed: Path, journal: Journal
) -> None:
    """Cancelled by Ctrl-C in the terminal, which the job server hears too."""
    catalog = tmp_path / "catalog"
    running = start(cluster, corpus, catalog, journal)
    wait_for_parts(catalog, 3, running)
    (job,) = cluster.jobs("RUNNING")
    running.interrupt()
    running.finish(code=130)
    assert (
        "interrupted; run the same command again" in running.errors and "could not be cancelled" not in running.errors
    )
    wait_until(lambda: cluster.ask(f"/jobs/{job['jid']}")["state"] == "CANCELED", "the job to be cancelled", 30)
    assert not cluster.network.processes("--job-port"), "no job server is left"
    finished = parts(catalog)
    assert len(finished) < NUM_SHARDS
    printed = start(cluster, corpus, catalog, journal).finish()
    assert f"(shards: {NUM_SHARDS}, {len(finished)} of them finished by an earlier run)" in printed
    assert_like_undisturbed(catalog, undisturbed, num_reused=len(finished))
    assert_computed_once(journal, finished)


def test_a_worker_pool_beside_the_only_task_manager(
    cluster: FlinkCluster, corpus: Path, tmp_path: Path, undisturbed: Path, journal: Journal
) -> None:
    """EXTERNAL, by Beam's own pool, as it runs in a container beside each TaskManager."""
    cluster.stop_task_manager()
    cluster.wait_for(1)
    with cluster.worker_pool(BEAMSIGHT_JOURNAL=journal.path) as address:
        external = ["--environment_type=EXTERNAL", f"--environment_config={address}", "--parallelism=1"]
        printed = cluster.start_command(*command(corpus, tmp_path / "catalog"), *cluster.flags(), *external).finish()
    cluster.start_task_manager()
    assert f"images     {NUM_SHARDS * PER_SHARD} (shards: {NUM_SHARDS})" in printed
    assert_like_undisturbed(tmp_path / "catalog", undisturbed)
    assert list(journal.loads().values()) == [1], "one process"
    cluster.wait_for(2)


def test_what_a_worker_meets_is_told(cluster: FlinkCluster, corpus: Path, tmp_path: Path) -> None:
    """Once, without a traceback: here an op that finds no journal in its environment."""
    running = cluster.start_command(*command(corpus, tmp_path / "catalog"), *cluster.flags())
    running.finish(code=1)
    assert running.errors.count("BEAMSIGHT_JOURNAL") == 1 and "Traceback" not in running.errors, running.errors
    assert 'beamsight build: failed: KeyError: "BEAMSIGHT_JOURNAL"\n' in running.errors
    assert not parts(tmp_path / "catalog") and not cluster.network.processes("--job-port")


def test_doctor_finds_nothing_amiss(cluster: FlinkCluster, tmp_path: Path) -> None:
    printed = cluster.start_command("doctor", "--catalog", tmp_path / "c", *cluster.flags()).finish()
    assert "Flink 1.19.3 at http://127.0.0.1:8081" in printed and "2 of 2 free, on 2 TaskManagers" in printed
    assert "PROBLEM" not in printed
