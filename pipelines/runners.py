"""Runner presets: they only set Beam flags, and any Beam flag that is given wins."""

from __future__ import annotations

import argparse
import difflib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
)
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.runners.runner import _RUNNER_MAP

from pipelines.runner_checks.dataflow import judge_flags
from pipelines.runner_checks.flink import check_flink
from vlm_ops.cores import usable_cores
from vlm_ops.diagnosis import Finding

if TYPE_CHECKING:
    from pipelines.options import RunningOptions

PRESETS = ("local", "flink", "dataflow")
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
        ValueError: Something that the runner needs is missing, or is not as it must be.
    """
    findings: Iterable[Finding] = ()
    if options.runner == "flink":
        findings = check_flink(beam_options(command, options))
    elif options.runner == "dataflow":
        findings = judge_flags(beam_options(command, options), places)
    if problem := next((each for each in findings if each.status == "problem"), None):
        raise ValueError(f"{problem.name}: {problem.told}; {problem.remedy}")


def check_runner(name: str) -> None:
    """Raises:
    ValueError: It is no preset, no runner of Beam, and no class of somebody's (`package.module.Class`).
    """
    known = [*PRESETS, *(path.rpartition(".")[2] for path in _RUNNER_MAP.values())]
    if name not in known and name.lower() not in _RUNNER_MAP and "." not in name:
        close = difflib.get_close_matches(name.lower(), known, 1)
        raise ValueError(
            f"unknown runner {name!r}; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}")
        )


def beam_actions() -> dict[str, argparse.Action]:
    """What Beam's flags are, by their names with dashes."""
    return {flag: action for action in _beam_parser()._actions for flag in action.option_strings}


def unknown_beam_args(beam_args: Sequence[str]) -> list[str]:
    """Those flags that no option class of Beam knows.

    Raises:
        ValueError: The value of a known one is wrong.
    """
    _, unknown = _beam_parser().parse_known_args(list(beam_args))
    return unknown


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raised, where Beam's own parser would print its hundred lines of usage."""
        raise ValueError(message)


def _beam_parser() -> argparse.ArgumentParser:
    parser = _OneLine(add_help=False, conflict_handler="resolve", allow_abbrev=False)
    classes: list[type[PipelineOptions]] = [PipelineOptions]
    while classes:
        current = classes.pop()
        classes += current.__subclasses__()
        if "_add_argparse_args" in vars(current):
            current._add_argparse_args(parser)  # type: ignore[arg-type]
    return parser
