"""A job is waited for, and cancelled with the command that waits."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.jobs import run_to_end


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """Shells start what is in the background with SIGINT ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("in_the_foreground")
def test_an_interrupted_wait_cancels_the_job_which_would_go_on(number: int) -> None:
    class Result:
        is_cancelled = False

        def wait_until_finish(self) -> None:
            signal.raise_signal(number)

        def cancel(self) -> None:
            self.is_cancelled = True

    class Runner(beam.runners.PipelineRunner):
        def run_pipeline(self, pipeline: beam.Pipeline, options: PipelineOptions) -> Result:
            return result

    result = Result()
    with pytest.raises(KeyboardInterrupt):
        run_to_end(beam.Pipeline(runner=Runner()))
    assert result.is_cancelled


def test_a_job_that_somebody_else_cancels_is_no_success() -> None:
    class Result:
        def wait_until_finish(self) -> str:
            return "CANCELLED"

    class Runner(beam.runners.PipelineRunner):
        def run_pipeline(self, pipeline: beam.Pipeline, options: PipelineOptions) -> Result:
            return Result()

    with pytest.raises(RuntimeError, match="the job ended in the state CANCELLED"):
        run_to_end(beam.Pipeline(runner=Runner()))


def test_a_job_that_was_cancelled_at_flink_is_told_in_a_word() -> None:
    class Result:
        def wait_until_finish(self) -> None:
            raise RuntimeError(
                "org.apache.flink.runtime.client.JobCancellationException: Job was cancelled.\n\tat a\n\tat b"
            )

    class Runner(beam.runners.PipelineRunner):
        def run_pipeline(self, pipeline: beam.Pipeline, options: PipelineOptions) -> Result:
            return Result()

    with pytest.raises(RuntimeError, match="^the job was cancelled$"):
        run_to_end(beam.Pipeline(runner=Runner()))
