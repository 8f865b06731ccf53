"""The suite's end-to-end tests once more, on Beam's Prism: a runner that speaks to its workers as remote ones do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import on_prism
from tests.flink import packages
from tests.flink.network import own_network

pytestmark = pytest.mark.prism
FOLDER = Path(__file__).parent
END_TO_END = {
    "test_build.py": (
        "test_the_default_catalog",
        "test_new_and_changed_inputs_are_added",
        "test_a_mix_of_formats",
        "test_too_many_failures_publish_nothing",
        "test_bad_input_never_loses_good_data",
        "test_another_recipe_computes_all_images_anew",
    ),
    "test_nightly.py": ("test_retry_processes_just_what_failed",),
    "test_tag.py": ("test_only_new_and_changed_rows_are_tagged",),
}


def test_end_to_end_on_prism() -> None:
    """Prism listens on every interface, so it runs in a network of its own."""
    prism = packages.prism()
    tests = [f"{FOLDER / module}::{name}" for module, names in END_TO_END.items() for name in names]
    command = [sys.executable, "-m", "pytest", "-p", "tests.on_prism", "-p", "no:cacheprovider", *tests]
    with own_network() as network:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        run = network.start(command, cwd=FOLDER.parents[1], env={**os.environ, on_prism.PRISM: str(prism)}, **pipes)
        printed, _ = run.communicate(timeout=400)
        assert run.returncode == 0 and f"{len(tests)} passed" in printed, printed
        assert not network.processes(), "Prism ends with the command"
