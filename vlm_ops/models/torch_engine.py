"""Torch as the engine: on GPUs, and on CPUs where bfloat16, compiling or a module that cannot be exported asks for it.

In half precision the matrix products and convolutions are what is computed in it: their weights are converted once, and
autocast does the rest, which leaves norms and residual sums in float32 (docs/decisions/0013-engines-and-precision.md).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from vlm_ops.models.settings import ModelSettings

logger = logging.getLogger(__name__)

# What autocast casts at every call, unless it was converted.
_LARGE = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.MultiheadAttention)
# The smallest batch of a compiled module: torch takes a size of 1 for a constant, and would compile once more.
_LEAST_COMPILED = 2


class TorchEngine:
    """One torch module. `run` may be called from several threads at once.

    Args:
        module: Tensors -> a tensor or a tuple of them. It is taken over: its weights are moved and converted in place.
        settings: Device, dtype and whether to compile; resolved.
        outputs: Which of the module's tensors are wanted; None: all.

    """

    def __init__(self, module: Any, settings: ModelSettings, outputs: Sequence[int] | None = None) -> None:
        self._device = torch.device(settings.device)
        self._dtype = None if settings.dtype == "float32" else getattr(torch, settings.dtype)
        self._outputs = outputs
        self._module = _prepared(module, self._device, self._dtype)
        self._is_compiled = settings.compile
        if settings.compile:
            # Freezing takes the weights for constants, which MKL-DNN packs once.
            self._module = torch.compile(self._module, options={"freezing": True})
        # What a GPU is given, it is given by one thread at a time, and computes in that order. On a CPU each thread has
        # a core of its own.
        self._queue = threading.Lock()

    def compile(self, example: Mapping[str, np.ndarray]) -> None:
        """Compiles now what would else be compiled within the first batch.

        Raises:
            ValueError: It cannot be compiled here.
        """
        logger.info("compiling a model for %s, which takes minutes, once a process", self._device)
        try:
            self.run(example)
        except Exception as error:  # dynamo, inductor, Triton and the C++ compiler share no class of errors
            raise ValueError(
                f"the model cannot be compiled here; leave out --compile ({type(error).__name__}: "
                f"{str(error).strip().partition(chr(10))[0]})"
            ) from error

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The wanted outputs, in float32 where they are floats; inputs of n rows, whatever n."""
        num_rows = len(next(iter(inputs.values())))
        arrays = [_padded(array) if self._is_compiled else array for array in inputs.values()]
        tensors = [torch.from_numpy(array) for array in arrays]
        if self._device.type == "cpu":
            results = self._forward(tensors)
        else:
            tensors = [tensor.pin_memory() for tensor in tensors]
            with self._queue:
                on_device = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
                # A copy from a GPU that does not block goes to pinned memory.
                results = [each.to("cpu", non_blocking=True) for each in self._forward(on_device)]
                done = torch.cuda.current_stream(self._device).record_event()
            # Not under the lock: the next batch is queued while this one is computed.
            done.synchronize()
        return [each.numpy()[:num_rows] for each in results]

    @torch.inference_mode()
    def _forward(self, tensors: Sequence[Any]) -> list[Any]:
        if self._is_compiled:
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0, min=_LEAST_COMPILED)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            outputs = self._module(*tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = range(len(outputs)) if self._outputs is None else self._outputs
        return [outputs[i].float() if outputs[i].is_floating_point() else outputs[i] for i in wanted]


def _prepared(module: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The module on its device, with the weights of large products in their dtype."""
    module = module.eval().requires_grad_(False).to(device)
    for part in module.modules():
        if dtype is not None and isinstance(part, _LARGE):
            part.to(dtype)
    if sum(isinstance(part, torch.nn.Conv2d) for part in module.modules()) > 1:  # not the one that cuts patches
        module.to(memory_format=torch.channels_last)
    if device.type == "cuda" and dtype is None:
        # float32 means float32: torch rounds the inputs of convolutions to ten bits (TF32) unless told otherwise.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return module


def _padded(array: np.ndarray) -> np.ndarray:
    return array if len(array) >= _LEAST_COMPILED else np.repeat(array, _LEAST_COMPILED, axis=0)
