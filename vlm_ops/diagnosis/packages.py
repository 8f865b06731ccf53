"""Python and the packages: what is installed, against what the installed distribution of Beamsight asks for."""

from __future__ import annotations

import platform
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_ops.diagnosis import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_OURS = "beamsight"
# Modules that several distributions install in each other's place.
_RIVALS = {"faiss": "faiss-gpu", "onnxruntime": "onnxruntime"}


def check_packages() -> Iterator[Finding]:
    """Python, Beamsight, and every package that its metadata names."""
    try:
        ours = metadata.distribution(_OURS)
    except metadata.PackageNotFoundError:
        yield Finding(_OURS, "problem", "is not installed as a package", "pip install . in its folder")
        return
    yield judge_python(platform.python_version(), "".join(_field(ours, "Requires-Python")))
    yield Finding(_OURS, "ok", f"{ours.version}, in {Path(__file__).parents[2]}")
    distributions = {_normal(each.name): each for each in metadata.distributions() if each.name}
    installed = {name: each.version for name, each in distributions.items()}
    providers = {module: sorted({_normal(name) for name in names})
                 for module, names in metadata.packages_distributions().items() if module in _RIVALS}  # fmt: skip
    yield from judge_rivals(providers)
    yield from judge_requirements(ours.requires or [], installed, providers)
    needs = {name: each.requires or [] for name, each in distributions.items() if name in _named(ours.requires or [])}
    yield from judge_conflicts(needs, installed)
    yield from judge_extras(ours.requires or [], _field(ours, "Provides-Extra"), installed)


def judge_python(version: str, wanted: str) -> Finding:
    """Args:
    wanted: A specifier, such as `>=3.11`.
    """
    from packaging.specifiers import SpecifierSet

    told = f"{version} on {platform.system()} {platform.machine()}, {sys.executable}"
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("python", "ok", told)
    return Finding("python", "problem", f"{told}; Beamsight needs {wanted}", f"make an environment of Python {wanted}")


def judge_requirements(
    requirements: Sequence[str], installed: Mapping[str, str], providers: Mapping[str, Collection[str]]
) -> Iterator[Finding]:
    """One finding a package that is always needed.

    Args:
        requirements: As metadata states them, `torch>=2.6`.
        installed: Versions by normalised name.
        providers: For modules that several distributions install, those that are installed.
    """
    for requirement in _parsed(requirements, extra=""):
        name, wanted = _normal(requirement.name), str(requirement.specifier)
        remedy = f"pip install '{requirement.name}{wanted}'"
        version = installed.get(name)
        module = next((module for module, usual in _RIVALS.items() if usual == name), "")
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            yield Finding(name, "ok", version)
        elif version is not None:
            yield Finding(name, "problem", f"{version} is installed; Beamsight needs {wanted}", remedy)
        elif providers.get(module):
            stand_in = " and ".join(providers[module])
            told = f"not installed; {stand_in} stands in for it, which Beamsight is not tested with"
            yield Finding(name, "warning", told, f"pip uninstall {stand_in}; {remedy}")
        else:
            yield Finding(name, "problem", f"not installed; Beamsight needs {wanted or 'it'}", remedy)


def judge_rivals(providers: Mapping[str, Collection[str]]) -> Iterator[Finding]:
    """Distributions that write their files over one another's: which of them is imported is a matter of chance."""
    for module, names in providers.items():
        if len(names) > 1:
            told = f"{' and '.join(names)} are installed at once, and each is imported as {module}"
            remedy = f"pip uninstall {' '.join(names)}; pip install {_RIVALS[module]}"
            yield Finding(module, "problem", told, remedy)


def judge_conflicts(needs: Mapping[str, Sequence[str]], installed: Mapping[str, str]) -> Iterator[Finding]:
    """Packages that ask one another for other versions than are there, such as torchvision of another torch.

    Args:
        needs: The requirements of each package.
    """
    for name, requirements in sorted(needs.items()):
        for requirement in _parsed(requirements, extra=""):
            version = installed.get(_normal(requirement.name))
            if version is None or requirement.specifier.contains(version, prereleases=True):
                continue
            told = f"{installed[name]} asks for {requirement.name}{requirement.specifier}, and {version} is installed"
            is_pinned = any(each.operator == "==" for each in requirement.specifier)
            remedy = f"pip install --upgrade {name} {requirement.name}"
            yield Finding(name, "problem" if is_pinned else "warning", told, remedy)


def judge_extras(requirements: Sequence[str], extras: Sequence[str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """Which extras are installed whole. Lacking one is no fault."""
    for extra in sorted(extras):
        needed = [each for each in _parsed(requirements, extra) if each.marker]
        missing = [
            each.name
            for each in needed
            if not each.specifier.contains(installed.get(_normal(each.name), "0"), prereleases=True)
        ]
        if not missing:
            yield Finding(f"[{extra}]", "ok", "installed")
        else:
            told = f"not installed (optional): {_some(missing)}; pip install '{_OURS}[{extra}]'"
            yield Finding(f"[{extra}]", "ok", told)


def _parsed(requirements: Sequence[str], extra: str) -> Iterator[Requirement]:
    """Those that hold on this machine, with an extra or without."""
    from packaging.requirements import Requirement

    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def _named(requirements: Sequence[str]) -> set[str]:
    return {_normal(requirement.name) for requirement in _parsed(requirements, extra="")}


def _field(distribution: metadata.Distribution, name: str) -> list[str]:
    return distribution.metadata.get_all(name) or []


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
