"""What the workers of a runner are, asked of themselves: Python, Beam, Beamsight and cards, by a job of some elements.

They answer by counters, which every runner brings back, and whose names say it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata

import apache_beam as beam
from apache_beam.metrics import Metrics, MetricsFilter
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.jobs import run_to_end
from vlm_ops.cores import usable_cores
from vlm_ops.diagnosis import Finding, one_line

_NAMESPACE = "beamsight.worker"
_NUM_ELEMENTS = 8
_SAME = {"python": "Python", "beam": "Apache Beam", "beamsight": "Beamsight"}


class _Say(beam.DoFn):
    def process(self, element: int) -> Iterator[int]:
        Metrics.counter(_NAMESPACE, json.dumps(facts(), sort_keys=True)).inc()
        yield element


def facts() -> dict[str, str]:
    """What this process is."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "beam": beam.__version__,
        "beamsight": metadata.version("beamsight"),
        "cores": str(usable_cores()),
        "card": card,
    }


def check_workers(options: PipelineOptions, needs_card: bool = False) -> Iterator[Finding]:
    """Runs a small job.

    Args:
        needs_card: Whether `--device cuda` was asked for.
    """
    try:
        pipeline = beam.Pipeline(options=options)
        _ = pipeline | beam.Create(range(_NUM_ELEMENTS)) | beam.Reshuffle() | beam.ParDo(_Say())
        result = run_to_end(pipeline)
        assert result is not None, "--template_location makes a template of it"
        found = result.metrics().query(MetricsFilter().with_namespace(_NAMESPACE))["counters"]
        answers = [json.loads(counter.key.metric.name) for counter in found]
    except Exception as error:  # of any runner
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        told = next((line for line in reversed(lines) if "Error" in line), one_line(error))
        remedy = "install the same Beamsight for the workers, or name an image that has it; see the runner's own log"
        yield Finding("workers", "problem", f"a small job failed: {told.strip()}", remedy)
        return
    if not answers:
        told = "a small job went through, but the runner brings no counters back"
        yield Finding("workers", "unknown", told, "see the runner's own page")
    for answer in answers:
        yield judge_worker(answer, facts(), needs_card)


def judge_worker(worker: Mapping[str, str], launcher: Mapping[str, str], needs_card: bool) -> Finding:
    """A worker beside the machine that submits: what is pickled there is read here."""
    differing = [
        f"{word} {worker[name]} (here {launcher[name]})"
        for name, word in _SAME.items()
        if worker[name] != launcher[name]
    ]
    card = worker["card"] or "no CUDA device"
    told = f"Python {worker['python']}, Apache Beam {worker['beam']}, Beamsight {worker['beamsight']}, {worker['cores']} cores, {card}"
    if differing:
        remedy = "use an image, or an environment, of the same versions as here"
        return Finding("workers", "problem", f"have other versions: {', '.join(differing)}", remedy)
    if needs_card and not worker["card"]:
        remedy = "give the workers a card and its driver, or leave out --device cuda"
        return Finding("workers", "problem", f"{told}, but --device cuda was asked for", remedy)
    return Finding("workers", "ok", told)
