"""Sentences made of names and of metadata."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
from jinja2.sandbox import SandboxedEnvironment


def class_sentence(name: str) -> str:
    """`otter` -> `a photo of an otter`."""
    return f"a photo of {with_article(name)}"


def with_article(name: str) -> str:
    """`otter` -> `an otter`."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


class CaptionTemplate:
    """A Jinja template whose lines are captions of an image, made of its metadata."""

    def __init__(self, source: str, name: str = "template") -> None:
        """Raises:
        ValueError: It is no valid template.
        """
        self.name = name
        environment = SandboxedEnvironment(undefined=jinja2.ChainableUndefined)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name}, line {error.lineno}: {error.message}") from error

    @classmethod
    def read(cls, path: str) -> CaptionTemplate:
        """Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no valid template.
        """
        try:
            return cls(Path(path).expanduser().read_text(encoding="utf-8"), path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no caption template {path!r}; name a file that exists") from error

    def captions(self, metadata: str | None) -> list[str]:
        """The different lines that are not empty, of metadata as a JSON object.

        Raises:
            ValueError: The template fails on this metadata.
        """
        values = json.loads(metadata or "{}")
        try:
            rendered = self._template.render(values)
        except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"{self.name} fails on metadata {metadata}: {error}") from error
        return list(dict.fromkeys(line for line in (" ".join(each.split()) for each in rendered.splitlines()) if line))
