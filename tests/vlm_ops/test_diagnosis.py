"""What the doctor's checks make of a machine: pure judgements on made-up machines, and a look at this one."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import jpeg
from tests.hubs import FakeHub
from tests.servers import Store, moto_store
from vlm_ops.diagnosis import Finding, examine
from vlm_ops.diagnosis.cpu import (
    CgroupLimits,
    cgroup_limits,
    check_cpu,
    judge_cores,
    judge_instructions,
    judge_memory,
    judge_threads,
)
from vlm_ops.diagnosis.cuda import (
    Card,
    Driver,
    TorchBuild,
    check_cards,
    check_cuda,
    judge_card,
    judge_driver,
    judge_torch,
    num_cards_on_bus,
    read_driver,
)
from vlm_ops.diagnosis.device_code import DeviceCode, fat_binaries, lacking, parse_code
from vlm_ops.diagnosis.faiss_build import check_faiss, judge_device_code
from vlm_ops.diagnosis.packages import (
    check_packages,
    judge_conflicts,
    judge_extras,
    judge_python,
    judge_requirements,
    judge_rivals,
)
from vlm_ops.diagnosis.places import check_catalog_access, check_folder, check_input, check_inputs, hub_cache, within
from vlm_ops.diagnosis.specs import check_model, judge_hub
from vlm_ops.models.settings import ModelSettings

H100 = Card("NVIDIA H100", (9, 0), 80_000_000_000)
T4 = Card("Tesla T4", (7, 5), 16_000_000_000)
K80 = Card("Tesla K80", (3, 7), 12_000_000_000)
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


def driver(cuda: tuple[int, int], *cards: Card, error: str | None = None) -> Driver:
    return Driver(cuda, "580.65.06", cards, error)


def torch_build(cuda: tuple[int, int] | None) -> TorchBuild:
    return TorchBuild("2.15.0", cuda, ARCHITECTURES)


# --- findings ------------------------------------------------------------------------------------


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> Iterator[Finding]:
        yield Finding("first", "ok", "well")
        raise KeyError("odd")

    found = list(examine("disk", check))
    assert [(each.group, each.name, each.status) for each in found] == [
        ("disk", "first", "ok"),
        ("disk", "check", "problem"),
    ]
    assert found[1].told == "could not be looked at any further: KeyError: 'odd'"
    monkeypatch.setenv("BEAMSIGHT_DEBUG", "1")
    with pytest.raises(KeyError):
        list(examine("disk", check))


# --- packages ------------------------------------------------------------------------------------


def test_packages_that_are_missing_or_old() -> None:
    installed = {"torch": "2.5.1", "pillow": "12.0", "imagehash": "4.3.2rc1"}
    wanted = [
        "torch>=2.6",
        "pillow>=10.4",
        "ImageHash>=4.3",
        "s3fs>=2024.6",
        "moto>=5; extra == 'dev'",
        "x>1; sys_platform == 'none'",
    ]
    found = {each.name: each for each in judge_requirements(wanted, installed, {})}
    assert {name: each.status for name, each in found.items()} == {
        "torch": "problem", "pillow": "ok", "imagehash": "ok", "s3fs": "problem",
    }  # fmt: skip
    assert found["torch"].told == "2.5.1 is installed; Beamsight needs >=2.6"
    assert found["torch"].remedy == "pip install 'torch>=2.6'"
    assert found["s3fs"].told == "not installed; Beamsight needs >=2024.6"


def test_a_stand_in_is_told() -> None:
    (found,) = judge_requirements(["faiss-gpu>=1.9"], {"faiss-cpu": "1.9"}, {"faiss": ["faiss-cpu"]})
    assert found.status == "warning"
    assert found.told.startswith("not installed; faiss-cpu stands in for it")
    assert found.remedy == "pip uninstall faiss-cpu; pip install 'faiss-gpu>=1.9'"


def test_two_packages_of_one_module() -> None:
    providers = {"faiss": ["faiss-cpu", "faiss-gpu"], "onnxruntime": ["onnxruntime"]}
    (found,) = judge_rivals(providers)
    assert (found.name, found.status) == ("faiss", "problem")
    assert found.told == "faiss-cpu and faiss-gpu are installed at once, and each is imported as faiss"
    assert found.remedy == "pip uninstall faiss-cpu faiss-gpu; pip install faiss-gpu"


def test_packages_that_do_not_fit_one_another() -> None:
    needs = {"torchvision": ["torch==2.15.0"], "s3fs": ["fsspec>=2026.9; python_version > '3'", "absent>1"]}
    installed = {"torch": "2.14.1", "torchvision": "0.29.2", "s3fs": "2026.9", "fsspec": "2025.1"}
    pinned, open_ended = sorted(judge_conflicts(needs, installed), key=lambda each: each.status)
    assert pinned.told == "0.29.2 asks for torch==2.15.0, and 2.14.1 is installed"
    assert (pinned.status, pinned.remedy) == ("problem", "pip install --upgrade torchvision torch")
    assert (open_ended.name, open_ended.status) == ("s3fs", "warning")
    assert not list(judge_conflicts(needs, {**installed, "torch": "2.15.0+cu132", "fsspec": "2026.9"}))


def test_extras_may_be_missing() -> None:
    wanted = ["a>1; extra == 'demo'", "b; extra == 'demo'", "c; extra == 'dev'", "always"]
    demo, dev = judge_extras(wanted, ["dev", "demo"], {"a": "1.0", "b": "1", "c": "3"})
    assert (demo.name, demo.status, demo.told) == (
        "[demo]",
        "ok",
        "not installed (optional): a; pip install 'beamsight[demo]'",
    )
    assert (dev.name, dev.told) == ("[dev]", "installed")


def test_python() -> None:
    assert judge_python("3.11.7", ">=3.11").status == "ok"
    old = judge_python("3.10.2", ">=3.11")
    assert old.status == "problem" and "Beamsight needs >=3.11" in old.told


def test_the_packages_of_this_environment() -> None:
    found = {each.name: each for each in check_packages()}
    assert found["torch"].status == found["beamsight"].status == found["python"].status == "ok"
    assert found["beamsight"].told.endswith(str(Path(__file__).parents[2]))


# --- processor -----------------------------------------------------------------------------------


def test_cores_within_a_container() -> None:
    assert judge_cores(64, 8, CgroupLimits()).told == "8 of 64 usable"
    assert judge_cores(64, 8, CgroupLimits(cores=8.0)).status == "ok"
    limited = judge_cores(64, 64, CgroupLimits(cores=2.5))
    assert limited.status == "warning" and limited.told.endswith("the container may use no more than 2.5 at a time")
    assert limited.remedy.startswith("give --num_threads 2 and set OMP_NUM_THREADS=2")
    assert "--num_threads 1 " in judge_cores(4, 4, CgroupLimits(cores=0.5)).remedy


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "status", "told"),
    [
        ("x86_64", "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", "ok", "x86_64, has AVX2, AVX-512, AVX-512 BF16; lacks VNNI (int8), AMX"),
        ("x86_64", "flags : sse2\n", "warning", "x86_64, lacks AVX2, AVX-512, VNNI (int8), AVX-512 BF16, AMX"),
        ("x86_64", "flags : avx2\n\nflags : sse2\n", "warning", "x86_64, lacks AVX2, AVX-512, VNNI (int8), AVX-512 BF16, AMX"),
        ("aarch64", "Features\t: fp asimd asimddp bf16\n", "ok", "aarch64, has NEON, dot product (int8), BF16; lacks SVE"),
        ("arm64", "", "unknown", "cannot be told on arm64 without /proc/cpuinfo"),
        ("x86_64", "", "unknown", "cannot be told on x86_64 without /proc/cpuinfo"),
    ],
)  # fmt: skip
def test_instructions(machine: str, cpuinfo: str, status: str, told: str) -> None:
    found = judge_instructions(cpuinfo, machine)
    assert (found.status, found.told) == (status, told)


def test_memory_within_a_container() -> None:
    meminfo = "MemTotal:       32000000 kB\nMemFree: 1 kB\nMemAvailable:   16000000 kB\n"
    assert judge_memory(meminfo, CgroupLimits()).told == "16.4 GB of 32.8 GB free"
    tight = judge_memory(meminfo, CgroupLimits(memory_bytes=4_000_000_000, memory_used_bytes=3_000_000_000))
    assert tight.status == "warning"
    assert tight.told == "16.4 GB of 32.8 GB free; the container may use 4.0 GB, of which 1.0 GB are free"
    assert judge_memory(meminfo, CgroupLimits(memory_bytes=1 << 50)).status == "ok"
    assert judge_memory("", CgroupLimits()).status == "unknown"


def test_threads() -> None:
    assert judge_threads({}, 2).told == "the libraries' own settings"
    assert judge_threads({"OMP_NUM_THREADS": "2", "HOME": "/"}, 2).told == "OMP_NUM_THREADS=2"
    many = judge_threads({"OMP_NUM_THREADS": "64"}, 2)
    assert (many.status, many.remedy) == ("warning", "set OMP_NUM_THREADS=2 at most")
    assert "is no number of threads" in judge_threads({"MKL_NUM_THREADS": "all"}, 2).told


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """Version 2: the tightest of the group and of those around it."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "0::/system/night.service\n")
    assert cgroup_limits(proc, root) == CgroupLimits()
    write(root / "system" / "night.service" / "cpu.max", "max 100000\n")
    write(root / "system" / "cpu.max", "150000 100000\n")
    write(root / "system" / "night.service" / "memory.max", "8000\n")
    write(root / "system" / "night.service" / "memory.current", "5000\n")
    write(root / "memory.max", "max\n")
    assert cgroup_limits(proc, root) == CgroupLimits(1.5, 8000, 5000)
    assert cgroup_limits(tmp_path / "none", root) == CgroupLimits()


