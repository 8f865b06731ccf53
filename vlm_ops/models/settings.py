"""How models are run: where, in which precision and by which engine, and what captioners are asked.

Some of it decides about numbers. That part is decided before any work (`planned`), stands in the recipe with each op
(`recorded`), and workers run the op by it (`with_recorded`).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")
ENGINES = ("auto", "torch", "onnxruntime")

# Fields of every op that a model serves, and of the op `caption`, that change what rows hold.
_RECORDED = ("dtype", "engine", "trust_remote_code")
CAPTION_SETTINGS = ("caption_prompt", "max_new_tokens", "num_beams")


@dataclass(frozen=True)
class ModelSettings:
    """How a model is run. Families get it `resolved`, without any `auto`.

    Attributes:
        device: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on CPUs, bfloat16 on GPUs that compute in it), `float32`, `bfloat16`, `float16` or `int8`:
            what the large matrix products and convolutions are computed in. Results are always float32. int8 is for the
            matrix products of image towers on CPUs; texts and captions stay in float32 beside it.
        engine: Of image and text towers: `auto`, `torch`, or `onnxruntime`, which runs on CPUs.
        compile: Whether torch compiles the image towers, which takes minutes once a process.
        trust_remote_code: Whether code that lies in a model's repository may be run.
        caption_prompt: What a captioner is told; None: what its family is usually told.
        max_new_tokens: Of a caption; None: the family's.
        num_beams: Of the search for a caption; None: the family's.
        may_run_by_torch: Whether torch takes what ONNX Runtime cannot. `resolved` says so where no engine was asked for.
    """

    device: str = "auto"
    dtype: str = "auto"
    engine: str = "auto"
    compile: bool = False
    trust_remote_code: bool = False
    caption_prompt: str | None = None
    max_new_tokens: int | None = None
    num_beams: int | None = None
    may_run_by_torch: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.device == "cpu"


# The usual way on a CPU, resolved.
CPU = ModelSettings(device="cpu", dtype="float32", engine="onnxruntime", may_run_by_torch=True)
_DEFAULTS = ModelSettings()


def planned(settings: ModelSettings, is_here: bool) -> ModelSettings:
    """The settings with all that changes numbers decided, as a recipe holds it: workers follow that, and decide nothing.

    Args:
        is_here: Whether models run on this machine. Elsewhere `auto` is float32, since nobody knows what is there.

    Raises:
        ValueError: As `resolved`, where models run here; as `check` elsewhere.
    """
    if not is_here:
        check(settings)
        return replace(settings, dtype="float32") if settings.dtype == "auto" else settings
    run = resolved(settings)
    usual = resolved(replace(settings, engine="auto")).engine
    return replace(settings, dtype=run.dtype, engine="auto" if settings.engine == usual == "torch" else settings.engine)


def recorded(settings: ModelSettings, op_name: str) -> tuple[tuple[str, Any], ...]:
    """What a recipe holds of the settings of an op: the fields that change numbers, but for what is usual (float32, by
    ONNX Runtime on CPUs)."""
    settings = replace(
        settings,
        dtype="auto" if settings.dtype == "float32" else settings.dtype,
        engine="auto" if settings.engine == "onnxruntime" else settings.engine,
    )
    names = _RECORDED + (CAPTION_SETTINGS if op_name == "caption" else ())
    return tuple(
        (name, getattr(settings, name)) for name in names if getattr(settings, name) != getattr(_DEFAULTS, name)
    )


def with_recorded(settings: ModelSettings, pairs: Iterable[tuple[str, Any]]) -> ModelSettings:
    """Where a model runs by the settings, and what it computes by a recipe's.

    Raises:
        ValueError: The recipe runs code of a model's repository, and the settings do not allow it.
    """
    asked = dict(pairs)
    if asked.get("trust_remote_code") and not settings.trust_remote_code:
        raise ValueError(
            "this catalog's model runs code that lies in its repository; allow that with --trust_remote_code if you trust it"
        )
    names = {field.name for field in fields(ModelSettings)}
    if unknown := sorted(asked.keys() - names):
        raise ValueError(f"the recipe has the setting {unknown[0]!r}, which this version of beamsight does not know")
    # Where a recipe says nothing it is float32, by the usual engine of the device, which may be asked for by name.
    engine = "onnxruntime" if settings.engine == "onnxruntime" else "auto"
    usual = ModelSettings(device=settings.device, dtype="float32", engine=engine, compile=settings.compile)
    return replace(usual, **asked)


def resolved(settings: ModelSettings) -> ModelSettings:
    """The settings with a device, a dtype and an engine in place of `auto`.

    Raises:
        ValueError: The device is not there, or the settings do not go together.
    """
    check(settings)
    device = resolve_device(settings.device)
    dtype = settings.dtype if settings.dtype != "auto" else usual_dtype(device)
    if device != "cpu":
        if dtype == "int8":
            raise ValueError("--dtype int8 is computed on CPUs; use bfloat16 or float16 on a GPU, or --device cpu")
        if settings.engine == "onnxruntime":
            raise ValueError("--engine onnxruntime runs on CPUs; use --engine torch on a GPU, or --device cpu")
        if dtype == "bfloat16" and settings.dtype == "bfloat16" and not _has_bfloat16(device):
            raise ValueError(f"the GPU {device} does not compute in bfloat16; use --dtype float16 or float32")
    elif dtype == "float16":
        raise ValueError("--dtype float16 is for GPUs; use bfloat16, int8 or float32 on a CPU")
    if settings.compile and device == "cpu":
        _check_compiler()
    by_torch = device != "cpu" or settings.compile or dtype == "bfloat16"
    engine = settings.engine if settings.engine != "auto" else ("torch" if by_torch else "onnxruntime")
    may_run_by_torch = settings.may_run_by_torch or settings.engine == "auto"
    return replace(settings, device=device, dtype=dtype, engine=engine, may_run_by_torch=may_run_by_torch)


def check(settings: ModelSettings) -> None:
    """Finds what is wrong on any machine.

    Raises:
        ValueError: A value is unknown, or two do not go together.
    """
    for name, known in (("dtype", DTYPES), ("engine", ENGINES)):
        if getattr(settings, name) not in known:
            raise ValueError(f"unknown {name} {getattr(settings, name)!r}; use {', '.join(known[:-1])} or {known[-1]}")
    _check_device_name(settings.device)
    if settings.engine == "onnxruntime" and settings.dtype in ("bfloat16", "float16"):
        raise ValueError(
            f"--engine onnxruntime computes in float32 or int8, not in {settings.dtype}; use --engine torch"
        )
    if settings.engine == "torch" and settings.dtype == "int8":
        raise ValueError("--dtype int8 is computed by ONNX Runtime; leave --engine torch out")
    if settings.compile and (settings.engine == "onnxruntime" or settings.dtype == "int8"):
        raise ValueError("--compile is for torch; leave it out with --engine onnxruntime and --dtype int8")
    for name in ("max_new_tokens", "num_beams"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def resolve_device(device: str) -> str:
    """`cpu`, `cuda` or `cuda:N`. Never falls back in silence.

    Raises:
        ValueError: The device is unknown, or CUDA was asked for and is not there.
    """
    _check_device_name(device)
    if device == "cpu":
        return "cpu"
    import torch  # heavy: only where it is used

    if torch.cuda.is_available():
        number = int(device.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"--device {device} was asked for, but there are {torch.cuda.device_count()} GPUs here (from cuda:0)"
            )
        return "cuda" if device == "auto" else device
    if device != "auto":
        raise ValueError(
            f"--device {device} was asked for, but no CUDA device is available here; use --device cpu or auto "
            "(`beamsight doctor` says why)"
        )
    return "cpu"


def _check_device_name(device: str) -> None:
    name, colon, number = device.partition(":")
    if device not in ("auto", "cpu", "cuda") and not (name == "cuda" and colon and number.isdecimal()):
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N")


def usual_dtype(device: str) -> str:
    """What `auto` means on a device: bfloat16 on a GPU that computes in it, float32 elsewhere."""
    return "bfloat16" if device != "cpu" and _has_bfloat16(device) else "float32"


def _has_bfloat16(device: str) -> bool:
    import torch

    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _check_compiler() -> None:
    """torch compiles for CPUs by way of C++ (`cxx` in torch/_inductor/config.py)."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        raise ValueError(
            f"--compile needs a C++ compiler on a CPU, and there is no {compiler!r} here; install one, name it in the "
            "environment variable CXX, or leave out --compile"
        )
