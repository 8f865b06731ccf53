"""Taxonomies: trees of categories, and the two published formats that they come in.

What is wrong in a file is told all at once, each error with its line. Opening files, and YAML, are in
`vlm_ops/taxonomies.py`; the formats are described in docs/taxonomies.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

_IAB_TITLE = re.compile(r"(\w+(?: \w+)? Taxonomy) v(\d+(?:\.\d+)*)")
_GOOGLE_VERSION = re.compile(r"#\s*Google_Product_Taxonomy_Version:\s*(\S+)")
_GOOGLE_LINE = re.compile(r"(\d+)\s+-\s+(.+)")
_MAX_ERRORS = 50  # of a file that is something else altogether, the rest says nothing new


@dataclass(frozen=True)
class Node:
    """A category.

    Attributes:
        parent: Its parent's id; None of a root.
        path: Names from the root down to its own.
        prompts: Texts that describe a picture of it, where its name alone does not.
        sensitive: Never assigned by what a picture looks like, nor by its texts: a wrong guess would do harm.
        visible: Whether pictures show it; where they do not, only a text that came with an image speaks for it.
    """

    id: str
    name: str
    parent: str | None
    path: tuple[str, ...]
    prompts: tuple[str, ...] = ()
    sensitive: bool = False
    visible: bool = True


@dataclass(frozen=True)
class Taxonomy:
    """A tree of categories, or several.

    Attributes:
        nodes: In the order of the file.
        attribution: What its licence asks to be said of it.
    """

    name: str
    version: str
    nodes: tuple[Node, ...]
    attribution: str = ""

    @cached_property
    def hash(self) -> str:
        """12 hex digits of ids, names and parents. Their order, and prompts, do not change what a category is."""
        content = sorted((node.id, node.name, node.parent or "") for node in self.nodes)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    @cached_property
    def by_id(self) -> Mapping[str, Node]:
        return {node.id: node for node in self.nodes}

    @cached_property
    def by_path(self) -> Mapping[tuple[str, ...], Node]:
        return {node.path: node for node in self.nodes}

    def find(self, text: str) -> Node:
        """The node of an id, or of a path such as "Food & Drink > Cooking".

        Raises:
            ValueError: There is none.
        """
        node = self.by_id.get(text.strip()) or self.by_path.get(tuple(name.strip() for name in text.split(">")))
        if node is None:
            deepest = max(self.nodes, key=lambda each: len(each.path))
            raise ValueError(
                f"{text!r} is no category of {self.name} {self.version}; give an id or a path, such as {deepest.id!r} or "
                f"{' > '.join(deepest.path)!r}"
            )
        return node


@dataclass(frozen=True)
class Entry:
    """A node as a file has it; `line` counts from 1."""

    line: int
    id: str
    name: str
    parent: str | None
    prompts: tuple[str, ...] = ()
    sensitive: bool = False
    visible: bool = True


@dataclass(frozen=True)
class FileError:
    """What is wrong in a line, with the value and the remedy."""

    line: int
    message: str


def invalid(where: str, errors: Iterable[FileError], what: str = "taxonomy") -> ValueError:
    """The exception that tells all errors of a file, a line for each, in the order of the file."""
    listed = sorted(errors, key=lambda error: error.line)
    more = [f"  and {len(listed) - _MAX_ERRORS} more"] if len(listed) > _MAX_ERRORS else []
    lines = [f"  line {error.line}: {error.message}" for error in listed[:_MAX_ERRORS]]
    count = "1 error" if len(listed) == 1 else f"{len(listed)} errors"
    return ValueError("\n".join([f"{where} is no valid {what}, {count}:", *lines, *more]))


def taxonomy_of(
    name: str,
    version: str,
    entries: Sequence[Entry],
    where: str,
    attribution: str = "",
    errors: Iterable[FileError] = (),
) -> Taxonomy:
    """The tree that entries make.

    Args:
        where: The file, for messages.
        errors: What was wrong in it already.

    Raises:
        ValueError: Something is wrong in any line: an id or a name stands there twice, a parent does not, or the way
            up from a node never ends.
    """
    first_of_id: dict[str, Entry] = {}
    found = list(errors)
    for entry in entries:
        first = first_of_id.setdefault(entry.id, entry)
        if first is not entry:
            found.append(
                FileError(
                    entry.line, f"id {entry.id!r} is that of line {first.line} too; give each node an id of its own"
                )
            )
    found += _repeated_names(entries)
    for entry in entries:
        if entry.parent is not None and entry.parent not in first_of_id:
            message = f"parent {entry.parent!r} of {entry.name!r} is no node of this file; add it, or correct the id"
            found.append(FileError(entry.line, message))
    found += _cycles(first_of_id)
    if not entries and not found:
        found.append(FileError(1, "there is no node; add one"))
    if found:
        raise invalid(where, found)
    nodes = tuple(
        Node(
            entry.id,
            entry.name,
            entry.parent,
            _path(entry, first_of_id),
            entry.prompts,
            entry.sensitive,
            entry.visible,
        )
        for entry in entries
    )
    return Taxonomy(name, version, nodes, attribution)


def parse_iab(text: str, where: str, default_name: str) -> Taxonomy:
    """A taxonomy of the IAB Tech Lab as it publishes them (https://github.com/InteractiveAdvertisingBureau/Taxonomies):
    tab-separated, a title line and a header line, then id, parent's id, name; what follows is not read.

    Where the tier columns tell another parent than the parent column does (two rows of Content Taxonomy 3.1), the
    parent column counts.

    Raises:
        ValueError: It is none, with a line for each error.
    """
    lines = _lines(text)
    header = next((n for n, line in enumerate(lines[:3]) if line.split("\t")[0].strip() == "Unique ID"), None)
    if header is None or [cell.strip() for cell in lines[header].split("\t")[1:3]] not in (
        ["Parent", "Name"],
        ["Parent ID", "Name"],
    ):
        message = (
            "no header 'Unique ID, Parent, Name' in the first three lines; take the file as IAB Tech Lab publishes it"
        )
        raise invalid(where, [FileError(1, message)])
    entries, errors = [], []
    for number, line in enumerate(lines[header + 1 :], header + 2):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) < 3 or not cells[0] or not cells[2]:
            errors.append(FileError(number, f"must be id, parent and name between tabs, got {line[:80]!r}"))
        else:
            entries.append(Entry(number, cells[0], cells[2], cells[1] or None))
    title = _IAB_TITLE.search(" ".join(lines[:header]))
    name, version = (f"IAB {title[1]}", title[2]) if title else (default_name, "")
    return taxonomy_of(name, version, entries, where, "IAB Tech Lab, CC BY 3.0", errors)


def parse_google(text: str, where: str) -> Taxonomy:
    """Google's product taxonomy with ids, as `taxonomy-with-ids.<language>.txt` of
    https://support.google.com/merchants/answer/6324436: a comment with the version, then lines `id - A > B > C`.

    Raises:
        ValueError: It is none, with a line for each error.
    """
    version, ids, errors = "", dict[tuple[str, ...], str](), list[FileError]()
    parsed: list[tuple[int, str, tuple[str, ...]]] = []
    for number, line in enumerate(_lines(text), 1):
        if found := _GOOGLE_VERSION.match(line.strip()):
            version = found[1]
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _GOOGLE_LINE.fullmatch(line.strip())
        path = tuple(name.strip() for name in match[2].split(">")) if match else ()
        if not match or not all(path):
            errors.append(FileError(number, f"must be `id - A > B > C`, got {line[:80]!r}; take the file with ids"))
            continue
        ids.setdefault(path, match[1])
        parsed.append((number, match[1], path))
    entries = []
    for number, id_, path in parsed:
        parent = ids.get(path[:-1]) if path[1:] else None
        if path[1:] and parent is None:
            message = f"{' > '.join(path)!r} stands there without its parent; add {' > '.join(path[:-1])!r}"
            errors.append(FileError(number, message))
        else:
            entries.append(Entry(number, id_, path[-1], parent))
    return taxonomy_of("Google Product Taxonomy", version, entries, where, "Google", errors)


def _lines(text: str) -> list[str]:
    """As editors count them: some characters that end a line for Python do not for them."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def _repeated_names(entries: Sequence[Entry]) -> Iterable[FileError]:
    first_of_name: dict[tuple[str | None, str], Entry] = {}
    for entry in entries:
        first = first_of_name.setdefault((entry.parent, entry.name.casefold()), entry)
        if first is entry or first.id == entry.id:
            continue
        if entry.parent is None:
            message = (
                f"root {entry.name!r} is there already, in line {first.line}; rename one, or put it under a parent"
            )
        else:
            message = f"{entry.name!r} is under {entry.parent!r} already, in line {first.line}; rename one of them"
        yield FileError(entry.line, message)


def _cycles(entries: Mapping[str, Entry]) -> Iterable[FileError]:
    """One error a cycle, at the first of its nodes."""
    ends: set[str] = set()  # ids whose way up is known
    for start in entries:
        way: dict[str, None] = {}
        id_: str | None = start
        while id_ is not None and id_ in entries and id_ not in ends and id_ not in way:
            way[id_] = None
            id_ = entries[id_].parent
        if id_ is not None and id_ in way:
            ids = list(way)
            circle = ids[ids.index(id_) :]
            first = min((entries[each] for each in circle), key=lambda entry: entry.line)
            shown = " > ".join([*circle[:5], *(["..."] if circle[5:] else []), circle[0]])
            yield FileError(first.line, f"{first.name!r} is its own ancestor ({shown}); correct a parent")
        ends.update(way)


def _path(entry: Entry, entries: Mapping[str, Entry]) -> tuple[str, ...]:
    names = [entry.name]
    while entry.parent is not None:
        entry = entries[entry.parent]
        names.append(entry.name)
    return tuple(reversed(names))
