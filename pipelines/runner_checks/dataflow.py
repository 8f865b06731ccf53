"""Whether Dataflow has what it needs: packages, account, flags, bucket, image, accelerator."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, WorkerOptions

from pipelines.runner_checks.images import describe_image
from pipelines.runners import check_seen_everywhere
from vlm_ops.diagnosis import Finding, one_line, refused
from vlm_ops.diagnosis.places import ANSWER_SEC, check_place, within

# Which machines take which card, by the beginning of their names (https://cloud.google.com/dataflow/docs/gpu/gpu-support and
# https://cloud.google.com/compute/docs/gpus).
ACCELERATORS: dict[str, tuple[str, ...]] = {
    "nvidia-l4": ("g2-standard-",),
    "nvidia-tesla-t4": ("n1-",),
    "nvidia-tesla-v100": ("n1-",),
    "nvidia-tesla-p100": ("n1-",),
    "nvidia-tesla-p4": ("n1-",),
    "nvidia-tesla-a100": ("a2-highgpu-", "a2-megagpu-"),
    "nvidia-a100-80gb": ("a2-ultragpu-",),
    "nvidia-h100-80gb": ("a3-highgpu-",),
    "nvidia-h100-mega-80gb": ("a3-megagpu-",),
}
# Machines come with so many cards: an A2 or A3 says it, a G2 by its cores; an N1 takes as many as it is given
# (https://cloud.google.com/compute/docs/accelerator-optimized-machines).
_CARDS_OF_G2 = {"24": 2, "48": 4, "96": 8}
_DOCS = "docs/dataflow.md"


def check_dataflow(
    options: PipelineOptions, places: Sequence[tuple[str, str]], storage_options: Mapping[str, Any]
) -> Iterator[Finding]:
    """What can be seen from here. Of the account it is asked who it is, and of the bucket whether it can be written.

    Args:
        places: Flags that name what workers read and write, with their values.
    """
    cloud, workers = options.view_as(GoogleCloudOptions), options.view_as(WorkerOptions)
    yield _check_packages()
    yield judge_project(cloud.project)
    yield judge_region(cloud.region)
    if cloud.no_auth:
        yield Finding("account", "ok", "none is asked for (--no_auth)")
    else:
        yield _check_account()
    if not cloud.temp_location:
        remedy = "give --temp_location=gs://BUCKET/tmp, in the region of the job"
        yield Finding("bucket", "problem", "no --temp_location, where the job is staged", remedy)
    elif not cloud.temp_location.startswith("gs://"):
        remedy = "give --temp_location=gs://BUCKET/tmp"
        yield Finding("bucket", "problem", f"--temp_location={cloud.temp_location} is not in a bucket", remedy)
    else:
        yield from check_place("bucket", cloud.temp_location, storage_options)
    if not workers.sdk_container_image:
        remedy = f"give --sdk_container_image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/beamsight:TAG ({_DOCS})"
        yield Finding("image", "problem", "none is named, and Beam's own has no Beamsight", remedy)
    else:
        yield describe_image("image", workers.sdk_container_image)
    for flag, place in places:
        try:
            check_seen_everywhere(flag, place)
        except ValueError as error:
            yield refused(flag.lstrip("-"), error)
    yield judge_accelerator(cloud.dataflow_service_options or (), workers.machine_type)


def _check_packages() -> Finding:
    try:
        from apache_beam.runners.dataflow.internal import apiclient  # noqa: F401
    except ImportError as error:
        return Finding("packages", "problem", f"{one_line(error)}", "pip install 'beamsight[dataflow]'")
    return Finding("packages", "ok", "apache-beam[gcp] is installed")


def judge_project(project: str | None) -> Finding:
    """By the rules of names (https://cloud.google.com/resource-manager/docs/creating-managing-projects)."""
    if not project:
        return Finding("project", "problem", "none is named", "give --project=PROJECT-ID")
    if not re.fullmatch(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", project):
        remedy = "give the project's id (6 to 30 of a-z, 0-9 and -), not its name or number"
        return Finding("project", "problem", f"{project!r} is no project id", remedy)
    return Finding("project", "ok", project)


def judge_region(region: str | None) -> Finding:
    if not region:
        return Finding("region", "problem", "none is named", "give --region, such as --region=europe-west4")
    if re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", region):
        remedy = f"give --region={region[:-2]}, and --worker_zone={region} if it must be this one"
        return Finding("region", "problem", f"{region} is a zone", remedy)
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+", region):
        return Finding("region", "problem", f"{region!r} is no region", "give one such as --region=europe-west4")
    return Finding("region", "ok", region)


def _check_account() -> Finding:
    import google.auth

    remedy = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
    try:
        credentials, project = within(google.auth.default, ANSWER_SEC)
    except Exception as error:  # google.auth's own, and whatever its transport raises
        return Finding("account", "problem", one_line(error), remedy)
    who = getattr(credentials, "service_account_email", None) or os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
    told = f"credentials are there: {who or 'those of a person'}" + (f"; their project is {project}" if project else "")
    return Finding("account", "ok", told)


def judge_accelerator(service_options: Sequence[str], machine_type: str | None) -> Finding:
    """The cards of the workers, and whether their machines take them.

    Args:
        service_options: As `--dataflow_service_options` has them.
    """
    found = [each.partition("=")[2] for each in service_options if each.startswith("worker_accelerator=")]
    if not found:
        if machine_type and machine_type.startswith(("g2-", "a2-", "a3-")):
            remedy = "give --device cuda, or a machine without a card"
            return Finding("accelerator", "problem", f"{machine_type} has cards, but none is asked for", remedy)
        told = f"none; machines are {machine_type or 'of the default type'}"
        return Finding("accelerator", "ok", told)
    text = found[-1]
    remedy = f"write worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver, in quotes for the shell ({_DOCS})"
    match = re.fullmatch(
        r"type:([a-z0-9-]+);count:([1-9]\d*)(;install-nvidia-driver(?::[a-z0-9.]+)?)?(?:;use_nvidia_mps)?", text
    )
    if not match:
        return Finding("accelerator", "problem", f"{text!r} is no accelerator", remedy)
    kind, count, driver = match.groups()
    machines = ACCELERATORS.get(kind)
    told = f"{count} {kind} on {machine_type or 'the default machine'}"
    if machines is None:
        return Finding("accelerator", "warning", f"{told}; Beamsight does not know such a card", f"known: {', '.join(ACCELERATORS)}")  # fmt: skip
    if not (machine_type or "n1-standard-1").startswith(machines):
        wanted = " or ".join(f"{each}..." for each in machines)
        return Finding("accelerator", "problem", f"{told}, which does not take it", f"give --machine_type={wanted}")
    if (has := _num_cards(machine_type or "")) not in (None, int(count)):
        remedy = f"write count:{has}, or take a machine with {count}"
        return Finding("accelerator", "problem", f"{told}, which has {has}", remedy)
    if driver is None:
        return Finding("accelerator", "problem", f"{told}, without a driver", "add ;install-nvidia-driver")
    return Finding("accelerator", "ok", told)


def _num_cards(machine_type: str) -> int | None:
    """What a machine comes with; None where it takes as many as it is given."""
    family, _, size = machine_type.rpartition("-")
    if family == "g2-standard":
        return _CARDS_OF_G2.get(size, 1)
    return int(size[:-1]) if re.fullmatch(r"a[23]-\w+", family) and re.fullmatch(r"\d+g", size) else None
