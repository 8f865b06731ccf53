"""ONNX Runtime as the engine on CPUs, with the graphs exported from torch once and cached.

Why not torch there: docs/decisions/0003-onnx-runtime-on-cpus.md.
"""

from __future__ import annotations

import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

logger = logging.getLogger(__name__)


class OnnxEngine:
    """One graph. `run` may be called from several threads at once: each call uses one core."""

    def __init__(self, graph: Path | bytes, outputs: Sequence[int] | None = None) -> None:
        """Args:
        graph: Its file, or what stands in it.
        outputs: Which of the graph's outputs are wanted (None: all); only these are computed.
        """
        options = onnxruntime.SessionOptions()
        # Parallelism comes from running several batches at once, which needs no synchronisation.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        model = graph if isinstance(graph, bytes) else str(graph)
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in self._session.get_outputs()]
        self.output_names = names if outputs is None else [names[number] for number in outputs]

    @property
    def metadata(self) -> Mapping[str, str]:
        """What its maker wrote into the graph."""
        return self._session.get_modelmeta().custom_metadata_map

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self._session.run(self.output_names, dict(inputs))


def cache_dir() -> Path:
    """Where exported graphs are kept: `$BEAMSIGHT_CACHE`, else the user's cache directory."""
    if configured := os.environ.get("BEAMSIGHT_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "beamsight"


def cached_file(name: str, make: Callable[[Path], None]) -> Path:
    """A file of the cache, made by `make(path)` when it is not there yet.

    Several processes may ask at once: each makes its own and the last rename wins, with equal
    content. Where the cache cannot be written (a read-only home), a temporary directory serves.
    """
    directory = cache_dir()
    path = directory / name
    if path.is_file():
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=directory, prefix=".making-"))
    except OSError:
        scratch = Path(tempfile.mkdtemp(prefix="beamsight-cache-"))
        path = scratch / "kept" / name
        path.parent.mkdir()
    try:
        logger.info("preparing %s (once; kept in %s)", name, path.parent)
        make(scratch / name)
        os.replace(scratch / name, path)
    finally:
        for leftover in scratch.glob(f"{name}*"):
            leftover.unlink()
        if not any(scratch.iterdir()):
            scratch.rmdir()
    return path


def export(module: Any, inputs: Mapping[str, Any], dynamic_dims: Mapping[str, Mapping[int, str]], path: Path) -> None:
    """Exports a torch module in evaluation mode to one ONNX file.

    Args:
        inputs: Example tensors by argument name, those of `*arguments` last; each dynamic dimension larger than 1.
        dynamic_dims: For each argument, its dynamic dimensions and their names.
    """
    import torch

    dims: tuple[Any, ...] = tuple(dict(dynamic_dims[name]) for name in inputs)
    parameters = inspect.signature(module.forward).parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):  # which the exporter counts as one
        dims = (*dims[: len(parameters) - 1], dims[len(parameters) - 1 :])
    noisy = {name: logging.getLogger(name) for name in ("torch.onnx", "onnxscript")}
    levels = {name: each.level for name, each in noisy.items()}
    for each in noisy.values():
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(), tuple(inputs.values()), dynamo=True, verbose=False, input_names=list(inputs),
                dynamic_shapes=dims,
            )  # fmt: skip
            assert program is not None
            program.save(str(path))
    finally:
        for name, each in noisy.items():
            each.setLevel(levels[name])


def quantise(graph: Path, path: Path) -> None:
    """Writes a graph whose matrix products by constant weights are computed in int8: weights are rounded once, to a scale
    for each column; activations as they come, to one scale a tensor (Jacob et al., "Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018).

    Weights get seven bits, so that their products fit into 16: CPUs without VNNI clip there, and a recipe's numbers are to
    be the same on all (`reduce_range` of onnxruntime.quantization). Convolutions stay as they are: in integers they are no
    faster.

    Raises:
        ValueError: The graph has no such products.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # where it advises what makes no difference here
    try:
        quantize_dynamic(
            graph, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        root.setLevel(level)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    if "MatMulInteger" not in kinds:
        raise ValueError("it has no matrix products by weights")
