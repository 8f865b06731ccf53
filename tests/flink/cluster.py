"""A real Flink cluster in a network of its own: a JobManager, TaskManagers, and `beamsight` commands that run on it.

Beam's flags are those that docs/flink.md tells users. Java is started as Flink's own scripts do it, but with all sizes of memory given.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.flink import packages
from tests.flink.network import Network, Process, own_network

ROOT = Path(__file__).parents[2]
MASTER = "127.0.0.1:8081"
_JOB_MANAGER = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
_TASK_MANAGER = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
_WORKER = "apache_beam.runners.worker.sdk_worker_main"
# As in conf/config.yaml of Flink 1.19: what Java 17 must open to it.
_OPENED = ("lang", "net", "io", "nio", "lang.reflect", "text", "time", "util", "util.concurrent", "util.concurrent.atomic", "util.concurrent.locks")  # fmt: skip
_JAVA_OPTIONS = (
    "--add-exports=java.base/sun.net.util=ALL-UNNAMED", "--add-exports=java.rmi/sun.rmi.registry=ALL-UNNAMED",
    "--add-exports=java.security.jgss/sun.security.krb5=ALL-UNNAMED", "--add-opens=java.base/sun.nio.ch=ALL-UNNAMED",
    *(f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in _OPENED),
)  # fmt: skip
_QUICK = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")  # Java that lives for minutes, on cores that work
_CONFIG = """
jobmanager.rpc.address: 127.0.0.1
jobmanager.rpc.port: 6123
rest.address: 127.0.0.1
rest.port: 8081
taskmanager.host: 127.0.0.1
taskmanager.numberOfTaskSlots: {slots}
taskmanager.cpu.cores: 1
taskmanager.memory.framework.heap.size: 128m
taskmanager.memory.framework.off-heap.size: 128m
taskmanager.memory.jvm-metaspace.size: 256m
taskmanager.memory.jvm-overhead.min: 192m
taskmanager.memory.jvm-overhead.max: 192m
taskmanager.memory.task.heap.size: 256m
taskmanager.memory.task.off-heap.size: 0m
taskmanager.memory.managed.size: 128m
taskmanager.memory.network.min: 64m
taskmanager.memory.network.max: 64m
io.tmp.dirs: {folder}/tmp
heartbeat.interval: 1000
heartbeat.timeout: 20000
cluster.evenly-spread-out-slots: true
restart-strategy.type: fixed-delay
restart-strategy.fixed-delay.attempts: 3
restart-strategy.fixed-delay.delay: 1s
classloader.check-leaked-classloader: false
"""
_LOGGING = """
rootLogger.level = INFO
rootLogger.appenderRef.out.ref = Out
appender.out.name = Out
appender.out.type = CONSOLE
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{HH:mm:ss,SSS} %-5p %c{1} %m%n
"""


class FlinkCluster:
    """One JobManager, and TaskManagers as they are started."""

    def __init__(self, network: Network, folder: Path, slots: int = 1) -> None:
        self.network = network
        self.folder = folder
        self._java = packages.java()
        self._libraries = packages.flink_libraries()
        self.job_server = packages.job_server()
        self.boot = self._boot_script(packages.boot())
        (folder / "tmp").mkdir()
        (folder / "config.yaml").write_text(_CONFIG.format(slots=slots, folder=folder))
        (folder / "log4j2.properties").write_text(_LOGGING)
        self._job_manager = self._start(_JOB_MANAGER, "job_manager")
        self._task_managers: list[subprocess.Popen] = []

    # --- the cluster ---

    def start_task_manager(self) -> None:
        """Starts one, and does not wait until it is there."""
        self._task_managers.append(self._start(_TASK_MANAGER, "task_manager"))

    def wait_for(self, num_task_managers: int) -> None:
        """Waits until there are so many."""
        wait_until(
            lambda: self.overview()["taskmanagers"] == num_task_managers, f"{num_task_managers} TaskManagers", 60
        )

    def overview(self) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            return self.ask("/overview")
        return {"taskmanagers": 0}

    def ask(self, path: str, method: str = "GET") -> Any:
        """An answer of Flink's REST service."""
        return self.network.run(_ask, f"http://{MASTER}{path}", method)

    def jobs(self, *states: str) -> list[dict[str, Any]]:
        """The jobs in these states, oldest first."""
        jobs = self.ask("/jobs/overview")["jobs"]
        return sorted((job for job in jobs if job["state"] in states), key=lambda job: job["start-time"])

    def task_managers(self) -> list[Process]:
        return self.network.processes(_TASK_MANAGER)

    def workers(self) -> list[Process]:
        """The Python workers."""
        return self.network.processes(_WORKER)

    def stop_task_manager(self) -> None:
        """Stops the oldest one as a person would."""
        self._task_managers = [each for each in self._task_managers if each.poll() is None]
        _stop(self._task_managers.pop(0))

    def stop(self) -> None:
        """Stops all of it.

        Raises:
            TimeoutError: Something is left running.
        """
        for process in [*self._task_managers, self._job_manager]:
            _stop(process)
        wait_until(lambda: not self.network.processes(), "nothing to be left running", 15)

    def _start(self, entry_point: str, name: str) -> subprocess.Popen:
        home = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))
        command = [self._java, "-Xmx512m", *_QUICK, *_JAVA_OPTIONS, f"-Dlog4j.configurationFile={self.folder / 'log4j2.properties'}",
                   "-cp", f"{self._libraries}/*", entry_point, "--configDir", self.folder]  # fmt: skip
        with open(home / "log", "w") as log:
            # A folder of its own: Beam's boot writes the options of a pipeline to the one that it is in.
            return self.network.start(command, cwd=home, stdout=log, stderr=log, env=worker_environment())

    def _boot_script(self, boot: Path) -> Path:
        """Beam's boot where Python and packages are those of the tests. A folder a worker: it unpacks what is staged there."""
        script = self.folder / "boot"
        (self.folder / "staged").mkdir()
        script.write_text(
            f'#!/bin/sh\nexec {boot} --semi_persist_dir="$(mktemp -d {self.folder}/staged/XXXXXX)" "$@"\n'
        )
        script.chmod(0o755)
        return script

    @contextlib.contextmanager
    def worker_pool(self, **environment: object) -> Iterator[str]:
        """Beam's own pool for EXTERNAL environments, which `IMAGE --worker_pool` starts in a container; yields its address."""
        port = 20000  # in a container 50000, which here any client may have
        command = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}",
                   f"--container_executable={self.boot}"]  # fmt: skip
        env = {**worker_environment(), **{name: str(value) for name, value in environment.items()}}
        with open(self.folder / "pool.log", "w") as log:
            pool = self.network.start(command, cwd=self.folder, stdout=log, stderr=log, env=env)
        try:
            wait_until(lambda: self.network.run(_accepts, port), "the worker pool", 60)
            yield f"127.0.0.1:{port}"
        finally:
            _stop(pool)

    # --- commands ---

    def flags(self, **environment: object) -> list[str]:
        """Flags that run a command on the cluster, its workers as processes of the TaskManagers; what is given goes to their environment."""
        process = {"command": str(self.boot), "env": {name: str(value) for name, value in environment.items()}}
        return [
            "--runner=flink", f"--flink_master={MASTER}", "--flink_version=1.19", f"--flink_job_server_jar={self.job_server}",
            f"--artifacts_dir={self.folder}/artifacts", "--parallelism=2",
            "--environment_type=PROCESS", f"--environment_config={json.dumps(process)}",
        ]  # fmt: skip

    def start_command(self, *arguments: object) -> Command:
        """Starts `beamsight ARGUMENTS` beside the cluster."""
        return Command(self.network, arguments)


