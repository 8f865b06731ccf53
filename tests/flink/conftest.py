"""A Flink cluster for the tests of this folder; brought up once, and gone at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.flink.cluster import FlinkCluster, flink_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlinkCluster]:
    with flink_cluster(tmp_path_factory.mktemp("flink"), num_task_managers=2) as running:
        yield running
