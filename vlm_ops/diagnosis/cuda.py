"""NVIDIA's driver, torch and the cards: whether they are there, and fit one another."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_ops.diagnosis import Finding, gigabytes, one_line
from vlm_ops.diagnosis.device_code import Capability, parse_code

# The first driver that runs all of a major version of CUDA
# (https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).
_FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}
_CUDA_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_NVML_LIBRARY = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI's vendor, and its class of displays and 3D controllers
_FIRST_WITH_BF16 = (8, 0)
_LITTLE_MEMORY = 2e9
_TORCH_INSTALLER = "https://pytorch.org/get-started/locally"


@dataclass(frozen=True)
class Card:
    """A card that programs may use here (CUDA_VISIBLE_DEVICES hides the others)."""

    name: str
    capability: Capability
    total_bytes: int


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver.

    Attributes:
        cuda: The newest version of CUDA that it can run.
        version: Its own; None where it cannot be told.
        error: What it says where it does not work.
    """

    cuda: tuple[int, int]
    version: str | None = None
    cards: tuple[Card, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch is built for.

    Attributes:
        cuda: None for a build for CPUs alone.
        architectures: In its words, such as `sm_90`.
    """

    version: str
    cuda: tuple[int, int] | None
    architectures: tuple[str, ...] = ()


def check_cuda(device: str) -> Iterator[Finding]:
    """Driver, torch and each card, and whether models can run where they are to.

    Args:
        device: As for the commands that run models.
    """
    driver = read_driver()
    yield judge_driver(driver, num_cards_on_bus())
    try:
        import torch
    except Exception as error:  # its shared libraries may be missing
        told = f"cannot be imported: {one_line(error)}"
        yield Finding("torch", "problem", told, "pip install --force-reinstall torch torchvision")
        return
    build = TorchBuild(torch.__version__, _version(torch.version.cuda), tuple(torch.cuda.get_arch_list()))
    fits = judge_torch(build, driver)
    yield fits
    if driver and driver.cards and fits.status == "ok":
        yield from check_cards(driver, build, torch)
    yield _check_device(device)


def judge_driver(driver: Driver | None, num_on_bus: int) -> Finding:
    """Args:
    num_on_bus: Cards of NVIDIA's in the machine, whether or not programs can use them.
    """
    reach = "install NVIDIA's driver, or start the container with its cards (docker run --gpus all)"
    if driver is None and num_on_bus:
        return Finding("driver", "problem", f"none, but this machine has {_cards(num_on_bus)} of NVIDIA's", reach)
    if driver is None:
        return Finding("driver", "ok", "no NVIDIA driver and no card; models run on the CPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    told = f"{driver.version or 'of unknown version'}, for CUDA up to {_text(driver.cuda)}, {_cards(len(driver.cards))}"
    told += f" (CUDA_VISIBLE_DEVICES={hidden})" if hidden is not None else ""
    if driver.error:
        remedy = "restart the machine or the container: after an update the driver's parts may be of two versions"
        return Finding("driver", "problem", f"{told}; it does not start: {driver.error}", remedy)
    if num_on_bus and not driver.cards and hidden is None:
        return Finding("driver", "problem", f"{told}, but this machine has {_cards(num_on_bus)} of NVIDIA's", reach)
    return Finding("driver", "ok", told)


def judge_torch(build: TorchBuild, driver: Driver | None) -> Finding:
    """Whether torch and the driver fit one another. Where the major versions of CUDA are equal, they do, by NVIDIA's
    promise, also where the driver's is the older one."""
    told = f"{build.version}, built " + (f"for CUDA {_text(build.cuda)}" if build.cuda else "without CUDA")
    if driver is None or not driver.cards:
        return Finding("torch", "ok", told)
    told += f", beside {_cards(len(driver.cards))} and a driver for CUDA up to {_text(driver.cuda)}"
    other_torch = f"torch and torchvision for CUDA {_text(driver.cuda)} or older: {_TORCH_INSTALLER}"
    if build.cuda is None:
        return Finding("torch", "problem", told, f"install {other_torch}")
    if driver.cuda[0] < build.cuda[0]:
        first = _FIRST_DRIVERS.get(build.cuda[0])
        wanted = f"NVIDIA's driver {first} or newer" if first else f"a driver for CUDA {build.cuda[0]}"
        return Finding("torch", "problem", told, f"install {wanted}, or {other_torch}")
    return Finding("torch", "ok", told)


def judge_card(card: Card, build: TorchBuild) -> Finding:
    """Whether torch has code for a card."""
    told = f"{card.name}, compute capability {_text(card.capability)}, {gigabytes(card.total_bytes)}"
    told += ", bfloat16" if card.capability >= _FIRST_WITH_BF16 else ", no bfloat16 units"
    codes = [parse_code(text) for text in build.architectures]
    if any(code.runs_on(card.capability) for code in codes):
        return Finding("card", "ok", told)
    told += f"; torch has code for {', '.join(build.architectures) or 'no card'}, and none for this one"
    return Finding(
        "card", "problem", told, f"run on the CPU (--device cpu), or install a torch that has: {_TORCH_INSTALLER}"
    )


def check_cards(driver: Driver, build: TorchBuild, torch: Any) -> Iterator[Finding]:
    """Each card, with its free memory, and whether it computes.

    Args:
        torch: The module.
    """
    try:
        torch.cuda.init()
    except RuntimeError as error:
        remedy = "see whether other programs of CUDA run here; if none does, restart the machine or the container"
        yield Finding("cards", "problem", f"torch cannot use them: {one_line(error)}", remedy)
        return
    for number, card in enumerate(driver.cards):
        name = f"cuda:{number}"
        fits = judge_card(card, build)
        if fits.status != "ok":
            yield Finding(name, fits.status, fits.told, fits.remedy)
            continue
        try:
            free, _ = torch.cuda.mem_get_info(number)
            right = torch.ones(8, device=name).sum().item() == 8
        except RuntimeError as error:
            remedy = "see whether another program holds the card (nvidia-smi), and whether torch fits the driver"
            yield Finding(name, "problem", f"{fits.told}; it does not compute: {one_line(error)}", remedy)
            continue
        told = f"{fits.told}, {gigabytes(free)} free"
        if not right:
            yield Finding(name, "problem", f"{told}; it computes wrongly", "have the card looked at, and use another")
        elif free < _LITTLE_MEMORY:
            yield Finding(name, "warning", told, "end other programs on it (nvidia-smi), or use another card")
        else:
            yield Finding(name, "ok", told)


def _check_device(device: str) -> Finding:
    from vlm_ops.models.settings import resolve_device

    try:
        return Finding("--device", "ok", f"{device}: models run on {resolve_device(device)}")
    except ValueError as error:
        told = str(error).partition(";")[0]
        return Finding(
            "--device", "problem", told, "name one that is there; what is said of driver and torch may tell why"
        )


def read_driver(cuda_library: str = _CUDA_LIBRARY, nvml_library: str = _NVML_LIBRARY) -> Driver | None:
    """The driver, by its own library (https://docs.nvidia.com/cuda/cuda-driver-api); None where there is none."""
    try:
        cuda = ctypes.CDLL(cuda_library)
    except OSError:
        return None
    version = _driver_version(nvml_library)
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    newest = number.value // 1000, number.value % 1000 // 10
    code = cuda.cuInit(0)
    if code == _NO_DEVICE:
        return Driver(newest, version)
    if code:
        return Driver(newest, version, error=_error_text(cuda, code))
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    return Driver(newest, version, tuple(_read_card(cuda, each) for each in range(count.value)))


def _read_card(cuda: ctypes.CDLL, number: int) -> Card:
    device, name, total = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), number)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Card(name.value.decode(errors="replace"), (capability[0], capability[1]), total.value)


def _error_text(cuda: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} ({code})"


def _driver_version(nvml_library: str) -> str | None:
    """Of the kernel's module, by NVML (https://docs.nvidia.com/deploy/nvml-api) or by the kernel; containers may lack
    either."""
    try:
        nvml = ctypes.CDLL(nvml_library)
        text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode()
    except OSError:
        pass
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[0] if found else None


def num_cards_on_bus(bus: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA's cards as the kernel sees them, without any driver."""
    found = 0
    for folder in bus.iterdir() if bus.is_dir() else ():
        try:
            vendor, kind = ((folder / name).read_text(encoding="utf-8") for name in ("vendor", "class"))
        except OSError:
            continue
        found += vendor.strip() == _NVIDIA and kind.startswith(_DISPLAY)
    return found


def _version(text: str | None) -> tuple[int, int] | None:
    if not text:
        return None
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _text(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _cards(number: int) -> str:
    return f"{number or 'no'} card{'' if number == 1 else 's'}"
