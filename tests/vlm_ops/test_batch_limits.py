"""Out of memory: the batch is halved, the smaller size is kept, and no image is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from schemas.recipes import Recipe
from schemas.samples import ShardRef
from tests.conftest import jpeg, tar_bytes
from tests.toys import BrightnessOp, ToyImageModel
from tests.vlm_ops.test_enrich import POISON
from vlm_ops.batch_limits import BatchLimits, is_out_of_memory
from vlm_ops.enrich import EnrichConfig, Enricher
from vlm_ops.models.settings import CPU
from vlm_ops.ops import plan_ops
from vlm_ops.shards import ReadConfig

RECIPE = Recipe(
    plan_ops(["quality", "features", "caption", "tests.toys:BrightnessOp"], "python:tests.toys"), 10**7, 10**7
)
ARENA = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Conv node. Name:'' Status Message: "
    "/onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal"
    "(size_t, bool, onnxruntime::Stream*) Failed to allocate memory for requested buffer of size 3200000000"
)
ERRORS = {
    "python": MemoryError(),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuda outside of torch": RuntimeError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "torch": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "onnx runtime, arena": RuntimeError(ARENA),
    "onnx runtime": RuntimeError(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Tile node. "
        "Name:'' Status Message: std::bad_alloc"
    ),
}


def enricher_of(tmp_path: Path, recipe: Recipe = RECIPE, **changes: object) -> Enricher:
    values = {"batch_size": 16, "num_threads": 1, "settings": CPU} | changes
    return Enricher(EnrichConfig(str(tmp_path / "catalog"), recipe, "run", ReadConfig(10**7), **values))  # type: ignore[arg-type]


def enrich(enricher: Enricher, tmp_path: Path, name: str, datas: list[bytes]) -> tuple[list[dict], list[dict]]:
    """(rows, failures)."""
    data = tar_bytes([(f"{i:03}.jpg", each) for i, each in enumerate(datas)])
    (tmp_path / name).write_bytes(data)
    summary = enricher.enrich(ShardRef(str(tmp_path / name), "tar", "v1", len(data)))
    failures = [
        row for path in (tmp_path / "catalog" / "failures").glob("*") for row in pq.read_table(path).to_pylist()
    ]
    return pq.read_table(tmp_path / "catalog" / "images" / summary.name).to_pylist(), failures


def starve(monkeypatch: pytest.MonkeyPatch, fits: Callable[[int], bool], error: Exception) -> list[int]:
    """Makes the model raise unless so many images fit; the sizes that it was given are returned as they come."""
    sizes: list[int] = []
    encode_images = ToyImageModel.encode_images

    def starved(self: ToyImageModel, pixels: np.ndarray):  # type: ignore[no-untyped-def]
        sizes.append(len(pixels))
        if not fits(len(pixels)):
            raise error
        return encode_images(self, pixels)

    monkeypatch.setattr(ToyImageModel, "encode_images", starved)
    return sizes


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if message.startswith("out of memory")]


@pytest.mark.parametrize("error", ERRORS.values(), ids=list(ERRORS))
def test_a_batch_that_does_not_fit_is_halved_and_the_size_is_kept(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    datas = [jpeg(seed, 24, 16) for seed in range(50)]
    expected, _ = enrich(enricher_of(tmp_path), tmp_path, "plenty.tar", datas)
    sizes = starve(monkeypatch, lambda size: size <= 5, error)
    enricher = enricher_of(tmp_path)
    rows, failures = enrich(enricher, tmp_path, "a.tar", datas)
    assert failures == [] and [row["key"] for row in rows] == [f"{i:03}" for i in range(50)]
    for name in ("features", "caption", "brightness", "width"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    assert told(caplog) == [
        "out of memory: op features, caption now runs batches of 8 images, not 16",
        "out of memory: op features, caption now runs batches of 4 images, not 8",
    ]
    assert sizes[:2] == [16, 8] and max(sizes[2:]) == 4
    del sizes[:]
    enrich(enricher, tmp_path, "b.tar", [jpeg(seed, 24, 16) for seed in range(100, 120)])
    assert sizes == [4] * 5 and len(told(caplog)) == 2


def test_only_the_op_that_lacks_memory_gets_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call = BrightnessOp.__call__

    def starved(self: BrightnessOp, batch) -> dict[str, pa.Array]:  # type: ignore[no-untyped-def]
        if len(batch) > 3:
            raise MemoryError
        return call(self, batch)

    monkeypatch.setattr(BrightnessOp, "__call__", starved)
    sizes = starve(monkeypatch, lambda _: True, MemoryError())
    rows, failures = enrich(enricher_of(tmp_path), tmp_path, "a.tar", [jpeg(seed, 24, 16) for seed in range(32)])
    assert len(rows) == 32 and not failures and sizes == [16, 16]
    assert [message.split(" now ")[0] for message in told(caplog)] == ["out of memory: op tests.toys:BrightnessOp"] * 3


def test_an_image_that_does_not_fit_by_itself_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starve(monkeypatch, lambda _: False, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    rows, failures = enrich(enricher_of(tmp_path), tmp_path, "a.tar", [jpeg(seed, 24, 16) for seed in range(3)])
    assert rows == []
    assert [(row["key"], row["stage"], row["reason"]) for row in failures] == [
        (key, "features", "model_error") for key in ("000", "001", "002")
    ]
    assert {row["message"] for row in failures} == {
        "out of memory, even for this image alone: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    }


def test_poison_fails_alone_where_memory_is_short_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starve(monkeypatch, lambda size: size <= 2, MemoryError())
    datas = [POISON if i == 13 else jpeg(i, 24, 16) for i in range(32)]
    rows, failures = enrich(enricher_of(tmp_path), tmp_path, "a.tar", datas)
    assert len(rows) == 31
    assert [(row["key"], row["message"]) for row in failures] == [("013", "RuntimeError: magenta is poison")]


@pytest.mark.parametrize("error", [MemoryError(), ValueError("poison")], ids=["memory", "poison"])
def test_what_a_failed_call_held_is_let_go_before_the_next(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref] = []
    encode_images = ToyImageModel.encode_images

    def starved(self: ToyImageModel, pixels: np.ndarray):  # type: ignore[no-untyped-def]
        assert [each() for each in held] == [None] * len(held)
        activations = np.zeros(4).view(_Activations)
        held.append(weakref.ref(activations))
        if len(pixels) > 2:
            raise type(error)(*error.args)
        return encode_images(self, pixels)

    monkeypatch.setattr(ToyImageModel, "encode_images", starved)
    rows, failures = enrich(enricher_of(tmp_path), tmp_path, "a.tar", [jpeg(seed, 24, 16) for seed in range(16)])
    assert len(rows) == 16 and not failures and len(held) > 8


class _Activations(np.ndarray):
    """An array that can be watched."""


def test_threads_that_run_short_at_once_halve_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    together = threading.Barrier(4)

    def fits(size: int) -> bool:
        if size > 4:
            together.wait(timeout=30)  # until each thread has a batch that is too large
        return size <= 4

    sizes = starve(monkeypatch, fits, MemoryError())
    datas = [jpeg(seed, 24, 16) for seed in range(64)]
    rows, failures = enrich(enricher_of(tmp_path, batch_size=8, num_threads=4), tmp_path, "a.tar", datas)
    assert len(rows) == 64 and not failures
    assert told(caplog) == ["out of memory: op features, caption now runs batches of 4 images, not 8"]
    assert sorted(sizes) == [4] * 16 + [8] * 4


def test_no_image_fails_because_of_what_other_threads_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for one image, and three threads that all want it."""
    in_use = threading.Semaphore(1)
    encode_images = ToyImageModel.encode_images

    def starved(self: ToyImageModel, pixels: np.ndarray):  # type: ignore[no-untyped-def]
        if len(pixels) > 1 or not in_use.acquire(blocking=False):
            raise MemoryError
        try:
            threading.Event().wait(0.005)
            return encode_images(self, pixels)
        finally:
            in_use.release()

    monkeypatch.setattr(ToyImageModel, "encode_images", starved)
    datas = [jpeg(seed, 24, 16) for seed in range(40)]
    rows, failures = enrich(enricher_of(tmp_path, batch_size=4, num_threads=3), tmp_path, "a.tar", datas)
    assert failures == [] and [row["key"] for row in rows] == [f"{i:03}" for i in range(40)]


