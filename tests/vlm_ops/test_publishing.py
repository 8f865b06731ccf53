"""The gate before the commit."""

from __future__ import annotations

from vlm_ops.parts import PartSummary
from vlm_ops.publishing import failure_rate


def part(num_images: int, num_failed: int = 0, unreadable: bool = False) -> PartSummary:
    return PartSummary("n", num_images, {}, num_failed, unreadable)


def test_failure_rate_of_images() -> None:
    assert failure_rate([part(90, 5), part(5)]) == 0.05
    assert failure_rate([]) == 0
    assert failure_rate([part(0)]) == 0


def test_a_shard_that_cannot_be_read_counts_as_a_shard() -> None:
    assert failure_rate([part(1000), part(1000), part(0, 1, unreadable=True), part(1000)]) == 0.25
