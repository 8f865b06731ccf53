"""The door: help, unknown commands and flags, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.cli import COMMANDS, main
from vlm_ops.models import load_text_model


def test_help_names_every_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_also_a_module(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines." + command.replace("-", "_"), "--help"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert f"usage: beamsight {command}" in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom pipelines.cli import main\nmain(['--help'])\n"
        "try: main(['build', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'apache_beam', 'pyarrow', 'transformers', 'faiss'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


def test_a_text_search_loads_no_torch(toy_catalog: Path) -> None:
    load_text_model("compact")  # the very first time, the encoder is exported, which does load torch
    code = (
        "import sys\nfrom pipelines.cli import main\n"
        f"assert main(['search', {str(toy_catalog)!r}, 'a dog']) == 0\n"
        "assert not {'torch', 'transformers', 'apache_beam'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


def test_looking_back_loads_no_torch(toy_catalog: Path) -> None:
    code = (
        "import sys\nfrom pipelines.cli import main\n"
        f"assert main(['history', {str(toy_catalog)!r}]) == main(['inspect', {str(toy_catalog)!r}]) == 0\n"
        f"assert main(['clean', {str(toy_catalog)!r}, '--dry_run']) == 0 and main(['rollback', {str(toy_catalog)!r}, 'x']) == 2\n"
        "assert not {'torch', 'transformers', 'apache_beam'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


def test_unknown_command(capsys: pytest.CaptureFixture) -> None:
    assert main(["biuld"]) == 2
    assert (
        "unknown command 'biuld'; the commands are build, retry, history, rollback, clean, index, tag, search, export, score, evaluate, train, inspect, doctor"
        in capsys.readouterr().err
    )


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert "usage: beamsight COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--catalog", "c"], "the following arguments are required: --input"),
        (
            ["build", "--input", "i", "--catalog", "c", "--max_failure_rat", "1"],
            "unknown flag '--max_failure_rat'; did you mean --max_failure_rate?",
        ),
        (
            ["build", "--input", "i", "--catalog", "c", "--max_failure_rate", "5"],
            r"argument --max_failure_rate: must be in [0, 1], got 5",
        ),
        (
            ["build", "--input", "i", "--catalog", "c", "--batch_size", "0"],
            "argument --batch_size: must be at least 1, got 0",
        ),
        (
            ["build", "--input", "i", "--catalog", "c", "--batch_size", "x"],
            "argument --batch_size: invalid whole number value: 'x'",
        ),
        (
            ["build", "--input", "i", "--catalog", "c", "--storage_options", "{"],
            "argument --storage_options: must be a JSON object, got '{'",
        ),
        (["build", "--input", "i", "--catalog", "c", "--storage_options", "[]"], "must be a JSON object, got '[]'"),
        (["build", "--input", "i", "--catalog", "c", "--ops", ","], "argument --ops: must name at least one"),
        (["search", "c", " "], "a query is empty; give a text to search for"),
        (["search", "c", "q", "-k", "0"], "argument -k: must be at least 1, got 0"),
        (["inspect"], "the following arguments are required: CATALOG"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, toy_catalog: Path
) -> None:
    import pipelines.inspect

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.inspect, "run", interrupted)
    assert main(["inspect", str(toy_catalog)]) == 130
    assert "interrupted; run the same command again, and it goes on where it stopped" in capsys.readouterr().err


def test_other_errors_are_one_line_and_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, toy_catalog: Path
) -> None:
    import pipelines.inspect

    def failing(*_: object) -> None:
        raise OSError("the network is down\nlong trace")

    monkeypatch.setattr(pipelines.inspect, "run", failing)
    assert main(["inspect", str(toy_catalog)]) == 1
    assert capsys.readouterr().err.splitlines()[0] == "beamsight inspect: failed: the network is down"
    monkeypatch.setenv("BEAMSIGHT_DEBUG", "1")
    with pytest.raises(OSError, match="the network is down"):
        cli.main(["inspect", str(toy_catalog)])
