"""What a person sees while a build runs."""

from __future__ import annotations

import logging

import pytest

from pipelines import progress
from pipelines.progress import Progress
from schemas.samples import FileRef, ShardRef

TARS = [ShardRef(f"{n}.tar", "tar", "1", 1000) for n in range(4)]
PACK = ShardRef("folder", "files", "", 0, tuple(FileRef(f"f{n}") for n in range(10)))


def test_images_of_shards_are_estimated_from_their_bytes() -> None:
    with Progress("r", TARS, on_terminal=False) as bar:
        assert bar.expected is None
        progress.report("r", TARS[0], 5, 500)
        assert (bar.done, bar.expected) == (5, 40)
        progress.report("r", TARS[0], 10, 500)
        assert bar.expected == 60


def test_a_finished_shard_counts_with_all_its_bytes() -> None:
    with Progress("r", TARS, on_terminal=False) as bar:
        progress.report("r", TARS[0], 10, 800)
        progress.report_finished("r", TARS[0], 10)
        assert bar.expected == 40
        progress.report_finished("r", TARS[1], 12)  # an earlier run had finished it
        assert (bar.done, bar.expected) == (22, 44)


def test_single_files_are_counted_beforehand() -> None:
    with Progress("r", [PACK], on_terminal=False) as bar:
        progress.report("r", PACK, 4, 100)
        assert (bar.done, bar.expected) == (4, 10)


def test_plain_log_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_SEC", 0.0)
    caplog.set_level(logging.INFO, "pipelines.progress")
    with Progress("r", TARS, on_terminal=False):
        progress.report("r", TARS[0], 10, 1000)
        progress.report_finished("r", TARS[0], 10)
    assert "10 of about 40 images" in caplog.text and "shards 1/4" in caplog.text and "time left" in caplog.text


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture) -> None:
    with Progress("r", TARS, on_terminal=True):
        progress.report("r", TARS[0], 10, 1000)
        progress.report_finished("r", TARS[0], 10)
    shown = capsys.readouterr().err
    assert "build" in shown and "image/s" in shown and "shards 1/4" in shown


def test_reports_of_other_processes_go_nowhere() -> None:
    progress.report("unknown run", TARS[0], 1, 1)
    progress.report_finished("unknown run", TARS[0], 1)


def test_a_count_is_logged_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "LOG_INTERVAL_SEC", 0.0)
    with caplog.at_level(logging.INFO, "pipelines.progress"), progress.counting("export", 30) as advance:
        advance(10)
        advance(20)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "export: 10 of 30 images",
        "export: 30 of 30 images",
    ]
