"""What may be wrong with a machine before a run is: checks that say what they find, each with its remedy.

    packages.py     Python and the packages, against what the installed Beamsight asks for
    cpu.py          cores, instruction sets, memory and threads
    cuda.py         driver, torch and cards; device_code.py: which cards a compiled library has code for
    faiss_build.py  the FAISS that is installed
    places.py       free space, the hub's cache, catalogs and inputs
    specs.py        which models and ops can be loaded here

A check is a generator of findings. What it needs is imported inside it, so that a machine on which half of the
packages are missing is told of each of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["ok", "warning", "problem", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        status: `problem`: a run that needs it fails; `warning`: it works, but worse than it could; `unknown`: it cannot
            be told here.
        told: What was found.
        remedy: What to do, where something is to be done.
        group: The group of checks that found it.
    """

    name: str
    status: Status
    told: str
    remedy: str = ""
    group: str = ""


def examine(group: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What a check finds, under the name of its group. A check that fails is a finding itself.

    Raises:
        Exception: What the check raised, where BEAMSIGHT_DEBUG is set.
    """
    try:
        for finding in check():
            yield replace(finding, group=group)
    except Exception as error:
        if os.environ.get("BEAMSIGHT_DEBUG"):
            raise
        told = f"could not be looked at any further: {one_line(error)}"
        yield Finding("check", "problem", told, "BEAMSIGHT_DEBUG=1 shows where it failed", group)


def refused(name: str, error: Exception) -> Finding:
    """A problem in the words of an error of ours, whose remedy, if it has one, stands behind the last semicolon."""
    told, separator, remedy = str(error).rpartition("; ")
    return Finding(name, "problem", told, remedy) if separator else Finding(name, "problem", remedy)


def failed(name: str, error: Exception, remedy: str) -> Finding:
    """A problem in the words of an error of another library.

    Raises:
        Exception: The error itself, where BEAMSIGHT_DEBUG is set.
    """
    if os.environ.get("BEAMSIGHT_DEBUG"):
        raise error
    return Finding(name, "problem", one_line(error), f"{remedy}; BEAMSIGHT_DEBUG=1 shows where it failed")


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