def test_who_runs_alone_waits_for_the_others_and_holds_them_off() -> None:
    limits, events = BatchLimits(), []
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with limits.running():
            entered.set()
            leave.wait(30)
            events.append("other")

    def late() -> None:
        with limits.running():
            events.append("late")

    def alone() -> None:
        with limits.running(alone=True):
            events.append("alone begins")
            threading.Event().wait(0.05)
            events.append("alone ends")

    threads = [threading.Thread(target=each) for each in (other, alone, late)]
    threads[0].start()
    entered.wait(30)
    threads[1].start()
    while not limits._is_one_alone:
        threading.Event().wait(0.001)
    threads[2].start()
    leave.set()
    for thread in threads:
        thread.join(30)
    assert events == ["other", "alone begins", "alone ends", "late"]


def test_real_allocations_that_fail_are_told_from_other_errors() -> None:
    for allocate in (
        lambda: np.zeros(1 << 50),
        lambda: torch.zeros(1 << 50),
        lambda: pa.allocate_buffer(1 << 50),
        lambda: bytearray(1 << 50),
    ):
        with pytest.raises(Exception) as caught:
            allocate()
        assert is_out_of_memory(caught.value)
    for error in (
        RuntimeError("magenta is poison"),
        ValueError("batch of 3"),
        RuntimeError("CUDA error: device-side assert"),
    ):
        assert not is_out_of_memory(error)


