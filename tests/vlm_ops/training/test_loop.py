"""The loop on a task of two lines: seed, kill, averaging, rates. It knows nothing of images."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vlm_ops.training.loop import Epoch, LoopConfig, fit

CONFIG = LoopConfig(num_epochs=6, batch_size=4, learning_rate=0.05, weight_decay=0.0, averaging=0.9)


class Line(nn.Module):
    """y = a x + b, with noise while training; `a` counts as pretrained."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Linear(1, 1, bias=False)
        self.norm = nn.Dropout(0.2)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.below(x)) + self.bias


class LineTask:
    """Ten points on y = 2 x + 1."""

    metric = "closeness"

    def __init__(self, num_points: int = 10, backbones: bool = True) -> None:
        torch.manual_seed(7)
        self.module = Line()
        self.backbones = [self.module.below] if backbones else []
        self.identity: Mapping[str, Any] = {"points": num_points}
        self.x = torch.linspace(-1, 1, num_points)[:, None]
        self.seen: list[list[int]] = []
        self.modes: list[tuple[bool, bool]] = []

    def num_images(self) -> int:
        return len(self.x)

    def loss(self, images: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        self.seen.append(images.tolist())
        self.modes.append((self.module.training, self.module.below.training))
        x = self.x[images] + torch.from_numpy(0.01 * rng.standard_normal((len(images), 1), np.float32))
        return (self.module(x) - 2 * self.x[images] - 1).square().mean()

    def validate(self, module: Any) -> float:
        assert not module.training
        return 1 / (1 + float((module(self.x) - 2 * self.x - 1).square().mean()))


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    for (name, one), other in zip(weights(first).items(), weights(second).values(), strict=True):
        assert torch.equal(one, other), name


def test_it_learns(tmp_path: Path) -> None:
    module, epochs = fit(LineTask(backbones=False), replace(CONFIG, num_epochs=40), tmp_path / "c.pt")
    assert [epoch.number for epoch in epochs] == list(range(1, 41))
    assert epochs[-1].loss < epochs[0].loss / 4 and epochs[-1].score > 0.9
    assert not module.training


def test_every_image_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    task = LineTask()
    steps: list[tuple[int, int]] = []
    fit(task, replace(CONFIG, num_epochs=2), tmp_path / "c.pt", on_step=lambda *step: steps.append(step))
    assert [len(each) for each in task.seen] == [4, 4, 2, 4, 4, 2]
    first, second = ([*itertools.chain(*task.seen[start : start + 3])] for start in (0, 3))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert steps == [(number, 6) for number in range(1, 7)]


def test_same_seed_same_result(tmp_path: Path) -> None:
    first, second, other = (
        fit(LineTask(), config, tmp_path / f"{number}.pt")
        for number, config in enumerate((CONFIG, CONFIG, replace(CONFIG, seed=1)))
    )
    assert first[1] == second[1] != other[1]
    assert_equal(first[0], second[0])


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_a_killed_training_goes_on_to_the_same_result(averaging: float, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(epoch: Epoch) -> None:
        if epoch.number == 3:
            raise KilledError

    config = replace(CONFIG, averaging=averaging)
    whole, epochs = fit(LineTask(), config, tmp_path / "whole.pt")
    with pytest.raises(KilledError):
        fit(LineTask(), config, tmp_path / "killed.pt", kill)
    numbers: list[int] = []
    steps: list[int] = []
    resumed, resumed_epochs = fit(
        LineTask(), config, tmp_path / "killed.pt",
        lambda epoch: numbers.append(epoch.number), lambda step, num_steps: steps.append(step),
    )  # fmt: skip
    assert numbers == [4, 5, 6] and resumed_epochs == epochs
    assert steps == list(range(10, 19))
    assert_equal(whole, resumed)


def test_a_training_that_is_over_is_not_trained_again(tmp_path: Path) -> None:
    whole, epochs = fit(LineTask(), CONFIG, tmp_path / "c.pt")
    task = LineTask()
    again, again_epochs = fit(task, CONFIG, tmp_path / "c.pt")
    assert task.seen == [] and again_epochs == epochs
    assert_equal(whole, again)


@pytest.mark.parametrize(
    ("task", "config", "flags"),
    [
        (LineTask(11), CONFIG, {"width": 3}),
        (LineTask(), replace(CONFIG, learning_rate=0.1), {"width": 3}),
        (LineTask(), CONFIG, {"width": 4}),
        (LineTask(), CONFIG, None),
    ],
    ids=["data", "config", "flag", "no flag"],
)
def test_the_checkpoint_of_another_training_is_refused(
    task: LineTask, config: LoopConfig, flags: dict[str, int] | None, tmp_path: Path
) -> None:
    fit(LineTask(), CONFIG, tmp_path / "c.pt", flags={"width": 3})
    with pytest.raises(ValueError, match=r"c\.pt is the checkpoint of another training .*; remove it to start anew"):
        fit(task, config, tmp_path / "c.pt", flags=flags)


def test_the_average_is_an_exponential_one_that_follows_closely_at_first(tmp_path: Path) -> None:
    task = LineTask()
    trajectory: list[dict[str, torch.Tensor]] = []
    averaged, _ = fit(
        task, CONFIG, tmp_path / "c.pt", on_step=lambda *_: trajectory.append(weights(task.module))
    )  # fmt: skip
    expected = trajectory[0]
    for number, current in enumerate(trajectory[1:], start=1):
        decay = min(0.9, (1 + number) / (10 + number))
        expected = {name: decay * expected[name] + (1 - decay) * current[name] for name in expected}
    for name, tensor in weights(averaged).items():
        torch.testing.assert_close(tensor, expected[name])
        assert not torch.equal(tensor, trajectory[-1][name])


def test_without_averaging_the_last_weights_are_kept(tmp_path: Path) -> None:
    task = LineTask()
    module, _ = fit(task, replace(CONFIG, averaging=0.0), tmp_path / "c.pt")
    assert module is task.module


def test_what_is_pretrained_takes_a_tenth_of_the_steps(tmp_path: Path) -> None:
    """Adam's first step is as long as the rate."""
    moved = {}
    for backbones in (True, False):
        task = LineTask(backbones=backbones)
        before = task.module.below.weight.item()
        after: list[float] = []
        fit(
            task, replace(CONFIG, num_epochs=1), tmp_path / f"{backbones}.pt",
            on_step=lambda *_, task=task, after=after: after.append(task.module.below.weight.item()),
        )  # fmt: skip
        moved[backbones] = abs(after[0] - before)
        assert set(task.modes) == {(True, not backbones)}
    assert moved[True] == pytest.approx(moved[False] / 10, rel=1e-3)


@pytest.mark.parametrize("num_epochs", [1, 2, 19, 20, 39])
def test_the_schedule_has_room_for_any_number_of_steps(num_epochs: int, tmp_path: Path) -> None:
    config = LoopConfig(num_epochs=num_epochs, batch_size=10, learning_rate=0.05)
    assert len(fit(LineTask(), config, tmp_path / "c.pt")[1]) == num_epochs


def test_half_precision(tmp_path: Path) -> None:
    config = replace(CONFIG, num_epochs=40, dtype="bfloat16")
    module, epochs = fit(LineTask(backbones=False), config, tmp_path / "c.pt")
    assert epochs[-1].score > 0.9
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="the loss or the weights of epoch 1 are no numbers; take a smaller --learning_rate"
    ):
        fit(LineTask(), replace(CONFIG, learning_rate=1e30), tmp_path / "c.pt")
    assert not (tmp_path / "c.pt").exists()
