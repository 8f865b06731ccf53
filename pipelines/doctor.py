"""`beamsight doctor`: whether this machine is ready for a run, before one is started."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from pipelines.options import DoctorOptions, model_settings
from schemas.recipes import DEFAULT_MODEL
from vlm_ops.diagnosis import Finding, examine, one_line
from vlm_ops.diagnosis.cpu import check_cpu
from vlm_ops.diagnosis.cuda import check_cuda
from vlm_ops.diagnosis.faiss_build import check_faiss
from vlm_ops.diagnosis.packages import check_packages
from vlm_ops.diagnosis.places import check_catalog_access, check_disk, check_inputs
from vlm_ops.diagnosis.specs import check_model, check_recipe, judge_hub

_WIDTH = 100
_MARKS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM", "unknown": "unknown"}
_NAMES_FROM, _TOLD_FROM = 10, 27  # columns


def run(options: DoctorOptions) -> int:
    """Prints what is found, each group when it is done.

    Returns:
        1 where anything is a problem.
    """
    found: list[Finding] = []
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    for group, check in _groups(options).items():
        findings = list(examine(group, check))
        found += findings
        if findings and not options.json:
            print(as_table(group, findings, width), flush=True)
    counts = {status: sum(each.status == status for each in found) for status in _MARKS}
    if options.json:
        print(json.dumps({"findings": [vars(each) for each in found], "counts": counts}, ensure_ascii=False))
    else:
        print(_summary(counts))
    return 1 if counts["problem"] else 0


def _groups(options: DoctorOptions) -> Mapping[str, Callable[[], Iterable[Finding]]]:
    """The checks in the order in which they are told; a runner's own come last."""
    catalog, storage_options = options.catalog, options.storage_options
    return {
        "packages": check_packages,
        "cpu": check_cpu,
        "cuda": lambda: check_cuda(options.device if options.runner == "local" else "auto"),
        "faiss": check_faiss,
        "disk": lambda: check_disk(catalog),
        "storage": lambda: [
            *(check_catalog_access(catalog, storage_options) if catalog else ()),
            *check_inputs(options.input, storage_options),
        ],
        "models": lambda: _check_models(options),
        f"{options.runner} runner": lambda: _check_runner(options),
    }


def _check_models(options: DoctorOptions) -> Iterator[Finding]:
    """Those of the catalog and those that are named; without any, the default one."""
    yield judge_hub()
    settings = model_settings(options if options.runner == "local" else replace(options, device="auto"))
    if options.catalog:
        yield from check_recipe(options.catalog, options.storage_options, settings, options.load)
    for spec in options.model or (() if options.catalog else (DEFAULT_MODEL,)):
        yield from check_model(spec, settings, options.load)


def _check_runner(options: DoctorOptions) -> Iterator[Finding]:
    """Whether Beam can be had, and what the runner needs besides."""
    try:
        import apache_beam
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    except Exception as error:
        yield Finding("Apache Beam", "problem", f"cannot be imported: {one_line(error)}", "pip install --force-reinstall apache-beam")  # fmt: skip
        return
    where = f", {FnApiRunner.__name__} in this process" if options.runner == "local" else ""
    yield Finding("Apache Beam", "ok", f"{apache_beam.__version__}{where}")
    from pipelines.runners import beam_options

    beam = beam_options("doctor", options)
    if options.runner == "flink":
        from pipelines.runner_checks.flink import check_flink

        yield from check_flink(beam)
    elif options.runner == "dataflow":
        from pipelines.runner_checks.dataflow import check_dataflow

        places = [("--catalog", options.catalog)] if options.catalog else []
        places += [("--input", pattern) for pattern in options.input]
        yield from check_dataflow(beam, places, options.storage_options)
    if options.load and options.runner != "local":
        from pipelines.runner_checks.workers import check_workers

        yield from check_workers(beam, needs_card=options.device.startswith("cuda"))


def as_table(group: str, findings: Iterable[Finding], width: int) -> str:
    """A group for a person: a line a finding, and its remedy below it. What is well with packages is one line."""
    lines = [group]
    for finding in _folded(findings):
        name, mark = finding.name, f"  {_MARKS[finding.status]:<{_NAMES_FROM - 2}}"
        told = _wrapped(finding.told, width)
        fits = len(name) < _TOLD_FROM - _NAMES_FROM
        lines.append(f"{mark}{name:<{_TOLD_FROM - _NAMES_FROM}}{told[0]}" if fits else mark + name)
        lines += [" " * _TOLD_FROM + line for line in (told[1:] if fits else told)]
        if finding.remedy:
            lines += [" " * _TOLD_FROM + line for line in _wrapped(f"-> {finding.remedy}", width)]
    return "\n".join(lines) + "\n"


def _folded(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Packages that are well stand together behind the first of them."""
    wells: list[str] = []
    others: list[Finding] = []
    for finding in findings:
        if (
            finding.group == "packages"
            and finding.status == "ok"
            and finding.told[:1].isdigit()
            and " " not in finding.told
        ):
            wells.append(f"{finding.name} {finding.told}")
        else:
            others.append(finding)
    yield from others
    if wells:
        yield Finding(f"{len(wells)} packages", "ok", ", ".join(wells), group="packages")


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(20, width - _TOLD_FROM), break_long_words=False, break_on_hyphens=False) or [""]


def _summary(counts: Mapping[str, int]) -> str:
    words = {"problem": "problems", "warning": "warnings", "unknown": "unknown"}
    told = [
        f"{counts[status]} {status if counts[status] == 1 else word}"
        for status, word in words.items()
        if counts[status]
    ]
    return ", ".join(told) or "all is well"


if __name__ == "__main__":
    from pipelines.cli import run_command

    sys.exit(run_command("doctor", sys.argv[1:]))