ONNX = """
import resource, sys
import numpy as np, onnxruntime
from onnx import TensorProto, helper
from vlm_ops.batch_limits import is_out_of_memory

nodes = [helper.make_node("Tile", ["x", "times"], ["y"]), helper.make_node("ReduceSum", ["y"], ["z"], keepdims=0)]
graph = helper.make_graph(
    nodes, "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
    [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    [helper.make_tensor("times", TensorProto.INT64, [2], [1, 100_000_000])],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
sessions = []
for has_arena in (True, False):
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = has_arena
    options.log_severity_level = 4
    sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29),) * 2)
for session in sessions:
    try:
        session.run(None, {"x": np.zeros((1, 4), np.float32)})
        print("it fitted")
    except Exception as error:
        print(is_out_of_memory(error), repr(error))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_onnx_runtime_says_that_it_is_out_of_memory() -> None:
    done = subprocess.run([sys.executable, "-c", ONNX], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["True", "True"], done.stdout


@pytest.fixture
def little_gpu_memory() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((1 << 30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_a_gpu_that_is_full_takes_smaller_batches(
    little_gpu_memory: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode_images = ToyImageModel.encode_images

    def hungry(self: ToyImageModel, pixels: np.ndarray):  # type: ignore[no-untyped-def]
        room = torch.zeros(len(pixels), 150 << 20, dtype=torch.uint8, device="cuda")  # 150 MiB an image, of 1 GiB
        room += 1
        return encode_images(self, pixels)

    monkeypatch.setattr(ToyImageModel, "encode_images", hungry)
    datas = [jpeg(seed, 24, 16) for seed in range(40)]
    rows, failures = enrich(enricher_of(tmp_path, device="cuda"), tmp_path, "a.tar", datas)
    assert len(rows) == 40 and not failures
    assert [message.split(" now ")[1] for message in told(caplog)] == [
        "runs batches of 8 images, not 16",
        "runs batches of 4 images, not 8",
    ]
    assert torch.cuda.memory_allocated() == 0
