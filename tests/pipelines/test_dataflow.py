"""`--runner dataflow`, to the wire: the whole submission, to a Dataflow and a Cloud Storage that tests imitate; and the
life of a job, which really runs what was staged."""

from __future__ import annotations

import gzip
import io
import json
import re
import runpy
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from apache_beam.internal import pickler
from apache_beam.internal.gcp import auth
from apache_beam.portability import common_urns, python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow import dataflow_runner
from apache_beam.utils import retry
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from deltalake import DeltaTable

from pipelines.cli import main
from pipelines.transforms import EnrichShardDoFn
from schemas.catalog import CatalogLayout
from schemas.samples import ShardRef
from tests.conftest import jpeg, tar_bytes
from tests.servers import Proxy, Rule, Store, fake_gcs_store
from vlm_ops import storage
from vlm_ops.run_manifests import read_manifest

dataflow = pytest.importorskip("google.cloud.dataflow", reason="needs beamsight[dataflow]")
service_module = pytest.importorskip("tests.dataflow_service")
IMAGE = "europe-west4-docker.pkg.dev/my-project/beamsight/worker:0.1.0"
FLEX_TEMPLATE = Path(__file__).parents[2] / "examples" / "flex_template"
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # as Beam checks it, and Dataflow
A100 = "worker_accelerator=type:nvidia-tesla-a100;count:1;install-nvidia-driver"
L4 = "worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"


@pytest.fixture(scope="module")
def google() -> Iterator[tuple[Store, Proxy]]:
    """A bucket with two shards of three photos; whatever speaks to Google speaks to this machine."""
    with fake_gcs_store("photos") as (store, proxy), pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        patch.setenv("NO_PROXY", "localhost,127.0.0.1")
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setattr(retry.Clock, "sleep", lambda self, seconds: None)
        patch.setattr(dataflow_runner, "time", SimpleNamespace(sleep=lambda seconds: time.sleep(0.02), time=time.time))
        for name, seeds in (("a", (1, 2, 3)), ("b", (4, 5, 6))):
            shard = tar_bytes([(f"{seed}.jpg", jpeg(seed)) for seed in seeds])
            storage.write_bytes(f"{store.uri}/corpus/{name}.tar", shard, store.options)
        yield store, proxy


@pytest.fixture
def store(google: tuple[Store, Proxy]) -> Store:
    return google[0]


@pytest.fixture
def bucket(google: tuple[Store, Proxy]) -> Iterator[Proxy]:
    """What stands before the bucket, and can make it fail."""
    yield google[1]
    google[1].fail()


@pytest.fixture
def service(google: tuple[Store, Proxy]) -> Iterator[Any]:
    with service_module.serving() as service:
        yield service


def catalog(store: Store, name: str = "catalog") -> str:
    return f"{store.uri}/{name}"


def build(service: Any, catalog: str, *flags: str, **how: bool) -> int:
    what = ("--input", "gs://photos/corpus/*.tar", "--catalog", catalog, "--model", "python:tests.toys")
    return command(service, "build", *what, *flags, **how)


def command(
    service: Any, name: str, *arguments: str, is_anonymous: bool = True, tells_its_packages: bool = False
) -> int:
    """A command as a person types it, but for what sends it to this machine, without an account, and saves half a second."""
    where = ("--project=my-project", "--region=europe-west4", "--temp_location=gs://photos/temp")
    here = ("--storage_options", json.dumps({"token": "anon"}), f"--dataflow_endpoint={service.url}")
    nobody = ("--no_auth",) if is_anonymous else ()
    quick = () if tells_its_packages else ("--experiments=disable_logging_submission_environment",)
    image = f"--sdk_container_image={IMAGE}"
    return main([name, *here, "--runner", "dataflow", *where, image, *nobody, *quick, *arguments])


def pipeline_of(job: Any, store: Store) -> beam_runner_api_pb2.Pipeline:
    return beam_runner_api_pb2.Pipeline.FromString(storage.read_bytes(service_module.pipeline_url(job), store.options))


def functions_of(pipeline: beam_runner_api_pb2.Pipeline) -> dict[str, tuple[Any, list]]:
    """The pickled DoFns of a pipeline and their arguments, by the names of their steps."""
    found = {}
    for transform in pipeline.components.transforms.values():
        if transform.spec.urn == common_urns.primitives.PAR_DO.urn:
            function = beam_runner_api_pb2.ParDoPayload.FromString(transform.spec.payload).do_fn
            if function.urn == python_urns.PICKLED_DOFN_INFO:
                do_fn, arguments, *_ = pickler.loads(function.payload)
                found[transform.unique_name] = do_fn, arguments
    return found


