"""Whether Dataflow has what it needs: packages, account, flags, bucket, image, accelerator."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions, WorkerOptions

from pipelines.runner_checks.images import describe_image
from vlm_ops import storage
from vlm_ops.diagnosis import Finding, one_line
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
_ACCELERATOR_FIELDS = {"type", "count", "install-nvidia-driver", "use_nvidia_mps"}
_DOCS = "docs/dataflow.md"


def check_dataflow(
    options: PipelineOptions, places: Sequence[tuple[str, str]], storage_options: Mapping[str, Any]
) -> Iterator[Finding]:
    """What can be seen from here. Of the account it is asked who it is, and of the bucket whether it can be written.

    Args:
        places: Flags that name what workers read and write, with their values.
    """
    cloud = options.view_as(GoogleCloudOptions)
    yield from judge_flags(options, places)
    if cloud.no_auth:
        yield Finding("account", "ok", "none is asked for (--no_auth)")
    else:
        yield _check_account()
    if str(cloud.temp_location).startswith("gs://"):
        yield from check_place("bucket", cloud.temp_location, storage_options)


def judge_flags(options: PipelineOptions, places: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """What can be told of the flags alone, without any network."""
    cloud, workers = options.view_as(GoogleCloudOptions), options.view_as(WorkerOptions)
    yield from judge_places(places)
    yield _check_packages()
    yield judge_project(cloud.project)
    yield judge_region(cloud.region)
    yield judge_job_name(cloud.job_name)
    yield from judge_staging(cloud.temp_location, cloud.staging_location)
    if not workers.sdk_container_image:
        told = "none is named, and Dataflow's workers have no Beamsight"
        remedy = f"give --sdk_container_image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/beamsight:TAG ({_DOCS})"
        yield Finding("image", "problem", told, remedy)
    else:
        yield describe_image("image", workers.sdk_container_image)
    yield judge_accelerator(cloud.dataflow_service_options or (), workers.machine_type)


def judge_places(places: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """Paths that are of this machine alone."""
    for flag, place in places:
        if storage.is_local(place):
            told = f"Dataflow's workers cannot see {place!r} of this machine"
            yield Finding(
                flag.lstrip("-"), "problem", told, f"give {flag} a place in a bucket, such as gs://BUCKET/..."
            )


def judge_staging(temp_location: str | None, staging_location: str | None) -> Iterator[Finding]:
    if not temp_location:
        remedy = "give --temp_location=gs://BUCKET/tmp, in the region of the job"
        yield Finding("bucket", "problem", "--temp_location is missing, where the job is staged", remedy)
    for flag, place in (("temp_location", temp_location), ("staging_location", staging_location)):
        if place and not place.startswith("gs://"):
            yield Finding("bucket", "problem", f"--{flag}={place} is not in a bucket", f"give --{flag}=gs://BUCKET/tmp")


def judge_job_name(name: str | None) -> Finding:
    if name and not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        remedy = "give one of a-z, 0-9 and -, that begins with a letter and does not end with -"
        return Finding("job name", "problem", f"--job_name={name} is none that Dataflow takes", remedy)
    return Finding("job name", "ok", name or "made up by Beam")


def _check_packages() -> Finding:
    try:
        from apache_beam.runners.dataflow.internal import apiclient  # noqa: F401
    except ImportError as error:
        return Finding("packages", "problem", f"{one_line(error)}", "pip install 'beamsight[dataflow]'")
    return Finding("packages", "ok", "apache-beam[gcp] is installed")


def judge_project(project: str | None) -> Finding:
    """By the rules of names (https://cloud.google.com/resource-manager/docs/creating-managing-projects)."""
    if not project:
        return Finding("project", "problem", "--project is missing", "give one, such as --project=PROJECT-ID")
    if not re.fullmatch(r"([a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", project):
        remedy = "give the project's id (6 to 30 of a-z, 0-9 and -), not its name or number"
        return Finding("project", "problem", f"{project!r} is no project id", remedy)
    return Finding("project", "ok", project)


def judge_region(region: str | None) -> Finding:
    if not region:
        return Finding("region", "problem", "--region is missing", "give one, such as --region=europe-west4")
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
        if machine_type and machine_type.startswith(("g2-", "g4-", "a2-", "a3-", "a4-")):
            remedy = "give --device cuda, or a machine without a card"
            return Finding("accelerator", "problem", f"{machine_type} has cards, but none is asked for", remedy)
        told = f"none; machines are {machine_type or 'of the default type'}"
        return Finding("accelerator", "ok", told)
    text = found[-1]
    remedy = f"write worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver, in quotes for the shell ({_DOCS})"
    values = {name: value for name, _, value in (part.partition(":") for part in text.split(";"))}
    kind, count = values.get("type", ""), values.get("count", "")
    if (
        values.keys() - _ACCELERATOR_FIELDS
        or not re.fullmatch(r"[a-z0-9-]+", kind)
        or not re.fullmatch(r"[1-9]\d*", count)
    ):
        return Finding("accelerator", "problem", f"{text!r} is no accelerator", remedy)
    machines = ACCELERATORS.get(kind)
    told = f"{count} {kind} on {machine_type or 'a machine of the default type'}"
    if machines is None:
        close = difflib.get_close_matches(kind, ACCELERATORS, 1)
        told = f"{told}; Beamsight does not know such a card"
        if close:
            return Finding("accelerator", "problem", told, f"did you mean type:{close[0]}?")
        return Finding("accelerator", "warning", told, f"known: {', '.join(ACCELERATORS)}")
    if not (machine_type or "n1-standard-1").startswith(machines):
        wanted = " or ".join(f"{each}..." for each in machines)
        return Finding("accelerator", "problem", f"{told}, which does not take it", f"give --machine_type={wanted}")
    if (has := _num_cards(machine_type or "")) not in (None, int(count)):
        remedy = f"write count:{has}, or take a machine with {count}"
        return Finding("accelerator", "problem", f"{told}, which has {has}", remedy)
    if "install-nvidia-driver" not in values:
        return Finding("accelerator", "problem", f"{told}, without a driver", "add ;install-nvidia-driver")
    return Finding("accelerator", "ok", told)


def _num_cards(machine_type: str) -> int | None:
    """What a machine comes with; None where it takes as many as it is given."""
    family, _, size = machine_type.rpartition("-")
    if family == "g2-standard":
        return _CARDS_OF_G2.get(size, 1)
    return int(size[:-1]) if re.fullmatch(r"a[23]-\w+", family) and re.fullmatch(r"\d+g", size) else None
