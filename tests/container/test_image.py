"""The image, built and run: without network, without capabilities, below a root that cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable

from tests.conftest import jpeg
from tests.container.engines import Engine
from tests.flink.cluster import flink_cluster, wait_until
from tests.flink.network import Network

pytestmark = pytest.mark.container

NUM_PHOTOS = 24
POOL = ("127.0.0.1", 50000)
USER = 1000


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that containers and this machine know by the same name, with photos; the user of the image may write there,
    and in what commands on this machine make there."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "photos").mkdir()
    for seed in range(NUM_PHOTOS):
        (folder / "photos" / f"p{seed:02}.jpg").write_bytes(jpeg(seed, 320, 240))
    usual = os.umask(0)
    folder.chmod(0o777)
    yield folder
    os.umask(usual)


@pytest.fixture(scope="module")
def catalog(engine: Engine, image: str, shared: Path) -> Path:
    """What a container builds by itself."""
    path = shared / "catalog"
    done = engine.run(image, "build", "--input", shared / "photos", "--catalog", path, flags=[mount(shared)])
    assert f"{NUM_PHOTOS} added" in done.stdout
    assert "preparing" not in done.stderr  # models are ready
    return path


def mount(folder: Path) -> str:
    return f"--volume={folder}:{folder}"


def rows(catalog: Path) -> list[dict[str, Any]]:
    return sorted(DeltaTable(str(catalog / "images")).to_pyarrow_table().to_pylist(), key=lambda row: row["image_id"])


def test_doctor_finds_no_problem(engine: Engine, image: str) -> None:
    findings = json.loads(engine.run(image, "doctor", "--load", "--json").stdout)["findings"]
    told = {(each["group"], each["name"]): each for each in findings}
    assert [each for each in findings if each["status"] == "problem"] == []
    assert told["disk", "cache"]["status"] == "warning"  # which nothing can be added to
    assert told["packages", "[tagging]"]["told"] == told["packages", "[dataflow]"]["told"] == "installed"
    labels = engine.inspect(image)["Config"]["Labels"]
    assert told["local runner", "Apache Beam"]["told"].startswith(f"{labels['org.apache.beam.version']}, ")
    assert told["packages", "python"]["told"].startswith(f"{labels['org.python.version']}.")


def test_what_the_image_is(engine: Engine, image: str) -> None:
    config = engine.inspect(image)["Config"]
    assert config["User"] == str(USER)
    assert config["Entrypoint"] == ["entrypoint"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert set(labels) >= {
        f"org.opencontainers.image.{each}" for each in ("title", "description", "version", "revision")
    }
    assert dict(each.split("=", 1) for each in config["Env"])["NVIDIA_VISIBLE_DEVICES"] == "all"


def test_nothing_is_left_of_what_made_it(engine: Engine, image: str) -> None:
    look = "id -u; ls -A / /tmp; command -v gcc go || echo no compiler"
    user, *seen = engine.run(image, "-c", look, flags=["--entrypoint=sh"]).stdout.split("\n")
    assert user == str(USER)
    assert not {"wheels", "src"} & set(seen)
    assert seen[seen.index("/tmp:") + 1 :] == ["no compiler", ""]


def test_a_catalog_of_mounted_photos(catalog: Path) -> None:
    found = rows(catalog)
    assert len(found) == NUM_PHOTOS
    assert all(row["caption"] and row["image_embedding"] for row in found)


def test_a_catalog_is_read_by_any_user(engine: Engine, image: str, shared: Path, catalog: Path) -> None:
    flags = [f"{mount(shared)}:ro", "--user=12345:12345"]
    found = engine.run(image, "search", catalog, "a photo", "-k", "3", flags=flags).stdout
    assert found.count(f"{shared}/photos/p") == 3


def test_flags_alone_are_for_beam(engine: Engine, image: str) -> None:
    assert engine.run(image, "--version").stdout.startswith("beamsight ")
    assert engine.run(image).stdout.startswith("usage: beamsight COMMAND")
    assert "No provision endpoint provided" in engine.run(image, "--id=1-1", code=1).stderr
    assert "unknown command" in engine.run(image, "biuld", code=2).stderr


def test_its_worker_pool_serves_a_build_on_flink(
    engine: Engine, image: str, shared: Path, catalog: Path, tmp_path: Path
) -> None:
    check_shares_networks(engine)
    built = shared / "by-pool"
    external = ["--environment_type=EXTERNAL", f"--environment_config={POOL[0]}:{POOL[1]}", "--parallelism=1"]
    # One TaskManager: Beam's pool knows workers by names that two of them would both give.
    with (
        flink_cluster(tmp_path, num_task_managers=1) as cluster,
        worker_pool(engine, image, shared, cluster.network),
    ):
        build = ["build", "--input", shared / "photos", "--catalog", built]
        said = cluster.start_command(*build, *cluster.flags(), *external).finish()
    assert f"{NUM_PHOTOS} added" in said
    check_equal(catalog, built)


def test_flink_starts_it_for_its_workers(
    engine: Engine, image: str, shared: Path, catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_shares_networks(engine)
    # What Flink calls `docker`. Beam mounts nothing into a container; with folders of this machine for buckets, this does.
    programs = tmp_path / "programs"
    programs.mkdir()
    _, _, *flags, _ = engine.command(image, flags=[mount(shared)])
    more = shlex.join(flag for flag in flags if flag != "--rm" and not flag.startswith("--network"))
    (programs / "docker").write_text(
        f'#!/bin/sh\n[ "$1" != run ] || {{ shift; set -- run {more} "$@"; }}\nexec {engine.name} "$@"\n'
    )
    (programs / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "flink").mkdir()
    built = shared / "by-docker"
    with flink_cluster(tmp_path / "flink", num_task_managers=2) as cluster:
        build = ["build", "--input", shared / "photos", "--catalog", built]
        docker = ["--environment_type=DOCKER", f"--environment_config={image}"]
        said = cluster.start_command(*build, *cluster.flags(), *docker).finish()
    assert f"{NUM_PHOTOS} added" in said
    check_equal(catalog, built)


def check_shares_networks(engine: Engine) -> None:
    if engine.name != "podman" or os.getuid() != 0:
        pytest.skip("needs podman as root, whose containers can be in the network namespace of the cluster")


def check_equal(catalog: Path, built: Path) -> None:
    """Commands and cluster are this user's: who wrote the parts was in a container."""
    assert {path.stat().st_uid for path in (built / "images").glob("*.parquet")} == {USER}
    for here, there in zip(rows(catalog), rows(built), strict=True):
        for name in ("image_id", "uri", "content_sha256", "caption"):
            assert here[name] == there[name]
        np.testing.assert_allclose(here["image_embedding"], there["image_embedding"], atol=1e-4)


@contextlib.contextmanager
def worker_pool(engine: Engine, image: str, shared: Path, network: Network) -> Iterator[subprocess.Popen]:
    """A container that serves workers in a network, as long as the block lasts; told to stop, it does."""
    pool = network.start(engine.command(image, "--worker_pool", flags=[mount(shared)], network="host"))
    try:
        wait_until(lambda: network.run(_answers), "the worker pool", 60)
        yield pool
        pool.terminate()
        pool.wait(8)  # an engine kills after ten
    finally:
        pool.kill()


def _answers() -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(POOL, timeout=1).close()
        return True
    return False
