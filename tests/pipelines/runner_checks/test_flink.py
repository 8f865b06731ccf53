"""What `beamsight doctor --runner flink` finds: each thing that is missing, with its remedy."""

from __future__ import annotations

import json
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.cli import main
from pipelines.runner_checks.flink import (
    cancel_job,
    check_artifacts,
    check_environment,
    check_flink,
    check_job_server,
    judge_slots,
    judge_version,
)
from pipelines.runner_checks.images import describe_image, judge_image
from vlm_ops.diagnosis import Finding


@pytest.fixture
def master() -> Iterator[str]:
    """A JobManager's REST interface, as much of it as is asked."""
    pages = {
        "/config": {"flink-version": "1.19.3"},
        "/overview": {"taskmanagers": 2, "slots-total": 4, "slots-available": 3},
        "/jobs/overview": {"jobs": [
            {"jid": "a1", "name": "mine", "end-time": 1700000000000}, {"jid": "a2", "name": "mine", "end-time": -1},
            {"jid": "b1", "name": "other", "end-time": -1}, {"jid": "c1", "name": "twins", "end-time": -1},
            {"jid": "c2", "name": "twins", "end-time": -1},
        ]},
    }  # fmt: skip
    cancelled: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in pages:
                return self.send_error(404)
            body = json.dumps(pages[self.path]).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def do_PATCH(self) -> None:
            pages["/cancelled"] = cancelled
            cancelled.append(self.path)
            self.send_response(202)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def job_server(path: Path, beam_version: str, flink_version: str) -> Path:
    with zipfile.ZipFile(path, "w") as jar:
        jar.writestr("org/apache/beam/sdk/sdk.properties", f"# a comment\nversion={beam_version}\nsdk_version=x\n")
        jar.writestr(".flink-runtime.version.properties", f"project.version={flink_version}\n")
    return path


def statuses(findings: Iterator[Finding]) -> dict[str, str]:
    return {each.name: each.status for each in findings}


def test_a_cluster_that_is_ready(master: str, tmp_path: Path) -> None:
    jar = job_server(tmp_path / "server.jar", beam.__version__, "1.19.1")
    boot = tmp_path / "boot"
    boot.write_text("#!/bin/sh\n")
    boot.chmod(0o755)
    options = PipelineOptions(
        [f"--flink_master={master}", f"--flink_job_server_jar={jar}", "--environment_type=PROCESS",
         "--environment_config=" + json.dumps({"command": str(boot)})]
    )  # fmt: skip
    found = statuses(check_flink(options))
    assert found.pop("java") in ("ok", "problem")  # as this machine has it
    assert found == dict.fromkeys(("job server", "master", "slots", "artifacts", "environment"), "ok")


