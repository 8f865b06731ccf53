"""The container engine of this machine: docker, or else podman; both take the same flags."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_SAFE = ("--read-only", "--tmpfs=/tmp", "--cap-drop=all", "--security-opt=no-new-privileges")


@dataclass(frozen=True)
class Engine:
    """Attributes:
    name: `docker` or `podman`.
    """

    name: str

    def build(self, context: Path, tag: str, arguments: Mapping[str, str], flags: Sequence[str] = ()) -> None:
        """Builds an image; its layers are kept, so that a second time builds only what has changed.

        Args:
            arguments: Build arguments.
        """
        given = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        self._call("build", f"--tag={tag}", *given, *flags, str(context))

    def command(self, image: str, *arguments: object, flags: Sequence[str] = (), network: str = "none") -> list[str]:
        """The command that runs an image without capabilities and below a root that cannot be written."""
        own = ["--rm", "--pull=never", f"--network={network}", *_SAFE, *_limits()]
        return [self.name, "run", *own, *flags, image, *map(str, arguments)]

    def run(
        self, image: str, *arguments: object, flags: Sequence[str] = (), code: int = 0
    ) -> subprocess.CompletedProcess:
        """Runs it to its end, without network.

        Raises:
            AssertionError: It ended with another exit code.
        """
        done = subprocess.run(self.command(image, *arguments, flags=flags), capture_output=True, text=True, timeout=300)
        assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def inspect(self, image: str) -> dict[str, Any]:
        """What the engine knows of an image that is there."""
        (about,) = json.loads(self._call("image", "inspect", image))
        return about

    def has(self, image: str) -> bool:
        return subprocess.run([self.name, "image", "inspect", image], capture_output=True).returncode == 0

    def _call(self, *arguments: str) -> str:
        done = subprocess.run([self.name, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"{self.name} {' '.join(arguments)}\n{(done.stdout + done.stderr)[-3000:]}"
        return done.stdout


@lru_cache(maxsize=1)
def find_engine() -> Engine:
    """The first engine that answers: docker may be there without its daemon."""
    for name in ("docker", "podman"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
            return Engine(name)
    pytest.skip("needs docker or podman: neither `docker info` nor `podman info` succeeds")


def _limits() -> list[str]:
    """Modest ones: an engine that may not raise limits stops at its own defaults."""
    flags = []
    for name, kind, most in (("nofile", resource.RLIMIT_NOFILE, 16384), ("nproc", resource.RLIMIT_NPROC, 4096)):
        _, hard = resource.getrlimit(kind)
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        flags.append(f"--ulimit={name}={limit}:{limit}")
    return flags


def certificates() -> Path | None:
    """Where the network is reached through a proxy that has certificates of its own."""
    named = os.environ.get("SSL_CERT_FILE") or os.environ.get("PIP_CERT")
    return Path(named) if named else None
