"""A network that nobody else can reach, for servers that listen on every interface and ask nobody who they are.

So do Beam's job server, the services of Flink's TaskManagers for their Python workers, worker pools and Prism, and no
option changes it. In a network namespace of its own (https://man7.org/linux/man-pages/man7/network_namespaces.7.html)
every interface is loopback.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

_Result = TypeVar("_Result")
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1  # linux/sockios.h, linux/if.h


@dataclass(frozen=True)
class Process:
    """A process as /proc tells of it."""

    pid: int
    parent: int
    command: str

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Network:
    """A namespace with loopback alone. One thread of this process lives in it: what runs there, and what is started from there, does too."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "network")
        self._thread.submit(_enter_own_network).result()
        self._id = self.run(os.readlink, "/proc/thread-self/ns/net")

    def run(self, function: Callable[..., _Result], *arguments: Any, **options: Any) -> _Result:
        """Calls a function in the namespace."""
        return self._thread.submit(function, *arguments, **options).result()

    def start(self, command: Sequence[object], **options: Any) -> subprocess.Popen:
        """Starts a program in the namespace."""
        return self.run(subprocess.Popen, list(map(str, command)), **options)

    def processes(self, *words: str) -> list[Process]:
        """All that run in the namespace and have these words in their command lines, whoever started them."""
        found = (process for folder in Path("/proc").glob("[0-9]*") if (process := self._process(folder)))
        return sorted(
            (each for each in found if all(word in each.command for word in words)), key=lambda each: each.pid
        )

    def descendants(self, of: Process) -> list[Process]:
        """What a process has started, and what these have."""
        everyone = self.processes()
        found = [of]
        for each in found:
            found += [child for child in everyone if child.parent == each.pid]
        return found[1:]

    def _process(self, folder: Path) -> Process | None:
        try:
            if os.readlink(folder / "ns" / "net") != self._id:
                return None
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            return None
        return Process(int(folder.name), parent, command) if command else None  # zombies have none

    def close(self) -> None:
        """Ends whatever still runs in the namespace, and with it the namespace."""
        while left := self.processes():
            for process in left:
                process.kill()
            time.sleep(0.05)
        self._thread.shutdown()


@contextlib.contextmanager
def own_network() -> Iterator[Network]:
    """A network for as long as the block lasts; skips where the system does not allow it."""
    try:
        network = Network()
    except (OSError, AttributeError) as error:
        pytest.skip(
            f"needs a network namespace of its own ({error}): run as root, or by `unshare --map-root-user pytest ...`"
        )
    try:
        yield network
    finally:
        network.close()


def _enter_own_network() -> None:
    """Moves the calling thread, which has loopback alone from now on."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket() as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