def test_limits_of_control_groups_of_version_1(tmp_path: Path) -> None:
    """In a container the path is one of the host's, and only the mount is there."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n1:name=systemd:/docker/ab\n")
    write(root / "cpu,cpuacct" / "cpu.cfs_quota_us", "200000\n")
    write(root / "cpu,cpuacct" / "cpu.cfs_period_us", "100000\n")
    write(root / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(root / "memory" / "docker" / "ab" / "memory.limit_in_bytes", "7000\n")
    assert cgroup_limits(proc, root) == CgroupLimits(2.0, 7000, 0)
    write(root / "cpu,cpuacct" / "cpu.cfs_quota_us", "-1\n")
    assert cgroup_limits(proc, root).cores is None


def test_the_cpu_of_this_machine() -> None:
    found = {each.name: each for each in check_cpu()}
    assert list(found) == ["cores", "instructions", "memory", "threads", "onnxruntime"]
    assert found["cores"].told.endswith(f"of {os.cpu_count()} usable") or found["cores"].status == "warning"
    assert "CPU" in found["onnxruntime"].told


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- CUDA ----------------------------------------------------------------------------------------


def test_drivers() -> None:
    assert judge_driver(None, 0).status == "ok"
    without = judge_driver(None, 2)
    assert (without.status, without.told) == ("problem", "none, but this machine has 2 cards of NVIDIA's")
    assert "docker run --gpus all" in without.remedy
    broken = judge_driver(
        driver((13, 0), error="system has unsupported display driver / cuda driver combination (803)"), 1
    )
    assert broken.status == "problem" and broken.told.endswith("it does not start: system has unsupported display driver / cuda driver combination (803)")  # fmt: skip


def test_a_driver_that_reaches_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert judge_driver(driver((13, 0)), 1).told.endswith("no cards, but this machine has 1 card of NVIDIA's")
    assert judge_driver(driver((13, 0)), 1).status == "problem"
    assert judge_driver(driver((13, 0)), 0).status == "ok"


def test_the_driver_says_which_cards_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert judge_driver(driver((13, 0), H100), 1).told == "580.65.06, for CUDA up to 13.0, 1 card"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert judge_driver(driver((13, 0)), 1).told == "580.65.06, for CUDA up to 13.0, no cards (CUDA_VISIBLE_DEVICES=)"


@pytest.mark.parametrize(
    ("cuda", "driver_cuda", "status", "remedy"),
    [
        ((13, 0), (13, 0), "ok", ""),
        ((12, 8), (13, 0), "ok", ""),
        ((13, 2), (13, 0), "ok", ""),
        ((13, 2), (12, 9), "problem", "install NVIDIA's driver 580 or newer, or torch and torchvision for CUDA 12.9"),
        ((12, 1), (11, 8), "problem", "install NVIDIA's driver 525 or newer, or"),
        ((15, 0), (13, 0), "problem", "install a driver for CUDA 15, or"),
        (None, (12, 9), "problem", "install torch and torchvision for CUDA 12.9 or older"),
    ],
)
def test_torch_and_the_driver(
    cuda: tuple[int, int] | None, driver_cuda: tuple[int, int], status: str, remedy: str
) -> None:
    found = judge_torch(torch_build(cuda), driver(driver_cuda, H100))
    assert found.status == status
    assert found.remedy.startswith(remedy)


@pytest.mark.parametrize("cuda", [None, (13, 2)])
def test_a_machine_without_a_card_is_well(cuda: tuple[int, int] | None) -> None:
    assert judge_torch(torch_build(cuda), None).status == "ok"
    assert judge_torch(torch_build(cuda), driver((11, 0))).status == "ok"


def test_cards_that_torch_has_code_for() -> None:
    fits = judge_card(H100, torch_build((13, 2)))
    assert (fits.status, fits.told) == ("ok", "NVIDIA H100, compute capability 9.0, 80.0 GB, bfloat16")
    assert judge_card(T4, torch_build((13, 2))).told.endswith("no bfloat16 units")
    unfit = judge_card(K80, torch_build((13, 2)))
    assert unfit.status == "problem"
    assert unfit.told.endswith("torch has code for sm_75, sm_80, sm_86, sm_90, sm_100, sm_120, and none for this one")
    assert "--device cpu" in unfit.remedy


class ATorch:
    """As much of torch as cards are tried with."""

    def __init__(self, free: float = 70e9, result: float = 8.0, error: str | None = None) -> None:
        self.cuda = SimpleNamespace(init=lambda: None, mem_get_info=lambda _: (int(free), int(80e9)))
        self.result, self.error = result, error

    def ones(self, size: int, device: str) -> ATorch:
        if self.error:
            raise RuntimeError(self.error)
        return self

    def sum(self) -> ATorch:
        return self

    def item(self) -> float:
        return self.result


@pytest.mark.parametrize(
    ("torch", "status", "told"),
    [
        (ATorch(), "ok", "bfloat16, 70.0 GB free"),
        (ATorch(free=1e9), "warning", "bfloat16, 1.0 GB free"),
        (ATorch(result=0.0), "problem", "70.0 GB free; it computes wrongly"),
        (
            ATorch(error="CUDA error: busy\nCompile with"),
            "problem",
            "it does not compute: RuntimeError: CUDA error: busy",
        ),
    ],
)
def test_cards_are_tried(torch: ATorch, status: str, told: str) -> None:
    first, second = check_cards(driver((13, 2), H100, K80), torch_build((13, 2)), torch)
    assert (first.name, first.status) == ("cuda:0", status) and first.told.endswith(told)
    assert (second.name, second.status) == ("cuda:1", "problem") and second.told.endswith("none for this one")


def test_cards_that_torch_cannot_use() -> None:
    def init() -> None:
        raise RuntimeError("CUDA unknown error")

    torch = SimpleNamespace(cuda=SimpleNamespace(init=init))
    (found,) = check_cards(driver((13, 2), H100), torch_build((13, 2)), torch)
    assert (found.status, found.told) == ("problem", "torch cannot use them: RuntimeError: CUDA unknown error")


def test_cards_on_the_bus(tmp_path: Path) -> None:
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x1002", "0x030000")):
        write(tmp_path / name / "vendor", f"{vendor}\n")
        write(tmp_path / name / "class", f"{kind}\n")
    (tmp_path / "d").mkdir()
    assert num_cards_on_bus(tmp_path) == 1  # neither its sound, nor other makers' cards
    assert num_cards_on_bus(tmp_path / "none") == 0


STUB = """
#include <stddef.h>
#include <string.h>
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuInit(unsigned int flags) { return CODE; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = number + 5; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, device == 5 ? "Card A" : "Card B", length); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)device << 33; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 12 : attribute == 76 ? 1 : -1; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "odd driver"; return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned int length) { strncpy(version, "595.10", length); return 0; }
"""  # as in cuda.h and nvml.h


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (0, Driver((13, 2), "595.10", (Card("Card A", (12, 1), 5 << 33), Card("Card B", (12, 1), 6 << 33)))),
        (100, Driver((13, 2), "595.10")),
        (803, Driver((13, 2), "595.10", error="odd driver (803)")),
    ],
)
def test_a_driver_is_read_by_its_library(tmp_path: Path, code: int, told: Driver) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", f"-DCODE={code}", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=STUB, text=True, check=True)
    assert read_driver(str(library), str(library)) == told


def test_without_a_driver_there_is_none(tmp_path: Path) -> None:
    assert read_driver(str(tmp_path / "libcuda.so.1")) is None


@pytest.mark.skipif(read_driver() is not None, reason="needs a machine without NVIDIA's driver")
def test_cuda_that_was_asked_for_without_a_card() -> None:
    found = {each.name: each for each in check_cuda("cuda")}
    assert found["torch"].status == "ok"
    assert found["--device"].status == "problem"
    assert found["--device"].told == "--device cuda was asked for, but no CUDA device is available here"


@pytest.mark.gpu
def test_a_real_card() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    card = read_driver()
    assert card is not None and len(card.cards) == torch.cuda.device_count()
    assert card.cards[0].capability == torch.cuda.get_device_capability(0)
    found = {each.name: each for each in check_cuda("cuda:0")}
    assert {"driver", "torch", "cuda:0", "--device"} <= found.keys()
    assert all(each.status != "problem" for each in found.values()), found
    assert torch.cuda.get_device_name(0) in found["cuda:0"].told and "GB free" in found["cuda:0"].told
    assert any(torch.cuda.get_device_name(0) in each.told for each in check_faiss())


# --- code for cards ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("compute_90", [(9, 0), (10, 3), (12, 0)], [(8, 9)]),
        ("sm_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("compute_100f", [(10, 3)], [(12, 0), (9, 0)]),
    ],
)
def test_which_cards_code_runs_on(code: str, runs: list, does_not: list) -> None:
    assert str(parse_code(code)) == code
    assert all(parse_code(code).runs_on(card) for card in runs)
    assert not any(parse_code(code).runs_on(card) for card in does_not)


def test_what_is_no_architecture() -> None:
    with pytest.raises(ValueError, match="'gfx90a' is no architecture of CUDA"):
        parse_code("gfx90a")


def entry(code: DeviceCode, num_bytes: int, kind: int | None = None) -> bytes:
    major, minor = code.capability
    kind = kind if kind is not None else 1 if code.is_ptx else 2
    return struct.pack("<HHIQ12xI32x", kind, 0x101, 64, num_bytes, 10 * major + minor) + bytes(num_bytes)


def fat_binary(*entries: bytes) -> bytes:
    content = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


codes = st.builds(
    DeviceCode, st.booleans(), st.tuples(st.integers(3, 15), st.integers(0, 9)), st.just("")
)  # fmt: skip


@given(
    st.lists(
        st.tuples(st.binary(max_size=40), st.lists(st.tuples(codes, st.integers(0, 90)), min_size=1, max_size=4)),
        max_size=4,
    )
)
def test_fat_binaries_of_a_library(tmp_path_factory: pytest.TempPathFactory, contents: list) -> None:
    """Wherever they stand in it, with anything between them."""
    path = tmp_path_factory.mktemp("library") / "lib.so"
    path.write_bytes(
        b"".join(before + fat_binary(*(entry(code, size) for code, size in binary)) for before, binary in contents)
    )
    assert fat_binaries(path) == [frozenset(code for code, _ in binary) for _, binary in contents]


def test_bytes_that_only_look_like_a_fat_binary(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    other_kind = entry(parse_code("sm_80"), 8, kind=16)
    path.write_bytes(
        b"\x50\xed\x55\xba and more\x50\xed\x55\xba" + fat_binary(other_kind, entry(parse_code("sm_90"), 0))
    )
    assert fat_binaries(path) == [{parse_code("sm_90")}]
    path.write_bytes(b"")
    assert fat_binaries(path) == []


@pytest.mark.parametrize("damage", [slice(0, -8), slice(0, 40)])
def test_fat_binaries_of_an_unknown_form(tmp_path: Path, damage: slice) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(fat_binary(entry(parse_code("sm_80"), 100))[damage])
    with pytest.raises(ValueError, match="cut short, or of a form that is not known"):
        fat_binaries(path)


def test_our_reading_of_torch_is_what_torch_says() -> None:
    """The format is not published, so it is compared with a library that knows of itself what it was built for."""
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        pytest.skip("needs a torch that is built for CUDA on Linux")
    said = {parse_code(text) for text in torch._C._cuda_getArchFlags().split()}
    binaries = fat_binaries(library)
    assert said <= set().union(*binaries)
    for code in said:
        assert lacking(binaries, code.capability) < len(binaries) / 2, code


def test_faiss_and_the_cards() -> None:
    binaries = [frozenset(map(parse_code, names)) for names in (["sm_70", "sm_80"], ["sm_70", "sm_80", "sm_90"])]
    (none,) = judge_device_code(binaries, None, 0)
    assert (none.status, none.told) == ("ok", "has code for sm_70, sm_80, sm_90")
    (fits,) = judge_device_code(binaries, driver((13, 0), T4, T4), 2)
    assert (fits.status, fits.told) == ("ok", "has code for sm_70, sm_80, sm_90; fits Tesla T4")
    (partly,) = judge_device_code(binaries, driver((13, 0), T4, H100), 2)
    assert partly.status == "warning" and partly.told.endswith("and none in 1 of its 2 parts for NVIDIA H100 (sm_90)")
    with_ptx = [codes | {parse_code("compute_90")} for codes in binaries]
    (translated,) = judge_device_code(with_ptx, driver((13, 0), H100), 1)
    assert translated.told.endswith("; fits NVIDIA H100 (translated by the driver at its first use)")
    (unfit,) = judge_device_code(binaries, driver((13, 0), K80), 1)
    assert unfit.told.endswith("and none for Tesla K80 (sm_37)")
    (unseen,) = judge_device_code(binaries, driver((11, 4), T4), 0)
    assert unseen.status == "warning" and "sees no card where the driver does" in unseen.told
    (untold,) = judge_device_code([], driver((13, 0), T4), 1)
    assert untold.status == "unknown"


def test_the_faiss_that_is_installed() -> None:
    import faiss

    version, *gpus = check_faiss()
    assert version.status == "ok" and version.told.startswith(f"{faiss.__version__}, built with ")
    if hasattr(faiss, "StandardGpuResources"):
        assert all("has code for sm_" in each.told for each in gpus)


# --- places --------------------------------------------------------------------------------------


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_folder("cache", tmp_path / "not" / "yet")
    assert found.told.endswith(f"GB free at {tmp_path}/not/yet")
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").touch()
    blocked = check_folder("cache", tmp_path / "file" / "below", "set BEAMSIGHT_CACHE")
    assert blocked.status == "warning" and blocked.told.endswith(f"cannot be written: no directory ({tmp_path}/file)")
    assert blocked.remedy == "allow it, or set BEAMSIGHT_CACHE"
    assert check_folder("catalog", tmp_path / "file", is_needed=True).status == "problem"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        refused = check_folder("temporary files", tmp_path, is_needed=True)
        assert refused.told.endswith(f"which cannot be written: no permission, or read-only ({tmp_path})")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage())
    full = check_folder("cache", tmp_path)
    assert full.status == "warning" and full.told.startswith("1.5 GB free")


class Usage:
    free = 1_500_000_000


def test_where_the_hub_keeps_models(tmp_path: Path) -> None:
    from huggingface_hub import constants

    assert hub_cache() == Path(constants.HF_HUB_CACHE)
    assert hub_cache({"HF_HOME": "/big"}) == Path("/big/hub")
    assert hub_cache({"HF_HOME": "/big", "HF_HUB_CACHE": "/other"}) == Path("/other")
    assert hub_cache({"XDG_CACHE_HOME": "/caches"}) == Path("/caches/huggingface/hub")


def test_whether_the_hub_is_asked() -> None:
    assert judge_hub({"HF_HUB_OFFLINE": "1", "HF_HOME": "/big"}).told == "offline (HF_HUB_OFFLINE=1): models hf:REPO are taken from /big/hub alone"  # fmt: skip
    assert judge_hub({"HF_HUB_OFFLINE": "0", "HF_HOME": "/big", "HF_ENDPOINT": "https://mirror"}).told == "models hf:REPO that are not in /big/hub are fetched from https://mirror"  # fmt: skip


def test_a_catalog_is_tried_out_and_left_as_it_was(tmp_path: Path) -> None:
    (found,) = check_catalog_access(str(tmp_path / "new" / "catalog"), {})
    assert (found.status, found.told) == ("ok", f"{tmp_path}: a small file was written, read, listed and deleted")
    assert list(tmp_path.iterdir()) == []


def test_places_where_no_catalog_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (found,) = check_catalog_access(str(tmp_path / "file" / "catalog"), {})
    assert found.status == "problem" and "is not a directory" in found.told
    (found,) = check_catalog_access("http://example.com/catalog", {})
    assert (found.told, found.remedy) == (
        "a catalog cannot live on http://", "use a local directory, s3:// or gs:// (got 'http://example.com/catalog')",
    )  # fmt: skip


def test_a_storage_that_replaces_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without conditional writes two runs could both win."""
    from vlm_ops import storage

    monkeypatch.setattr(storage, "_link", os.replace)
    (found,) = check_catalog_access(str(tmp_path), {})
    assert found.status == "problem" and "replaced unasked" in found.told
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def s3() -> Iterator[Store]:
    with moto_store("corpus") as store:
        yield store


