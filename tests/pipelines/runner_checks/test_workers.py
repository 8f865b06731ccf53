"""Workers say what they are, and it is compared with the machine that submits."""

from __future__ import annotations

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.runner_checks.workers import check_workers, facts, judge_worker

LOCAL = ["--runner=FnApiRunner", "--direct_running_mode=in_memory"]


def test_workers_are_asked_by_a_job() -> None:
    (found,) = check_workers(PipelineOptions(LOCAL))
    assert found.status == "ok" and f"Apache Beam {beam.__version__}" in found.told


def test_other_versions_and_missing_cards() -> None:
    here = facts()
    assert judge_worker(here, here, needs_card=False).status == "ok"
    other = judge_worker({**here, "python": "3.99"}, here, needs_card=False)
    assert other.status == "problem" and f"Python 3.99 (here {here['python']})" in other.told and other.remedy
    bare = judge_worker({**here, "card": ""}, here, needs_card=True)
    assert bare.status == "problem" and "--device cuda was asked for" in bare.told
    assert judge_worker({**here, "card": "NVIDIA L4"}, here, needs_card=True).status == "ok"


def test_a_job_that_fails_is_a_finding() -> None:
    (found,) = check_workers(PipelineOptions(["--runner=PortableRunner", "--job_endpoint=127.0.0.1:1",
                                              "--job_server_timeout=1"]))  # fmt: skip
    assert found.status == "problem" and found.told.startswith("a small job failed: ") and "\n" not in found.told
