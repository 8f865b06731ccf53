"""What is known here of a container image."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping

import apache_beam as beam

from vlm_ops.diagnosis import Finding
from vlm_ops.diagnosis.places import ANSWER_SEC


def describe_image(name: str, image: str) -> Finding:
    """What is known here of an image, by its labels."""
    if re.match(r"(docker\.io/)?apache/beam_python", image):
        told = f"{image} is Beam's own image, which has no Beamsight"
        return Finding(name, "problem", told, "build one from the Dockerfile (docs/container.md)")
    for program in ("docker", "podman"):  # the first one may be there without its daemon
        if path := shutil.which(program):
            command = [path, "image", "inspect", "--format", "{{json .Config.Labels}}", image]
            shown = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SEC)
            if shown.returncode == 0:
                return judge_image(name, image, json.loads(shown.stdout) or {})
    return Finding(name, "unknown", f"{image} is not on this machine; with --load a small job asks its workers")


def judge_image(name: str, image: str, labels: Mapping[str, str]) -> Finding:
    """Args:
    labels: Of the image; those that the project's Dockerfile gives say what is in it.
    """
    here = {"python": ".".join(platform.python_version_tuple()[:2]), "beam": beam.__version__}
    there = {"python": labels.get("org.python.version"), "beam": labels.get("org.apache.beam.version")}
    if None in there.values():
        return Finding(name, "unknown", f"{image} does not say what is in it; with --load a small job asks its workers")
    told = f"{image}: Python {there['python']}, Apache Beam {there['beam']}"
    if there != here:
        remedy = "build the image of the same versions as here (docs/container.md)"
        return Finding(name, "problem", f"{told}; here {here['python']} and {here['beam']}", remedy)
    return Finding(name, "ok", told)
