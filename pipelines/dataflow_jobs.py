"""What is Dataflow's own of a job: a bucket to stage it in, its page, and how its errors are told."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

_FAILURE = re.compile(r"Dataflow pipeline failed\. State: (\w+), Error:\n(.*)", re.DOTALL)
# What to do where Google refuses a job, by HTTP status.
_REFUSALS = {
    400: "mend the flags",
    401: "`gcloud auth application-default login` makes an account known",
    403: "docs/dataflow.md lists what accounts must be allowed",
    404: "check --project and --region, and that the Dataflow API is enabled",
    409: "wait for the other job, or give another --job_name",
}


def check_staging(options: PipelineOptions) -> None:
    """Finds out whether the bucket of a Dataflow job can be written: Beam would try for ten minutes, in silence.

    Raises:
        ValueError: It cannot.
    """
    import google.auth
    from apache_beam.io.gcp.gcsio import create_storage_client
    from google.api_core.exceptions import ClientError
    from google.auth.exceptions import GoogleAuthError

    cloud = options.view_as(GoogleCloudOptions)
    places = {flag: getattr(cloud, flag) or "" for flag in ("temp_location", "staging_location")}
    for flag, place in places.items():
        bucket, _, folder = place.removeprefix("gs://").partition("/")
        if not place.startswith("gs://"):
            continue
        try:
            if not cloud.no_auth:
                google.auth.default()  # Beam would look for credentials for half a minute
            client = create_storage_client(options, not cloud.no_auth)
            # As Beam does; an upload that is begun and goes no further leaves nothing behind.
            client.get_bucket(bucket).blob(f"{folder.rstrip('/')}/probe".lstrip("/")).create_resumable_upload_session()
        except GoogleAuthError as error:
            raise ValueError(
                f"no Google account: {error}; `gcloud auth application-default login` makes one known"
            ) from error
        except ClientError as error:
            raise ValueError(
                f"--{flag}={place} cannot be written: {error.message} ({error.code}); name a bucket that is there, "
                "where you may read the bucket and create objects (docs/dataflow.md)"
            ) from error


class LostJobError(OSError):
    """A job that was submitted and cannot be seen any more; it may still be at work."""


@contextlib.contextmanager
def seen() -> Iterator[None]:
    """Raises:
    LostJobError: In place of whatever but the job's own failure ends the wait for it.
    """
    try:
        yield
    except Exception as error:
        if _FAILURE.fullmatch(str(error)):
            raise
        raise LostJobError(f"the job goes on, but cannot be seen any more: {error}") from error


def page_of(result: Any, options: PipelineOptions) -> str:
    """Where a person looks at the job."""
    cloud = options.view_as(GoogleCloudOptions)
    return f"https://console.cloud.google.com/dataflow/jobs/{cloud.region}/{result.job_id()}?project={cloud.project}"


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Raises:
    ValueError: In place of what Google's client raises where the job is refused.
    RuntimeError: In place of what Beam raises where the job has failed, which is a page of text.
    """
    try:
        yield
    except Exception as error:
        if failure := _FAILURE.fullmatch(str(error)):
            raise RuntimeError(f"the job {_told(*failure.groups())}") from error
        code = getattr(error, "code", None)
        if type(error).__module__ != "google.api_core.exceptions" or code not in _REFUSALS:
            raise
        raise ValueError(f"the job was refused: {error.message} ({code}; {_REFUSALS[code]})") from error  # type: ignore[attr-defined]


def _told(state: str, text: str) -> str:
    """How a job ended, and its last error: the last line of a worker's traceback."""
    lines = [re.sub(r"\s*\[while running .*\]$", "", line.strip()) for line in text.splitlines() if line.strip()]
    if state != "FAILED" or not lines or lines == ["None"]:
        return f"ended in the state {state}"
    return f"failed: {lines[-1] if 'Traceback' in text else lines[0]}"