def planned(job: Any, store: Store) -> list[ShardRef]:
    """What there is to do: a file whose name is in the pipeline, as long as the job is at work."""
    functions = functions_of(pipeline_of(job, store))
    uri = next(arguments[0] for name, (_, arguments) in functions.items() if name.startswith("Shards/FlatMap(_lines"))
    lines = gzip.decompress(storage.read_bytes(uri, store.options)).decode().splitlines()
    return [ShardRef.from_json(line) for line in lines]


def options_of(job: Any) -> dict[str, Any]:
    return dict(job.environment.sdk_pipeline_options)["options"]


def identities(catalog: str, store: Store) -> list[tuple]:
    table = DeltaTable(f"{catalog}/images", storage_options=storage.delta_options(catalog, store.options))
    names = ("image_id", "uri", "key", "content_sha256", "caption", "width", "recipe_id")
    return sorted(tuple(row[name] for name in names) for row in table.to_pyarrow_table().to_pylist())


# --- a build that goes well ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(google: tuple[Store, Proxy]) -> SimpleNamespace:
    """A build from its command to its end: what arrived, what was printed, and what came of it."""
    out, err = io.StringIO(), io.StringIO()
    shards: list[ShardRef] = []

    def work(service: Any) -> None:
        shards.extend(planned(service.jobs[0], google[0]))
        service_module.run_staged(service)

    with service_module.serving() as service, redirect_stdout(out), redirect_stderr(err):
        service.work = work
        code = build(service, "gs://photos/catalog", "--labels=team=photos", tells_its_packages=True)
    job = service.jobs[0]
    staged = storage.filesystem("gs://", google[0].options).find("photos/temp")
    pipeline = pipeline_of(job, google[0])
    return SimpleNamespace(
        code=code,
        out=out.getvalue(),
        err=err.getvalue(),
        job=job,
        places=service.places,
        staged=staged,
        pipeline=pipeline,
        shards=shards,
    )


def test_the_catalog_is_the_one_of_a_local_build(done: SimpleNamespace, store: Store) -> None:
    assert done.code == 0, done.err
    assert "images     6 (shards: 2)" in done.out
    options = json.dumps(store.options)
    arguments = ["--input", "gs://photos/corpus/*.tar", "--model", "python:tests.toys", "--storage_options", options]
    assert main(["build", *arguments, "--catalog", f"{store.uri}/local"]) == 0
    assert identities(f"{store.uri}/catalog", store) == identities(f"{store.uri}/local", store)
    assert len(identities(f"{store.uri}/catalog", store)) == 6


def test_the_job(done: SimpleNamespace) -> None:
    job, environment = done.job, done.job.environment
    assert done.places == [("my-project", "europe-west4")]
    assert NAME.fullmatch(job.name) and len(job.name) <= 63 and job.name.startswith("beamsight-build-")
    assert job.type_.name == "JOB_TYPE_BATCH" and job.labels == {"team": "photos"}
    (pool,) = environment.worker_pools
    assert pool.worker_harness_container_image == IMAGE
    assert [image.container_image for image in pool.sdk_harness_container_images] == [IMAGE]
    assert pool.machine_type == "n2-standard-4" and pool.disk_size_gb == 100
    assert "no_use_multiple_sdk_containers" in environment.experiments
    assert "use_multiple_sdk_containers" not in environment.experiments
    assert not environment.service_options
    assert environment.temp_storage_prefix.startswith("storage.googleapis.com/photos/temp/beamsight-build-")


def test_what_is_staged(done: SimpleNamespace) -> None:
    """The pipeline, and the list of the launcher's packages, which Beam compares with the worker's and logs. No Beam,
    which the image has, and no session."""
    names = {path.rpartition("/")[2] for path in done.staged}
    assert names == {"pipeline.pb", "submission_environment_dependencies.txt"}
    assert {path.split("/")[2].rpartition(".")[0].rpartition(".")[0] for path in done.staged} == {done.job.name}
    options = options_of(done.job)
    assert options["sdk_location"] == "container" and options["save_main_session"] is False
    (environment,) = done.pipeline.components.environments.values()
    payload = beam_runner_api_pb2.DockerPayload.FromString(environment.payload)
    assert environment.urn == common_urns.environments.DOCKER.urn and payload.container_image == IMAGE


