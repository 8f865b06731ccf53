"""The real command, killed at any moment, and twice at once; with a reader who looks all the time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from pipelines.cli import main
from schemas.catalog import INDEX_ROWS, CatalogLayout
from tests.conftest import jpeg, tar_bytes
from vlm_ops.states import current_state

ROOT = Path(__file__).parents[2]
NUM_SHARDS, PER_SHARD = 48, 6
SECONDS_A_BATCH = 0.1


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The first night's inputs: half of the shards, one of which will change, and a folder of files."""
    folder = tmp_path / "corpus"
    (folder / "photos").mkdir(parents=True)
    for number in range(NUM_SHARDS // 2):
        write_shard(folder, number)
    for seed in range(4):
        (folder / "photos" / f"p{seed}.jpg").write_bytes(jpeg(8000 + seed))
    return folder


def write_shard(folder: Path, number: int, first: int = 0) -> None:
    members = [(f"{number:02}-{i}.jpg", jpeg(100 * number + i)) for i in range(first, first + PER_SHARD)]
    (folder / f"{number:02}.tar").write_bytes(tar_bytes([*members, (f"{number:02}-bad.jpg", b"no image")]))


def second_night(folder: Path) -> None:
    """New shards, a changed one, one that is gone, a new file and one that is gone."""
    for number in range(NUM_SHARDS // 2, NUM_SHARDS):
        write_shard(folder, number)
    write_shard(folder, 0, first=2)
    (folder / "01.tar").unlink()
    (folder / "photos" / "p0.jpg").unlink()
    (folder / "photos" / "new.jpg").write_bytes(jpeg(9000))


def command(corpus: Path, catalog: Path) -> list[str]:
    flags = ["--model", "python:tests.toys", "--device", "cpu", "--num_threads", "1", "--max_failure_rate", "1"]
    return ["build", "--input", str(corpus), "--catalog", str(catalog), "--prune", *flags]


def start(corpus: Path, catalog: Path, seconds: float = 0.0) -> subprocess.Popen:
    """The command in a process of its own; `seconds` a batch make it slow enough to be disturbed."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *command(corpus, catalog)],
        cwd=ROOT,
        env={**os.environ, "BEAMSIGHT_TOY_SECONDS": str(seconds)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def build(corpus: Path, catalog: Path) -> None:
    """The same, undisturbed."""
    assert main(command(corpus, catalog)) == 0


def table_of(catalog: Path) -> list[tuple[str, pa.Table]]:
    """The live parts by name, with their rows in order, but for which run made them."""
    state = current_state(CatalogLayout(str(catalog)), {})
    tables = [(part.name, pq.read_table(catalog / "images" / part.name)) for part in state.images]
    return [(name.rpartition("-")[0], table.drop_columns(["run_id"])) for name, table in tables if table.num_rows]


def assert_same_table(found: list[tuple[str, pa.Table]], expected: list[tuple[str, pa.Table]]) -> None:
    """Ids, order, captions and labels equal; vectors within 1e-5."""
    rows, wanted = (pa.concat_tables([table for _, table in each]).to_pylist() for each in (found, expected))
    rows, wanted = (sorted(each, key=lambda row: row["shard_uri"]) for each in (rows, wanted))  # stable: order kept
    assert [row["uri"] for row in rows] == [row["uri"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        for column in ("features", "image_embedding"):
            np.testing.assert_allclose(row.pop(column), other.pop(column), atol=1e-5)
        assert row == other


class Reader:
    """Looks at table and index all the time, as long as the block lasts."""

    def __init__(self, catalog: Path) -> None:
        self.catalog = CatalogLayout(str(catalog))
        self.seen: list[frozenset[int]] = []
        self.errors: list[BaseException] = []
        self.num_looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look_on)

    def look(self) -> frozenset[int]:
        state = current_state(self.catalog, {})
        assert state.commit is not None
        table = DeltaTable(self.catalog.images, version=state.commit.version).to_pyarrow_table(columns=["image_id"])
        assert state.commit.record.index is not None
        index = pq.read_table(self.catalog.index_file(state.commit.record.index, INDEX_ROWS), columns=["image_id"])
        ids = frozenset(table.column("image_id").to_pylist())
        assert ids == set(index.column("image_id").to_pylist()), "table and index of different states"
        failures = DeltaTable(self.catalog.failures, version=state.commit.record.failures_version).to_pyarrow_table()
        assert failures.num_rows == state.commit.record.num_failures, "table and failures of different states"
        return ids

    def _look_on(self) -> None:
        while not self._stop.is_set():
            try:
                ids = self.look()
            except BaseException as error:  # told by the test
                self.errors.append(error)
                return
            self.num_looks += 1
            if not self.seen or self.seen[-1] != ids:
                self.seen.append(ids)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def commit_has_begun(catalog: Path) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Moments of the commit, in their order: name, and whether it has come."""
    before = {name: set(catalog.glob(name)) for name in MOMENTS}
    for name in MOMENTS:
        yield name, lambda name=name: bool(set(catalog.glob(name)) - before[name])  # type: ignore[misc]


# When the index is begun; when it is whole; between the two tables; right after the commit.
MOMENTS = (
    "indexes/*", "indexes/*/manifest.json", "failures/_delta_log/*.json", "images/_delta_log/*.json",
)  # fmt: skip


def num_parts(catalog: Path) -> int:
    return sum(1 for _ in catalog.glob("images/part-*"))


def kill_when(process: subprocess.Popen, has_come: Callable[[], bool]) -> bool:
    """Kills a command at a moment; False where it ended before."""
    while not has_come():
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return True


@pytest.mark.parametrize("num_kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_command_that_is_killed_again_and_again(
    corpus: Path, tmp_path: Path, num_kills: int, capsys: pytest.CaptureFixture
) -> None:
    catalog, undisturbed = tmp_path / "catalog", tmp_path / "undisturbed"
    build(corpus, catalog)
    build(corpus, undisturbed)
    second_night(corpus)
    build(corpus, undisturbed)
    rng = random.Random(num_kills)
    finished: dict[Path, tuple[int, int]] = {}  # parts: inode and time of writing
    kills, first_parts = 0, num_parts(catalog)
    moments = [*(lambda: False for _ in range(num_kills - len(MOMENTS))), *(f for _, f in commit_has_begun(catalog))]
    with Reader(catalog) as reader:
        for number, has_come in enumerate(moments):
            is_random = number < num_kills - len(MOMENTS)
            process = start(corpus, catalog, seconds=SECONDS_A_BATCH if is_random else 0.0)
            if is_random:
                # From the start of the command on: imports, planning, and some of the work.
                assert process.stderr is not None
                if rng.random() < 0.8:
                    process.stderr.readline()  # it has planned
                limit = time.monotonic() + rng.uniform(0, 1.5)
                # However fast the machine is, some work is left for each of the kills to come.
                enough = first_parts + NUM_SHARDS // 2 - (num_kills - len(MOMENTS) - number)
                kills += kill_when(
                    process,
                    lambda limit=limit, enough=enough: time.monotonic() > limit or num_parts(catalog) >= enough,  # type: ignore[misc]
                )
            else:
                kills += kill_when(process, has_come)
            for path, identity in finished.items():
                assert (path.stat().st_ino, path.stat().st_mtime_ns) == identity, "a finished shard was written again"
            finished = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in catalog.glob("images/part-*")}
        capsys.readouterr()
        build(corpus, catalog)
    assert kills == num_kills
    assert "nothing to do" in capsys.readouterr().out  # the last kill came right after the commit
    assert reader.errors == [] and reader.num_looks > 10
    assert len(reader.seen) == 2, "readers see the first night, then the second, and nothing between"
    assert_same_table(table_of(catalog), table_of(undisturbed))
    assert set(catalog.glob("images/part-*")) == set(finished)


def test_of_two_builds_at_once_one_wins(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    catalog = tmp_path / "catalog"
    build(corpus, catalog)
    second_night(corpus)
    with Reader(catalog) as reader:
        both = [
            start(corpus, catalog, seconds=3 * SECONDS_A_BATCH) for _ in range(2)
        ]  # they overlap, however they start
        errors = [process.communicate(timeout=180)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], errors
    message = errors[codes.index(1)].splitlines()
    assert any("another run changed" in line and "run the same command again" in line for line in message)
    assert not any("Traceback" in line for line in message)
    assert reader.errors == [] and len(reader.seen) == 2
    capsys.readouterr()
    build(corpus, catalog)
    assert "nothing to do" in capsys.readouterr().out
    undisturbed = tmp_path / "undisturbed"
    build(corpus, undisturbed)
    assert_same_table(table_of(catalog), table_of(undisturbed))
