"""The images that the Dockerfile stands on: the official ones, or, where no registry answers, stand-ins.

The stand-ins are made of Debian's packages, laid out like `python:3.11-slim`, and of Beam's `boot`, built from its Go module.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.container.engines import Engine, certificates

BEAM_VERSION = "2.77.0"
_REGISTRY = ("registry-1.docker.io", 443)
_PYTHON, _BEAM = "localhost/python:3.11-slim", f"localhost/beam_python3.11_sdk:{BEAM_VERSION}"
_BOOT = f"github.com/apache/beam/sdks/v2/python/container@v{BEAM_VERSION}"
_SUITE = "bookworm"  # has Python 3.11
_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
# Python and pip where the official image has them; Debian's setuptools would stay beside a newer one.
_HOOKS = (
    'rm -f "$1"/usr/lib/python3.11/EXTERNALLY-MANAGED',
    'rm -rf "$1"/usr/lib/python3/dist-packages/setuptools* "$1"/usr/lib/python3/dist-packages/pkg_resources',
    'for n in python python3 python3.11; do ln -sf /usr/bin/python3.11 "$1"/usr/local/bin/$n; done',
    'for n in pip pip3; do ln -sf /usr/bin/pip3 "$1"/usr/local/bin/$n; done',
    'rm -rf "$1"/etc/resolv.conf',
)


def build_flags(engine: Engine) -> tuple[dict[str, str], list[str]]:
    """Build arguments and flags that name the base images; the stand-ins are made where they are needed, once."""
    try:
        socket.create_connection(_REGISTRY, timeout=5).close()
        return {}, []
    except OSError:
        pass
    for image, make in ((_PYTHON, _python_image), (_BEAM, _beam_image)):
        if not engine.has(image):
            with tempfile.TemporaryDirectory() as scratch:
                make(engine, Path(scratch))
    # Debian's pip asks the system's certificates. They are there while the image is built, not in it.
    mounted = [f"--volume={path}:/etc/ssl/certs/ca-certificates.crt:ro"] if (path := certificates()) else []
    return {"BASE_IMAGE": _PYTHON, "BEAM_IMAGE": _BEAM}, mounted


def _python_image(engine: Engine, scratch: Path) -> None:
    _need("mmdebstrap", "to make a base image, since no registry answers")
    hooks = [f"--customize-hook={hook}" for hook in _HOOKS]
    _call(
        "mmdebstrap", "--mode=root", "--variant=minbase", f"--include={_PACKAGES}", *hooks, _SUITE, scratch / "root.tar"
    )
    path = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    (scratch / "Dockerfile").write_text(
        f'FROM scratch\nADD root.tar /\nENV LANG=C.UTF-8 PATH={path}\nCMD ["python3"]\n'
    )
    engine.build(scratch, _PYTHON, {})


def _beam_image(engine: Engine, scratch: Path) -> None:
    _need("go", "to make Beam's image, since no registry answers")
    _call(
        "go", "install", "-trimpath", "-ldflags=-s -w", _BOOT, environment={"CGO_ENABLED": "0", "GOBIN": str(scratch)}
    )
    modules = subprocess.run(["go", "env", "GOMODCACHE"], capture_output=True, text=True, check=True).stdout.strip()
    shutil.copy(Path(modules) / f"github.com/apache/beam/sdks/v2@v{BEAM_VERSION}" / "LICENSE", scratch)
    (scratch / "Dockerfile").write_text(
        "FROM scratch\nCOPY container /opt/apache/beam/boot\nCOPY LICENSE /opt/apache/beam/\n"
    )
    engine.build(scratch, _BEAM, {})


def _need(program: str, why: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"needs {program}, {why}")


def _call(*command: object, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **(environment or {})}, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}")
