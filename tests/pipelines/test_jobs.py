"""A job is waited for, and cancelled with the command that waits."""

from __future__ import annotations

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.jobs import run_to_end


def test_an_interrupted_wait_cancels_the_job_which_would_go_on() -> None:
    class Result:
        is_cancelled = False

        def wait_until_finish(self) -> None:
            raise KeyboardInterrupt

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
