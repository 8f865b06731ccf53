"""How models are run: what goes together, what `auto` means, and what a recipe keeps of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_ops.models.settings import (
    CAPTION_SETTINGS,
    CPU,
    DTYPES,
    ENGINES,
    ModelSettings,
    check,
    planned,
    recorded,
    resolve_device,
    resolved,
    with_recorded,
)

SETTINGS = st.builds(
    ModelSettings,
    device=st.sampled_from(("auto", "cpu", "cuda", "cuda:0", "cuda:1", "cuda:7")),
    dtype=st.sampled_from(DTYPES),
    engine=st.sampled_from(ENGINES),
    compile=st.booleans(),
    trust_remote_code=st.booleans(),
    caption_prompt=st.none() | st.just("a photo of"),
    max_new_tokens=st.none() | st.integers(1, 99),
    num_beams=st.none() | st.integers(1, 9),
)


@pytest.fixture(params=["no GPU", "two GPUs", "two old GPUs"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine, as far as torch tells of it."""
    pretend(monkeypatch, request.param)
    return request.param


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    num_gpus = 0 if machine == "no GPU" else 2
    monkeypatch.setattr("torch.cuda.is_available", lambda: num_gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: machine == "two GPUs")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize(
    ("asked", "machine", "expected"),
    [
        ({}, "no GPU", ("cpu", "float32", "onnxruntime")),
        ({}, "two GPUs", ("cuda", "bfloat16", "torch")),
        ({}, "two old GPUs", ("cuda", "float32", "torch")),
        ({"device": "cpu"}, "two GPUs", ("cpu", "float32", "onnxruntime")),
        ({"device": "cuda:1"}, "two GPUs", ("cuda:1", "bfloat16", "torch")),
        ({"dtype": "float16"}, "two old GPUs", ("cuda", "float16", "torch")),
        ({"dtype": "bfloat16"}, "no GPU", ("cpu", "bfloat16", "torch")),
        ({"dtype": "int8"}, "no GPU", ("cpu", "int8", "onnxruntime")),
        ({"dtype": "int8", "device": "cpu"}, "two GPUs", ("cpu", "int8", "onnxruntime")),
        ({"engine": "torch"}, "no GPU", ("cpu", "float32", "torch")),
        ({"compile": True}, "no GPU", ("cpu", "float32", "torch")),
    ],
)
def test_auto(
    asked: dict[str, object], machine: str, expected: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, machine)
    run = resolved(ModelSettings(**asked))  # type: ignore[arg-type]
    assert (run.device, run.dtype, run.engine) == expected


@given(settings=SETTINGS)
@pytest.mark.parametrize("machine", ["no GPU", "two GPUs", "two old GPUs"])
def test_resolved_keeps_what_was_asked(settings: ModelSettings, machine: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, machine)
        try:
            run = resolved(settings)
        except ValueError:
            return
        for name in ("device", "dtype", "engine"):
            asked, got = getattr(settings, name), getattr(run, name)
            assert got == asked if asked != "auto" else got != "auto"
        assert run.may_run_by_torch == (settings.engine == "auto")
        assert (run.engine == "onnxruntime") <= (run.is_cpu and run.dtype in ("float32", "int8") and not run.compile)
        assert (run.dtype == "int8") <= (run.engine == "onnxruntime")
        assert (run.dtype == "float16") <= (not run.is_cpu)
        assert run.compile == settings.compile
        assert resolved(run) == run


@given(settings=SETTINGS)
def test_on_a_gpu_nothing_falls_back_to_the_cpu(settings: ModelSettings) -> None:
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, "no GPU")
        if settings.device.startswith("cuda"):
            with pytest.raises(ValueError, match="--"):
                resolved(settings)


def test_the_usual_way_on_a_cpu_is_resolved() -> None:
    assert resolved(ModelSettings(device="cpu")) == resolved(CPU) == CPU


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dtype": "half"}, "unknown dtype 'half'; use auto, float32, bfloat16, float16 or int8"),
        ({"engine": "tvm"}, "unknown engine 'tvm'; use auto, torch or onnxruntime"),
        ({"device": "gpu"}, "unknown device 'gpu'; use auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, "unknown device 'cuda:'"),
        ({"device": "cpu:1"}, "unknown device 'cpu:1'"),
        (
            {"engine": "onnxruntime", "dtype": "bfloat16"},
            "--engine onnxruntime computes in float32 or int8, not in bfloat16; use --engine torch",
        ),
        (
            {"engine": "torch", "dtype": "int8"},
            "--dtype int8 is computed by ONNX Runtime; leave --engine torch out",
        ),
        ({"compile": True, "engine": "onnxruntime"}, "--compile is for torch; leave it out with --engine onnxruntime"),
        ({"compile": True, "dtype": "int8"}, "--compile is for torch"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 1, got -1"),
    ],
)
def test_what_is_wrong_on_any_machine(asked: dict[str, object], message: str, machine: str) -> None:
    for find in (check, resolved):
        with pytest.raises(ValueError, match=f"^{message}"):
            find(ModelSettings(**asked))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "machine", "message"),
    [
        (
            {"device": "cuda"},
            "no GPU",
            "--device cuda was asked for, but no CUDA device is available here; use --device",
        ),
        ({"device": "cuda:2"}, "two GPUs", "--device cuda:2 was asked for, but there are 2 GPUs here"),
        ({"dtype": "float16"}, "no GPU", "--dtype float16 is for GPUs; use bfloat16, int8 or float32 on a CPU"),
        (
            {"dtype": "int8"},
            "two GPUs",
            "--dtype int8 is computed on CPUs; use bfloat16 or float16 on a GPU, or --device",
        ),
        ({"engine": "onnxruntime"}, "two GPUs", "--engine onnxruntime runs on CPUs; use --engine torch on a GPU, or"),
        ({"dtype": "bfloat16", "device": "cuda:1"}, "two old GPUs", "the GPU cuda:1 does not compute in bfloat16; use"),
    ],
)
def test_what_is_wrong_here(
    asked: dict[str, object], machine: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, machine)
    check(ModelSettings(**asked))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{message}"):
        resolved(ModelSettings(**asked))  # type: ignore[arg-type]


