"""The rule of the house: pipelines -> vlm_ops -> schemas, never back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {"schemas": {"schemas"}, "vlm_ops": {"schemas", "vlm_ops"}, "pipelines": {"schemas", "vlm_ops", "pipelines"}}
# Pipelines meet in the catalog: a command imports only what all commands share.
SHARED = {
    "pipelines.cli",
    "pipelines.corpora",
    "pipelines.dataflow_jobs",
    "pipelines.jobs",
    "pipelines.matching",
    "pipelines.options",
    "pipelines.progress",
    "pipelines.query_images",
    "pipelines.runner_checks",
    "pipelines.runners",
    "pipelines.runs",
    "pipelines.transforms",
    "pipelines",
}
# What one command is made of, besides its own module: nobody else's.
PARTS = {"pipelines.evaluations": ("pipelines/evaluate.py", "pipelines/evaluations/")}
SCHEMA_LIBRARIES = {"numpy", "pyarrow"}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


MODULES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    import sys

    package = path.relative_to(ROOT).parts[0]
    for name in imports_of(path):
        top = name.partition(".")[0]
        if top in ALLOWED:
            assert top in ALLOWED[package], f"{path} imports {name}"
        if package == "vlm_ops":
            assert top != "apache_beam", f"{path} imports Beam"
        if package == "schemas" and top not in ALLOWED:
            assert top in SCHEMA_LIBRARIES or top in sys.stdlib_module_names, f"{path} imports {name}"
        if name.startswith("pipelines.") and package == "pipelines":
            own = {part for part, owners in PARTS.items() if path.relative_to(ROOT).as_posix().startswith(owners)}
            assert any(name == shared or name.startswith(f"{shared}.") for shared in SHARED - {"pipelines"} | own), (
                f"{path} imports {name}"
            )


def test_no_module_is_a_drawer() -> None:
    for path in MODULES:
        assert not any(word in path.stem for word in ("utils", "manager", "helper", "processor")), path