def test_the_pipeline_holds_the_configuration(done: SimpleNamespace, store: Store) -> None:
    functions = functions_of(done.pipeline)
    (enrich,) = (do_fn for do_fn, _ in functions.values() if isinstance(do_fn, EnrichShardDoFn))
    assert enrich.config.catalog == "gs://photos/catalog"
    assert enrich.config.read.storage_options == {"token": "anon"}
    assert [op.model for op in enrich.config.recipe.ops if op.model] == ["python:tests.toys"] * 4
    assert enrich.config.num_threads is None  # as many as the worker has cores, not the launcher
    (publish,) = functions["Publish/Map(_publish)"][1]
    assert (publish.catalog, publish.run_id) == (enrich.config.catalog, enrich.config.run_id)
    assert publish.recipe == enrich.config.recipe and publish.inputs == ("gs://photos/corpus/*.tar",)
    manifest = read_manifest(CatalogLayout(publish.catalog), publish.run_id, store.options)
    assert manifest.status == "committed" and manifest.recipe == publish.recipe

    assert [shard.uri for shard in done.shards] == ["gs://photos/corpus/a.tar", "gs://photos/corpus/b.tar"]
    assert all(shard.num_bytes > 0 and shard.version for shard in done.shards)
    left = storage.names_in(f"gs://photos/catalog/runs/{publish.run_id}", store.options)
    assert left == {"manifest.json", "metrics.json", "report.html"}


# --- GPUs, and other flags -----------------------------------------------------------------------


def refuse_to_work(service: Any) -> None:
    raise RuntimeError("this job is only looked at")


@pytest.mark.parametrize(
    ("flags", "machine", "accelerators", "experiments"),
    [
        (("--device", "cuda"), "g2-standard-8", [L4], {"no_use_multiple_sdk_containers"}),
        (
            ("--device", "cuda", "--machine_type=a2-highgpu-1g", f"--dataflow_service_options={A100}"),
            "a2-highgpu-1g", [A100], {"no_use_multiple_sdk_containers"},
        ),
        (
            ("--machine_type=c3-standard-8", "--experiments=use_multiple_sdk_containers", "--experiments=shuffle_mode=auto"),
            "c3-standard-8", [], {"use_multiple_sdk_containers", "shuffle_mode=auto"},
        ),
    ],
    ids=["L4", "A100", "CPU"],
)  # fmt: skip
def test_workers(
    service: Any, store: Store, flags: tuple[str, ...], machine: str, accelerators: list[str], experiments: set[str]
) -> None:
    service.work = refuse_to_work
    network = ("--subnetwork=regions/europe-west4/subnetworks/photos", "--no_use_public_ips")
    size = ("--num_workers=4", "--max_num_workers=10", "--number_of_worker_harness_threads=1")
    account = (
        "--service_account_email=worker@my-project.iam.gserviceaccount.com",
        "--staging_location=gs://photos/staged",
    )
    assert build(service, catalog(store, "other"), *flags, *network, *size, *account, "--job_name=my-own-name") == 1
    (job,) = service.jobs
    (pool,) = job.environment.worker_pools
    assert job.name == "my-own-name" and pool.machine_type == machine
    assert list(job.environment.service_options) == accelerators
    assert experiments <= set(job.environment.experiments)
    multiple = {"use_multiple_sdk_containers", "no_use_multiple_sdk_containers"}
    assert len(multiple & set(job.environment.experiments)) == 1
    assert pool.ip_configuration.name == "WORKER_IP_PRIVATE" and pool.subnetwork.endswith("/photos")
    assert (pool.num_workers, pool.autoscaling_settings.max_num_workers) == (4, 10)
    assert pool.num_threads_per_worker == 1
    assert job.environment.service_account_email == "worker@my-project.iam.gserviceaccount.com"
    assert service_module.pipeline_url(job).startswith("gs://photos/staged/my-own-name.")
    device = next(
        do_fn.config
        for do_fn, _ in functions_of(pipeline_of(job, store)).values()
        if isinstance(do_fn, EnrichShardDoFn)
    ).settings.device
    assert device == ("cuda" if "cuda" in flags else "auto")


# --- the life of a job ---------------------------------------------------------------------------


