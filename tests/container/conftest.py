"""The image under test.

engine      docker or podman
image       built from the Dockerfile; `BEAMSIGHT_IMAGE` names one that is there already
"""

from __future__ import annotations

import os

import pytest

from tests.container.base_images import build_flags
from tests.container.engines import ROOT, Engine, find_engine

TAG = "localhost/beamsight:test"


@pytest.fixture(scope="session")
def engine() -> Engine:
    return find_engine()


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    if named := os.environ.get("BEAMSIGHT_IMAGE"):
        return named
    arguments, flags = build_flags(engine)
    engine.build(ROOT, TAG, arguments, flags)
    return TAG