def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match="--compile needs a C\\+\\+ compiler on a CPU, and there is no 'no-such-compiler'"
    ):
        resolved(ModelSettings(device="cpu", compile=True))


def test_bfloat16_is_asked_of_the_gpu_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "two GPUs")
    asked: list[str] = []

    @contextlib.contextmanager
    def device(name: str) -> Iterator[None]:
        asked.append(name)
        yield

    monkeypatch.setattr("torch.cuda.device", device)
    assert resolved(ModelSettings(device="cuda:1")).dtype == "bfloat16"
    assert set(asked) == {"cuda:1"}
    assert resolve_device("auto") == "cuda"


# --- recipes --------------------------------------------------------------------------------------


def test_a_recipe_keeps_what_changes_numbers_and_is_not_usual() -> None:
    assert recorded(ModelSettings(device="cpu", compile=True), "caption") == ()
    assert recorded(ModelSettings(dtype="float32", engine="onnxruntime"), "embedding") == ()
    asked = ModelSettings(dtype="int8", engine="onnxruntime", num_beams=3)
    assert recorded(asked, "embedding") == (("dtype", "int8"),)
    assert recorded(asked, "caption") == (("dtype", "int8"), ("num_beams", 3))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (ModelSettings(), ()),
        (ModelSettings(dtype="float32", engine="onnxruntime"), ()),
        (ModelSettings(engine="torch"), (("engine", "torch"),)),
        (ModelSettings(dtype="bfloat16"), (("dtype", "bfloat16"),)),
        (ModelSettings(dtype="bfloat16", engine="torch"), (("dtype", "bfloat16"),)),
    ],
)
def test_what_is_usual_here_is_decided_before_any_work(
    asked: ModelSettings, found: tuple[tuple[str, str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = planned(asked, is_here=True)
    assert plan.dtype != "auto" and recorded(plan, "embedding") == found
    # Workers compute what the plan says, on whatever device.
    assert resolved(with_recorded(asked, found)).dtype == plan.dtype


def test_auto_is_bfloat16_where_a_gpu_is_and_stands_in_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("vlm_ops.models.settings._has_bfloat16", lambda device: True)
    assert recorded(planned(ModelSettings(), is_here=True), "embedding") == (("dtype", "bfloat16"),)
    assert recorded(planned(ModelSettings(dtype="float32", engine="torch"), is_here=True), "embedding") == ()
    assert planned(ModelSettings(), is_here=False).dtype == "float32"  # nobody knows what is there
    with pytest.raises(ValueError, match="unknown dtype"):
        planned(ModelSettings(dtype="float8"), is_here=False)


@given(asked=SETTINGS, here=SETTINGS)
def test_a_recipe_says_what_is_computed_and_the_machine_where(asked: ModelSettings, here: ModelSettings) -> None:
    pairs = recorded(asked, "caption")
    if asked.trust_remote_code and not here.trust_remote_code:
        with pytest.raises(ValueError, match="allow that with --trust_remote_code"):
            with_recorded(here, pairs)
        return
    run = with_recorded(here, pairs)
    assert recorded(run, "caption") == pairs
    assert (run.device, run.compile) == (here.device, here.compile)
    assert run.dtype != "auto"
    assert not run.may_run_by_torch


def test_settings_of_captions_are_not_those_of_other_ops() -> None:
    asked = ModelSettings(caption_prompt="a", max_new_tokens=5, num_beams=2)
    assert dict(recorded(asked, "caption")).keys() == set(CAPTION_SETTINGS)
    assert recorded(asked, "embedding") == ()


def test_a_recipe_of_a_later_version() -> None:
    with pytest.raises(
        ValueError, match="the recipe has the setting 'sparsity', which this version of beamsight does not"
    ):
        with_recorded(ModelSettings(), [("sparsity", "2:4")])