def test_a_job_that_fails_says_why(
    service: Any, store: Store, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    def work(service: Any) -> None:
        service.say("BASIC", "Worker pool started.")
        service.say(
            "ERROR", 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: the weights are damaged'
        )
        service.say("ERROR", "Workflow failed. Causes: S02 failed, a work item was attempted 4 times without success.")
        raise RuntimeError("Workflow failed.")

    service.work = work
    assert build(service, catalog(store, "failed")) == 1
    message = capsys.readouterr().err
    assert "ValueError: the weights are damaged" in message
    page = f"console.cloud.google.com/dataflow/jobs/europe-west4/{service.jobs[0].id}?project=my-project"
    assert page in caplog.text  # a person may look while it runs
    assert "run the same command again" in message and "Traceback" not in message


def test_a_job_that_is_done_and_has_written_nothing(service: Any, store: Store, capsys: pytest.CaptureFixture) -> None:
    service.work = lambda service: None
    assert build(service, catalog(store, "elsewhere")) == 1
    message = capsys.readouterr().err
    assert "the job has ended well, but gs://photos/elsewhere/runs/" in message and "is not there" in message


def test_a_job_that_somebody_cancels(service: Any, store: Store, capsys: pytest.CaptureFixture) -> None:
    service.work = lambda service: service.cancel()
    assert build(service, catalog(store, "cancelled")) == 1
    message = capsys.readouterr().err
    assert "cancelled" in message.lower() and "run the same command again" in message and "Traceback" not in message


def test_ctrl_c_cancels_the_job(
    service: Any, store: Store, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.work = lambda service: service.cancelled.wait(10)

    def interrupted(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        time.sleep(0.02)

    monkeypatch.setattr(dataflow_runner, "time", SimpleNamespace(sleep=interrupted, time=time.time))
    assert build(service, catalog(store, "interrupted")) == 130
    assert service.cancelled.is_set()
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Exception in thread")
def test_a_job_that_is_out_of_sight_goes_on(service: Any, store: Store, capsys: pytest.CaptureFixture) -> None:
    """A launcher without network: what the job reads stays, and the job publishes."""
    service.is_mute = True
    service.work = lambda service: service.cancelled.wait(10)
    place = catalog(store, "unseen")
    assert build(service, place) == 1
    message = capsys.readouterr().err
    assert "the job goes on, but cannot be seen any more: " in message
    service_module.run_here(service)
    assert len(identities(place, store)) == 6
    service.cancelled.set()


def test_finished_parts_of_a_job_that_was_cancelled_are_kept(
    service: Any, store: Store, capsys: pytest.CaptureFixture
) -> None:
    """The second job computes the shard that the first one had not come to, and no other."""
    place = catalog(store, "twice")

    def one_shard(service: Any) -> None:
        functions = functions_of(pipeline_of(service.jobs[-1], store))
        (enrich,) = (do_fn for do_fn, _ in functions.values() if isinstance(do_fn, EnrichShardDoFn))
        enrich.setup()
        list(enrich.process(planned(service.jobs[-1], store)[0]))
        service.cancel()

    service.work = one_shard
    assert build(service, place) == 1
    service.cancelled.clear()
    service.work = service_module.run_here
    assert build(service, place) == 0
    assert "images     6 (shards: 2, 1 of them finished by an earlier run)" in capsys.readouterr().out


# --- submissions that are refused ----------------------------------------------------------------


REFUSALS = {
    400: ("INVALID_ARGUMENT", "The workflow could not be created. Causes: the machine type is not in the zone"),
    403: ("PERMISSION_DENIED", "Current user cannot act as service account worker@my-project.iam.gserviceaccount.com"),
    404: ("NOT_FOUND", "Project my-project was not found"),
    409: ("ALREADY_EXISTS", "There is already an active job named my-own-name"),
    429: ("RESOURCE_EXHAUSTED", "Quota NVIDIA_L4_GPUS exceeded in europe-west4"),
    503: ("UNAVAILABLE", "The service is currently unavailable"),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refused_job_is_one_message(
    service: Any, store: Store, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """What the person, or who gives permissions, can mend ends with 2; what may be gone later with 1."""
    status, message = REFUSALS[code]
    service.refusal = code, status, message
    assert build(service, catalog(store, "refused")) == (2 if code < 429 else 1)
    told = capsys.readouterr().err
    assert told.count(message) == 1 and "Traceback" not in told and message not in caplog.text
    assert not service.jobs and service.num_refused == (4 if code == 503 else 1)


def test_a_service_that_is_not_there(service: Any, store: Store, capsys: pytest.CaptureFixture) -> None:
    assert build(service, catalog(store, "refused"), "--dataflow_endpoint=http://localhost:9") == 1
    told = capsys.readouterr().err
    assert "Connection refused" in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("status", "methods", "told"),
    [
        (401, "GET", "no Google account: "),
        (403, "GET", "--temp_location=gs://photos/temp cannot be written: "),
        (403, "POST", "--temp_location=gs://photos/temp cannot be written: "),
    ],
)
def test_a_bucket_that_may_not_be_written(
    service: Any, store: Store, bucket: Proxy, capsys: pytest.CaptureFixture, status: int, methods: str, told: str
) -> None:
    """Known at once: Beam would try eight times, in ten minutes. (`photos?` is how Beam asks, and nobody else.)"""
    bucket.fail(Rule(status, methods=methods, path="b/photos?proj" if methods == "GET" else "uploadType=resumable"))
    assert build(service, catalog(store, "forbidden")) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not service.jobs
    assert bucket.num_failed() == 1


def test_a_bucket_that_is_not_there(service: Any, store: Store, capsys: pytest.CaptureFixture) -> None:
    assert build(service, catalog(store, "nowhere"), "--staging_location=gs://not-there/staged") == 2
    error = capsys.readouterr().err
    assert "--staging_location=gs://not-there/staged cannot be written: " in error and error.count("\n") == 1
    assert "does not exist" in error and "name a bucket that is there" in error


def test_an_account_is_used(service: Any, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A service account's key, whose tokens come from this machine too."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    account = {"type": "service_account", "client_email": "launcher@my-project.iam.gserviceaccount.com", "private_key": pem,
               "private_key_id": "1", "token_uri": f"{service.url}/token", "project_id": "my-project"}  # fmt: skip
    (tmp_path / "key.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    for name in ("_credentials_init", "_credentials"):  # Beam asks once a process
        monkeypatch.setattr(auth._Credentials, name, None)
    service.work = refuse_to_work
    assert build(service, catalog(store, "account"), is_anonymous=False) == 1
    assert len(service.jobs) == 1 and "Bearer" in service.authorizations


def test_nobody(
    service: Any, store: Store, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without an account, and without `--no_auth`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    assert build(service, catalog(store, "nobody"), is_anonymous=False) == 2
    error = capsys.readouterr().err
    assert "no Google account: " in error and "gcloud auth application-default login" in error and not service.jobs


# --- templates -----------------------------------------------------------------------------------


def test_a_template_is_written_and_its_job_finds_the_plan(service: Any, store: Store) -> None:
    """What the launcher of a Flex Template does: no job is submitted here, and nothing that it reads goes away."""
    place = catalog(store, "templated")
    assert build(service, place, "--template_location=gs://photos/templates/job") == 0
    assert not service.jobs
    job = dataflow.Job.from_json(storage.read_bytes("gs://photos/templates/job", store.options))
    assert [shard.uri for shard in planned(job, store)] == ["gs://photos/corpus/a.tar", "gs://photos/corpus/b.tar"]
    service.jobs.append(job)
    service_module.run_here(service)
    assert len(identities(place, store)) == 6


def test_the_launcher_of_the_flex_template(service: Any, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flags as Google's launcher gives them, with the parameters that the metadata declare."""
    metadata = json.loads((FLEX_TEMPLATE / "metadata.json").read_text())
    parameters = {"input": "gs://photos/corpus/*.tar", "catalog": catalog(store, "flex"), "sdk_container_image": IMAGE,
                  "model": "python:tests.toys", "device": "cuda", "dtype": "bfloat16"}  # fmt: skip
    assert set(parameters) == {each["name"] for each in metadata["parameters"]}
    for each in metadata["parameters"]:
        assert all(re.fullmatch(regex, parameters[each["name"]]) for regex in each.get("regexes", []))
    flags = [
        "--runner=DataflowRunner", "--project=my-project", "--region=europe-west4", "--job_name=nightly",
        "--temp_location=gs://photos/temp", "--template_location=gs://photos/templates/flex", "--no_auth",
        "--storage_options", json.dumps({"token": "anon"}), f"--dataflow_endpoint={service.url}",
    ]  # fmt: skip
    monkeypatch.setattr(
        sys, "argv", ["launch.py", *(f"--{name}={value}" for name, value in parameters.items()), *flags]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FLEX_TEMPLATE / "launch.py"), run_name="__main__")
    assert ended.value.code == 0
    job = dataflow.Job.from_json(storage.read_bytes("gs://photos/templates/flex", store.options))
    assert job.name == "nightly" and list(job.environment.service_options) == [L4]
    assert "no_use_multiple_sdk_containers" in job.environment.experiments
    assert len(planned(job, store)) == 2


# --- other commands ------------------------------------------------------------------------------


def test_an_index_is_made_there_too(done: SimpleNamespace, service: Any, capsys: pytest.CaptureFixture) -> None:
    assert done.code == 0
    service.work = service_module.run_here
    assert command(service, "index", "gs://photos/catalog") == 0
    assert (
        service.jobs[0].name.startswith("beamsight-index-") and "6 vectors of 3 dimensions" in capsys.readouterr().out
    )
