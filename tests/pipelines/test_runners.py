"""The runner presets: what Beam is given, and what a person is told before any work."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import (
    DebugOptions,
    DirectOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.runners.worker import data_plane

from pipelines.cli import main
from pipelines.jobs import run_to_end
from pipelines.options import RunningOptions, parse_build
from pipelines.runners import beam_flags, beam_options, unknown_beam_args

FLINK = ("--flink_master=flink:8081", "--sdk_container_image=eu.example/beamsight:1")
DATAFLOW = ("--project=shop-project", "--region=europe-west4", "--temp_location=gs://shop/tmp",
            "--sdk_container_image=europe-west4-docker.pkg.dev/shop-project/images/beamsight:1")  # fmt: skip


def running(runner: str, *beam_args: str, num_threads: int | None = 3, device: str = "auto") -> RunningOptions:
    return RunningOptions(runner=runner, num_threads=num_threads, device=device, beam_args=beam_args)


def options_of(runner: str, *beam_args: str, device: str = "auto") -> PipelineOptions:
    return beam_options("build", running(runner, *beam_args, device=device))


def test_local_runs_in_this_process_with_as_many_threads_as_are_asked_for() -> None:
    options = options_of("local")
    assert options.view_as(StandardOptions).runner == "FnApiRunner"
    assert options.view_as(DirectOptions).direct_num_workers == 3
    assert options.view_as(DirectOptions).direct_running_mode == "multi_threading"
    assert options_of("local", "--direct_num_workers=7").view_as(DirectOptions).direct_num_workers == 7
    assert (
        beam_options("tag", running("local", num_threads=1)).view_as(DirectOptions).direct_running_mode == "in_memory"
    )


def test_flink_has_one_process_a_task_manager() -> None:
    flags = beam_flags("tag", running("flink", *FLINK))
    assert "--sdk_worker_parallelism=1" in flags and flags[-2:] == list(FLINK)
    options = PipelineOptions(flags)
    assert options.view_as(StandardOptions).runner == "FlinkRunner"
    assert re.fullmatch(r"beamsight-tag-\d{8}-\d{6}-[0-9a-f]{4}", options.view_as(GoogleCloudOptions).job_name)
    assert options.view_as(SetupOptions).save_main_session is False


def test_dataflow_has_one_container_a_machine_and_a_gpu_where_one_is_asked_for() -> None:
    options = options_of("dataflow", *DATAFLOW, device="cuda")
    assert options.view_as(StandardOptions).runner == "DataflowRunner"
    assert options.view_as(SetupOptions).sdk_location == "container"
    assert options.view_as(DebugOptions).experiments == ["no_use_multiple_sdk_containers"]
    services = options.view_as(GoogleCloudOptions).dataflow_service_options
    assert services == ["worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"]
    assert options.view_as(WorkerOptions).machine_type.startswith("g2-")
    without = options_of("dataflow", *DATAFLOW)
    assert not without.view_as(GoogleCloudOptions).dataflow_service_options
    assert not without.view_as(WorkerOptions).machine_type.startswith("g2-")


@pytest.mark.parametrize("form", [lambda name, value: (f"--{name}={value}",), lambda name, value: (f"--{name}", value)])
def test_given_flags_win_in_every_form(form) -> None:
    a100 = "worker_accelerator=type:nvidia-tesla-a100;count:1;install-nvidia-driver"
    given = [
        *form("machine_type", "a2-highgpu-1g"), *form("job_name", "mine"), *form("disk_size_gb", "50"),
        *form("dataflow_service_options", a100), *form("experiments", "use_multiple_sdk_containers"),
    ]  # fmt: skip
    options = options_of("dataflow", *DATAFLOW, *given, "--save_main_session", device="cuda")
    assert options.view_as(WorkerOptions).machine_type == "a2-highgpu-1g"
    assert options.view_as(WorkerOptions).disk_size_gb == 50
    assert options.view_as(GoogleCloudOptions).job_name == "mine"
    assert options.view_as(GoogleCloudOptions).dataflow_service_options == [a100]
    assert options.view_as(DebugOptions).experiments == ["use_multiple_sdk_containers"]
    assert options.view_as(SetupOptions).save_main_session is True


def test_entries_of_lists_stand_beside_those_of_the_preset() -> None:
    options = options_of(
        "dataflow", *DATAFLOW, "--experiments=shuffle_mode=service,enable_prime",
        "--dataflow_service_options", "enable_google_cloud_profiler", device="cuda",
    )  # fmt: skip
    assert set(options.view_as(DebugOptions).experiments) == {
        "no_use_multiple_sdk_containers", "shuffle_mode=service", "enable_prime",
    }  # fmt: skip
    services = options.view_as(GoogleCloudOptions).dataflow_service_options
    assert len(services) == 2 and "enable_google_cloud_profiler" in services


def test_a_beam_runner_by_name_has_no_preset() -> None:
    assert beam_flags("build", running("PortableRunner", "--job_endpoint=h:1")) == [
        "--runner=PortableRunner", "--job_endpoint=h:1",
    ]  # fmt: skip


def test_flags_that_beam_does_not_know() -> None:
    assert unknown_beam_args(["--direct_num_workers=2", "--job_name", "x", "--no_such_flag=1"]) == ["--no_such_flag=1"]


def test_printed_flags_are_those_that_beam_is_given_and_nothing_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["build", "--input", str(tmp_path / "none"), "--catalog", str(tmp_path / "catalog"), "--print_beam_flags"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--runner", "dataflow", "--job_name=mine", *DATAFLOW, "--num_workers=4", "--device", "cuda"])
    assert stopped.value.code == 0
    printed = shlex.split(capsys.readouterr().out)
    options = options_of("dataflow", "--job_name=mine", *DATAFLOW, "--num_workers=4", device="cuda")
    assert PipelineOptions(printed).get_all_options() == options.get_all_options()
    assert options.view_as(WorkerOptions).num_workers == 4 and not (tmp_path / "catalog").exists()


@pytest.fixture
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    (tmp_path / "java").write_text("#!/bin/sh\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--runner", "flink", "--environment_type=DOCKER"], "environment: Flink's workers would have Beam's own image"),
        (["--runner", "flink", "--flink_master=127.0.0.1:1"], "master: http://127.0.0.1:1 does not answer"),
        (["--runner", "flink", "--flink_master=127.0.0.1:x"], "master: http://127.0.0.1:x is no Flink"),
        (["--runner", "flink", "--environment_type=PROCESS", '--environment_config={"command": "/no/boot"}'], "/no/boot is not there"),
        (["--runner", "flink", "--environment_type=EXTERNAL"], "EXTERNAL without the address of a worker pool"),
        (["--runner", "flink", "--flink_mster=flink:8081"], "unknown flag '--flink_mster=flink:8081'; did you mean --flink_master?"),
        (["--runner", "flink", "--num_thread=3"], "unknown flag '--num_thread=3'; did you mean --num_threads?"),
        (["--runner", "flink", "--flink_version=1.18"], "argument --flink_version: invalid choice: '1.18'"),
        (["--runner", "flnk"], "unknown runner 'flnk'; did you mean flink?"),
        (["--num_workers=3"], "--num_workers is of Dataflow's machines; did you mean --num_threads?"),
        (["--runner", "dataflow", *DATAFLOW[:3]], "image: none is named, and Dataflow's workers have no Beamsight; give --sdk_container_image"),
        (["--runner", "dataflow", *DATAFLOW[1:]], "--project is missing; give one, such as --project=PROJECT-ID"),
        (["--runner", "dataflow", *DATAFLOW, "--project=My Shop"], "'My Shop' is no project id"),
        (["--runner", "dataflow", *DATAFLOW[:2], DATAFLOW[3]], "--temp_location is missing"),
        (["--runner", "dataflow", *DATAFLOW, "--temp_location=/tmp"], "--temp_location=/tmp is not in a bucket"),
        (["--runner", "dataflow", *DATAFLOW, "--staging_location=/tmp"], "--staging_location=/tmp is not in a bucket"),
        (["--runner", "dataflow", *DATAFLOW, "--job_name=My Job"], "--job_name=My Job is none that Dataflow takes"),
        (["--runner", "dataflow", *DATAFLOW, "--nonsense=1"], "unknown flag '--nonsense=1'"),
        (["--runner", "Dataflow", *DATAFLOW, "--machine_typ=n1"], "did you mean --machine_type?"),
        (["--runner", "dataflow", *DATAFLOW, "--num_workers=x"], "argument --num_workers: invalid int value: 'x'"),
        (["--runner", "dataflow", *DATAFLOW, "--input", "photos/"], "cannot see 'photos/' of this machine; give --input a place"),
        (["--runner", "dataflow", *DATAFLOW, "--catalog", "mine"], "cannot see 'mine' of this machine; give CATALOG a place"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("java")
def test_what_a_runner_lacks_is_told_before_any_work(
    flags: list[str], told: str, capsys: pytest.CaptureFixture
) -> None:
    if "dataflow" in flags:
        pytest.importorskip("apache_beam.runners.dataflow.internal.apiclient", reason="needs beamsight[dataflow]")
    with pytest.raises(SystemExit) as stopped:
        parse_build(["--input", "gs://shop/photos", "--catalog", "gs://shop/catalog", *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert told in error and len(error.splitlines()) == 1


def test_the_local_runner_sends_nothing_while_an_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would once a second, from another thread, and cut the element in two or lose it."""
    by_time = []
    usual = data_plane.TimeBasedBufferingClosableOutputStream.__init__
    monkeypatch.setattr(
        data_plane.TimeBasedBufferingClosableOutputStream,
        "__init__",
        lambda self, *args, **kwargs: by_time.append(self) or usual(self, *args, **kwargs),
    )

    def run() -> None:
        pipeline = beam.Pipeline(options=beam_options("build", running("local")))
        _ = pipeline | beam.Create(range(9)) | beam.Reshuffle()
        run_to_end(pipeline)

    run()
    assert not by_time
    monkeypatch.setattr(worker_handlers, "DATA_BUFFER_TIME_LIMIT_MS", 1000)  # as Beam has it
    run()
    assert by_time
