"""The training loop of all models: AdamW under a cosine, averaged weights, and checkpoints to go on from."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from vlm_ops.storage import replacing

_WARM_UP = 0.05
_MAX_GRADIENT_NORM = 1.0
# A pretrained backbone needs small steps, or it forgets what it knows.
_BACKBONE_RATE = 0.1


@dataclass(frozen=True)
class LoopConfig:
    """How a task is trained.

    Attributes:
        num_epochs: Passes over the images.
        batch_size: Images a step.
        learning_rate, weight_decay: Of AdamW; the rate warms up and follows a cosine. A fine-tuned backbone has
            a tenth of it.
        averaging: Decay of the moving average of the weights, which is what is kept; 0 keeps the last ones.
        dtype: `float32` or `bfloat16` (autocast; the weights stay float32).
        device: `cpu`, `cuda` or `cuda:N`.
        seed: Same seed, same result on the same machine.
    """

    num_epochs: int = 20
    batch_size: int = 600
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    averaging: float = 0.0
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to: mean loss, and the task's metric on the validation data."""

    number: int
    loss: float
    score: float


class Task(Protocol):
    """What is trained, on what.

    Attributes:
        module: The module.
        backbones: Its parts that are pretrained: fine-tuned with a smaller rate, and left in evaluation mode,
            because the statistics of their batch norms are not those of small batches.
        metric: Name of what `validate` gives.
        identity: What a checkpoint must have been made from, to be gone on from.
    """

    metric: str
    identity: Mapping[str, Any]

    @property
    def module(self) -> Any: ...
    @property
    def backbones(self) -> Sequence[nn.Module]: ...
    def num_images(self) -> int: ...

    def loss(self, images: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """The loss of a step on these images (rows of the training data)."""
        ...

    def validate(self, module: Any) -> float:
        """The metric of the module, which is in evaluation mode."""
        ...


def fit(
    task: Task,
    config: LoopConfig,
    checkpoint: Path,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_step: Callable[[int, int], None] = lambda step, num_steps: None,
    flags: Mapping[str, Any] | None = None,
) -> tuple[Any, tuple[Epoch, ...]]:
    """Trains a task; goes on from the checkpoint of a run that was killed.

    Args:
        checkpoint: Written after each epoch, whole or not at all.
        on_step: Called with the steps done and those of the whole training.
        flags: What decides about the result besides `config` and the task's identity: a checkpoint must have been
            made with the same.

    Returns:
        The module with the weights to keep, in evaluation mode, and its epochs.

    Raises:
        ValueError: The checkpoint is of another recipe or other data, or the loss is no number any more.
    """
    torch.manual_seed(config.seed)
    module = task.module.to(config.device)
    steps_an_epoch = -(-task.num_images() // config.batch_size)
    num_steps = steps_an_epoch * config.num_epochs
    optimizer = torch.optim.AdamW(_groups(task, config.learning_rate), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=num_steps + 1,
        pct_start=max(_WARM_UP, 2 / (num_steps + 1)),  # it divides by the steps of the warm-up less one
    )
    averaged = AveragedModel(module, avg_fn=_average(config.averaging), use_buffers=False)
    parts = {"module": module, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    identity = {**asdict(config), **task.identity, **(flags or {})}
    epochs = _resume(checkpoint, parts, identity)
    for number in range(len(epochs), config.num_epochs):
        rng = np.random.default_rng((config.seed, number))
        losses = []
        _training_mode(task)
        for images in _batches(task.num_images(), config.batch_size, rng):
            with _autocast(config):
                loss = task.loss(images, rng)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), _MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            averaged.update_parameters(module)
            losses.append(loss.item())
            on_step(number * steps_an_epoch + len(losses), num_steps)
        if not np.isfinite(losses).all() or not all(each.isfinite().all() for each in module.parameters()):
            raise ValueError(
                f"the loss or the weights of epoch {number + 1} are no numbers; take a smaller --learning_rate than "
                f"{config.learning_rate}, and remove {checkpoint} if it is there"
            )
        with torch.inference_mode():
            epochs.append(Epoch(number + 1, float(np.mean(losses)), task.validate(_kept(module, averaged, config))))
        _save(checkpoint, parts, epochs, identity)
        on_epoch(epochs[-1])
    return _kept(module, averaged, config), tuple(epochs)


def _groups(task: Task, learning_rate: float) -> list[dict[str, Any]]:
    """Parameters by their learning rate."""
    pretrained = [parameter for backbone in task.backbones for parameter in backbone.parameters()]
    known = {id(parameter) for parameter in pretrained}
    groups = [{"params": [p for p in task.module.parameters() if id(p) not in known], "lr": learning_rate}]
    return [*groups, {"params": pretrained, "lr": _BACKBONE_RATE * learning_rate}] if pretrained else groups


def _training_mode(task: Task) -> None:
    task.module.train()
    for backbone in task.backbones:
        backbone.eval()


def _average(decay: float) -> Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]:
    """A moving average that follows closely at first, when there is little to average."""

    def average(averaged: torch.Tensor, current: torch.Tensor, num_averaged: Any) -> torch.Tensor:
        kept = min(decay, (1 + int(num_averaged)) / (10 + int(num_averaged)))
        return torch.lerp(averaged, current, 1 - kept)

    return average


def _kept(module: nn.Module, averaged: AveragedModel, config: LoopConfig) -> Any:
    return (averaged.module if config.averaging else module).eval()


def _autocast(config: LoopConfig) -> contextlib.AbstractContextManager[Any]:
    if config.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, getattr(torch, config.dtype))


def _batches(num_images: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    order = rng.permutation(num_images)
    for start in range(0, num_images, batch_size):
        yield order[start : start + batch_size]


def _save(path: Path, parts: Mapping[str, Any], epochs: Sequence[Epoch], identity: Mapping[str, Any]) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"random": _random_states(identity["device"]), "identity": dict(identity)}
    state["epochs"] = [asdict(epoch) for epoch in epochs]
    with replacing(str(path)) as scratch:
        torch.save(state, scratch)


def _resume(path: Path, parts: Mapping[str, Any], identity: Mapping[str, Any]) -> list[Epoch]:
    if not path.is_file():
        return []
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read; remove it to start anew ({str(error).splitlines()[0]})") from error
    if state["identity"] != dict(identity):
        raise ValueError(f"{path} is the checkpoint of another training (other data or flags); remove it to start anew")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"][0])
    for on_gpu in state["random"][1:]:
        torch.cuda.set_rng_state(on_gpu, identity["device"])
    return [Epoch(**epoch) for epoch in state["epochs"]]


def _random_states(device: str) -> list[torch.Tensor]:
    """Of the CPU, and of the GPU that is used, if any."""
    return [torch.get_rng_state(), *([] if device == "cpu" else [torch.cuda.get_rng_state(device)])]
