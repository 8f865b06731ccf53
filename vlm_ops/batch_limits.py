"""Out of memory: which errors mean it, and the smaller batches that follow from it.

A batch that does not fit is halved, and the smaller size is kept: the next one would not fit either.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import torch

logger = logging.getLogger(__name__)

# Whatever has no exception type of its own says it in words.
_MESSAGES = (
    "can't allocate memory",  # torch on CPUs: DefaultCPUAllocator
    "out of memory",  # CUDA, HIP, Metal
    "std::bad_alloc",  # ONNX Runtime without its arena; libstdc++ everywhere
    "failed to allocate memory for requested buffer",  # ONNX Runtime's arena
    "smaller than requested bytes",  # the same, with a limit set
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory (of a GPU, or the machine's) did not suffice."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):  # NumPy's and Arrow's are MemoryErrors too
        return True
    message = str(error).lower()
    return any(each in message for each in _MESSAGES)


def release_cached_memory() -> None:
    """Gives back what torch's allocator keeps on a GPU. To be called when the error, which holds tensors, is gone."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class BatchLimits:
    """How many images at once the models of this process can take, as far as that was found out. For all threads."""

    def __init__(self) -> None:
        self._limits: dict[str, int] = {}
        self._condition = threading.Condition()
        self._num_running = 0
        self._is_one_alone = False

    def size(self, name: str, num_images: int) -> int:
        """How many of so many images may be run at once."""
        return min(num_images, self._limits.get(name, num_images))

    def halve(self, name: str, size: int) -> None:
        """A batch of this size did not fit. Batches that were on their way halve nothing twice."""
        with self._condition:
            smaller = max(1, size // 2)
            if smaller >= self._limits.get(name, size):
                return
            self._limits[name] = smaller
        logger.warning("out of memory: op %s now runs batches of %d images, not %d", name, smaller, size)

    @contextlib.contextmanager
    def running(self, alone: bool = False) -> Iterator[None]:
        """Runs something beside the others, or, where memory is short, while nothing else runs."""
        with self._condition:
            self._condition.wait_for(lambda: not self._is_one_alone)
            if alone:
                self._is_one_alone = True
                self._condition.wait_for(lambda: self._num_running == 0)
            self._num_running += 1
        try:
            yield
        finally:
            with self._condition:
                self._num_running -= 1
                if alone:
                    self._is_one_alone = False
                self._condition.notify_all()
