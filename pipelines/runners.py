"""Runner presets: they only set Beam flags, and any Beam flag that is given wins."""

from __future__ import annotations

import argparse
import re
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from apache_beam.options.pipeline_options import (
    DebugOptions,
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    WorkerOptions,
)
from apache_beam.runners.portability.fn_api_runner import worker_handlers

from pipelines.runner_checks.flink import EMBEDDED, check_job_server, check_master
from vlm_ops import storage
from vlm_ops.cores import usable_cores

if TYPE_CHECKING:
    from pipelines.options import RunningOptions

# What a Dataflow worker with a GPU is, unless other flags say so: one L4 with 24 GB, and the cores to decode for it.
_GPU_MACHINE = ("--machine_type=g2-standard-8",)
_GPU = "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"
_CPU_MACHINE = ("--machine_type=n2-standard-4",)

# Beam's local runner with threads sends what a bundle has written so far once a second: from another thread, and without a
# lock (2.77, TimeBasedBufferingClosableOutputStream), so that an element now and then is cut in two, or lost. By 0 it sends
# whole elements alone, once there are enough of them, or all.
worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = 0


def beam_flags(command: str, options: RunningOptions) -> list[str]:
    """The flags that Beam is given: those of the preset that no given flag replaces, and the given ones.

    Args:
        command: Names the job, on runners that have names for jobs.
    """
    given = list(options.beam_args)
    if options.runner == "local":
        preset = _local(options.num_threads or usable_cores())
    elif options.runner == "flink":
        preset = [*_remote(command), "--runner=FlinkRunner"]
    elif options.runner == "dataflow":
        preset = [*_remote(command), *_dataflow(getattr(options, "device", "cpu"))]
    else:
        preset = [f"--runner={options.runner}"]
    return [*_not_replaced(preset, given), *given]


def beam_options(command: str, options: RunningOptions) -> PipelineOptions:
    """Beam's options for a command."""
    return PipelineOptions(beam_flags(command, options))


def _local(num_threads: int) -> list[str]:
    # Beam's own default would look for the Prism runner on the network first. One process, so
    # that models are loaded once; its threads overlap.
    mode = "in_memory" if num_threads == 1 else "multi_threading"
    return ["--runner=FnApiRunner", f"--direct_running_mode={mode}", f"--direct_num_workers={num_threads}"]


def _remote(command: str) -> list[str]:
    """What holds wherever others compute: workers have Beamsight installed, and run one process a machine, so that models
    are loaded once."""
    name = f"beamsight-{command}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"
    return [f"--job_name={name}", "--no_save_main_session", "--sdk_worker_parallelism=1"]


def _dataflow(device: str) -> list[str]:
    # One container a machine: the default is one a core, each with models of its own.
    preset = ["--runner=DataflowRunner", "--sdk_location=container", "--experiments=no_use_multiple_sdk_containers"]
    # The image with CUDA does not fit on the disk that Dataflow gives by default.
    preset += ["--disk_size_gb=100"]
    if device.startswith("cuda"):
        return [*preset, *_GPU_MACHINE, f"--dataflow_service_options={_GPU}"]
    return [*preset, *_CPU_MACHINE]


def _not_replaced(preset: Sequence[str], given: Sequence[str]) -> Iterator[str]:
    """The flags of a preset that no given one stands in place of."""
    names = {_name(flag) for flag in given if flag.startswith("--")}
    parsed = PipelineOptions(list(given))
    lists = {
        "experiments": parsed.view_as(DebugOptions).experiments,
        "dataflow_service_options": parsed.view_as(GoogleCloudOptions).dataflow_service_options,
    }
    for flag in preset:
        name = _name(flag)
        if name not in lists:  # of lists, each entry stands for itself
            is_replaced = name in names
        else:
            is_replaced = _name(flag.partition("=")[2]) in {_name(entry) for entry in lists[name] or ()}
        if not is_replaced:
            yield flag


def _name(flag: str) -> str:
    """The name of a flag or of an entry: of a switch and its opposite the same."""
    name = flag.partition("=")[0].lstrip("-").removeprefix("no_")
    return "machine_type" if name == "worker_machine_type" else name


