"""What `beamsight doctor --runner dataflow` finds."""

from __future__ import annotations

from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.runner_checks.dataflow import check_dataflow, judge_accelerator, judge_project, judge_region

L4 = "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"


@pytest.mark.parametrize(
    ("options", "machine", "status", "told"),
    [
        ([L4], "g2-standard-8", "ok", "1 nvidia-l4 on g2-standard-8"),
        ([L4 + ":5xx"], "g2-standard-8", "ok", "1 nvidia-l4"),
        ([L4 + ";use_nvidia_mps"], "g2-standard-8", "ok", "1 nvidia-l4"),
        ([L4.replace("count:1", "count:2")], "g2-standard-24", "ok", "2 nvidia-l4"),
        ([L4.replace("count:1", "count:2")], "g2-standard-8", "problem", "which has 1"),
        ([L4.replace("nvidia-l4", "nvidia-tesla-a100")], "a2-highgpu-1g", "ok", "1 nvidia-tesla-a100"),
        ([L4.replace("nvidia-l4", "nvidia-a100-80gb")], "a2-ultragpu-4g", "problem", "which has 4"),
        ([L4], "a2-highgpu-1g", "problem", "does not take it"),
        (["x=1", L4], "n2-standard-4", "problem", "does not take it"),
        ([L4], None, "problem", "of the default type, which does not take it"),
        (["worker_accelerator=type:nvidia-tesla-t4;count:2;install-nvidia-driver"], "n1-standard-8", "ok", "2 nvidia"),
        (["worker_accelerator=type:nvidia-l4;count:1"], "g2-standard-8", "problem", "without a driver"),
        (["worker_accelerator=type:nvidia-l4,count:1"], "g2-standard-8", "problem", "is no accelerator"),
        (["worker_accelerator=type:nvidia-l4;count:0;install-nvidia-driver"], "g2-standard-8", "problem", "is no"),
        (["worker_accelerator=type:tpu;count:1;install-nvidia-driver"], "g2-standard-8", "warning", "does not know"),
        ([], "g2-standard-8", "problem", "g2-standard-8 has cards, but none is asked for"),
        ([], "n2-standard-4", "ok", "none"),
        (["worker_accelerator=count:1;type:nvidia-l4;install-nvidia-driver"], "g2-standard-8", "ok", "1 nvidia-l4"),
        (
            ["worker_accelerator=type:nvidia-l44;count:1;install-nvidia-driver"],
            "g2-standard-8",
            "problem",
            "does not know",
        ),
    ],
)
def test_accelerators(options: list[str], machine: str | None, status: str, told: str) -> None:
    found = judge_accelerator(options, machine)
    assert found.status == status and told in found.told and (status == "ok" or found.remedy)


@pytest.mark.parametrize(
    ("project", "status"),
    [("shop-project", "ok"), ("example.com:shop-1", "ok"), ("My Shop", "problem"), ("123456789", "problem"), (None, "problem")],
)  # fmt: skip
def test_projects(project: str | None, status: str) -> None:
    assert judge_project(project).status == status


@pytest.mark.parametrize(
    ("region", "status"),
    [("europe-west4", "ok"), ("northamerica-northeast1", "ok"), ("europe-west4-a", "problem"), ("Europe", "problem"), (None, "problem")],
)  # fmt: skip
def test_regions(region: str | None, status: str) -> None:
    assert judge_region(region).status == status


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    options = PipelineOptions(["--no_auth"])
    places = [("--catalog", str(tmp_path)), ("--input", "gs://shop/photos")]
    found = {each.name: each for each in check_dataflow(options, places, {})}
    problems = {name for name, each in found.items() if each.status == "problem"} - {"packages"}
    assert problems == {"project", "region", "bucket", "image", "catalog"}
    assert all(found[name].remedy for name in problems)
    assert found["account"].status == found["accelerator"].status == "ok"
