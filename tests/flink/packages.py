"""What a Flink cluster is made of: Flink from PyPI, a job server assembled by Maven, Beam's `boot` from its Go module.

All of it is kept in Beamsight's cache. The job server that Beam publishes (`org.apache.beam:beam-runners-flink-1.19-job-server`) is of
the version of the Python package; this one is put together from `pom.xml` with the newest runner that Maven finds there, an older one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.servers import _go_binary
from vlm_ops.models.onnx_engine import cache_dir

FLINK_VERSION = "1.19.3"
BEAM_VERSION = "2.77.0"
_POM = Path(__file__).with_name("pom.xml")


def flink_libraries() -> Path:
    """The folder of Flink's jars."""
    return _kept(f"flink-{FLINK_VERSION}", _download_flink)


def job_server() -> Path:
    """The jar that turns Beam's pipelines into Flink's jobs."""
    made_of = hashlib.sha256(_POM.read_bytes()).hexdigest()[:8]
    return _kept(f"flink-job-server-{FLINK_VERSION}-{made_of}.jar", _assemble_job_server)


def boot() -> Path:
    """The program that starts Python workers; in Beam's image it is /opt/apache/beam/boot."""
    return Path(_go_binary(f"github.com/apache/beam/sdks/v2/python/container@v{BEAM_VERSION}"))


def prism() -> Path:
    """Beam's own local runner."""
    return Path(_go_binary(f"github.com/apache/beam/sdks/v2/go/cmd/prism@v{BEAM_VERSION}"))


def java() -> str:
    """The Java that runs all of it."""
    if not (found := shutil.which("java")):
        pytest.skip("needs Java 11 or 17")
    return found


def _kept(name: str, make: Callable[[Path, Path], None]) -> Path:
    """A file or folder of the cache; `make(scratch, target)` makes it once."""
    target = cache_dir() / "servers" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "made"
            make(Path(scratch), made)
            os.replace(made, target)
    return target


def _download_flink(scratch: Path, target: Path) -> None:
    """The jars of the source distribution of `apache-flink-libraries`."""
    source = ["--no-deps", "--no-binary", ":all:", f"apache-flink-libraries=={FLINK_VERSION}"]
    _call([sys.executable, "-m", "pip", "download", "--quiet", *source, "--dest", str(scratch)], scratch)
    (archive,) = scratch.glob("*.tar.gz")
    target.mkdir()
    with tarfile.open(archive) as packed:
        for member in packed:
            path = Path(member.name)
            if path.parent.name == "lib" and path.name.startswith(("flink-dist", "log4j")) and path.suffix == ".jar":
                content = packed.extractfile(member)
                assert content is not None
                (target / path.name).write_bytes(content.read())


def _assemble_job_server(scratch: Path, target: Path) -> None:
    if not shutil.which("mvn"):
        pytest.skip("needs Maven, to assemble Flink's job server")
    shutil.copy(_POM, scratch)
    _call(["mvn", "--quiet", "--batch-mode", "package"], scratch)  # dependency:tree says success with jars missing
    (scratch / "target" / "job-server-1.jar").rename(target)


def _call(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        told = [line for line in (done.stdout + done.stderr).splitlines() if "ERROR" in line] or ["it failed"]
        pytest.skip(f"{' '.join(command[:4])}: {told[0]}")