def check_flags(command: str, options: RunningOptions, places: Sequence[tuple[str, str]] = ()) -> None:
    """Finds out before any work what a runner would only say after minutes, or not at all.

    Args:
        places: Flags that name what workers read and write, with their values.

    Raises:
        ValueError: Something that the runner needs was not given.
        ModuleNotFoundError: A package that the runner needs is not installed.
    """
    if options.runner == "flink":
        _check_flink(beam_options(command, options))
    elif options.runner == "dataflow":
        _check_dataflow(beam_options(command, options), places)


def _check_flink(options: PipelineOptions) -> None:
    portable = options.view_as(PortableOptions)
    is_embedded = options.view_as(FlinkRunnerOptions).flink_master in EMBEDDED
    image = options.view_as(WorkerOptions).sdk_container_image or portable.environment_config
    if not is_embedded and portable.environment_type in (None, "DOCKER") and not image:
        raise ValueError(
            "Flink's workers have no Beamsight; give --sdk_container_image=IMAGE, --environment_type=EXTERNAL with "
            "--environment_config=HOST:PORT of a worker pool, or --environment_type=PROCESS (docs/flink.md)"
        )
    if portable.job_endpoint:  # what is to be seen from there is not seen from here
        return
    # Beam would try for more than a minute.
    flink = options.view_as(FlinkRunnerOptions)
    job_server, speaks = check_job_server(flink.flink_job_server_jar, flink.flink_version)
    found = [job_server, *(() if is_embedded else check_master(flink.flink_master, speaks or flink.flink_version))]
    if problem := next((each for each in found if each.status == "problem"), None):
        raise ValueError(f"{problem.told}; {problem.remedy}")


def _check_dataflow(options: PipelineOptions, places: Sequence[tuple[str, str]]) -> None:
    for flag, place in places:
        check_seen_everywhere(flag, place)
    try:
        from apache_beam.runners.dataflow.internal import apiclient  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(f"{error}; pip install 'beamsight[dataflow]'") from error
    if not options.view_as(WorkerOptions).sdk_container_image:
        raise ValueError(
            "Dataflow's workers have no Beamsight; give --sdk_container_image=REGION-docker.pkg.dev/... (docs/dataflow.md)"
        )
    # What Beam would look up in the network, or miss only once the inputs are listed.
    cloud = options.view_as(GoogleCloudOptions)
    for name, example in (("project", "PROJECT-ID"), ("region", "europe-west4"), ("temp_location", "gs://BUCKET/tmp")):
        if not getattr(cloud, name):
            raise ValueError(f"--{name} is missing; give one, such as --{name}={example}")
    if not str(cloud.temp_location).startswith("gs://"):
        raise ValueError(f"--temp_location={cloud.temp_location}: must be in a bucket, such as gs://BUCKET/tmp")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", cloud.job_name):
        raise ValueError(
            f"--job_name={cloud.job_name}: must be of a-z, 0-9 and -, begin with a letter and not end with -"
        )
    from pipelines.runner_checks.dataflow import judge_accelerator, judge_region  # which knows this module

    machine = options.view_as(WorkerOptions).machine_type
    for each in (judge_region(cloud.region), judge_accelerator(cloud.dataflow_service_options or (), machine)):
        if each.status == "problem":
            raise ValueError(f"{each.told}; {each.remedy}")


def check_seen_everywhere(flag: str, place: str) -> None:
    """Raises:
    ValueError: The place is of this machine alone.
    """
    if storage.is_local(place):
        raise ValueError(
            f"Dataflow's workers cannot see {place!r} of this machine; give {flag} a place in a bucket, such as gs://BUCKET/..."
        )


def unknown_beam_args(beam_args: Sequence[str]) -> list[str]:
    """Those flags that no option class of Beam knows."""
    parser = argparse.ArgumentParser(add_help=False, conflict_handler="resolve", allow_abbrev=False)
    classes: list[type[PipelineOptions]] = [PipelineOptions]
    while classes:
        current = classes.pop()
        classes += current.__subclasses__()
        if "_add_argparse_args" in vars(current):
            current._add_argparse_args(parser)  # type: ignore[arg-type]
    _, unknown = parser.parse_known_args(list(beam_args))
    return unknown
