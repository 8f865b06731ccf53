"""One job: submitted, waited for, cancelled with the command that waits, and its failure told in one line."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    StandardOptions,
)
from apache_beam.runners.runner import PipelineState

from pipelines.dataflow_jobs import check_staging, page_of, seen, told_in_one_line
from pipelines.runner_checks.flink import EMBEDDED, cancel_job

if TYPE_CHECKING:
    from apache_beam.runners.portability.job_server import JobServer
    from apache_beam.runners.runner import PipelineResult, PipelineRunner

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def run_to_end(pipeline: beam.Pipeline) -> PipelineResult | None:
    """Runs a pipeline and waits. Beam's workers print the traceback of an error to stderr wherever it
    passes; the error comes to the caller all the same, who says it once.

    Returns:
        What came of it; None where `--template_location` was given: the launcher of a Flex Template gives it, and submits what
        is written there.

    Raises:
        ValueError: Dataflow refused the job for what it is, or for who asks.
        RuntimeError: The job failed, or somebody cancelled it.
        LostJobError: What became of a job on Dataflow is not known.
    """
    options = pipeline.options
    is_dataflow = options.view_as(StandardOptions).runner == "DataflowRunner"
    shown = sys.stderr if os.environ.get("BEAMSIGHT_DEBUG") else io.StringIO()
    told = told_in_one_line() if is_dataflow else contextlib.nullcontext()
    with contextlib.redirect_stderr(shown), _job_server_of(pipeline.runner), told, _terminated_as_interrupted(options):
        if is_dataflow:
            check_staging(options)
        try:
            result = pipeline.run()
        except KeyboardInterrupt:
            _cancel_at_flink(options)
            raise
        if template := options.view_as(GoogleCloudOptions).template_location:
            logger.info("the job was written to %s", template)
            return None
        if is_dataflow:
            logger.info("the job's page is %s", page_of(result, options))
        elif master := _master(options):
            logger.info("the job %s is at %s", options.view_as(GoogleCloudOptions).job_name, master)
        try:
            with seen() if is_dataflow else contextlib.nullcontext():
                state = result.wait_until_finish()
        except KeyboardInterrupt:
            _cancel(result, options)
            raise
        except RuntimeError as error:
            if "JobCancellationException" in str(error):  # Flink's, with Java's traceback
                raise RuntimeError("the job was cancelled") from error
            raise
    if state not in (PipelineState.DONE, None):
        raise RuntimeError(f"the job ended in the state {state}")
    return result


@contextlib.contextmanager
def _terminated_as_interrupted(options: PipelineOptions) -> Iterator[None]:
    """Whoever ends the command by SIGTERM, as schedulers do, means its job on other machines too. Work in this process just
    ends."""
    is_here = options.view_as(StandardOptions).runner == "FnApiRunner"
    if is_here or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _job_server_of(runner: PipelineRunner) -> Iterator[None]:
    """The job server that a portable runner starts lives as long as the block: it listens on every interface, and Beam would
    stop it only at the exit of the process, which a failed command does not wait for.

    Interrupted at a terminal, it is what the job is cancelled through. So it does not hear of it, and Beam's own handler,
    which would stop it first, is not left in place.
    """
    servers: list[JobServer] = []
    if make := getattr(runner, "default_job_server", None):

        def make_and_keep(options: PipelineOptions) -> JobServer:
            server = make(options)
            if threading.current_thread() is threading.main_thread():
                server.start = _uninterrupted(server.start)
            servers.append(server)
            return server

        runner.default_job_server = make_and_keep  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for server in servers:
            server.stop()


def _uninterrupted(start: Callable[[], _Result]) -> Callable[[], _Result]:
    """Calls a function while SIGINT is ignored; the programs that it starts ignore it for good."""

    def started() -> _Result:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return start()
        finally:
            signal.signal(signal.SIGINT, handler)

    return started


def _cancel(result: PipelineResult, options: PipelineOptions) -> None:
    """Another machine's job goes on when the one that has submitted it does not, and keeps its slots."""
    try:
        result.cancel()
    except Exception as error:  # of any runner; the interruption is what counts
        logger.warning("the job could not be cancelled, and may go on: %s", error)
    _cancel_at_flink(options)


def _cancel_at_flink(options: PipelineOptions) -> None:
    """The job server only stops waiting for a batch job (seen with that of Beam 2.70)."""
    master, name = _master(options), options.view_as(GoogleCloudOptions).job_name
    if master is None:
        return
    try:
        if not cancel_job(master, name):
            logger.warning("no job %s is at %s; should it have been on its way, cancel it there", name, master)
    except Exception as error:  # the interruption is what counts
        logger.warning("the job %s could not be cancelled at %s, and may go on: %s", name, master, error)


def _master(options: PipelineOptions) -> str | None:
    """Where a job on Flink is seen; None where there is no such place."""
    master = options.view_as(FlinkRunnerOptions).flink_master
    return None if master in EMBEDDED else master
