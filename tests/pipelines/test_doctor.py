"""`beamsight doctor` as a person and as a program see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines import doctor
from pipelines.cli import main
from tests.conftest import jpeg
from vlm_ops.diagnosis import Finding

TOY = "python:tests.toys"


def findings(arguments: list[str], capsys: pytest.CaptureFixture, code: int) -> dict[str, dict[str, dict[str, Any]]]:
    """What `--json` says, by group and name."""
    capsys.readouterr()
    assert main(["doctor", "--json", *arguments]) == code
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for each in json.loads(capsys.readouterr().out)["findings"]:
        found.setdefault(each["group"], {})[each["name"]] = each
    return found


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two photos with the catalog of them beside it."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "photos").mkdir()
    for seed in range(2):
        (folder / "photos" / f"{seed}.jpg").write_bytes(jpeg(seed))
    arguments = ["--input", str(folder / "photos"), "--model", TOY, "--device", "cpu"]
    assert main(["build", "--catalog", str(folder / "catalog"), *arguments]) == 0
    return folder


def test_a_machine_that_is_ready(toy: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(path for path in toy.rglob("*"))
    where = ["--catalog", str(toy / "catalog"), "--input", str(toy / "photos"), "--device", "cpu", "--load"]
    found = findings(where, capsys, 0)
    assert list(found) == ["packages", "cpu", "cuda", "faiss", "disk", "storage", "models", "local runner"]
    assert all(each["status"] in ("ok", "warning", "unknown") for group in found.values() for each in group.values())
    assert found["storage"]["catalog"]["told"].endswith("a small file was written, read, listed and deleted")
    assert found["storage"]["input"]["told"].endswith("0 shards and 2 single files; the first one can be read")
    assert "5 ops" in found["models"]["recipe"]["told"]
    assert found["models"]["quality"]["told"] == "loaded"
    assert found["models"][TOY]["told"].startswith("loaded, and encoded a text into 3 dimensions")
    assert "compact" not in found["models"]
    assert sorted(path for path in toy.rglob("*")) == before


def test_a_model_of_another_revision(toy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import toys
    from vlm_ops.models import ModelInfo

    produces = toys.describe(TOY).produces
    monkeypatch.setattr(toys, "describe", lambda spec, settings=None: ModelInfo(spec, "2", produces))
    told = findings(["--catalog", str(toy / "catalog")], capsys, 1)["models"][TOY]
    assert told["status"] == "problem"
    assert told["told"] == f"the recipe asks for model {TOY}@1, but {TOY}@2 is installed here"
    assert told["remedy"].startswith("install the same version of beamsight")


def test_what_is_wrong_is_told_with_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    arguments = ["--catalog", str(tmp_path / "file" / "c"), "--input", str(tmp_path / "none"), "--model", "compct"]
    capsys.readouterr()
    assert main(["doctor", *arguments]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "  PROBLEM compct           unknown model 'compct'" in lines
    assert any(line.strip().startswith("-> known models: compact") for line in lines)
    assert f"no input matches '{tmp_path}/none'" in " ".join(line.strip() for line in lines)
    assert lines[-1] == "4 problems"  # the folder counts for its space and for its use


def test_a_catalog_that_is_not_there_yet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = findings(["--catalog", str(tmp_path / "new"), "--device", "cpu"], capsys, 0)
    assert found["models"]["recipe"]["told"] == f"no catalog at {tmp_path}/new yet"
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_fails_stops_no_other(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[Finding]:
        raise OSError("the disk is gone")
        yield

    monkeypatch.setattr(doctor, "check_cpu", broken)
    found = findings(["--device", "cpu"], capsys, 1)
    assert found["cpu"]["check"]["told"] == "could not be looked at any further: OSError: the disk is gone"
    assert found["models"]["compact"]["status"] == "ok"


def test_a_table_fits_the_terminal() -> None:
    found = [
        Finding("a", "ok", "1.0", group="packages"),
        Finding("torch", "problem", "is missing, " + "and more " * 20, "pip install torch", "packages"),
        Finding("b", "ok", "2.0rc1", group="packages"),
        Finding("a name that is longer than its column", "unknown", "told", group="packages"),
    ]
    lines = doctor.as_table("packages", found, 60).splitlines()
    assert lines[0] == "packages"
    assert lines[1].startswith("  PROBLEM torch            is missing, and more")
    assert " " * 27 + "-> pip install torch" in lines
    assert lines[-3:] == [
        "  unknown a name that is longer than its column", " " * 27 + "told", "  ok      2 packages       a 1.0, b 2.0rc1",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 60


def test_without_heavy_packages_it_says_which() -> None:
    """Nothing is imported before the check that needs it."""
    code = (
        "import sys\nfrom pipelines.cli import main\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'faiss', 'apache_beam', 'onnxruntime'): raise ImportError(f'no {name} here')\n"
        "sys.meta_path.insert(0, Missing())\n"
        "sys.exit(main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    for name in ("torch", "faiss", "onnxruntime", "Apache Beam"):
        assert f"  PROBLEM {name} " in done.stdout
    assert "cannot be imported: ImportError: no torch here" in done.stdout


def test_nobody_is_told_what_is_run(tmp_path: Path) -> None:
    """ONNX Runtime keeps a number of the machine in the user's cache where it may send what it sees."""
    code = "import vlm_ops, onnxruntime, os, sys; sys.exit(os.environ['ORT_DISABLE_TELEMETRY'] != '1')"
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(tmp_path.rglob("*onnxruntime*"))
