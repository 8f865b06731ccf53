"""Whether Flink has what it needs: a job server, a master, a place for artifacts, workers."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    FlinkRunnerOptions,
    JobServerOptions,
    PipelineOptions,
    PortableOptions,
    WorkerOptions,
)

from pipelines.runner_checks.images import describe_image
from vlm_ops.diagnosis import Finding, one_line
from vlm_ops.diagnosis.places import ANSWER_SEC, check_folder

EMBEDDED = ("[auto]", "[local]")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DOCS = "docs/flink.md"
_MASTER_REMEDY = "start the cluster, or give its REST address: --flink_master=HOST:8081"


def check_flink(options: PipelineOptions) -> Iterator[Finding]:
    """Job server, master, artifacts, and the environment of the workers."""
    flink = options.view_as(FlinkRunnerOptions)
    portable = options.view_as(PortableOptions)
    is_embedded = flink.flink_master in EMBEDDED
    speaks = None
    if portable.job_endpoint and portable.job_endpoint != "embed":
        yield _check_address("job server", portable.job_endpoint, "start it, or leave out --job_endpoint")
    else:
        yield _check_java()
        found, speaks = check_job_server(flink.flink_job_server_jar, flink.flink_version)
        yield found
    if is_embedded:
        told = "none is named: a Flink inside the job server, on this machine, for trying out"
        yield Finding("master", "ok", told)
    else:
        yield from check_master(flink.flink_master, speaks or flink.flink_version)
    is_here = is_embedded or _host(flink.flink_master) in _LOOPBACK
    if not is_embedded and not flink.flink_submit_uber_jar:
        yield check_artifacts(options.view_as(JobServerOptions).artifacts_dir, is_here)
    image = options.view_as(WorkerOptions).sdk_container_image
    yield check_environment(portable.environment_type, portable.environment_config, image, is_embedded, is_here)


def _check_java() -> Finding:
    java = shutil.which("java")
    if java is None:
        return Finding("java", "problem", "not found; the job server needs it", "install a Java runtime, 11 or newer")
    version = subprocess.run([java, "-version"], capture_output=True, text=True).stderr.partition("\n")[0]
    return Finding("java", "ok", version)


def check_job_server(jar: str | None, flink_version: str) -> tuple[Finding, str | None]:
    """The jar that is started for a run.

    Returns:
        What was found, and the Flink that it speaks to, where that can be told.
    """
    if jar is None:
        name = f"beam-runners-flink-{flink_version}-job-server-{beam.__version__}.jar"
        cached = Path("~/.apache_beam/cache/jars").expanduser() / name
        if not cached.exists():
            remedy = "nothing, where Maven Central can be reached; else fetch it, and name it by --flink_job_server_jar"
            return Finding("job server", "warning", f"{name} is fetched by the first run", remedy), flink_version
        jar = str(cached)
    elif urlsplit(jar).scheme in ("http", "https"):
        return Finding("job server", "unknown", f"{jar} is fetched by the first run"), None
    try:
        server, speaks = versions_of(Path(jar))
    except FileNotFoundError:
        remedy = "fetch beam-runners-flink-VERSION-job-server from Maven Central, or leave out --flink_job_server_jar"
        return Finding("job server", "problem", f"there is no {jar}", remedy), None
    except (OSError, zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        told = f"{jar} is no job server of Beam for Flink: {one_line(error)}"
        return Finding("job server", "problem", told, "fetch beam-runners-flink-VERSION-job-server again"), None
    told = f"Beam {server} for Flink {speaks}, {jar}"
    if server != beam.__version__:
        remedy = f"fetch beam-runners-flink-{_minor(speaks)}-job-server {beam.__version__}"
        return Finding("job server", "warning", f"{told}; Apache Beam here is {beam.__version__}", remedy), speaks
    return Finding("job server", "ok", told), speaks


def versions_of(jar: Path) -> tuple[str, str]:
    """Versions of Beam and of Flink that are packed into a job server.

    Raises:
        KeyError: They are not.
        zipfile.BadZipFile: It is no jar.
    """
    with zipfile.ZipFile(jar) as archive:
        texts = [
            archive.read(name).decode()
            for name in ("org/apache/beam/sdk/sdk.properties", ".flink-runtime.version.properties")
        ]
    found = [re.search(r"^(?:project\.)?version=(.+)$", text, re.MULTILINE) for text in texts]
    if None in found:
        raise KeyError("version")
    return found[0][1].strip(), found[1][1].strip()  # type: ignore[index]


def check_master(master: str, speaks: str) -> Iterator[Finding]:
    """The JobManager, and the slots of its TaskManagers.

    Args:
        speaks: The Flink that the job server is for.
    """
    url = _url(master)
    try:
        config, overview = (_get(f"{url}/{page}") for page in ("config", "overview"))
        version = config["flink-version"]
    except (ConnectionError, TimeoutError, urllib.error.URLError) as error:
        is_there = isinstance(error, urllib.error.HTTPError)
        told = (
            f"{url} {'answers, but is no Flink' if is_there else 'does not answer'}: {getattr(error, 'reason', error)}"
        )
        yield Finding("master", "problem", told, _MASTER_REMEDY)
    except (OSError, ValueError, HTTPException, KeyError, TypeError) as error:
        yield Finding("master", "problem", f"{url} is no Flink: {one_line(error)}", _MASTER_REMEDY)
    else:
        yield judge_version(url, str(version), speaks)
        yield judge_slots(overview)


def judge_version(url: str, version: str, speaks: str) -> Finding:
    told = f"Flink {version} at {url}"
    if _minor(version) != _minor(speaks):
        remedy = f"use the job server for Flink {_minor(version)}: --flink_version={_minor(version)}, or its jar"
        return Finding("master", "problem", f"{told}, but the job server is for Flink {_minor(speaks)}", remedy)
    return Finding("master", "ok", told)


def judge_slots(overview: Mapping[str, Any]) -> Finding:
    """Args:
    overview: What Flink's REST interface says at /overview.
    """
    managers, total, free = (int(overview.get(name, 0)) for name in ("taskmanagers", "slots-total", "slots-available"))
    told = f"{free} of {total} free, on {managers} TaskManagers"
    if not total:
        return Finding("slots", "problem", told, "start TaskManagers")
    if not free:
        remedy = "wait for the jobs that have them, or cancel those that nobody waits for (PATCH /jobs/ID?mode=cancel)"
        return Finding("slots", "warning", told, remedy)
    return Finding("slots", "ok", told)


def cancel_job(master: str, name: str) -> bool:
    """Cancels the job of a name, if it runs; nothing where several do, of which one is another's.

    Returns:
        Whether there was one.
    """
    jobs = _get(f"{_url(master)}/jobs/overview")["jobs"]
    running = [job["jid"] for job in jobs if job["name"] == name and job["end-time"] < 0]
    if len(running) > 1:
        raise ValueError(f"{len(running)} jobs are called {name}; cancel the right one at {_url(master)}")
    for job in running:
        request = urllib.request.Request(f"{_url(master)}/jobs/{job}?mode=cancel", method="PATCH")
        urllib.request.urlopen(request, timeout=ANSWER_SEC).close()
    return bool(running)


def check_artifacts(folder: str | None, is_here: bool) -> Finding:
    """Where the job server puts what the workers fetch through the TaskManagers, which read it from the same path.

    Args:
        is_here: Whether the cluster is on this machine.
    """
    remedy = "give --artifacts_dir a folder that the TaskManagers have at the same path, or --flink_submit_uber_jar"
    if folder is None:
        if is_here:
            return Finding("artifacts", "ok", "in a temporary folder of this machine, where the cluster is too")
        told = "lie in a temporary folder of this machine, which the TaskManagers do not see"
        return Finding("artifacts", "problem", told, remedy)
    if "://" in folder:
        return Finding("artifacts", "unknown", f"{folder}; whether the TaskManagers can read it is seen in a run")
    if not is_here and not Path(folder).is_dir():  # here, the job server makes it
        return Finding("artifacts", "problem", f"there is no folder {folder}, so it is not one that is shared", remedy)
    found = check_folder("artifacts", Path(folder), remedy, is_needed=True)
    if found.status != "ok" or is_here:
        return found
    told = f"{found.told}; whether the TaskManagers have it too cannot be told from here"
    return Finding("artifacts", "unknown", told, "mount the same folder there")


def check_environment(
    kind: str | None, config: str | None, image: str | None, is_embedded: bool, is_here: bool = True
) -> Finding:
    """What the workers run in.

    Args:
        kind: DOCKER, PROCESS, EXTERNAL, LOOPBACK, or None for Beam's own choice.
        config: What belongs to it.
        is_here: Whether the cluster is on this machine; of another one's commands and ports nothing can be seen.
    """
    if kind == "LOOPBACK" and not is_here:
        told = "LOOPBACK: the workers are threads of this process, which a cluster elsewhere does not reach"
        return Finding("environment", "problem", told, f"give DOCKER, PROCESS or EXTERNAL ({_DOCS})")
    if kind == "LOOPBACK" or (kind is None and is_embedded):
        return Finding("environment", "ok", "LOOPBACK: the workers are threads of this process")
    if kind in (None, "DOCKER"):
        return _check_docker(image or config)
    if kind == "PROCESS":
        return _check_process(config, is_here)
    if kind == "EXTERNAL":
        if not config:
            remedy = f"give --environment_config=HOST:PORT ({_DOCS})"
            return Finding("environment", "problem", "EXTERNAL without the address of a worker pool", remedy)
        try:
            address = str(json.loads(config)["url"]) if config.lstrip().startswith("{") else config
        except (ValueError, KeyError):
            told = f"EXTERNAL needs the address of a worker pool, got --environment_config={config}"
            return Finding("environment", "problem", told, f"give --environment_config=HOST:PORT ({_DOCS})")
        remedy = f"start one beside each TaskManager: IMAGE --worker_pool ({_DOCS})"
        if not is_here and _host(address) in _LOOPBACK:
            told = f"{address} of each TaskManager's host, which cannot be seen from here"
            return Finding("worker pool", "unknown", told, remedy)
        return _check_address("worker pool", address, remedy)
    remedy = f"give DOCKER, PROCESS or EXTERNAL ({_DOCS})"
    return Finding("environment", "problem", f"--environment_type={kind} is none of Flink's", remedy)


def _check_docker(image: str | None) -> Finding:
    if not image:
        told = "Flink's workers would have Beam's own image, which has no Beamsight"
        remedy = (
            "give --sdk_container_image=IMAGE, --environment_type=EXTERNAL with --environment_config=HOST:PORT of a worker pool, or "
            f"--environment_type=PROCESS ({_DOCS})"
        )
        return Finding("environment", "problem", told, remedy)
    return describe_image("environment", image)


def _check_process(config: str | None, is_here: bool) -> Finding:
    try:
        command = str(json.loads(config or "")["command"])
    except (ValueError, KeyError, TypeError):
        told = f"PROCESS needs a command, got --environment_config={config}"
        return Finding("environment", "problem", told, """give --environment_config='{"command": "/path/to/boot"}'""")
    found = shutil.which(command)
    if found is None and not is_here:
        told = f"PROCESS: {command}, which each TaskManager's host must have; it cannot be seen from here"
        return Finding("environment", "unknown", told)
    if found is None:
        told = f"{command} is {'not executable' if os.path.exists(command) else 'not there'} on this machine"
        return Finding(
            "environment", "problem", told, "put the boot command at the same path of each TaskManager's host"
        )
    told = f"PROCESS: {found}, which each TaskManager's host must have too"
    return Finding("environment", "ok", told)


def _host(address: str) -> str:
    return urlsplit(address if "://" in address else f"//{address}").hostname or ""


def _check_address(name: str, address: str, remedy: str) -> Finding:
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), ANSWER_SEC).close()
    except (OSError, ValueError) as error:
        return Finding(name, "problem", f"{address} does not answer: {one_line(error)}", remedy)
    return Finding(name, "ok", f"{address} answers")


def _url(master: str) -> str:
    return master if "://" in master else f"http://{master}"


def _get(url: str) -> Mapping[str, Any]:
    with urllib.request.urlopen(url, timeout=ANSWER_SEC) as answer:
        return json.load(answer)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
