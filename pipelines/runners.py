"""Runner presets: they only set Beam flags, and any Beam flag that is given wins."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions


def beam_options(runner: str, num_workers: int, beam_args: Sequence[str]) -> PipelineOptions:
    """Beam's options for a runner.

    Args:
        runner: `local`, or the name of a Beam runner, whose flags are then all in `beam_args`.
        num_workers: Threads, for the local runner.
        beam_args: Flags that belong to Beam.
    """
    if runner != "local":
        return PipelineOptions([f"--runner={runner}", *beam_args])
    # Beam's own default would look for the Prism runner on the network first. One process, so
    # that models are loaded once; its threads overlap.
    preset = [
        "--runner=FnApiRunner",
        "--direct_running_mode=in_memory" if num_workers == 1 else "--direct_running_mode=multi_threading",
    ]
    return PipelineOptions([*preset, f"--direct_num_workers={num_workers}", *beam_args])


def run_to_end(pipeline: beam.Pipeline) -> None:
    """Runs a pipeline and waits. Beam's workers print the traceback of an error to stderr wherever it
    passes; the error comes to the caller all the same, who says it once."""
    shown = sys.stderr if os.environ.get("BEAMSIGHT_DEBUG") else io.StringIO()
    with contextlib.redirect_stderr(shown):
        pipeline.run().wait_until_finish()


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
