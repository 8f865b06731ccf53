"""A plugin of pytest (`-p tests.on_prism`): the commands that run a pipeline run it on Prism, whose binary the environment names.

The tests call the command line's entry in their own process; so does this, with Prism's flags behind theirs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from pipelines import cli

PRISM = "BEAMSIGHT_PRISM"
_main = cli.main


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(argv or ())
    if arguments[:1] in (["build"], ["index"], ["retry"], ["tag"]):
        arguments += ["--runner=PrismRunner", f"--prism_location={os.environ[PRISM]}"]
    return _main(arguments)


def pytest_configure() -> None:
    """Called where this is a plugin, and not where it is imported."""
    cli.main = main