class Command:
    """A `beamsight` command in a process of its own."""

    errors = ""

    def __init__(self, network: Network, arguments: Sequence[object]) -> None:
        # A shell that runs the tests in the background has them ignore SIGINT.
        command = ["env", "--default-signal=INT", sys.executable, "-m", "pipelines.cli", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = {**worker_environment(), "JDK_JAVA_OPTIONS": " ".join(_QUICK)}  # of the job server that Beam starts
        self.process = network.start(command, cwd=ROOT, env=env, start_new_session=True, **pipes)

    def finish(self, code: int = 0, timeout_sec: float = 300) -> str:
        """What it printed, once it has ended with an exit code; what else it said is in `errors`."""
        try:
            printed, self.errors = self.process.communicate(timeout=timeout_sec)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        assert self.process.returncode == code, f"{self.process.returncode}\n{printed}\n{self.errors}"
        return printed

    def interrupt(self) -> None:
        """As Ctrl-C in a terminal does: the command, and whatever it has started."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """The command, and the job server that it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@contextlib.contextmanager
def flink_cluster(folder: Path, num_task_managers: int, slots: int = 1) -> Iterator[FlinkCluster]:
    """A cluster for as long as the block lasts."""
    with own_network() as network:
        cluster = FlinkCluster(network, folder, slots)
        for _ in range(num_task_managers):
            cluster.start_task_manager()
        cluster.wait_for(num_task_managers)
        yield cluster
        cluster.stop()


def wait_until(is_true: Callable[[], object], what: str, timeout_sec: float = 200, every_sec: float = 0.05) -> None:
    """Raises:
    TimeoutError: It did not become true.
    """
    deadline = time.monotonic() + timeout_sec
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_sec:g} s for {what}")
        time.sleep(every_sec)


def worker_environment() -> dict[str, str]:
    """For commands and for workers: this Python, this code, one thread an operation."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    single = dict.fromkeys(("OMP_NUM_THREADS", "RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT", "PIP_NO_INDEX"), "1")
    return {**os.environ, **single, "PATH": path, "PYTHONPATH": str(ROOT)}


def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def _accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _ask(url: str, method: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as answer:
        return json.loads(answer.read() or b"{}")
