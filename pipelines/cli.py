"""`beamsight <command>`. Only the command that is run is imported, so that `--help` is quick."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence

COMMANDS = {
    "build": "read images, run the models, write the catalog and its index",
    "retry": "try again what failed",
    "history": "list the runs that changed a catalog",
    "rollback": "take table and index back to what they were after a run",
    "clean": "delete what no kept state of a catalog needs",
    "index": "make a new index from the catalog's table",
    "tag": "say of every image what pages, feeds and ad servers ask for",
    "search": "find images by text or by image",
    "export": "write the tags for a shop, a CMS or a search engine",
    "score": "say how likely captions describe their images",
    "evaluate": "measure a model on images with captions or labels",
    "train": "train a model on images with captions",
    "inspect": "say what is in a catalog",
    "doctor": "say whether this machine is ready for a run",
    "fetch-model": "fetch a model beforehand, for machines without network",
}
EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 1, 2, 130
_INTERRUPTED = "interrupted; run the same command again, and it goes on where it stopped"
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 1 where storage or a worker failed; 2 for a user's mistake; 3 where too many images failed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else EXIT_USER_ERROR
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"beamsight {version('beamsight')}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"beamsight: error: unknown command {argv[0]!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_USER_ERROR
    return run_command(argv[0], argv[1:])


def run_command(command: str, argv: Sequence[str]) -> int:
    """Runs one command, and turns what it raises into a message and an exit code."""
    try:
        _set_up_logging()
        # Options first: they are light, and `--help` and wrong flags end the program here.
        from pipelines import options

        module = command.replace("-", "_")
        parsed = getattr(options, f"parse_{module}")(argv)
        return importlib.import_module(f"pipelines.{module}").run(parsed)
    except KeyboardInterrupt:
        return _report(command, _INTERRUPTED, EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output (`| head`) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        if os.environ.get("BEAMSIGHT_DEBUG"):
            raise
        return _report(command, f"error: {_message(error, is_whole=True)}", EXIT_USER_ERROR)
    except Exception as error:
        if os.environ.get("BEAMSIGHT_DEBUG"):
            raise
        if _message(error).startswith("KeyboardInterrupt"):  # that a worker's thread has met
            return _report(command, _INTERRUPTED, EXIT_INTERRUPTED)
        message = f"failed: {_message(error)}\n  What was finished is kept: run the same command again."
        return _report(command, f"{message} BEAMSIGHT_DEBUG=1 shows the traceback.", EXIT_FAILED)


def entry_point() -> None:
    """The command `beamsight`. Ends at once where a run failed or was interrupted: the runner's
    threads may be in the middle of a batch, and need not be waited for."""
    code = main()
    sys.stdout.flush()
    if code in (EXIT_FAILED, EXIT_INTERRUPTED):
        os._exit(code)
    sys.exit(code)


def _message(error: BaseException, is_whole: bool = False) -> str:
    """What went wrong: its first line, or all of them where each says something of its own. Beam wraps a worker's error
    into its traceback, whose last line says it, and a remote runner that into a line of its own."""
    # Delta tells causes on lines of their own, in colours, each below an arrow.
    text = re.sub(r"\s*\[while running [^\n\]]*\](?=[\"']?\s*$)", "", re.sub(r"\x1b\[[0-9;]*m", "", str(error)))
    text = re.sub(r"\s*\n\s*↳\s*", ": ", text)
    text = re.sub(r"^Pipeline \S+ failed in state [A-Z]+: ", "", text)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].endswith("Traceback (most recent call last):"):
        return lines[-1].removeprefix("RuntimeError: ")
    return "\n".join(lines) if is_whole else lines[0]


def _report(command: str, message: str, code: int) -> int:
    print(f"beamsight {command}: {message}", file=sys.stderr, flush=True)
    if "vlm_ops.storage" in sys.modules:
        sys.modules["vlm_ops.storage"].discard_unfinished()
    return code


def _set_up_logging() -> None:
    level = (os.environ.get("BEAMSIGHT_LOG") or "INFO").upper()
    if level not in _LOG_LEVELS:
        raise ValueError(f"BEAMSIGHT_LOG={level!r}: must be one of {', '.join(_LOG_LEVELS)}")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, stream=sys.stderr)
    for package in ("pipelines", "vlm_ops", "schemas"):
        logging.getLogger(package).setLevel(level)
    # Beam complains here about Google packages that a local run does not need.
    logging.getLogger("root").addFilter(lambda record: "apitools" not in record.getMessage())
    # And repeats a worker's traceback at every stage; the message at the end says it once.
    is_debug = bool(os.environ.get("BEAMSIGHT_DEBUG"))
    logging.getLogger("apache_beam").setLevel(logging.ERROR if is_debug else logging.CRITICAL + 1)
    # The root's logger serves these two for a remote job's messages, and while its job server starts.
    loud = () if is_debug else ("portable_runner", "subprocess_server")
    logging.getLogger("root").addFilter(lambda record: record.module not in loud)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return f"usage: beamsight COMMAND ...\n\n{commands}\n\n`beamsight COMMAND --help` shows the flags of a command."


if __name__ == "__main__":
    entry_point()
