"""Dataflow on this machine: as much of its REST API (v1b3) as submits a job, follows it and cancels it.

A job that arrives is run: the pipeline that was staged, in a process that knows nothing else, with the worker's own code.
`python -m tests.dataflow_service gs://.../pipeline.pb` is that process.
https://cloud.google.com/dataflow/docs/reference/rest
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from google.cloud import dataflow

_PATH = re.compile(
    r"/v1b3/projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/jobs(?:/(?P<id>[^/]+)(?P<messages>/messages)?)?$"
)
Work = Callable[["Service"], None]


class Service(ThreadingHTTPServer):
    """The service. What a test tells it: `work`, `refusal`, `is_mute`. What it tells a test: `jobs`, `places`.

    Attributes:
        work: What happens to a job while it is RUNNING; it is DONE afterwards, FAILED if this raises.
        refusal: HTTP status, name of the status and message by which the next jobs are refused; None: they are taken.
        is_mute: Whether it tells nothing of its jobs.
        jobs: Jobs that arrived.
        places: Their (project, region).
        num_refused: Jobs that did not get in.
        authorizations: How requests said who sends them: "Bearer", or not at all.
        cancelled: Whether a job was cancelled.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        # With "localhost" in the endpoint Beam speaks REST, without TLS. It also leaves out its checks of the options,
        # and says that the workers are of the kind `local`.
        self.url = f"http://localhost:{self.server_address[1]}"
        self.work: Work = run_staged
        self.refusal: tuple[int, str, str] | None = None
        self.is_mute = False
        self.num_refused = 0
        self.authorizations: set[str] = set()
        self.jobs: list[dataflow.Job] = []
        self.places: list[tuple[str, str]] = []
        self.cancelled = threading.Event()
        self._messages: list[dataflow.JobMessage] = []

    def cancel(self) -> None:
        """What a person does in the console."""
        self.jobs[-1].current_state = dataflow.JobState.JOB_STATE_CANCELLED
        self.cancelled.set()

    def say(self, importance: str, text: str) -> None:
        """A message of the job, such as `say("ERROR", "out of quota")`."""
        importance = dataflow.JobMessageImportance[f"JOB_MESSAGE_{importance}"]
        message = dataflow.JobMessage(
            id=str(len(self._messages)), time=datetime.now(UTC), message_text=text, message_importance=importance
        )
        self._messages.append(message)

    def create(self, project: str, region: str, body: bytes) -> dataflow.Job:
        job = dataflow.Job.from_json(body)
        self.places.append((project, region))
        job.id, job.project_id, job.location = f"2026-01-01_00_00_00-{len(self.jobs)}", project, region
        job.current_state = dataflow.JobState.JOB_STATE_RUNNING
        self.jobs.append(job)
        return job

    def start(self, job: dataflow.Job) -> None:
        threading.Thread(target=self._run, args=(job,), daemon=True).start()

    def update(self, job: dataflow.Job, body: bytes) -> dataflow.Job:
        """A request to cancel is all that is known here."""
        assert dataflow.Job.from_json(body).requested_state == dataflow.JobState.JOB_STATE_CANCELLED
        self.cancel()
        return job

    def messages(self) -> dataflow.ListJobMessagesResponse:
        return dataflow.ListJobMessagesResponse(job_messages=self._messages)

    def _run(self, job: dataflow.Job) -> None:
        try:
            self.work(self)
        except Exception as error:
            self.say("ERROR", str(error))
            state = dataflow.JobState.JOB_STATE_FAILED
        else:
            state = dataflow.JobState.JOB_STATE_DONE
        if not self.cancelled.is_set():
            job.current_state = state


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Service

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.authorizations.add(self.headers.get("Authorization", "").partition(" ")[0])
        if self.path == "/token":
            return self._answer(200, json.dumps({"access_token": "t", "expires_in": 3600, "token_type": "Bearer"}))
        if self.command == "GET" and self.server.is_mute:
            return self._answer(503, json.dumps({"error": {"code": 503, "message": "mute", "status": "UNAVAILABLE"}}))
        place = _PATH.match(self.path.partition("?")[0])
        if place is None:
            return self._answer(501, json.dumps({"error": {"code": 501, "message": f"not imitated: {self.path}"}}))
        if self.command == "POST":
            if self.server.refusal is not None:
                self.server.num_refused += 1
                code, status, message = self.server.refusal
                return self._answer(code, json.dumps({"error": {"code": code, "message": message, "status": status}}))
            job = self.server.create(place["project"], place["region"], body)
            self._answer(200, dataflow.Job.to_json(job))
            return self.server.start(job)
        job = next(job for job in self.server.jobs if job.id == place["id"])
        if self.command == "PUT":
            return self._answer(200, dataflow.Job.to_json(self.server.update(job, body)))
        if place["messages"]:
            return self._answer(200, dataflow.ListJobMessagesResponse.to_json(self.server.messages()))
        return self._answer(200, dataflow.Job.to_json(job))

    do_GET = do_POST = do_PUT = do_any  # noqa: N815

    def _answer(self, status: int, body: str) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Service]:
    """The service, as long as the block lasts."""
    service = Service()
    thread = threading.Thread(target=service.serve_forever, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        service.shutdown()
        service.server_close()


# --- workers -------------------------------------------------------------------------------------


def pipeline_url(job: dataflow.Job) -> str:
    """Where the pipeline of a job was staged."""
    return dict(job.environment.sdk_pipeline_options)["options"]["pipelineUrl"]


def run_here(service: Service) -> None:
    """Runs the job's pipeline in this process, which is quicker."""
    run_pipeline(pipeline_url(service.jobs[-1]))


def run_staged(service: Service) -> None:
    """Runs the job's pipeline in a process of its own, which has nothing but what was staged.

    Raises:
        RuntimeError: It failed; the message is its last line.
    """
    command = [sys.executable, "-m", "tests.dataflow_service", pipeline_url(service.jobs[-1])]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().splitlines()[-1])


def run_pipeline(url: str) -> None:
    """What workers do: read the staged pipeline, and run its stages. They are one process here, not a container."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability import python_urns
    from apache_beam.portability.api import beam_runner_api_pb2
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    from vlm_ops import storage

    pipeline = beam_runner_api_pb2.Pipeline.FromString(storage.read_bytes(url, {"token": "anon"}))
    for environment in pipeline.components.environments.values():
        environment.urn, environment.payload = python_urns.EMBEDDED_PYTHON, b""
    FnApiRunner().run_via_runner_api(pipeline, PipelineOptions([])).wait_until_finish()


if __name__ == "__main__":
    run_pipeline(sys.argv[1])
    sys.stdout.flush()
    os._exit(0)
