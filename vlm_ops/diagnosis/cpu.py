"""The processor: what this process may use of it, which may be less than the machine has."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_ops.cores import usable_cores
from vlm_ops.diagnosis import Finding, gigabytes, one_line

# What speeds models up, by the flags of /proc/cpuinfo (Linux, arch/x86/include/asm/cpufeatures.h and
# Documentation/arch/arm64/elf_hwcaps.rst).
_INSTRUCTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "AVX2": ("avx2",), "AVX-512": ("avx512f",), "VNNI (int8)": ("avx512_vnni", "avx_vnni"),
        "AVX-512 BF16": ("avx512_bf16",), "AMX": ("amx_tile",),
    },
    "aarch64": {"NEON": ("asimd",), "dot product (int8)": ("asimddp",), "SVE": ("sve",), "BF16": ("bf16",)},
}  # fmt: skip
_LITTLE_MEMORY = 2e9
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "LD_PRELOAD")


@dataclass(frozen=True)
class CgroupLimits:
    """What a container, or a unit of systemd, may use; None where nothing limits it.

    Attributes:
        cores: As a number that need not be whole.
        memory_bytes, memory_used_bytes: The tightest limit, and how much of it is used.
    """

    cores: float | None = None
    memory_bytes: int | None = None
    memory_used_bytes: int = 0


def check_cpu() -> Iterator[Finding]:
    """Cores, instruction sets, memory and threads."""
    limits = cgroup_limits()
    allowed = usable_cores()
    yield judge_cores(os.cpu_count() or 1, allowed, limits)
    yield judge_instructions(_text(Path("/proc/cpuinfo")), platform.machine())
    yield judge_memory(_text(Path("/proc/meminfo")), limits)
    yield judge_threads(os.environ, allowed)
    yield _check_onnxruntime()


def judge_cores(num_cores: int, num_allowed: int, limits: CgroupLimits) -> Finding:
    """Args:
    num_cores: Of the machine.
    num_allowed: That the process may run on (its affinity).
    """
    told = f"{num_allowed} of {num_cores} usable"
    if limits.cores is None or limits.cores >= num_allowed:
        return Finding("cores", "ok", told)
    whole = max(1, int(limits.cores))
    return Finding(
        "cores", "warning", f"{told}, but the container may use no more than {limits.cores:g} at a time",
        f"give --num_threads {whole} and set OMP_NUM_THREADS={whole}, or raise the limit",
    )  # fmt: skip


def judge_instructions(cpuinfo: str, machine: str) -> Finding:
    """Args:
    cpuinfo: Text of /proc/cpuinfo; empty where there is none.
    machine: As `platform.machine()` says.
    """
    known = _INSTRUCTIONS.get(machine)
    fields = [line.partition(":") for line in cpuinfo.splitlines()]
    lists = [value.split() for key, _, value in fields if key.strip() in ("flags", "Features")]
    if not known or not lists:
        return Finding("instructions", "unknown", f"cannot be told on {machine} without /proc/cpuinfo")
    flags = set(lists[0]).intersection(*lists)
    has = [name for name, any_of in known.items() if flags.intersection(any_of)]
    lacks = [name for name in known if name not in has]
    told = "; ".join(f"{verb} {', '.join(names)}" for verb, names in (("has", has), ("lacks", lacks)) if names)
    told = f"{machine}, {told}"
    if machine == "x86_64" and "AVX2" in lacks:
        return Finding("instructions", "warning", told, "models are several times faster on a processor with AVX2")
    return Finding("instructions", "ok", told)


def judge_memory(meminfo: str, limits: CgroupLimits) -> Finding:
    """Args:
    meminfo: Text of /proc/meminfo; empty where there is none.
    """
    values = {line.partition(":")[0]: line.partition(":")[2].split() for line in meminfo.splitlines()}
    if not values.get("MemTotal") or not values.get("MemAvailable"):
        return Finding("memory", "unknown", "cannot be told without /proc/meminfo")
    total, free = (int(values[name][0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    told = f"{gigabytes(free)} of {gigabytes(total)} free"
    if limits.memory_bytes is not None and limits.memory_bytes < total:
        free = min(free, limits.memory_bytes - limits.memory_used_bytes)
        told += f"; the container may use {gigabytes(limits.memory_bytes)}, of which {gigabytes(free)} are free"
    if free < _LITTLE_MEMORY:
        remedy = "end other programs, or give fewer --num_threads and a smaller --batch_size"
        return Finding("memory", "warning", told, remedy)
    return Finding("memory", "ok", told)


def judge_threads(environment: Mapping[str, str], num_allowed: int) -> Finding:
    """What the environment says to the libraries that start threads, and to the allocator."""
    given = {name: environment[name] for name in _THREAD_VARIABLES + _MALLOC_VARIABLES if environment.get(name)}
    told = ", ".join(f"{name}={value}" for name, value in given.items()) or "the libraries' own settings"
    for name in _THREAD_VARIABLES:
        value = given.get(name, "1")
        if not value.isdigit() or int(value) < 1:
            return Finding("threads", "warning", f"{told}: {name} is no number of threads", f"unset {name}")
        if int(value) > num_allowed:
            return Finding("threads", "warning", f"{told}, on {num_allowed} cores", f"set {name}={num_allowed} at most")
    return Finding("threads", "ok", told)


def cgroup_limits(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> CgroupLimits:
    """The tightest limits of all groups that this process is in, version 1 or 2 of Linux' control groups
    (https://docs.kernel.org/admin-guide/cgroup-v2.html)."""
    cores: list[float] = []
    memory: list[tuple[int, int]] = []  # limit, used
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(",") if controllers else [""]:
            if name not in ("", "cpu", "memory"):
                continue
            mount = root / controllers if (root / controllers).is_dir() else root / name
            for folder in _from_group_to_root(mount, path):
                if name != "memory":
                    cores += _cores_of(folder)
                if name != "cpu":
                    memory += _memory_of(folder)
    limit, used = min(memory, key=lambda each: each[0] - each[1]) if memory else (None, 0)
    return CgroupLimits(min(cores, default=None), limit, used)


def _from_group_to_root(mount: Path, path: str) -> Iterator[Path]:
    """The folder of a group, and those of the groups around it. In a container the path may be one of the host's,
    of which only the last folder, the mount itself, is seen."""
    folder = mount / path.strip("/")
    while True:
        yield folder
        if folder == mount:
            return
        folder = folder.parent


def _cores_of(folder: Path) -> list[float]:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    return [int(quota) / int(period)] if quota.strip().isdigit() and period.strip().isdigit() else []


def _memory_of(folder: Path) -> list[tuple[int, int]]:
    for limit_name, used_name in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
        if limit.isdigit() and int(limit) < 1 << 60:  # version 1 has such a number for "no limit"
            return [(int(limit), int(used) if used.isdigit() else 0)]
    return []


def _check_onnxruntime() -> Finding:
    try:
        import onnxruntime

        providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    except Exception as error:  # of its shared libraries too
        remedy = "pip install --force-reinstall onnxruntime; models run through it on CPUs"
        return Finding("onnxruntime", "problem", f"cannot be imported: {one_line(error)}", remedy)
    return Finding("onnxruntime", "ok", f"{onnxruntime.__version__}; providers: {', '.join(providers)}")


def _text(path: Path) -> str:
    """What stands in a file of the system's, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