def test_what_is_missing_is_told_with_its_remedy(
    master: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    jar = job_server(tmp_path / "server.jar", "2.70.0", "1.20.0")
    code = main(["doctor", "--runner", "flink", f"--flink_master={master}", f"--flink_job_server_jar={jar}",
                 "--environment_type=EXTERNAL", "--environment_config=127.0.0.1:1", "--json"])  # fmt: skip
    assert code == 1
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert found["job server"]["remedy"] == f"fetch beam-runners-flink-1.20-job-server {beam.__version__}"
    assert found["master"]["status"] == "problem"
    assert found["master"]["told"].endswith("but the job server is for Flink 1.20")
    assert "--flink_version=1.19" in found["master"]["remedy"]
    assert found["worker pool"]["status"] == "problem" and "--worker_pool" in found["worker pool"]["remedy"]


def test_the_job_of_a_name_is_cancelled_and_no_other(master: str) -> None:
    cancel_job(master, "mine")
    cancel_job(master, "nobody's")
    with pytest.raises(ValueError, match="2 jobs are called twins; cancel the right one at http://127.0.0.1:"):
        cancel_job(master, "twins")
    with urllib.request.urlopen(f"http://{master}/cancelled") as answer:
        assert json.load(answer) == ["/jobs/a2?mode=cancel"]


def test_a_master_that_is_something_else(master: str) -> None:
    findings = list(check_flink(PipelineOptions([f"--flink_master={master}/other", "--environment_type=LOOPBACK"])))
    (found,) = [each for each in findings if each.name == "master"]
    assert found.status == "problem" and "answers, but is no Flink" in found.told and found.remedy


def test_a_master_that_does_not_answer() -> None:
    findings = list(check_flink(PipelineOptions(["--flink_master=127.0.0.1:1", "--environment_type=LOOPBACK"])))
    (master,) = [each for each in findings if each.name == "master"]
    assert master.status == "problem" and "127.0.0.1:1 does not answer: " in master.told
    assert master.remedy.startswith("start the cluster") and "<" not in master.told


@pytest.mark.parametrize(
    ("content", "status"),
    [(None, "problem"), (b"no jar", "problem"), (b"", "problem")],
    ids=["absent", "text", "empty"],
)
def test_a_jar_that_is_none(tmp_path: Path, content: bytes | None, status: str) -> None:
    path = tmp_path / "server.jar"
    if content is not None:
        path.write_bytes(content)
    finding, speaks = check_job_server(str(path), "1.19")
    assert finding.status == status and str(path) in finding.told and finding.remedy and speaks is None


def test_a_jar_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.jar"
    with zipfile.ZipFile(path, "w") as jar:
        jar.writestr("other", "")
    assert "is no job server of Beam" in check_job_server(str(path), "1.19")[0].told


def test_versions_and_slots() -> None:
    assert judge_version("http://m", "2.2.1", "2.2").status == "ok"
    assert judge_version("http://m", "2.1.0", "2.2").status == "problem"
    assert judge_slots({"taskmanagers": 0, "slots-total": 0, "slots-available": 0}).status == "problem"
    full = judge_slots({"taskmanagers": 1, "slots-total": 2, "slots-available": 0})
    assert full.status == "warning" and full.told == "0 of 2 free, on 1 TaskManagers"


def test_artifacts_that_the_task_managers_do_not_see(tmp_path: Path) -> None:
    assert check_artifacts(None, is_here=True).status == "ok"
    away = check_artifacts(None, is_here=False)
    assert away.status == "problem" and "--artifacts_dir" in away.remedy
    assert check_artifacts(str(tmp_path), is_here=True).status == "ok"
    assert check_artifacts(str(tmp_path), is_here=False).status == "unknown"
    assert check_artifacts(str(tmp_path / "absent"), is_here=True).status == "ok"
    assert check_artifacts(str(tmp_path / "absent"), is_here=False).status == "problem"
    (tmp_path / "file").touch()
    assert check_artifacts(str(tmp_path / "file"), is_here=True).status == "problem"


def test_environments(tmp_path: Path) -> None:
    def status(*args: str | None, is_embedded: bool = False) -> str:
        return check_environment(*args, is_embedded).status

    assert status(None, None, None) == "problem"  # Beam's own image
    assert status(None, None, None, is_embedded=True) == "ok"
    assert status("DOCKER", None, "no.example/such:1") == "unknown"
    assert status("PROCESS", None, None) == "problem"
    assert status("PROCESS", '{"command": "/no/boot"}', None) == "problem"
    (tmp_path / "boot").touch()
    found = check_environment("PROCESS", json.dumps({"command": str(tmp_path / "boot")}), None, False)
    assert found.status == "problem" and "is not executable" in found.told
    assert status("EXTERNAL", None, None) == "problem"
    elsewhere = check_environment("EXTERNAL", "localhost:50000", None, False, is_here=False)
    assert elsewhere.status == "unknown" and "each TaskManager's host" in elsewhere.told, "a sidecar"
    assert check_environment("PROCESS", '{"command": "/no/boot"}', None, False, is_here=False).status == "unknown"
    assert status("SOMETHING", None, None) == "problem"
    assert status("EXTERNAL", '{"address": "h:1"}', None) == status("EXTERNAL", "{", None) == "problem"
    assert status("DOCKER", None, "apache/beam_python3.11_sdk:2.77.0") == "problem"
    assert check_environment("LOOPBACK", None, None, False, is_here=False).status == "problem"


def test_labels_of_an_image() -> None:
    import platform

    here = {
        "org.python.version": ".".join(platform.python_version_tuple()[:2]),
        "org.apache.beam.version": beam.__version__,
    }
    assert judge_image("image", "i", here).status == "ok"
    assert judge_image("image", "i", {}).status == "unknown"
    other = judge_image("image", "i", {**here, "org.apache.beam.version": "2.1.0"})
    assert other.status == "problem" and "2.1.0" in other.told and beam.__version__ in other.told


def test_an_image_is_looked_for_by_podman_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {"docker": "exit 1", "podman": '[ "$5" = mine ] && echo \'{"org.apache.beam.version": "2.1.0"}\''}
    for name, does in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "does not say what is in it" in describe_image("image", "mine").told
    assert "other is not on this machine" in describe_image("image", "other").told