def test_places_that_take_credentials(s3: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    nobody = {"endpoint_url": s3.options["endpoint_url"], "client_kwargs": {"region_name": "us-east-1"}}
    for found in (*check_input(f"{s3.uri}/photos", nobody), *check_catalog_access(f"{s3.uri}/catalog", nobody)):
        assert found.status == "problem"
        assert (
            found.told
            == f"'{s3.uri}/{ {'input': 'photos', 'catalog': 'catalog'}[found.name] }' cannot be reached: Unable to locate credentials"
        )
        assert found.remedy.startswith("check its name, and the credentials and the endpoint in --storage_options")


def test_catalogs_on_s3(s3: Store) -> None:
    (found,) = check_catalog_access(f"{s3.uri}/catalog", s3.options)
    assert (found.status, found.told) == ("ok", f"{s3.uri}/catalog: a small file was written, read, listed and deleted")
    (found,) = check_catalog_access("s3://none/catalog", s3.options)
    assert (found.status, found.remedy) == ("problem", "make it, or name another")
    assert found.told == "'s3://none/catalog' cannot be made: there is no bucket s3://none"


def test_a_storage_that_does_not_answer(s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_ops.diagnosis.places.ANSWER_SEC", 0.5)
    monkeypatch.setattr("vlm_ops.diagnosis.places.LISTING_SEC", 0.5)
    nowhere = s3.at("http://127.0.0.1:9").options
    (found,) = check_catalog_access(f"{s3.uri}/catalog", nowhere)
    assert (found.status, found.told) == ("problem", f"{s3.uri}/catalog: no answer within 0.5 seconds")
    (found,) = check_input(f"{s3.uri}/photos", nowhere)
    assert found.status == "unknown" and "not listed within 0.5 seconds" in found.told


def test_inputs(tmp_path: Path) -> None:
    for seed in range(3):
        (tmp_path / f"{seed}.jpg").write_bytes(jpeg(seed))
    (tmp_path / "empty").mkdir()
    patterns = [f"{tmp_path}/*.jpg", f"{tmp_path}/none", f"{tmp_path}/empty", "zz://x"]
    well, missing, empty, unknown = check_inputs(patterns, {})
    assert well.told == f"{tmp_path}/*.jpg: 0 shards and 3 single files; the first one can be read"
    assert missing.told == f"no input matches '{tmp_path}/none'"
    assert empty.told == f"no images, tars, Parquet files or lists in {tmp_path}/empty"
    assert [each.status for each in (well, missing, empty, unknown)] == ["ok", "problem", "problem", "problem"]
    assert "cannot open 'zz://x'" in unknown.told


def test_patience_ends_and_errors_come_through() -> None:
    assert within(lambda: 7, 5) == 7
    with pytest.raises(KeyError):
        within(lambda: {}["x"], 5)
    started = time.perf_counter()
    with pytest.raises(TimeoutError, match="no answer within 0.1 seconds"):
        within(lambda: time.sleep(5), 0.1)
    assert time.perf_counter() - started < 4


# --- models --------------------------------------------------------------------------------------


def test_models_are_loaded_when_asked_for() -> None:
    (described,) = check_model("python:tests.toys", ModelSettings(device="cpu"), load=False)
    assert (
        described.told
        == "revision 1; images give caption, embedding, features, grid, labels, match; texts give embeddings"
    )
    _, image, text = check_model("python:tests.toys", ModelSettings(device="cpu"), load=True)
    assert image.told.startswith("loaded, and encoded an image of 8 x 8 pixels, in ")
    assert text.told.startswith("loaded, and encoded a text into 3 dimensions, in ")


def test_models_that_are_not_there(tmp_path: Path) -> None:
    (unknown,) = check_model("compct", ModelSettings(), load=False)
    assert (unknown.status, unknown.told) == ("problem", "unknown model 'compct'")
    assert unknown.remedy.startswith("known models: compact")
    (missing,) = check_model(f"dir:{tmp_path}", ModelSettings(), load=False)
    assert missing.status == "problem" and "there is no config.json" in missing.told


def test_the_hub_is_not_asked_unless_models_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8)  # fmt: skip
    transformers.ViTModel(config).save_pretrained(tmp_path / "tiny")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "tiny")
    settings = ModelSettings(device="cpu", engine="torch")
    with FakeHub(tmp_path / "cache", monkeypatch) as server:
        server.publish("someone/tiny", tmp_path / "tiny")
        (absent,) = check_model("hf:someone/tiny", settings, load=False)
        assert (absent.status, absent.told) == (
            "warning",
            "not in the local Hugging Face cache; the first run would fetch it",
        )
        assert absent.remedy.startswith("beamsight fetch-model hf:someone/tiny --to DIR")
        assert not server.requests
        described, encoded = check_model("hf:someone/tiny", settings, load=True)
        assert encoded.told.startswith("loaded, and encoded an image of 32 x 32 pixels")
        num_requests = len(server.requests)
        assert list(check_model("hf:someone/tiny", settings, load=False)) == [described]
        assert len(server.requests) == num_requests > 0
        (gone,) = check_model("hf:someone/other", settings, load=True)
        assert gone.status == "problem" and "shows no such repository" in gone.told
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        (offline,) = check_model("hf:someone/other", settings, load=False)
        assert offline.status == "problem" and offline.told.endswith("HF_HUB_OFFLINE is set")


def test_a_model_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import toys

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: no kernel image\nmore lines")

    monkeypatch.setattr(toys, "load_image_model", broken)
    _, failed = check_model("python:tests.toys", ModelSettings(device="cpu"), load=True)
    assert (failed.status, failed.told) == ("problem", "RuntimeError: CUDA error: no kernel image")
    monkeypatch.setenv("BEAMSIGHT_DEBUG", "1")
    with pytest.raises(RuntimeError, match="more lines"):
        list(check_model("python:tests.toys", ModelSettings(device="cpu"), load=True))
